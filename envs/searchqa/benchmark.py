"""The Search QA benchmark: tasks, episodes, scores.

The setting is that of Search-R1: at every turn the agent searches or answers,
with at most four turns, three passages per search, and a reward for an answer
that matches a target exactly. Without a data directory the questions and
passages come from the embedded world (`world.py`). Deliberate difference from
the reference: the answer is read only from the model's own response, never from
retrieved text.
"""

from collections.abc import Mapping
import pathlib

from t2po_jax.envs import base, prompts, templates
from t2po_jax.envs.searchqa import (
  data,
  dense,
  expert,
  hindsight,
  remote,
  retrieval,
  score,
)
from t2po_jax.envs.searchqa import settings as settings_lib
from t2po_jax.envs.searchqa import world as world_lib
from t2po_jax.envs.searchqa.wordings import compact, full, reference

_WORDINGS = {"compact": compact, "full": full, "reference": full}
_CACHE_DIR = "~/.cache/t2po_jax"
# The most sentences in the corpus for a tokenizer.
_CORPUS_EPISODES = 200
_CORPUS_PASSAGES = 20_000


class SearchQA:
  """Question answering by search; implements `envs.base.Benchmark`.

  Attributes:
    tasks: the questions by task id.
    world: the embedded world, or None with real data.
    questions: the chains behind the embedded tasks; empty with real data.
    passages: the passages to search; empty with retriever `http` and real
      data.
    retriever: searches them.
    wording: the module that words prompts and observations.
  """

  Settings = settings_lib.Settings
  threadsafe = True
  grammar = prompts.Grammar(
    actions=("search", "answer"),
    closing="</think>",
    tools=(
      prompts.Tool("search", "query", "Shows what fits the query best."),
      prompts.Tool("answer", "answer", "Ends the task with the answer."),
    ),
  )

  def __init__(self, settings: settings_lib.Settings | None = None) -> None:
    """Loads or generates the tasks and builds the index.

    Raises:
      ValueError: if a data file is invalid.
    """
    settings = settings or settings_lib.Settings()
    self.settings = settings
    self.max_turns = settings.max_turns
    real = bool(settings.data_dir) or bool(settings.tfds)
    chosen = settings.wording or ("full" if real else "compact")
    self.wording = _WORDINGS[chosen]
    self.grammar = settings.adapt(self.grammar)
    self._prompts = templates.choose(
      chosen, settings.prompt_file, reference, self.wording
    )
    self.world: world_lib.World | None = None
    self.questions: dict[str, world_lib.Question] = {}
    self.passages: list[retrieval.Passage] = []
    if real:
      splits = self._load()
    else:
      world = world_lib.build(
        settings.seed,
        people=settings.people,
        places=settings.places,
        works=settings.works,
        regions=settings.regions,
      )
      self.world = world
      splits = self._ask_world(world)
      self.passages = self._describe_world(world)
    if settings.categories:
      splits = _keep_categories(splits, settings.categories)
    self.tasks = {
      task.task_id: task for tasks in splits.values() for task in tasks
    }
    self.splits: Mapping[str, tuple[str, ...]] = {
      name: tuple(task.task_id for task in tasks)
      for name, tasks in splits.items()
    }
    self.retriever = self._open_retriever()

  def _load(self) -> dict[str, list[data.Task]]:
    """Loads real questions, and stores their passages."""
    settings = self.settings
    folder = None
    if settings.data_dir:
      folder = pathlib.Path(settings.data_dir).expanduser()
    if settings.retriever != "http":
      self.passages = _load_passages(folder)
    return _load_splits(
      folder, settings.tfds, settings.tfds_eval_split, settings.valid_tasks
    )

  def _open_retriever(self) -> retrieval.Retriever:
    """The retriever that the settings ask for."""
    settings = self.settings
    cache = pathlib.Path(settings.cache_dir or _CACHE_DIR).expanduser()
    if settings.retriever == "http":
      return remote.Remote(
        settings.url,
        dialect=settings.dialect,
        timeout=settings.timeout,
        tries=settings.tries,
        backoff=settings.backoff,
        deadline=settings.deadline,
      )
    if settings.retriever == "dense":
      return dense.Dense(
        self.passages, encoder=settings.encoder, cache_dir=cache
      )
    real = self.world is None
    return retrieval.BM25(self.passages, cache_dir=cache if real else None)

  def _ask_world(self, world: world_lib.World) -> dict[str, list[data.Task]]:
    """The embedded tasks; stores the chain of each."""
    sizes = base.split_sizes(self.settings)
    splits: dict[str, list[data.Task]] = {}
    drawn = world_lib.draw_splits(world, sizes, _parse_hops(self.settings.hops))
    for name, questions in drawn.items():
      splits[name] = []
      for question in questions:
        self.questions[question.task_id] = question
        splits[name].append(
          data.Task(
            question.task_id,
            self.wording.ask(question.start, question.relations),
            (question.answer,),
            f"{question.hops}-hop",
          )
        )
    return splits

  def _describe_world(self, world: world_lib.World) -> list[retrieval.Passage]:
    """One passage per entity, with its name as title."""
    return [
      retrieval.Passage(
        entity,
        self.wording.name(entity),
        " ".join(
          self.wording.state(entity, relation, value)
          for relation, value in facts.items()
        ),
      )
      for entity, facts in world.facts.items()
    ]

  def env(self) -> "SearchEnv":
    """A new environment."""
    return SearchEnv(self)

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """The prompt of a turn in the benchmark's wording."""
    return self._prompts.render(view)

  def category(self, task_id: str) -> str:
    """The number of hops, or the question set of real data."""
    return self.tasks[task_id].category

  def corpus(self) -> list[str]:
    """Passages, training questions, and episodes of the expert, if any."""
    sentences = [passage.text for passage in self.passages[:_CORPUS_PASSAGES]]
    train = self.splits["train"]
    sentences.extend(self.tasks[task_id].text for task_id in train)
    if self.world is not None:
      sentences.extend(
        self._transcribe(task_id, seed)
        for seed, task_id in enumerate(train[:_CORPUS_EPISODES])
      )
    return sentences

  def _transcribe(self, task_id: str, seed: int) -> str:
    """The last prompt of an expert's episode and every response."""
    env = self.env()
    observation = env.reset(task_id)
    player = env.expert(seed)
    memory: list[tuple[str, str]] = []
    responses = []
    for turn in range(1, self.max_turns + 1):
      view = prompts.View(
        observation.task,
        tuple(memory),
        observation.text,
        (),
        turn,
        self.max_turns,
      )
      responses.append(player.respond())
      result = env.step(responses[-1])
      memory.append((observation.text, result.action))
      observation = result.observation
      if result.done:
        break
    prompt = "".join(message["content"] for message in self.render(view))
    return prompt + "".join(responses)


