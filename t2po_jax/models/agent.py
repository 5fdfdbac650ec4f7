"""A policy network with its parameters and its tokenizer."""

import dataclasses

from t2po_jax import types
from t2po_jax.models import decoder, tokenizer


@dataclasses.dataclass(frozen=True)
class Agent:
  """What acts: text in, text out.

  Attributes:
    policy: the network as pure functions.
    params: parameters in the training layout, numpy or device arrays.
    tokenizer: its tokenizer.
  """

  policy: decoder.Policy
  params: types.Params
  tokenizer: tokenizer.Tokenizer
