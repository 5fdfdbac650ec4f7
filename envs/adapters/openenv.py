"""A client for servers of the OpenEnv protocol.

One WebSocket (`/ws`) is one session with its own environment: `{"type":
"reset", "data": {"seed": 3}}` and `{"type": "step", "data": ACTION}` are
answered by `{"type": "observation", "data": {"observation", "reward",
"done"}}`, or by `{"type": "error"}`. The package itself, which depends on a web
framework and more, is not needed. The adapter cannot guarantee that a server
respects the seed or that its sessions are isolated, and does not know which
actions are admissible; `t2po-check-env` checks this. If a server stops
answering, the episode is aborted.
"""

import contextlib
import dataclasses
import json
import time
from typing import Any
import urllib.parse

from t2po_jax import keys
from t2po_jax.envs import base, games
from t2po_jax.envs.adapters import seeded


@dataclasses.dataclass(frozen=True)
class OpenEnvSettings(seeded.Settings):
  """The keys of `config.env` for an OpenEnv server."""

  url: str = keys.key(
    "ws://127.0.0.1:8000/ws", "WebSocket address of the server."
  )
  task: str = keys.key(
    "Do what the environment asks for.", "The task in words."
  )
  action_field: str = keys.key(
    "message",
    "Field of the server's action that takes the text; empty: the text is "
    "itself the whole action, a JSON object.",
  )
  text_field: str = keys.key(
    "",
    "Field of the server's observation that is shown; empty: all of it, as "
    "JSON.",
  )
  timeout: float = keys.key(
    60.0, "Seconds to wait for an answer of the server.", above=0.0
  )


# Error codes: all sessions are taken; the message is malformed.
_FULL, _INVALID = "CAPACITY_REACHED", "VALIDATION_ERROR"
_PAUSE = 0.2  # Seconds until a full server is asked again.


class _FullError(base.EnvError):
  """All sessions of the server are taken."""


class OpenEnv(seeded.SeededTable):
  """Tasks of one server; implements `envs.base.Benchmark`."""

  Settings = OpenEnvSettings
  threadsafe = True  # Every session has its own connection.

  def __init__(self, settings: OpenEnvSettings) -> None:
    """Resets the first task to check that the server answers.

    Raises:
      ValueError: if it does not answer, or the package is missing.
    """
    self.game = Play
    try:
      from websockets.sync import client
    except ImportError:
      raise ValueError(
        "env.name: 'openenv' needs the package websockets; install the extra "
        "'openenv'"
      ) from None
    if urllib.parse.urlsplit(settings.url).scheme not in ("ws", "wss"):
      raise ValueError(
        f"env.url: found {settings.url!r}, expected an address such as "
        "ws://127.0.0.1:8000/ws"
      )
    self._client = client
    super().__init__(settings)

  def connect(self) -> Any:
    """A new session."""
    return self._client.connect(
      self.settings.url, open_timeout=self.settings.timeout, max_size=None
    )


class Play(games.Game):
  """Episodes of one session."""

  table: OpenEnv

  def __init__(self, table: OpenEnv) -> None:
    super().__init__(table)
    self._session: Any = None
    self._open = contextlib.ExitStack()
    self._total = 0.0
    self._last = base.Observation("", "")

  def _ask(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    """Sends a message; returns the answer, empty if the server rejects it.

    Raises:
      EnvError: if the server cannot be reached, or its answer is invalid.
    """
    settings = self.table.settings
    try:
      if self._session is None:
        self._session = self._open.enter_context(self.table.connect())
      with contextlib.suppress(Exception):
        # A full server says so in its answer, and then closes.
        self._session.send(json.dumps({"type": kind, "data": data}))
      answer = json.loads(self._session.recv(timeout=settings.timeout))
      body = answer["data"]
      if answer["type"] == "error" and body.get("code") == _INVALID:
        return {}
      if answer["type"] == "error":
        kind_of = _FullError if body.get("code") == _FULL else ValueError
        raise kind_of(f"the server says {body.get('message', body)!r}")
      if not isinstance(body["observation"], dict):
        raise ValueError("an observation that is no object")
      return body
    except Exception as error:
      # Refused, closed, timed out, or a protocol violation.
      self.close()
      kind_of = _FullError if isinstance(error, _FullError) else base.EnvError
      raise kind_of(
        f"OpenEnv server {settings.url}: {kind}: "
        f"{str(error) or type(error).__name__}"
      ) from None

  def begin(self, task_id: str) -> base.Observation:
    """Resets the session with the task's seed.

    A server releases a session some time after its client has left, so a full
    server is asked again until the timeout.
    """
    self._total = 0.0
    seed = {"seed": seeded.read_seed(task_id)}
    end = time.monotonic() + self.table.settings.timeout
    while True:
      try:
        return self._see(self._ask("reset", seed))
      except _FullError:
        if time.monotonic() + _PAUSE > end:
          raise
      time.sleep(_PAUSE)

  def _see(self, body: dict[str, Any]) -> base.Observation:
    if not body:
      raise base.EnvError("OpenEnv server: it finds a reset invalid")
    settings, shown = self.table.settings, body["observation"]
    text: Any = json.dumps(shown, ensure_ascii=False)
    if self.table.describe is not None:
      text = shown
    elif settings.text_field:
      text = shown.get(settings.text_field, "")
    self._last = self.table.see(settings.task, self, text, settings.actions)
    return self._last

  def act(self, action: str) -> games.Move:
    """Sends an action, unless it should be a JSON object and is not."""
    settings = self.table.settings
    data: Any = {settings.action_field: action}
    if not settings.action_field:
      try:
        data = json.loads(action)
      except ValueError:
        data = None
      if not isinstance(data, dict):
        return games.Move(self._last, possible=False)
    body = self._ask("step", data)
    if not body:
      return games.Move(self._last, possible=False)
    reward = float(body.get("reward") or 0.0)
    self._total += reward
    done = bool(body.get("done"))
    return games.Move(
      self._see(body),
      reward=settings.reward_scale * reward,
      done=done,
      possible=bool(action),
      success=done and self._total >= settings.success_from,
    )

  def close(self) -> None:
    """Ends the session."""
    self._session = None
    with contextlib.suppress(Exception):
      self._open.close()
