"""Recognises strings in a stream of tokens, on the device.

A stop string or a closing tag may be spread over several tokens or end in
the middle of one, whatever the tokenisation, so comparing token ids misses
it. This file composes an Aho-Corasick automaton over UTF-8 bytes (Aho and
Corasick 1975) with the bytes of every token of the vocabulary. One step of the
decode loop is then two table look-ups per row: exact, without decoding and
without a round trip to the host.
"""

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np

from t2po_jax import types

_MAX_PATTERNS = 32


class Automaton(flax.struct.PyTreeNode):
  """Tables over whole tokens; in state 0 no part of any pattern has been read.

  Attributes:
    next: [states, V] int16 or int32, the state after reading a token.
    hit: [states, V] uint8, uint16 or uint32; bit i is set if pattern i was
      completed at some byte inside the token.
    depth: [states, patterns] int32, how many bytes of the pattern the stream
      ends with: the longest proper prefix, so 0 right after `</think>`.
    patterns: the strings, in the order of the bits.
  """

  next: types.Array
  hit: types.Array
  depth: types.Array
  patterns: tuple[str, ...] = flax.struct.field(pytree_node=False)


def build(
  token_bytes: Sequence[bytes],
  patterns: Sequence[str],
  *,
  vocab_size: int | None = None,
) -> Automaton:
  """Builds the automaton that recognises some strings in one vocabulary.

  Args:
    token_bytes: the bytes each token id adds to the text; empty for tokens
      that add none, which leave the state as it is.
    patterns: 1 to 32 different, non-empty strings.
    vocab_size: V of the model where it exceeds the tokenizer's; the extra ids
      add no bytes.

  Returns:
    The automaton, with NumPy tables; transfer it to the device once.

  Raises:
    ValueError: if the list of patterns is invalid or the vocabulary too small.
  """
  patterns = tuple(patterns)
  if not 1 <= len(patterns) <= _MAX_PATTERNS:
    raise ValueError(
      f"patterns: found {len(patterns)} strings, expected 1 to {_MAX_PATTERNS}"
    )
  if not all(patterns) or len(set(patterns)) < len(patterns):
    raise ValueError(
      f"patterns: found {list(patterns)}, expected different, non-empty strings"
    )
  vocab_size = len(token_bytes) if vocab_size is None else vocab_size
  if vocab_size < max(len(token_bytes), 1):
    raise ValueError(
      f"vocab_size: found {vocab_size}, expected at least the tokenizer's "
      f"{len(token_bytes)} and not 0"
    )
  encoded = [pattern.encode() for pattern in patterns]
  byte_next, byte_hit, depth = _byte_automaton(encoded)
  after, hit = _compose(byte_next, byte_hit, token_bytes, vocab_size)
  return Automaton(next=after, hit=hit, depth=depth, patterns=patterns)


def start(batch: int) -> types.Array:
  """The initial states of `batch` rows, [B] int32."""
  return jnp.zeros((batch,), jnp.int32)


def step(
  automaton: Automaton, state: types.Array, token: types.Array
) -> tuple[types.Array, types.Array]:
  """Reads one token per row.

  Args:
    automaton: the tables.
    state: [B] int32.
    token: [B] int32 token ids below V.

  Returns:
    The new state, [B] int32, and the completed patterns, [B] uint32 bits.
  """
  after = jnp.asarray(automaton.next)[state, token]
  hits = jnp.asarray(automaton.hit)[state, token]
  return after.astype(jnp.int32), hits.astype(jnp.uint32)


def completed(hits: types.Array, pattern: int) -> types.Array:
  """Whether a pattern was completed: bool, shaped like `hits`."""
  return (hits >> pattern) & 1 == 1


def partial_match(
  automaton: Automaton, state: types.Array, pattern: int
) -> types.Array:
  """How many bytes of an unfinished pattern the stream ends with.

  Args:
    automaton: the tables.
    state: [B] int32.
    pattern: index of the pattern.

  Returns:
    [B] int32, from 0 to the pattern's length in bytes less 1.
  """
  return jnp.asarray(automaton.depth)[state, pattern]


def _byte_automaton(
  patterns: Sequence[bytes],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Transitions [states, 256], hits [states], depth [states, patterns]."""
  # Every state is the prefix of a pattern: the longest one the stream ends in.
  prefixes = {p[:end] for p in patterns for end in range(len(p) + 1)}
  prefixes = sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
  index = {prefix: state for state, prefix in enumerate(prefixes)}
  after = np.zeros((len(prefixes), 256), np.int32)
  hit = np.zeros(len(prefixes), np.uint32)
  depth = np.zeros((len(prefixes), len(patterns)), np.int32)
  for state, prefix in enumerate(prefixes):
    if prefix:
      # The longest proper suffix that is a state is shorter: its row is done.
      fallback = next(
        index[prefix[i:]]
        for i in range(1, len(prefix) + 1)
        if prefix[i:] in index
      )
      after[state] = after[fallback]
    for byte in range(256):
      child = index.get(prefix + bytes([byte]))
      if child is not None:
        after[state, byte] = child
    for i, pattern in enumerate(patterns):
      if prefix.endswith(pattern):
        hit[state] |= np.uint32(1 << i)
      depth[state, i] = max(
        end for end in range(len(pattern)) if prefix.endswith(pattern[:end])
      )
  return after, hit, depth


def _compose(
  byte_next: np.ndarray,
  byte_hit: np.ndarray,
  token_bytes: Sequence[bytes],
  vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Runs all tokens from all states at once, one byte position at a time."""
  states = len(byte_next)
  index_type = np.int16 if states < 2**15 else np.int32
  bits = int(byte_hit.max()).bit_length()
  hit_type = (np.uint8, np.uint16, np.uint32)[(bits > 8) + (bits > 16)]
  flat_next = byte_next.astype(index_type).ravel()
  flat_hit = byte_hit.astype(hit_type)
  lengths = np.zeros(vocab_size, np.int64)
  lengths[: len(token_bytes)] = [len(text) for text in token_bytes]
  starts = np.cumsum(lengths) - lengths
  stream = np.frombuffer(b"".join(token_bytes), np.uint8)
  # Longest tokens first: those still running are then a leading slice.
  order = np.argsort(-lengths, kind="stable")
  running = np.searchsorted(-lengths[order], -np.arange(lengths.max()))
  columns = [
    stream[starts[order[:count]] + position].astype(np.int32)
    for position, count in enumerate(running)
  ]
  after = np.empty((states, vocab_size), index_type)
  hit = np.empty((states, vocab_size), hit_type)
  for state in range(states):
    current = np.full(vocab_size, state, index_type)
    hits = np.zeros(vocab_size, hit_type)
    for byte in columns:
      count = len(byte)
      row = current[:count].astype(np.int32) * 256
      current[:count] = flat_next[row + byte]
      hits[:count] |= flat_hit[current[:count]]
    after[state, order] = current
    hit[state, order] = hits
  return after, hit
