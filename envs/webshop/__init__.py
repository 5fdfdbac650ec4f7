"""WebShop: buy the product that an instruction describes."""

from envs.webshop import benchmark

WebShop = benchmark.WebShop
