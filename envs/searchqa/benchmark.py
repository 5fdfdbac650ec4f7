"""The Search QA benchmark: tasks, episodes, scores.

The setting is that of Search-R1: at every turn the agent searches or answers,
four turns at most, three passages per search, and an answer pays if it
matches a target exactly. Without a data directory the questions and passages
come from the embedded world. Deliberate difference: the answer is read from
the model's own response only.
"""

from envs import base, prompts
from envs.searchqa import compact, expert, full, retrieval, score
from envs.searchqa import world as world_lib

_WORDINGS = {"compact": compact, "full": full}


class SearchQA:
  """Question answering by search; implements `envs.base.Benchmark`."""

  grammar = prompts.Grammar(actions=("search", "answer"), closing="</think>")

  def __init__(
    self,
    *,
    wording: str = "compact",
    max_turns: int = 4,
    topk: int = 3,
    reward_success: float = 1.0,
    seed: int = 0,
    people: int = 48,
    places: int = 24,
    works: int = 32,
    regions: int = 6,
    train_tasks: int = 1000,
    valid_tasks: int = 100,
    test_tasks: int = 200,
    expert_hesitation: float = 1.0,
    expert_doubt: float = 0.15,
  ):
    self.wording = _WORDINGS[wording]
    self.max_turns = max_turns
    self.topk = topk
    self.reward_success = reward_success
    self.expert_hesitation = expert_hesitation
    self.expert_doubt = expert_doubt
    self.world = world_lib.build(
      seed, people=people, places=places, works=works, regions=regions
    )
    drawn = world_lib.draw_splits(
      self.world,
      {"train": train_tasks, "valid": valid_tasks, "test": test_tasks},
    )
    self.questions = {
      question.task_id: question
      for questions in drawn.values()
      for question in questions
    }
    self.splits = {
      name: tuple(question.task_id for question in questions)
      for name, questions in drawn.items()
    }
    self.passages = [
      retrieval.Passage(
        entity,
        self.wording.name(entity),
        " ".join(
          self.wording.state(entity, relation, value)
          for relation, value in facts.items()
        ),
      )
      for entity, facts in self.world.facts.items()
    ]
    self.retriever: retrieval.Retriever = retrieval.BM25(self.passages)

  def env(self) -> "SearchEnv":
    """A new environment."""
    return SearchEnv(self)

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """The prompt of a turn in the benchmark's wording."""
    return self.wording.render(view)

  def category(self, task_id: str) -> str:
    """Number of hops."""
    return f"{self.questions[task_id].hops}-hop"

  def corpus(self) -> list[str]:
    """Passages, questions, and whole episodes of the expert."""
    sentences = [passage.text for passage in self.passages]
    for index, task_id in enumerate(self.splits["train"][:200]):
      env = self.env()
      observation = env.reset(task_id)
      parts = [observation.task]
      player = env.expert(index)
      done = False
      while not done:
        response = player.respond()
        result = env.step(response)
        done = result.done
        parts += [response, " ", result.observation.text]
      sentences.append("".join(parts))
    return sentences


class SearchEnv:
  """One episode after another."""

  def __init__(self, benchmark: SearchQA):
    self._benchmark = benchmark
    self._question: world_lib.Question | None = None
    self._task = ""
    self._targets: tuple[str, ...] = ()
    self._shown: list[str] = []
    self._turn = 0
    self._done = True

  def reset(self, task_id: str) -> base.Observation:
    """Starts the episode of a question; see `envs.base.Env.reset`."""
    benchmark = self._benchmark
    question = benchmark.questions[task_id]
    self._question = question
    self._task = benchmark.wording.ask(question.start, question.relations)
    self._targets = (question.answer,)
    self._shown, self._turn, self._done = [], 0, False
    return base.Observation(self._task, self._task)

  def step(self, response: str) -> base.StepResult:
    """Searches or judges an answer; see `envs.base.Env.step`."""
    if self._done:
      raise RuntimeError("searchqa: the episode is over; call reset first")
    benchmark, wording = self._benchmark, self._benchmark.wording
    parsed = prompts.parse(response, benchmark.grammar)
    self._turn += 1
    action, text, success = "", wording.INVALID, False
    if parsed.content and parsed.blocks == 1:
      action = wording.action(parsed.kind, parsed.content)
      if parsed.kind == "answer":
        success = score.exact_match(parsed.content, self._targets)
        self._done, text = True, wording.OVER
      else:
        found = benchmark.retriever.search([parsed.content], benchmark.topk)
        passages = [passage for passage, _ in found[0]]
        self._shown.extend(passage.id for passage in passages)
        text = wording.show(passages)
    self._done = self._done or self._turn == benchmark.max_turns
    return base.StepResult(
      observation=base.Observation(self._task, text),
      action=action,
      reward=benchmark.reward_success if success else 0.0,
      done=self._done,
      format_valid=parsed.format_valid,
      action_valid=parsed.format_valid and bool(action),
      success=success,
    )

  def expert(self, seed: int) -> expert.ScriptedExpert:
    """The scripted searcher; needs the embedded world."""
    if self._question is None:
      raise RuntimeError("searchqa: no episode is running; call reset first")
    benchmark = self._benchmark
    return expert.ScriptedExpert(
      benchmark.world,
      self._question,
      self._shown,
      benchmark.wording,
      hesitation=benchmark.expert_hesitation,
      doubt=benchmark.expert_doubt,
      seed=seed,
    )

  def close(self) -> None:
    """Nothing to release."""
