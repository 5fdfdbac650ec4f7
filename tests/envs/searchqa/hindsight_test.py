"""The expert for real questions, on hand-made passages."""

from absl.testing import absltest

from t2po_jax.envs import prompts
from t2po_jax.envs.searchqa import hindsight, retrieval
from t2po_jax.envs.searchqa.wordings import full

GRAMMAR = prompts.Grammar(actions=("search", "answer"), closing="</think>")


def passage(name, text):
  return retrieval.Passage(id=name, title=name, text=text)


class HindsightTest(absltest.TestCase):
  def test_searches_quotes_and_answers(self):
    shown = []
    expert = hindsight.HindsightExpert(
      "Where is the tower?", ["the Paris", "Lyon"], shown, full
    )
    first = prompts.parse(expert.respond(), GRAMMAR)
    self.assertEqual((first.kind, first.format_valid), ("search", True))
    self.assertEqual(first.content, "Where is the tower?")
    shown.append(passage("Tower", "It is tall. It stands in Paris. It rusts."))
    second = prompts.parse(expert.respond(), GRAMMAR)
    self.assertEqual((second.kind, second.content), ("answer", "the Paris"))
    self.assertIn("It stands in Paris.", second.thought)
    self.assertNotIn("rusts", second.thought)

  def test_searches_about_the_first_passage_and_then_gives_up(self):
    shown = [passage("Rome", "A city."), passage("Oslo", "Another.")]
    expert = hindsight.HindsightExpert("Who?", ["Nobody"], shown, full)
    expert.respond()
    again = prompts.parse(expert.respond(), GRAMMAR)
    self.assertEqual((again.kind, again.content), ("search", "Rome Who?"))
    last = prompts.parse(expert.respond(), GRAMMAR)
    self.assertEqual((last.kind, last.content), ("answer", "unknown"))

  def test_a_target_counts_only_as_whole_words(self):
    self.assertEqual(hindsight.find_sentence("Parisian cafes.", "Paris"), "")
    self.assertEqual(hindsight.find_sentence("A. Paris!", "paris"), "Paris!")
    self.assertEqual(hindsight.find_sentence("Anything.", "the"), "")

  def test_a_yes_or_no_is_never_quoted(self):
    self.assertEqual(hindsight.find_sentence("There is no sea.", "no"), "")


if __name__ == "__main__":
  absltest.main()
