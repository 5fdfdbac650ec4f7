"""Plays an environment in the terminal: `experiments/play.py --env=webshop`.

You see the very prompts that a model sees, whole, before a prompt that is too
long for its model is cut. Type an action, or a whole response with its tags;
an empty line ends the game. `--expert` watches the scripted expert instead,
`--config=configs/webshop.py` takes an environment's settings from a
configuration, `--task` and `--split` choose what is played. `--web` opens
WebShop as a web site.
"""

from collections.abc import Callable
import itertools
import sys

from absl import app, flags
from ml_collections import config_flags

from t2po_jax import envs
from t2po_jax.envs import base, prompts
from t2po_jax.experiments import command_line

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_ENV = flags.DEFINE_string(
  "env", None, "Environment with its default settings, instead of a config."
)
_SPLIT = flags.DEFINE_string("split", "train", "Where tasks come from.")
_TASK = flags.DEFINE_string("task", None, "Task id; default: one after other.")
_EPISODES = flags.DEFINE_integer("episodes", 1, "Episodes to play.")
_EXPERT = flags.DEFINE_bool("expert", False, "Watch the scripted expert.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the expert and of web tasks.")
_MEMORY = flags.DEFINE_integer(
  "memory", 2, "Past turns in a prompt; a config brings its own number."
)
_WEB = flags.DEFINE_bool("web", False, "Open WebShop as a web site.")
_PORT = flags.DEFINE_integer("port", 8080, "Port of the web site.")


def complete(text: str, grammar: prompts.Grammar) -> str:
  """Makes a whole response of what a person types.

  A text with tags stays as it is. Otherwise it is the action; where there are
  several kinds, its first word says which: `search red mug`.
  """
  if "<" in text:
    return text
  kinds = [tool.name for tool in grammar.tools] or grammar.actions
  kind, content = kinds[0], text
  if len(kinds) > 1:
    first, _, rest = text.partition(" ")
    if first in kinds:
      kind, content = first, rest
  return f"<think></think>{grammar.write(content, kind)}"


def show_prompt(messages: list[prompts.Message], turn: int) -> None:
  """Prints a prompt."""
  print(f"\n--- turn {turn} " + "-" * 60)
  for message in messages:
    if len(messages) > 1:
      print(f"[{message['role']}]")
    print(message["content"])


def show_result(result: base.StepResult) -> None:
  """Prints what the environment made of a response."""
  remarks = [f"action: {result.action or 'none'}", f"reward {result.reward:g}"]
  if not result.format_valid:
    remarks.append("badly formed")
  elif not result.action_valid:
    remarks.append("not possible")
  remarks += [f"{name} {value:g}" for name, value in result.info.items()]
  print("=> " + ", ".join(remarks))
  if result.done:
    print(f"\n{result.observation.text}")
    print("solved" if result.success else "not solved")


def play(
  benchmark: base.Benchmark,
  task_id: str,
  *,
  memory: int,
  start: Callable[[base.Env], Callable[[], str]],
) -> bool:
  """Plays one episode.

  Args:
    benchmark: what is played.
    task_id: the task.
    memory: (observation, action) pairs in a prompt.
    start: gives, for an environment, the function that answers a prompt.

  Returns:
    Whether the episode was played to its end.
  """
  env = benchmark.env()
  observation = env.reset(task_id)
  respond = start(env)
  past: list[tuple[str, str]] = []
  print(f"task {task_id} ({benchmark.category(task_id)})")
  for turn in itertools.count(1):
    view = prompts.View(
      task=observation.task,
      memory=tuple(past[-memory:]) if memory else (),
      observation=observation.text,
      admissible=observation.admissible,
      turn=turn,
      max_turns=benchmark.max_turns,
    )
    show_prompt(benchmark.render(view), turn)
    response = respond()
    if not response:
      env.close()
      return False
    result = env.step(response)
    show_result(result)
    past.append((observation.text, result.action))
    observation = result.observation
    if result.done:
      env.close()
      return True


def ask_person(grammar: prompts.Grammar) -> Callable[[], str]:
  """Answers with what is typed; an empty line or the end of input stops."""

  def respond() -> str:
    try:
      text = input("\n> ").strip()
    except EOFError:
      text = ""
    return complete(text, grammar) if text else ""

  return respond


def ask_expert(env: base.Env, seed: int) -> Callable[[], str]:
  """Answers with what the expert says, and prints it."""
  expert = env.expert(seed)

  def respond() -> str:
    response = expert.respond()
    print(f"\n> {response}")
    return response

  return respond


def serve(benchmark: base.Benchmark, *, split: str, memory: int) -> None:
  """Serves WebShop as a web site until interrupted."""
  from t2po_jax.envs.webshop import site

  page = site.Site(benchmark, split=split, memory=memory, seed=_SEED.value)
  server = site.make_server(page, _PORT.value)
  print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
  try:
    server.serve_forever()
  except KeyboardInterrupt:
    server.server_close()


def open_benchmark() -> tuple[base.Benchmark, int]:
  """The benchmark and the length of its memory, from the flags.

  Raises:
    ValueError: if flags or settings make no benchmark.
  """
  config = _CONFIG.value
  if (config is None) == (_ENV.value is None):
    raise ValueError("give either --config or --env")
  if config is None:
    name, benchmark = _ENV.value, envs.make(_ENV.value)
    memory = _MEMORY.value
  else:
    settings = config.env.to_dict()
    name = settings.pop("name")
    benchmark = envs.make(name, **settings)
    memory = config.rollout.memory
  if _SPLIT.value not in benchmark.splits:
    raise ValueError(
      f"--split: {_SPLIT.value!r}; must be one of {', '.join(benchmark.splits)}"
    )
  if _WEB.value and name != "webshop":
    raise ValueError(f"--web: shows webshop only, not {name}")
  return benchmark, memory


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  try:
    benchmark, memory = open_benchmark()
    if _WEB.value:
      serve(benchmark, split=_SPLIT.value, memory=memory)
      return
    tasks = benchmark.splits[_SPLIT.value][: _EPISODES.value]
    if _TASK.value is not None:
      if not any(_TASK.value in known for known in benchmark.splits.values()):
        raise ValueError(f"--task: no task {_TASK.value!r}; try {tasks[0]!r}")
      tasks = (_TASK.value,)
    for number, task_id in enumerate(tasks):
      played = play(
        benchmark,
        task_id,
        memory=memory,
        start=lambda env, seed=_SEED.value + number: (
          ask_expert(env, seed)
          if _EXPERT.value
          else ask_person(benchmark.grammar)
        ),
      )
      if not played:
        return
  except ValueError as error:
    sys.exit(f"error: {error}")


def run() -> None:
  """The command `t2po-play`."""
  app.run(main, flags_parser=command_line.parse_flags)


if __name__ == "__main__":
  run()
