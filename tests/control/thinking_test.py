"""The thinking intervention against a plain simulator of one row."""

import dataclasses
import functools

from absl.testing import absltest, parameterized
import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from t2po_jax.control import automaton as automata
from t2po_jax.control import thinking

QUEUE = (101, 102, 103)
CLOSES = 102  # The queue's middle token completes the closing tag.
STILL = thinking.ThinkingConfig(
  window=2, min_tokens=4, max_tokens=50, require_past_peak=False
)

_intervene = jax.jit(thinking.intervene, static_argnums=4)
_observe = jax.jit(thinking.observe)


@dataclasses.dataclass
class Row:
  """One response, told step by step from the rule's wording."""

  forced: list[int | None]
  means: list[float]
  fired_at: int = -1
  thinking_tokens: int = 0


def simulate(signal, closes, begun, epsilon, config) -> Row:
  """Runs the rule over the M of one response.

  Args:
    signal: M_t as the model would show it at each step.
    closes: whether the sampled token at each step completes the tag.
    begun: bytes of an unfinished tag after each sampled token.
    epsilon: threshold.
    config: the rule.
  """
  row = Row([], [])
  open_, queue, pending = True, [], 0
  for t in range(len(signal)):
    mean = np.inf
    if open_ and row.fired_at < 0:
      deltas = [abs(signal[i] - signal[i - 1]) for i in range(1, t + 1)]
      window = deltas[-(config.window + 1) :]
      full = len(window) == config.window + 1
      if full and t >= config.min_tokens:
        mean = float(np.mean(window))
      if config.rule == "released":
        last = deltas[-config.patience :]
        due = len(last) == config.patience and max(last) <= config.tolerance
      else:
        due = mean < epsilon
        if config.require_past_peak:
          latest = max(
            i for i in range(t + 1) if signal[i] == max(signal[: t + 1])
          )
          due = due and latest not in range(t - config.window, t + 1)
      due = due or t >= config.max_tokens
      if due and pending < 2 and config.enabled:
        row.fired_at, queue = t, list(QUEUE)
    row.means.append(mean)
    token = queue.pop(0) if queue else None
    row.forced.append(token)
    row.thinking_tokens += open_
    if token is None:
      pending, closed = begun[t], closes[t]
    else:
      pending, closed = 0, token == CLOSES
    open_ = open_ and not closed
  return row


@functools.partial(jax.jit, static_argnames="config")
def _run(signals, closes, begun, active, epsilon, *, config):
  """A decode loop without a model."""

  def step(state, inputs):
    signal, closed, pending, running = inputs
    state, token, forced = thinking.intervene(
      state, signal, epsilon, jnp.array(QUEUE), config, active=running
    )
    state = thinking.observe(
      state,
      jnp.where(forced, token == CLOSES, closed),
      jnp.where(forced, 0, pending),
      active=running,
    )
    return state, (token, forced, state.window_mean)

  state = thinking.init(signals.shape[1], config)
  return jax.lax.scan(step, state, (signals, closes, begun, active))


def drive(signals, closes, begun, epsilon, config, *, active=None):
  """Runs the state machine; returns its state and the [T, B] records."""
  signals = np.asarray(signals, "f4")
  active = np.ones(signals.shape, bool) if active is None else active
  state, records = _run(
    signals, closes, begun, active, np.float32(epsilon), config=config
  )
  return state, *map(np.asarray, records)


def _quiet(steps, batch=1):
  """No tag in sight."""
  return np.zeros((steps, batch), bool), np.zeros((steps, batch), int)


