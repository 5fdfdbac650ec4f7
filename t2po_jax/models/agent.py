"""A policy network with its parameters and its tokenizer."""

import dataclasses

from t2po_jax import types
from t2po_jax.models import decoder, tokenizer


@dataclasses.dataclass(frozen=True)
class Agent:
  """A policy with everything needed to act: text in, text out.

  Attributes:
    policy: the network as pure functions.
    params: parameters in the training layout, NumPy or device arrays.
    tokenizer: its tokenizer.
  """

  policy: decoder.Policy
  params: types.Params
  tokenizer: tokenizer.Tokenizer
