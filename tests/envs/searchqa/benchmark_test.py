"""Episodes, prompts and arguments of Search QA, by the contract."""

import collections
import gzip
import io
import itertools
import json
import pathlib
import re
import statistics
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from t2po_jax import envs
from t2po_jax.envs import prompts
from t2po_jax.envs.searchqa import benchmark as benchmark_lib
from t2po_jax.envs.searchqa import data


def _respond(kind, content):
  return f"<think> t</think><{kind}>{content}</{kind}>"


def _count_tokens(text):
  """Words and tags."""
  return len(re.findall(r"</?\w+>|[^\s<]+", text))


class HopsTest(parameterized.TestCase):
  def test_deep_questions_need_every_hop(self):
    benchmark = envs.make("searchqa", hops="5,3", train_tasks=100)
    found = collections.Counter(
      benchmark.category(task) for task in benchmark.splits["train"]
    )
    self.assertEqual(found, {"3-hop": 50, "5-hop": 50})
    for task in benchmark.splits["valid"]:
      question = benchmark.questions[task]
      self.assertIn(question.hops, (3, 5))
      self.assertLen(set(question.path), question.hops + 1)
      place = question.start
      for relation in question.relations:
        place = benchmark.world.facts[place][relation]
      self.assertEqual(place, question.answer)

  @parameterized.parameters("", "0", "1,1", "2,6", "two", "1;2")
  def test_refuses(self, hops):
    with self.assertRaisesRegex(ValueError, "env.hops: found"):
      envs.make("searchqa", hops=hops)


class EpisodeTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.benchmark = envs.make("searchqa", reward_success=2.0)
    cls.task = next(
      task
      for task in cls.benchmark.splits["train"]
      if cls.benchmark.questions[task].hops == 1
    )
    cls.question = cls.benchmark.questions[cls.task]

  def setUp(self):
    super().setUp()
    self.env = self.benchmark.env()
    self.first = self.env.reset(self.task)

  def test_first_observation_is_the_question(self):
    self.assertEqual(self.first.text, self.first.task)
    self.assertEqual(self.first.admissible, ())
    relation = self.question.relations[0]
    self.assertEqual(self.first.task, f"{self.question.start} {relation} ?")

  def test_a_partial_answer_is_paid_by_its_overlap(self):
    benchmark = envs.make("searchqa", reward_f1=0.6)
    env = benchmark.env()
    env.reset(self.task)
    answer = self.question.answer
    partly = env.step(_respond("answer", f"{answer} indeed"))
    self.assertAlmostEqual(partly.info["f1"], 2 / 3)
    self.assertAlmostEqual(partly.reward, 0.4)
    self.assertFalse(partly.success)
    env.reset(self.task)
    self.assertEqual(env.step(_respond("answer", answer)).reward, 1.0)
    env.reset(self.task)
    self.assertEqual(env.step(_respond("answer", "nothing")).reward, 0.0)

  def test_only_the_chosen_categories_are_played(self):
    benchmark = envs.make("searchqa", categories="3-hop, 1-hop")
    for split in ("train", "valid", "test"):
      kept = benchmark.splits[split]
      self.assertSameElements(
        {benchmark.category(task) for task in kept}, {"1-hop", "3-hop"}
      )
      of_all = [
        task
        for task in self.benchmark.splits[split]
        if self.benchmark.category(task) != "2-hop"
      ]
      self.assertEqual(list(kept), of_all)
    with self.assertRaisesRegex(ValueError, "env.categories.*'4-hop'.*1-hop"):
      envs.make("searchqa", categories="1-hop,4-hop")

  def test_search_shows_passages(self):
    result = self.env.step(_respond("search", f" {self.question.start} "))
    facts = self.benchmark.world.facts[self.question.start]
    first = " ".join(
      f"{self.question.start} {relation} {value} ."
      for relation, value in facts.items()
    )
    self.assertStartsWith(result.observation.text, first)
    self.assertEqual(result.action, f"<search> {self.question.start}</search>")
    self.assertEqual((result.reward, result.done), (0.0, False))
    self.assertTrue(result.format_valid and result.action_valid)
    self.assertEqual(result.info, {"answer_shown": 1.0})

  def test_nothing_found(self):
    result = self.env.step(_respond("search", "zzzz"))
    self.assertEqual(result.observation.text, "nothing .")
    self.assertTrue(result.action_valid)
    self.assertEqual(result.info, {"answer_shown": 0.0})

  @parameterized.parameters("{}", " The {}! ")
  def test_right_answer_ends_the_episode(self, form):
    answer = form.format(self.question.answer.upper())
    result = self.env.step(_respond("answer", answer))
    self.assertEqual((result.reward, result.done), (2.0, True))
    self.assertTrue(result.success and result.action_valid)
    with self.assertRaisesRegex(RuntimeError, "call reset"):
      self.env.step("")

  def test_wrong_answer_ends_the_episode(self):
    result = self.env.step(_respond("answer", self.question.start))
    self.assertEqual((result.reward, result.done), (0.0, True))
    self.assertFalse(result.success)
    self.assertTrue(result.action_valid)

  @parameterized.named_parameters(
    ("no action", "<think> t</think>"),
    ("nothing", ""),
    ("both kinds", "<think>t</think><search>a</search><answer>{}</answer>"),
    ("answer first", "<think>t</think><answer>{}</answer><search>a</search>"),
    ("two answers", "<think>t</think><answer>{}</answer><answer>{}</answer>"),
    ("two searches", "<think>t</think><search>a</search><search>b</search>"),
    ("left open", "<think>t</think><answer>{}"),
    ("search left open", "<think>t</think><search>a<answer>{}</answer>"),
    ("empty search", "<think>t</think><search> </search>"),
    ("empty answer", "<think>t</think><answer></answer>"),
  )
  def test_no_action_is_executed(self, response):
    search = mock.Mock(side_effect=AssertionError("searched"))
    with mock.patch.object(self.benchmark.retriever, "search", search):
      response = response.replace("{}", self.question.answer)
      result = self.env.step(response)
    self.assertEqual(result.action, "")
    self.assertEqual((result.reward, result.done), (0.0, False))
    self.assertFalse(result.action_valid)
    self.assertEqual(result.observation.text, "invalid .")

  @parameterized.parameters(
    "<answer>{}</answer>", "<think>t</think><answer>{}</answer> ok"
  )
  def test_badly_formed_but_clear_is_executed(self, response):
    result = self.env.step(response.format(self.question.answer))
    self.assertTrue(result.success and result.done)
    self.assertFalse(result.format_valid or result.action_valid)

  @parameterized.parameters(1, 2, 4)
  def test_turn_limit(self, max_turns):
    with mock.patch.object(self.benchmark, "max_turns", max_turns):
      done = [self.env.step("?").done for _ in range(max_turns)]
    self.assertEqual(done, [False] * (max_turns - 1) + [True])

  def test_answer_at_the_last_turn_counts(self):
    for _ in range(3):
      self.env.step(_respond("search", "x"))
    self.assertTrue(
      self.env.step(_respond("answer", self.question.answer)).success
    )

  def test_shown_or_thought_answers_do_not_count(self):
    for _ in range(4):
      result = self.env.step(
        f"<think> {self.question.answer}</think>"
        f"<search> {self.question.start} {self.question.answer}</search>"
      )
      self.assertEqual(result.reward, 0.0)
    self.assertTrue(result.done)
    self.assertFalse(result.success)

  def test_environments_do_not_share_state(self):
    other = self.benchmark.env()
    other.reset(self.benchmark.splits["test"][0])
    for _ in range(4):
      other.step("?")
    self.assertFalse(self.env.step("?").done)
    self.assertEqual(self.env.reset(self.task), self.first)

  def test_unknown_task(self):
    with self.assertRaisesRegex(KeyError, "unknown task 'x'"):
      self.env.reset("x")

  def test_expert_needs_an_episode(self):
    with self.assertRaisesRegex(RuntimeError, "call reset"):
      self.benchmark.env().expert(0)


