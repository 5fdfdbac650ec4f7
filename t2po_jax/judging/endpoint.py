"""Plays a model behind an OpenAI-compatible endpoint.

The messages are those of training. As in training, a response ends with the
first string that closes an action; stop strings are not sent, because most
endpoints strip them from the response. If the list of models says that the
endpoint has an exploration control, as this project's server does, the control
is switched on or off as requested, and its state is carried from turn to turn.

A failed call is retried with increasing delays, or as the endpoint's
Retry-After says. Permanent errors (a wrong key, an unknown model) end the
evaluation with one line. The key is read from the environment and never shown.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import random
import threading
import time
from typing import Any

import httpx

from t2po_jax.envs import base, prompts
from t2po_jax.judging import dialogues

# Worth retrying.
_TEMPORARY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LONGEST_PAUSE = 60.0


@dataclasses.dataclass(frozen=True)
class Settings:
  """How an endpoint is called.

  Attributes:
    url: base URL, up to and including `/v1`.
    model: name of the model at the endpoint.
    key_variable: environment variable that holds the key; may be unset.
    max_tokens: the most tokens of a response.
    temperature: of sampling; 0 is greedy.
    top_p: of sampling.
    top_k: of sampling; sent only to endpoints with an exploration control,
      because others refuse it.
    control: whether to use the model's exploration control, if it has one.
    seed: of the evaluation.
    retries: the most retries of a call.
    timeout: of a call, in seconds.
    per_minute: the most calls per minute; 0 = no limit.
  """

  url: str
  model: str
  key_variable: str = "OPENAI_API_KEY"
  max_tokens: int = 256
  temperature: float = 0.0
  top_p: float = 1.0
  top_k: int = 0
  control: bool = False
  seed: int = 0
  retries: int = 6
  timeout: float = 120.0
  per_minute: float = 0.0


class Pace:
  """Limits the rate of calls from many threads."""

  def __init__(self, per_minute: float) -> None:
    self._gap = 60.0 / per_minute if per_minute else 0.0
    self._next = time.monotonic()
    self._lock = threading.Lock()

  def wait(self) -> None:
    """Sleeps until the next call may be made."""
    if not self._gap:
      return
    with self._lock:
      now = time.monotonic()
      start = max(self._next, now)
      self._next = start + self._gap
    time.sleep(max(0.0, start - now))


class Endpoint:
  """A model behind an endpoint; implements `dialogues.Player`.

  Attributes:
    counts: calls, retries, prompt and completion tokens so far.
    controlled: whether the model has an exploration control.
  """

  def __init__(
    self,
    settings: Settings,
    grammar: prompts.Grammar,
    *,
    transport: httpx.BaseTransport | None = None,
  ) -> None:
    """Connects, and checks the endpoint's list of models.

    Args:
      settings: how the endpoint is called.
      grammar: of the responses.
      transport: carries the requests; by default the network.

    Raises:
      ValueError: if the endpoint cannot be reached, refuses the key, or lists
        models without this one.
    """
    self._settings = settings
    self._grammar = grammar
    self._pace = Pace(settings.per_minute)
    self._lock = threading.Lock()
    self.counts: collections.Counter[str] = collections.Counter()
    key = os.environ.get(settings.key_variable, "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    self._client = httpx.Client(
      base_url=settings.url.rstrip("/") + "/",
      headers=headers,
      timeout=settings.timeout,
      transport=transport,
      limits=httpx.Limits(max_connections=None),
    )
    self.controlled = self._find_control()

  def _find_control(self) -> bool:
    """Whether the model has an exploration control; it must be listed."""
    try:
      listing = self._call("GET", "models", None)
    except _Refused as refused:
      if refused.status in (404, 405):
        return False  # Not every endpoint lists its models.
      raise
    cards = listing.get("data") if isinstance(listing, dict) else None
    if not isinstance(cards, list):
      return False
    names = [card.get("id") for card in cards if isinstance(card, dict)]
    if names and self._settings.model not in names:
      shown = ", ".join(str(name) for name in names[:8])
      raise ValueError(
        f"--model: {self._settings.url} has no model "
        f"{self._settings.model!r}, expected one of {shown}"
      )
    return any(
      card.get("id") == self._settings.model and "exploration_control" in card
      for card in cards
      if isinstance(card, dict)
    )

  def begin(self, env: base.Env, place: dialogues.Place) -> dialogues.Respond:
    """See `dialogues.Player`."""
    del env
    turn = 0

    def respond(
      messages: list[prompts.Message],
      observation: base.Observation,
      state: object,
    ) -> dialogues.Reply:
      nonlocal turn
      del observation
      seed = (self._settings.seed, place.number, place.repeat, turn)
      turn += 1
      return self._respond(messages, state, _fold(seed))

    return respond

  def _respond(
    self, messages: list[prompts.Message], state: object, seed: int
  ) -> dialogues.Reply:
    settings = self._settings
    body: dict[str, Any] = {
      "model": settings.model,
      "messages": list(messages),
      "max_tokens": settings.max_tokens,
      "temperature": settings.temperature,
      "top_p": settings.top_p,
      "seed": seed,
    }
    if self.controlled:
      body["top_k"] = settings.top_k
      control: dict[str, object] = {"enabled": settings.control}
      if state is not None:
        control["state"] = state
      body["exploration_control"] = control
    answer = self._call("POST", "chat/completions", body)
    try:
      choice = answer["choices"][0]
      text = choice["message"]["content"] or ""
      finish = choice.get("finish_reason") or "stop"
    except (KeyError, IndexError, TypeError):
      raise ValueError(
        f"--endpoint: found {json.dumps(answer)[:120]} as an answer, expected "
        "choices with a message"
      ) from None
    usage = answer.get("usage") or {}
    billed = (
      int(usage.get("prompt_tokens") or 0),
      int(usage.get("completion_tokens") or 0),
    )
    with self._lock:
      self.counts["prompt_tokens"] += billed[0]
      self.counts["completion_tokens"] += billed[1]
    text, stopped = cut(text, self._grammar.stops)
    extra = choice.get("exploration_control") or {}
    return dialogues.Reply(
      text,
      finish="length" if finish == "length" and not stopped else "stop",
      usage=billed,
      state=extra.get("state"),
    )

  def _call(self, method: str, path: str, body: Mapping | None) -> Any:
    """Makes a call, with retries while they may help.

    Raises:
      ValueError: for a permanent error.
      base.EnvError: if all retries failed; the episode is aborted.
    """
    settings, reason = self._settings, ""
    for attempt in range(settings.retries + 1):
      self._pace.wait()
      with self._lock:
        self.counts["calls"] += 1
        self.counts["repeated"] += attempt > 0
      pause = None
      try:
        response = self._client.request(method, path, json=body)
      except httpx.HTTPError as error:
        reason = f"{type(error).__name__}: {error}"
      else:
        if response.status_code < 400:
          try:
            return response.json()
          except ValueError:
            raise ValueError(
              f"--endpoint: {settings.url} answered {path} with "
              f"{response.text[:60]!r}, expected JSON"
            ) from None
        reason = f"{response.status_code} {_message(response)}"
        if response.status_code not in _TEMPORARY:
          raise _Refused(settings.url, response.status_code, reason)
        pause = _retry_after(response)
      if attempt < settings.retries:
        if pause is None:
          pause = min(0.5 * 2**attempt, _LONGEST_PAUSE)
          pause *= random.uniform(0.5, 1.0)
        time.sleep(pause)
    if method == "GET":
      raise ValueError(f"--endpoint: {settings.url} cannot be asked ({reason})")
    raise base.EnvError(f"{settings.url}: {reason}")

  def close(self) -> None:
    """Closes all connections."""
    self._client.close()


class _Refused(ValueError):
  """The endpoint refuses a request for good."""

  def __init__(self, url: str, status: int, reason: str) -> None:
    hint = "; set the key's variable" if status in (401, 403) else ""
    super().__init__(f"--endpoint: {url} answered {reason}{hint}")
    self.status = status


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
  """A text up to its first stop string, included, and whether it has one."""
  ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
  return (text[: min(ends)], True) if ends else (text, False)


def _fold(parts: Sequence[int]) -> int:
  """Hashes several numbers to 31 bits, the same on every machine."""
  hashed = 0
  for part in parts:
    hashed = (hashed * 1_000_003 + part + 1) % (1 << 31)
  return hashed


def _message(response: httpx.Response) -> str:
  """The endpoint's error message, in one line."""
  try:
    error = response.json()["error"]
    text = error["message"] if isinstance(error, dict) else error
  except (ValueError, KeyError, TypeError):
    text = response.text
  return " ".join(str(text).split())[:200]


def _retry_after(response: httpx.Response) -> float | None:
  """Seconds that the endpoint asks to wait; None if it gives none."""
  try:
    pause = float(response.headers.get("retry-after", ""))
  except ValueError:
    return None
  return min(max(pause, 0.0), _LONGEST_PAUSE)