def _parse_hops(text: str) -> dict[int, float] | None:
  """Number of hops -> fraction of questions; None for the defaults.

  Raises:
    ValueError: unless they are distinct numbers from 1 to 5.
  """
  names = [part.strip() for part in text.split(",")]
  if not all(name in {"1", "2", "3", "4", "5"} for name in names) or len(
    set(names)
  ) < len(names):
    raise ValueError(
      f"env.hops: found {text!r}, expected different numbers from 1 to 5, "
      "joined by commas"
    )
  hops = tuple(sorted(map(int, names)))
  if hops == world_lib.HOPS:
    return None
  return {count: 1.0 / len(hops) for count in hops}


def _load_passages(folder: pathlib.Path | None) -> list[retrieval.Passage]:
  """The corpus of real data."""
  if folder is None:
    raise ValueError(
      "env.tfds: question sets bring no passages; "
      "give env.data_dir with a corpus, or env.retriever='http'"
    )
  return data.load_corpus(data.find_corpus(folder))


def _keep_categories(
  splits: Mapping[str, list[data.Task]], names: str
) -> dict[str, list[data.Task]]:
  """The tasks of the named categories.

  Raises:
    ValueError: for a category that no task has.
  """
  chosen = {name.strip() for name in names.split(",")}
  known = {task.category for tasks in splits.values() for task in tasks}
  if unknown := sorted(chosen - known):
    raise ValueError(
      f"env.categories: found {unknown[0]!r}, expected some of "
      f"{', '.join(sorted(known))}"
    )
  return {
    name: [task for task in tasks if task.category in chosen]
    for name, tasks in splits.items()
  }


def _load_splits(
  folder: pathlib.Path | None, tfds: str, eval_split: str, valid_tasks: int
) -> dict[str, list[data.Task]]:
  """The questions of real data."""
  if tfds:
    return data.draw_splits(
      data.load_tfds(tfds, "train"),
      data.load_tfds(tfds, eval_split),
      valid_tasks,
    )
  if folder is None:
    raise ValueError("env.data_dir: found none, expected a folder of questions")
  return data.load_splits(folder, valid_tasks)