class BenchmarkTest(parameterized.TestCase):
  def test_splits_and_categories(self):
    benchmark = envs.make("searchqa")
    everything = list(itertools.chain(*benchmark.splits.values()))
    self.assertEqual(
      {name: len(tasks) for name, tasks in benchmark.splits.items()},
      {"train": 1000, "valid": 100, "test": 200},
    )
    self.assertLen(set(everything), 1300)
    for task in everything:
      hops = benchmark.category(task)
      self.assertEqual(hops, f"{task.count('/')}-hop")

  def test_grammar_and_expert_agree_on_the_closing(self):
    for wording in ("compact", "full"):
      benchmark = envs.make("searchqa", wording=wording)
      env = benchmark.env()
      env.reset(benchmark.splits["train"][0])
      response = env.expert(0).respond()
      self.assertEqual(response.count(benchmark.grammar.closing), 1)
      self.assertTrue(response.endswith(benchmark.grammar.stops))

  @parameterized.parameters(
    ({"wording": "ful"}, "env.wording: found 'ful'.*did you mean 'full'"),
    ({"retriever": "bm52"}, "env.retriever: found 'bm52'.*did you mean 'bm2"),
    ({"max_turns": 0}, "env.max_turns: found 0"),
    ({"topk": 0}, "env.topk: found 0"),
    ({"valid_tasks": 0}, "env.valid_tasks: found 0"),
    ({"expert_hesitation": -1.0}, "env.expert_hesitation: found -1.0"),
    ({"expert_doubt": 2.0}, "env.expert_doubt: found 2.0"),
    ({"expert_slip": -0.5}, "env.expert_slip: found -0.5"),
    ({"data_dir": "/nowhere"}, "env.data_dir: '/nowhere' is no directory"),
    ({"tfds": "trivia_qa"}, "env.tfds: .*give env.data_dir"),
    ({"retriever": "http", "url": "x"}, "env.url: 'x'"),
    ({"people": 5}, "env.people: 5"),
  )
  def test_bad_arguments(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message) as caught:
      envs.make("searchqa", **arguments)
    self.assertNotIn("\n", str(caught.exception))

  def test_question_set_with_a_server(self):
    tasks = [data.Task(f"t{i}", f"q {i}?", ("x",), "nq") for i in range(9)]
    with mock.patch.object(
      data, "load_tfds", side_effect=[tasks[:3], tasks[3:]]
    ) as load:
      benchmark = envs.make("searchqa", tfds="nq", retriever="http")
    self.assertEqual(
      [call.args for call in load.call_args_list],
      [("nq", "train"), ("nq", "validation")],
    )
    self.assertLen(benchmark.splits["train"], 3)
    self.assertEqual(benchmark.passages, [])


class CompactPromptTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.benchmark = envs.make("searchqa")

  def _episode(self, task, seed):
    """(prompts, responses) of an expert's episode."""
    benchmark = self.benchmark
    env = benchmark.env()
    observation, memory = env.reset(task), ()
    player = env.expert(seed)
    shown, responses = [], []
    for turn in range(1, benchmark.max_turns + 1):
      view = prompts.View(
        observation.task, memory, observation.text, (), turn, 4
      )
      (message,) = benchmark.render(view)
      self.assertEqual(message["role"], "user")
      shown.append(message["content"])
      responses.append(player.respond())
      result = env.step(responses[-1])
      memory = (*memory, (observation.text, result.action))
      observation = result.observation
      if result.done:
        break
    return shown, responses

  def test_every_turn_continues_the_prompt_before(self):
    shown, _ = self._episode(self.benchmark.splits["train"][0], 0)
    for before, after in itertools.pairwise(shown):
      self.assertStartsWith(after, before)

  def test_hand_case(self):
    view = prompts.View(
      task="a b c ?",
      memory=(("a b c ?", "<search> a b</search>"), ("a b d .", "")),
      observation="invalid .",
      admissible=(),
      turn=3,
      max_turns=4,
    )
    (message,) = self.benchmark.render(view)
    self.assertEqual(
      message["content"], "Q a b c ?<search> a b</search> a b d . invalid ."
    )

  def test_short_enough_for_a_tiny_model(self):
    lengths, responses = [], []
    for seed, task in enumerate(self.benchmark.splits["train"][:150]):
      episode = self._episode(task, seed)
      lengths.extend(map(_count_tokens, episode[0]))
      responses.extend(map(_count_tokens, episode[1]))
    self.assertLess(max(lengths), 160)
    self.assertBetween(statistics.mean(responses), 12, 25)

  def test_corpus_covers_every_word(self):
    known = set(" ".join(self.benchmark.corpus()).replace("<", " <").split())
    words = set()
    for seed, task in enumerate(self.benchmark.splits["test"][:60]):
      for texts in self._episode(task, seed):
        words.update(" ".join(texts).replace("<", " <").split())
    self.assertEmpty({w for w in words if ">" not in w} - known)

  def test_names_become_single_tokens(self):
    try:
      import sentencepiece
    except ImportError:
      self.skipTest("sentencepiece is not installed")
    actions = ("think", *self.benchmark.grammar.actions)
    tags = [f"<{mark}{tag}>" for tag in actions for mark in ("", "/")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(self.benchmark.corpus()),
      model_writer=model,
      model_type="bpe",
      vocab_size=700,
      user_defined_symbols=tags,
      minloglevel=2,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(
      model_proto=model.getvalue()
    )
    for name in self.benchmark.world.facts:
      pieces = tokenizer.encode(f"<search> {name}</search>", out_type=str)
      self.assertLen([p for p in pieces if p != "▁"], 3, pieces)


class FullPromptTest(absltest.TestCase):
  def test_prompt_has_all_parts(self):
    benchmark = envs.make("searchqa", wording="full")
    env = benchmark.env()
    task = benchmark.splits["train"][0]
    first = env.reset(task)
    self.assertRegex(first.task, r"^(Who|What) is the .* of [A-Z][a-z]+\?$")
    view = prompts.View(first.task, (), first.text, (), 1, 4)
    (message,) = benchmark.render(view)
    opening = message["content"]
    for part in ("<think>", "<search>", "<answer>", "turn 1 of 4"):
      self.assertIn(part, opening)
    self.assertEqual(opening.count(first.task), 1)
    self.assertNotIn("so far", opening)
    start = benchmark.questions[task].start.capitalize()
    result = env.step(_respond("search", start))
    seen = result.observation.text
    self.assertStartsWith(seen, f"<information>\nDoc 1: {start}\n")
    self.assertEndsWith(seen, "\n</information>")
    self.assertIn("\nDoc 3: ", seen)
    memory = ((first.text, result.action),)
    view = prompts.View(first.task, memory, seen, (), 2, 4)
    (message,) = benchmark.render(view)
    self.assertIn(
      f"Your action at turn 1: <search>{start}</search>\n{seen}",
      message["content"],
    )
    self.assertEqual(message["content"].count(seen), 1)

  def test_window_counts_turns(self):
    benchmark = envs.make("searchqa", wording="full")
    memory = (("seen 1", "<search>x</search>"), ("seen 2", ""))
    view = prompts.View("Who?", memory, "seen 3", (), 4, 4)
    content = benchmark.render(view)[0]["content"]
    self.assertIn(
      "seen 1\nYour action at turn 2: <search>x</search>\n"
      "seen 2\nYour action at turn 3: none\nseen 3\n",
      content,
    )
    self.assertIn("turn 4 of 4. You must answer now.", content)


class RealFilesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    for name in ("train", "eval"):
      rows = [
        {
          "data_source": "nq" if i % 2 else "popqa",
          "question": f"{name} {i} capital?",
          "reward_model": {"ground_truth": {"target": ["Paris", "paree"]}},
        }
        for i in range(6)
      ]
      (self.folder / f"{name}.jsonl").write_text(
        "\n".join(map(json.dumps, rows))
      )
    with gzip.open(self.folder / "corpus.jsonl.gz", "wt") as file:
      for i, text in enumerate(("Paris is the capital " + "x" * 50, "Rome")):
        file.write(
          json.dumps({"id": str(i), "contents": f'"T{i}"\n{text}'}) + "\n"
        )
    self.cache = self.folder / "cache"

  def _make(self, **kwargs):
    return envs.make(
      "searchqa", data_dir=self.folder, cache_dir=self.cache, **kwargs
    )

  def test_episode(self):
    benchmark = self._make()
    self.assertIs(benchmark.wording, benchmark_lib.full)
    self.assertEqual(
      {name: len(tasks) for name, tasks in benchmark.splits.items()},
      {"train": 6, "valid": 2, "test": 4},
    )
    self.assertLen(list(self.cache.iterdir()), 1)
    task = benchmark.splits["train"][0]
    self.assertEqual(benchmark.category(task), "popqa")
    env = benchmark.env()
    env.reset(task)
    result = env.step(_respond("search", "capital"))
    self.assertIn("Doc 1: T0\nParis is the capital", result.observation.text)
    self.assertEqual(result.info, {"answer_shown": 1.0})
    self.assertEqual(env.step(_respond("search", "of")).info["answer_shown"], 0)
    self.assertTrue(env.step(_respond("answer", "the Paree")).success)
    self.assertIn("train 0 capital?", benchmark.corpus())

  def test_long_passages_are_cut(self):
    env = self._make(passage_chars=30).env()
    env.reset("eval-0")
    text = env.step(_respond("search", "capital")).observation.text
    passage = text.split("\n")[2]
    self.assertLen(passage, 30)
    self.assertIn(prompts.ELLIPSIS, passage)

  def test_compact_wording_of_real_data(self):
    benchmark = self._make(wording="compact")
    env = benchmark.env()
    env.reset("train-0")
    text = env.step(_respond("search", "rome")).observation.text
    self.assertEqual(text, "Rome")

  def test_server_needs_no_corpus(self):
    (self.folder / "corpus.jsonl.gz").unlink()
    self.assertEqual(self._make(retriever="http").passages, [])
    with self.assertRaisesRegex(ValueError, "no file corpus.jsonl or"):
      self._make()


if __name__ == "__main__":
  absltest.main()
