"""Plays an environment in the terminal: `experiments/play.py --env=webshop`.

You see exactly the prompts that a model sees, before any truncation. Type an
action, or a whole response with its tags; an empty line ends the game.
`--expert` shows the scripted expert instead, `--config=configs/webshop.py`
uses an environment's settings from a configuration, `--task` and `--split`
choose the task. `--web` opens WebShop as a web site.
"""

from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import config_flags

from t2po_jax import envs
from t2po_jax.envs import base, prompts
from t2po_jax.experiments import command_line


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  config_flags.DEFINE_config_file("config", lock_config=True, **own)
  flags.DEFINE_string(
    "env",
    None,
    "Environment to play with its default settings, instead of --config.",
    **own,
  )
  flags.DEFINE_string("split", "train", "Split of the tasks.", **own)
  flags.DEFINE_string("task", None, "Task id; default: the first tasks.", **own)
  flags.DEFINE_integer("episodes", 1, "Episodes to play.", **own)
  flags.DEFINE_bool("expert", False, "Watch the scripted expert.", **own)
  flags.DEFINE_integer("seed", 0, "Seed of the expert and of web tasks.", **own)
  flags.DEFINE_integer(
    "memory",
    2,
    "Past turns in a prompt; a configuration sets its own number.",
    **own,
  )
  flags.DEFINE_bool("web", False, "Open WebShop as a web site.", **own)
  flags.DEFINE_integer("port", 8080, "Port of the web site.", **own)


def complete(text: str, grammar: prompts.Grammar) -> str:
  """Completes typed text to a full response.

  Text with tags is unchanged. Otherwise it is the action; if there are several
  kinds, the first word is the kind: `search red mug`.
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
  """Prints the environment's result of a response."""
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
    benchmark: the benchmark.
    task_id: the task.
    memory: (observation, action) pairs in a prompt.
    start: given an environment, returns the function that gives responses.

  Returns:
    Whether the episode was played to its end.
  """
  env = benchmark.env()
  observation = env.reset(task_id)
  respond = start(env)
  past: list[tuple[str, str]] = []
  print(f"task {task_id} ({benchmark.category(task_id)})")
  while True:
    view = observation.view(past, memory=memory, max_turns=benchmark.max_turns)
    show_prompt(benchmark.render(view), view.turn)
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
  """Answers with typed text; an empty line or the end of input stops."""

  def respond() -> str:
    try:
      text = input("\n> ").strip()
    except EOFError:
      text = ""
    return complete(text, grammar) if text else ""

  return respond


def ask_expert(env: base.Env, seed: int) -> Callable[[], str]:
  """Answers with the expert's response, and prints it."""
  expert = env.expert(seed)

  def respond() -> str:
    response = expert.respond()
    print(f"\n> {response}")
    return response

  return respond


def serve(
  benchmark: base.Benchmark, given: flags.FlagValues, memory: int
) -> None:
  """Serves WebShop as a web site until interrupted."""
  from t2po_jax.envs.webshop import benchmark as webshop
  from t2po_jax.envs.webshop import site

  assert isinstance(benchmark, webshop.WebShop)
  page = site.Site(benchmark, split=given.split, memory=memory, seed=given.seed)
  server = site.make_server(page, given.port)
  print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
  try:
    server.serve_forever()
  except KeyboardInterrupt:
    server.server_close()


def open_benchmark(
  given: flags.FlagValues,
) -> tuple[base.Benchmark, int]:
  """The benchmark and the length of its memory, from the flags.

  Raises:
    ValueError: if flags or settings are invalid.
  """
  config = given.config
  if (config is None) == (given.env is None):
    raise ValueError("give either --config or --env")
  if config is None:
    name, benchmark = given.env, envs.make(given.env)
    memory = given.memory
  else:
    settings = config.env.to_dict()
    name = settings.pop("name")
    benchmark = envs.make(name, **settings)
    memory = config.rollout.memory
  if given.split not in benchmark.splits:
    raise ValueError(
      f"--split: {given.split!r}; must be one of {', '.join(benchmark.splits)}"
    )
  if given.web and name != "webshop":
    raise ValueError(f"--web: shows webshop only, not {name}")
  return benchmark, memory


def run_episodes(given: flags.FlagValues) -> None:
  """Plays the episodes that the flags ask for, or serves a web site.

  Raises:
    ValueError: if flags or settings are invalid, or there is no such task.
  """
  benchmark, memory = open_benchmark(given)
  if given.web:
    serve(benchmark, given, memory)
    return
  tasks = benchmark.splits[given.split][: given.episodes]
  if given.task is not None:
    if not any(given.task in known for known in benchmark.splits.values()):
      raise ValueError(f"--task: no task {given.task!r}; try {tasks[0]!r}")
    tasks = (given.task,)
  for number, task_id in enumerate(tasks):
    played = play(
      benchmark,
      task_id,
      memory=memory,
      start=lambda env, seed=given.seed + number: (
        ask_expert(env, seed) if given.expert else ask_person(benchmark.grammar)
      ),
    )
    if not played:
      return


def run() -> None:
  """The command `t2po-play`."""
  command_line.run(run_episodes, define_flags)


if __name__ == "__main__":
  run()