class RuleTest(chex.TestCase):
  def _fired(self, signal, config, epsilon=0.05):
    signal = np.asarray(signal, "f4")[:, None]
    state, *_ = drive(signal, *_quiet(len(signal)), epsilon, config)
    return int(state.fired_at[0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_fires_at_the_first_quiet_window_after_the_prefix(self):
    # Deltas from t = 1: 0.4, 0.2, 0.1, 0.02, 0.02, 0.02; their means over
    # three: t = 3 0.233, 4 0.107, 5 0.047, 6 0.02.
    signal = [1.0, 0.6, 0.4, 0.3, 0.28, 0.26, 0.24]
    intervene = self.variant(
      functools.partial(thinking.intervene, config=STILL)
    )
    state = thinking.init(1, STILL)
    means = []
    with jax.debug_nans(True):
      for m in signal:
        state, token, forced = intervene(
          state, jnp.array([m]), jnp.float32(0.05), jnp.array(QUEUE)
        )
        means.append(float(state.window_mean[0]))
        state = thinking.observe(state, jnp.array([False]))
    np.testing.assert_allclose(
      means, [np.inf] * 4 + [0.32 / 3, 0.14 / 3, np.inf], rtol=1e-4
    )
    self.assertEqual(int(state.fired_at[0]), 5)
    # t = 6 forces the second token of the queue.
    self.assertTrue(bool(forced[0]))
    self.assertEqual(int(token[0]), QUEUE[1])

  def test_minimum_prefix(self):
    # Zeros, so that a delta to nothing before the first token would be small.
    still = [0.0] * 30
    for least in (0, 4, 11):
      config = dataclasses.replace(STILL, min_tokens=least)
      # A window of three deltas is full at t = 3.
      self.assertEqual(self._fired(still, config), max(least, 3))

  def test_hard_budget(self):
    config = dataclasses.replace(STILL, max_tokens=7)
    self.assertEqual(self._fired([0.5] * 12, config, epsilon=0.0), 7)
    self.assertEqual(self._fired([0.5] * 7, config, epsilon=0.0), -1)

  def test_waits_until_the_peak_lies_before_the_window(self):
    config = dataclasses.replace(STILL, require_past_peak=True)
    # The peak is at t = 6; a window covers the tokens t - 2 to t.
    signal = [0.5, 0.501, 0.502, 0.503, 0.504, 0.505, 0.51] + [0.5] * 9
    self.assertEqual(self._fired(signal, config), 9)
    self.assertEqual(self._fired(signal, STILL), 4)

  def test_a_plateau_at_the_maximum_is_the_peak(self):
    config = dataclasses.replace(STILL, require_past_peak=True)
    self.assertEqual(self._fired([0.2, 0.9] + [0.9] * 20, config), -1)
    self.assertEqual(self._fired([0.2, 0.9] + [0.89] * 20, config), 4)

  def test_released_counts_consecutive_still_steps(self):
    config = thinking.ThinkingConfig(rule="released", max_tokens=99)
    # 15 still steps, a jump at t = 16, then deltas of zero from t = 17 on.
    signal = [0.1] * 16 + [0.3] * 40
    self.assertEqual(self._fired(signal, config, epsilon=0.0), 36)
    # Small steps add up without being noticed; larger ones reset.
    self.assertEqual(self._fired(0.00005 * np.arange(30), config), 20)
    self.assertEqual(self._fired(0.0002 * np.arange(60), config), -1)

  def test_off_keeps_the_statistics(self):
    config = dataclasses.replace(STILL, enabled=False)
    signal = np.full((60, 1), 0.5, "f4")
    state, _, forced, means = drive(signal, *_quiet(60), 0.05, config)
    self.assertFalse(forced.any())
    self.assertEqual(int(state.fired_at[0]), -1)
    np.testing.assert_array_equal(np.isfinite(means[:, 0]), np.arange(60) >= 4)


class ForcingTest(chex.TestCase):
  def test_queue_is_forced_whole_and_once(self):
    signal = np.full((40, 1), 0.5, "f4")
    state, tokens, forced, means = drive(signal, *_quiet(40), 0.05, STILL)
    np.testing.assert_array_equal(np.flatnonzero(forced[:, 0]), [4, 5, 6])
    np.testing.assert_array_equal(tokens[4:7, 0], QUEUE)
    # Thinking ended with the queue's second token, at t = 5.
    self.assertEqual(int(state.thinking_tokens[0]), 6)
    self.assertFalse(bool(state.thinking[0]))
    self.assertFalse(np.isfinite(means[5:]).any())

  def test_never_after_the_model_closed_it(self):
    signal = np.full((60, 2), 0.5, "f4")
    closes, begun = _quiet(60, 2)
    closes[3, 0] = True
    state, _, forced, _ = drive(signal, closes, begun, 0.05, STILL)
    np.testing.assert_array_equal(state.fired_at, [-1, 4])
    np.testing.assert_array_equal(state.thinking_tokens, [4, 6])
    self.assertFalse(forced[:, 0].any())

  def test_an_unfinished_tag_holds_it_back(self):
    signal = np.full((12, 4), 0.5, "f4")
    closes, begun = _quiet(12, 4)
    # Row 0: "</", "think", then the tag is completed. Row 1: the same, but it
    # comes to nothing. Row 2: a lone "<". Row 3: as row 0, over the budget.
    begun[3:5, (0, 1, 3)] = [[2], [7]]
    closes[5, (0, 3)] = True
    begun[3, 2] = 1
    for config in (STILL, dataclasses.replace(STILL, max_tokens=4)):
      state, *_ = drive(signal, closes, begun, 0.05, config)
      np.testing.assert_array_equal(state.fired_at, [-1, 6, 4, -1])
      np.testing.assert_array_equal(state.thinking_tokens, [6, 8, 6, 6])

  def test_with_the_automaton_over_token_borders(self):
    texts = [b".", b"</", b"think", b">", b">\n<", b"action>"]
    machine = automata.build(texts, ["</think>"])
    queue = jnp.array([1, 2, 4, 5])
    config = dataclasses.replace(STILL, max_tokens=4, min_tokens=0)
    # At t = 4, where the budget ends, row 0 stands after "</think", row 1
    # after "</think" that goes on otherwise, row 2 in plain text.
    sampled = np.array(
      [[0, 0, 1, 2, 3, 0, 0, 0, 0, 0, 0], [0, 0, 1, 2, 0] + [0] * 6, [0] * 11]
    ).T
    state = thinking.init(3, config)
    reading = automata.start(3)
    written = [[], [], []]
    for t in range(11):
      state, forced, is_forced = _intervene(
        state, jnp.full(3, 0.1 * t), jnp.float32(0), queue, config
      )
      token = jnp.where(is_forced, forced, jnp.array(sampled[t]))
      reading, hits = automata.step(machine, reading, token)
      state = _observe(
        state,
        automata.completed(hits, 0),
        automata.partial_match(machine, reading, 0),
      )
      for row in range(3):
        written[row].append(texts[int(token[row])].decode())
    self.assertEqual("".join(written[0]), "..</think>" + "." * 6)
    self.assertEqual("".join(written[1]), "..</think." + "</think>\n<action>..")
    self.assertEqual("".join(written[2]), "...." + "</think>\n<action>...")
    np.testing.assert_array_equal(state.fired_at, [-1, 5, 4])
    np.testing.assert_array_equal(state.thinking_tokens, [5, 8, 7])


class RowsTest(chex.TestCase):
  @hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
  @hypothesis.given(
    seed=st.integers(0, 10_000),
    epsilon=st.sampled_from([0.0, 0.03, 0.1, 1.0]),
    config=st.sampled_from(
      [
        thinking.ThinkingConfig(window=0, min_tokens=0, max_tokens=30),
        thinking.ThinkingConfig(window=3, min_tokens=5, max_tokens=20),
        thinking.ThinkingConfig(window=3, min_tokens=8, max_tokens=8),
        thinking.ThinkingConfig(window=2, min_tokens=0, enabled=False),
        dataclasses.replace(STILL, max_tokens=25),
        thinking.ThinkingConfig(
          rule="released", tolerance=0.02, patience=3, max_tokens=30
        ),
      ]
    ),
  )
  def test_equals_the_simulator(self, seed, epsilon, config):
    rng = np.random.default_rng(seed)
    steps, batch = 36, 6
    # Random walks with quiet stretches, on a grid so that maxima repeat.
    jumps = rng.integers(-3, 4, (steps, batch)) * (
      rng.uniform(size=(steps, batch)) < rng.uniform(size=batch)
    )
    signal = (np.cumsum(jumps, axis=0) / 64).astype("f4")
    closes = rng.uniform(size=(steps, batch)) < 0.02
    begun = rng.integers(0, 4, (steps, batch)) * (
      rng.uniform(size=(steps, batch)) < 0.2
    )
    state, tokens, forced, means = drive(signal, closes, begun, epsilon, config)
    for b in range(batch):
      row = simulate(
        signal[:, b].tolist(), closes[:, b], begun[:, b], epsilon, config
      )
      found = [
        int(token) if keep else None
        for token, keep in zip(tokens[:, b], forced[:, b], strict=True)
      ]
      self.assertEqual(found, row.forced)
      self.assertEqual(int(state.fired_at[b]), row.fired_at)
      self.assertEqual(int(state.thinking_tokens[b]), row.thinking_tokens)
      np.testing.assert_allclose(means[:, b], row.means, atol=1e-6)

  def test_inactive_rows_stand_still(self):
    rng = np.random.default_rng(0)
    signal = rng.uniform(size=(20, 3)).astype("f4")
    config = dataclasses.replace(STILL, max_tokens=6)
    # Row 1 pauses for four steps, in which its entries are rubbish.
    active = np.ones((24, 3), bool)
    active[5:9, 1] = False
    paused = np.concatenate([signal, rng.uniform(size=(4, 3)).astype("f4")])
    paused[:, 1] = np.insert(signal[:, 1], 5, np.full(4, 9.0))
    closes, begun = _quiet(24, 3)
    closes[5:9, 1], begun[5:9, 1] = True, 7
    state, tokens, forced, _ = drive(
      paused, closes, begun, 0.0, config, active=active
    )
    expected, alone, alone_forced, _ = drive(
      signal, *_quiet(20, 3), 0.0, config
    )
    kept = active[:, 1]
    np.testing.assert_array_equal(forced[kept, 1], alone_forced[:, 1])
    self.assertFalse(forced[~kept, 1].any())
    np.testing.assert_array_equal(
      tokens[kept, 1][forced[kept, 1]], alone[alone_forced[:, 1], 1]
    )
    np.testing.assert_array_equal(state.fired_at, expected.fired_at)
    self.assertEqual(int(state.step[1]), 20)

  def test_no_retrace_when_the_threshold_moves_and_donatable(self):
    chex.clear_trace_counter()

    @functools.partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(state, uncertainty, epsilon):
      state, _, forced = thinking.intervene(
        state, uncertainty, epsilon, jnp.array(QUEUE), STILL
      )
      return thinking.observe(state, forced)

    state = thinking.init(2, STILL)
    for epsilon in (0.0, 0.1, 0.2):
      state = step(state, jnp.zeros(2), jnp.float32(epsilon))
    self.assertEqual(state.step.tolist(), [3, 3])


class BadInputTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(rule="relaesed"), "rule: found 'relaesed'"),
    (dict(window=-1), "window: found -1"),
    (dict(min_tokens=-1), "min_tokens: found -1"),
    (dict(patience=0), "patience: found 0"),
    (dict(min_tokens=9, max_tokens=8), "max_tokens: found 8"),
    (dict(tolerance=-1.0), "tolerance: found -1.0"),
  )
  def test_config(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      thinking.ThinkingConfig(**fields)

  def test_empty_queue(self):
    with self.assertRaisesRegex(ValueError, "queue: found shape"):
      thinking.intervene(
        thinking.init(1, STILL),
        jnp.zeros(1),
        jnp.float32(0),
        jnp.zeros(0, jnp.int32),
        STILL,
      )


if __name__ == "__main__":
  absltest.main()
