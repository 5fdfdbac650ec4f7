"""The tools of a Model Context Protocol server, as actions.

An action is a call, `{"name": "add", "arguments": {"a": 1, "b": 2}}`; its
result is the next observation. `finish` with an `answer` ends the episode.
Tasks are rows of a JSONL file: `id`, `task`, `split`, and `answer`, a string or
several alternatives (compared ignoring case and surrounding spaces). Every
environment starts its own server process, and a new one for each episode unless
`env.reset_tool` names a tool that resets it. The adapter cannot guarantee that
a tool returns the same result twice. A call that is not JSON, or names an
unknown tool, is a turn without effect.
"""

import asyncio
from collections.abc import Coroutine
import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import shlex
import threading
from typing import Any

from t2po_jax import keys
from t2po_jax.envs import base, games, prompts
from t2po_jax.envs.adapters.wordings import full

FINISH = "finish"


@dataclasses.dataclass(frozen=True)
class ToolSettings(base.Settings):
  """The keys of `config.env` for a tool environment."""

  command: str = keys.key(
    "",
    "Command that starts the server, which communicates over standard input "
    "and output.",
  )
  tasks: str = keys.key("", "JSONL file with the tasks.")
  reset_tool: str = keys.key(
    "",
    "Tool that resets the server, called with `task_id`; empty: every episode "
    "starts a new process.",
  )
  max_turns: int = keys.key(8, "Turns until an episode ends.", least=1)
  reward_success: float = keys.key(1.0, "Reward of a right answer.")
  timeout: float = keys.key(
    30.0, "Seconds to wait for the server to start or to answer.", above=0.0
  )


def _read_tasks(place: str) -> dict[str, dict[str, Any]]:
  """The rows of the task file, by id.

  Raises:
    ValueError: if the file or a row is invalid.
  """
  path = pathlib.Path(os.path.expandvars(place)).expanduser()
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except OSError as error:
    raise ValueError(
      f"env.tasks: found {place!r} ({error.strerror}), expected a JSONL file"
    ) from None
  rows = {}
  for number, line in enumerate(filter(str.strip, lines), 1):
    try:
      row = json.loads(line)
      row = {
        "task": str(row["task"]),
        "split": str(row["split"]),
        "answer": row["answer"],
        "id": str(row["id"]),
      }
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"env.tasks: {place}, row {number}: {error!r}; expected an object with "
        "id, task, split and answer"
      ) from None
    if row["id"] in rows:
      raise ValueError(
        f"env.tasks: {place}, row {number}: a second {row['id']!r}"
      )
    rows[row["id"]] = row
  return rows


class ToolServer:
  """A server process and its session, used by one thread at a time.

  Attributes:
    tools: (name, description, schema of its arguments) of each tool.
  """

  def __init__(self, command: str, timeout: float) -> None:
    """Starts the server.

    Raises:
      EnvError: if it does not start in time.
    """
    self._timeout = timeout
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
    self._thread.start()
    self._end = asyncio.Event()
    self._session: Any = None
    self.tools: list[tuple[str, str, dict[str, Any]]] = []
    started: asyncio.Future = self._run(self._make_future())
    self._task = asyncio.run_coroutine_threadsafe(
      self._serve(command, started), self._loop
    )
    try:
      self._run(asyncio.wait_for(started, timeout))
    except Exception as error:
      self.close()
      raise base.EnvError(
        f"MCP server {command!r} does not start: {str(error) or repr(error)}"
      ) from None

  async def _make_future(self) -> asyncio.Future:
    return self._loop.create_future()

  def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run_coroutine_threadsafe(work, self._loop).result()

  async def _serve(self, command: str, started: asyncio.Future) -> None:
    """Keeps the session open: the task that opened it must also close it."""
    mcp: Any = importlib.import_module("mcp")
    stdio: Any = importlib.import_module("mcp.client.stdio")

    program, *arguments = shlex.split(command)
    parameters = mcp.StdioServerParameters(
      command=program, args=arguments, env=dict(os.environ)
    )
    try:
      async with stdio.stdio_client(parameters) as streams:
        async with mcp.ClientSession(*streams) as session:
          await session.initialize()
          listed = await session.list_tools()
          self.tools = [
            (tool.name, tool.description or "", tool.inputSchema)
            for tool in listed.tools
          ]
          self._session = session
          started.set_result(None)
          await self._end.wait()
    except BaseException as error:
      if not started.done():
        started.set_exception(RuntimeError(str(error) or type(error).__name__))

  def call(self, name: str, arguments: dict[str, Any]) -> tuple[str, bool]:
    """Calls a tool; returns its text and whether it succeeded.

    Raises:
      EnvError: if the server does not answer.
    """
    try:
      answer = self._run(
        asyncio.wait_for(
          self._session.call_tool(name, arguments), self._timeout
        )
      )
    except Exception as error:
      raise base.EnvError(
        f"MCP tool {name!r}: {str(error) or type(error).__name__}"
      ) from None
    texts = [getattr(part, "text", f"[{part.type}]") for part in answer.content]
    return "\n".join(texts), not answer.isError

  def close(self) -> None:
    """Stops the server."""
    self._loop.call_soon_threadsafe(self._end.set)
    with contextlib.suppress(Exception):
      self._task.result(5.0)
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join(5.0)


