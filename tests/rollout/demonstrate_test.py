"""Demonstrations of a scripted expert, on the toy bandit."""

from absl.testing import absltest

from t2po_jax.envs import toy
from t2po_jax.rollout import collect, demonstrate


class Letters:
  """A tokenizer of Unicode code points."""

  def encode(self, text):
    return [ord(letter) for letter in text]

  def decode(self, ids):
    return "".join(map(chr, ids))

  def render_chat(self, messages, prefix=""):
    return self.encode(messages[-1]["content"] + prefix)


def play(tasks, only_successes, max_response=80):
  benchmark = toy.ToyBenchmark()
  return demonstrate.demonstrate(
    benchmark,
    Letters(),
    collect.Rules(
      memory=1, max_prompt=400, max_response=max_response, prefix="<think>"
    ),
    benchmark.splits["train"][:tasks],
    seed=0,
    only_successes=only_successes,
  )


class DemonstrateTest(absltest.TestCase):
  def test_every_turn_is_a_prompt_and_a_response_without_the_prefix(self):
    pairs, success = play(4, False)
    self.assertLen(pairs, 4 * toy.TURNS)
    self.assertEqual(success, 1.0)
    for prompt, response in pairs:
      self.assertEndsWith("".join(map(chr, prompt)), "<think>")
      self.assertNotIn("<think>", "".join(map(chr, response)))
      self.assertEndsWith("".join(map(chr, response)), "</action>")

  def test_failed_episodes_are_left_out_when_asked(self):
    # Cut after two letters no response holds an action: every episode fails.
    everything, success = play(4, False, max_response=2)
    self.assertEqual(success, 0.0)
    self.assertNotEmpty(everything)
    self.assertEqual(play(4, True, max_response=2), ([], 0.0))

  def test_successes_stay_when_failures_are_left_out(self):
    self.assertLen(play(4, True)[0], 4 * toy.TURNS)


if __name__ == "__main__":
  absltest.main()
