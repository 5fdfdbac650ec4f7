"""WebShop: buy the product that an instruction describes."""

from t2po_jax.envs.webshop import benchmark

WebShop = benchmark.WebShop