class Tools(games.Table):
  """Tasks to be solved with tools; implements `envs.base.Benchmark`."""

  Settings = ToolSettings
  grammar = prompts.Grammar()

  def __init__(self, settings: ToolSettings) -> None:
    """Reads the tasks and asks the server for its tools.

    Raises:
      ValueError: if the tasks are invalid, or the server does not start.
    """
    self.game = Play
    self.settings = settings
    self.max_turns = settings.max_turns
    if not settings.command:
      raise ValueError(
        "env.command: found none, expected the server's command, e.g. "
        "'python my_server.py'"
      )
    try:
      importlib.import_module("mcp")
    except ImportError:
      raise ValueError(
        "env.name: 'mcp' needs the package mcp; install the extra 'mcp'"
      ) from None
    self.rows = _read_tasks(settings.tasks)
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for row in self.rows.values():
      splits.setdefault(row["split"], []).append(row["id"])
    self.splits = {name: tuple(ids) for name, ids in splits.items()}
    try:
      server = self.start_server()
    except base.EnvError as error:
      raise ValueError(f"env.command: {error}") from None
    self.tools = {name: schema for name, _, schema in server.tools}
    self.manual = "\n".join(
      f"- {name}: {description.strip()} Arguments: "
      f"{json.dumps(schema.get('properties', {}))}"
      for name, description, schema in server.tools
      if name != settings.reset_tool
    )
    server.close()

  def start_server(self) -> ToolServer:
    """A new server."""
    return ToolServer(self.settings.command, self.settings.timeout)

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """The task, the tools, and the last calls with their results."""
    rules = (
      f"{view.task}\n\nYou have these tools:\n{self.manual}\n"
      f'- {FINISH}: gives the answer and ends the task. Arguments: {{"answer": '
      '{"type": "string"}}\n\n'
      'An action is one call, written as JSON: {"name": ..., "arguments": '
      "{...}}"
    )
    return full.render(dataclasses.replace(view, task=rules))


class Play(games.Game):
  """Episodes with one server."""

  table: Tools

  def __init__(self, table: Tools) -> None:
    super().__init__(table)
    self._server: ToolServer | None = None
    self._row: dict[str, Any] = {}

  def begin(self, task_id: str) -> base.Observation:
    """Starts or resets the server."""
    table = self.table
    self._row = table.rows[task_id]
    if self._server is not None and not table.settings.reset_tool:
      self.close()
    if self._server is None:
      self._server = table.start_server()
    if table.settings.reset_tool:
      text, well = self._server.call(
        table.settings.reset_tool, {"task_id": task_id}
      )
      if not well:
        raise base.EnvError(f"{table.settings.reset_tool}: {text}")
    return self._see("No tool was called yet.")

  def _see(self, text: str) -> base.Observation:
    return base.Observation(self._row["task"], text)

  def act(self, action: str) -> games.Move:
    """Calls a tool, or ends the episode with an answer."""
    table = self.table
    try:
      call = json.loads(action)
      name, arguments = call["name"], call.get("arguments", {})
      if not isinstance(arguments, dict):
        raise TypeError("arguments must be an object")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      text = f"This is no call of a tool ({type(error).__name__}: {error})."
      return games.Move(self._see(text), possible=False)
    if name == FINISH:
      return self._finish(arguments.get("answer", ""))
    if name not in table.tools or name == table.settings.reset_tool:
      return games.Move(
        self._see(f"There is no tool {name!r}."), possible=False
      )
    if self._server is None:
      raise base.EnvError("the server has been closed")
    text, well = self._server.call(name, arguments)
    return games.Move(self._see(text), possible=well)

  def _finish(self, answer: Any) -> games.Move:
    right = self._row["answer"]
    right = right if isinstance(right, list) else [right]
    given = str(answer).strip().lower()
    won = given in [str(text).strip().lower() for text in right]
    return games.Move(
      self._see("The task is over."),
      reward=self.table.settings.reward_success * won,
      done=True,
      success=won,
    )

  def close(self) -> None:
    """Stops the server."""
    if self._server is not None:
      self._server.close()
      self._server = None