class SearchEnv:
  """Plays one episode after another; see `envs.base.Env`."""

  def __init__(self, benchmark: SearchQA) -> None:
    self._benchmark = benchmark
    self._current: data.Task | None = None
    self._shown: list[str] = []
    self._passages: list[retrieval.Passage] = []
    self._turn = 0
    self._done = True

  @property
  def _task(self) -> data.Task:
    """The task of the episode.

    Raises:
      RuntimeError: before the first one.
    """
    if self._current is None:
      raise RuntimeError("searchqa: no episode is running; call reset first")
    return self._current

  def reset(self, task_id: str) -> base.Observation:
    """Starts the episode of a question.

    Raises:
      KeyError: if the task is unknown.
    """
    tasks = self._benchmark.tasks
    if task_id not in tasks:
      raise KeyError(f"searchqa: unknown task {task_id!r}")
    task = self._current = tasks[task_id]
    # New lists, because an expert of the last episode may hold the old ones.
    self._shown, self._passages = [], []
    self._turn, self._done = 0, False
    return base.Observation(task.text, task.text)

  def step(self, response: str) -> base.StepResult:
    """Searches, or scores an answer.

    A response without exactly one action block, or with an unclosed or empty
    one, only uses up the turn.

    Raises:
      EnvError: if the search server cannot be reached.
    """
    if self._done:
      raise RuntimeError("searchqa: the episode is over; call reset first")
    benchmark, wording = self._benchmark, self._benchmark.wording
    parsed = prompts.parse(response, benchmark.grammar)
    self._turn += 1
    action, text, success, reward = "", wording.INVALID, False, 0.0
    info: dict[str, float] = {}
    if parsed.opened == 1 and parsed.content:
      action = wording.action(parsed.kind, parsed.content)
      if parsed.kind == "answer":
        success = score.exact_match(parsed.content, self._task.targets)
        info["f1"] = score.f1(parsed.content, self._task.targets)
        reward = benchmark.settings.reward_f1 * info["f1"]
        if success:
          reward = benchmark.settings.reward_success
        self._done, text = True, wording.OVER
      else:
        text = self._search(parsed.content)
        info["answer_shown"] = float(self._shows_answer(text))
    self._done = self._done or self._turn >= benchmark.max_turns
    return base.StepResult(
      observation=base.Observation(self._task.text, text),
      action=action,
      reward=reward,
      done=self._done,
      format_valid=parsed.format_valid,
      action_valid=parsed.format_valid and bool(action),
      success=success,
      info=info,
    )

  def _search(self, query: str) -> str:
    """The observation after a search."""
    benchmark = self._benchmark
    try:
      hits = benchmark.retriever.search([query], benchmark.settings.topk)[0]
    except base.EnvError:
      self._done = True
      raise
    passages = [
      _shorten(passage, benchmark.settings.passage_chars) for passage, _ in hits
    ]
    self._shown.extend(passage.id for passage in passages)
    self._passages.extend(passages)
    return benchmark.wording.show(passages)

  def _shows_answer(self, text: str) -> bool:
    """Whether the text contains a target word for word."""
    words = f" {score.normalize(text)} "
    targets = map(score.normalize, self._task.targets)
    return any(target and f" {target} " in words for target in targets)

  def expert(self, seed: int) -> base.Expert:
    """The expert of the current episode.

    A scripted searcher in the embedded world; with real data, one that knows
    the answers.

    Raises:
      RuntimeError: if no episode is running.
    """
    benchmark = self._benchmark
    if self._done:
      raise RuntimeError("searchqa: no episode is running; call reset first")
    if benchmark.world is None:
      return hindsight.HindsightExpert(
        self._task.text, self._task.targets, self._passages, benchmark.wording
      )
    return expert.ScriptedExpert(
      benchmark.world,
      benchmark.questions[self._task.task_id],
      self._shown,
      benchmark.wording,
      hesitation=benchmark.settings.expert_hesitation,
      doubt=benchmark.settings.expert_doubt,
      slip=benchmark.settings.expert_slip,
      seed=seed,
    )

  def close(self) -> None:
    """Nothing to release."""


def _shorten(passage: retrieval.Passage, keep: int) -> retrieval.Passage:
  """A passage of at most `keep` characters; 0 keeps all."""
  if not keep:
    return passage
  text = prompts.shorten(passage.text, keep)
  return retrieval.Passage(passage.id, passage.title, text)
