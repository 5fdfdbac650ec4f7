"""Requests and responses of the OpenAI API, as plain dicts.

Chat completions and completions, with sampling, `n`, stop strings, seed,
streaming, log-probabilities of the chosen tokens, and usage. Unsupported
options are refused rather than ignored. There are two extensions:

  exploration_control  in a request: {"enabled": bool, "epsilon": number,
      "state": [...]}; in a choice: {"phi", "fired_at", "thinking_tokens",
      "state"}. `state` is the state of the uncertainty signal, carried from one
      turn of an episode to the next.
  logprobs             every token also has `uncertainty`, `entropy`,
      `confidence` and `forced`.

If the last message is the assistant's, it is continued. Otherwise the response
begins with the prefix that the policy was trained with, which is included in
the response. The policy's own stop strings, which close its actions, end a
response and are kept in it; those of the request are cut off, as usual.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
from typing import Any

import numpy as np

from t2po_jax import keys, types
from t2po_jax.rollout import draw
from t2po_jax.rollout import sampler as samplers

ROLES = {
  "system": "system",
  "developer": "system",
  "user": "user",
  "assistant": "assistant",
}
# Without effect on the answer.
_IGNORED = {
  "user",
  "metadata",
  "store",
  "service_tier",
  "safety_identifier",
  "prompt_cache_key",
  "suffix",
}
# Accepted only with these values.
_ONLY = {
  "presence_penalty": (0, 0.0, None),
  "frequency_penalty": (0, 0.0, None),
  "logit_bias": ({}, None),
  "tools": ([], None),
  "tool_choice": ("none", None),
  "functions": ([], None),
  "response_format": ({"type": "text"}, None),
  "best_of": (1, None),
  "echo": (False, None),
}
_KNOWN = {
  "model",
  "max_tokens",
  "max_completion_tokens",
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "n",
  "stop",
  "stream",
  "stream_options",
  "seed",
  "logprobs",
  "exploration_control",
}
MOST_CHOICES = 64
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 256


class Refused(ValueError):
  """A request that is answered with an error.

  Attributes:
    status: the HTTP status.
    body: the error object.
  """

  def __init__(
    self, status: int, message: str, *, param: str = "", code: str = ""
  ) -> None:
    super().__init__(message)
    self.status = status
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind}
    self.body = {
      "error": error | {"param": param or None, "code": code or None}
    }


@dataclasses.dataclass(frozen=True)
class Model:
  """The served model.

  Attributes:
    name: its id.
    created: Unix seconds.
    prefix: the text that its responses begin with.
    max_prompt: most tokens of a prompt, the prefix included.
    max_response: most tokens of a response.
    sampling: the default sampling settings.
    epsilon: threshold of the exploration control.
    controlled: whether the control acts by default.
    state_size: W, the size of the uncertainty signal's state.
  """

  name: str
  created: int
  prefix: str
  max_prompt: int
  max_response: int
  sampling: draw.Sampling
  epsilon: float
  controlled: bool
  state_size: int

  def card(self) -> dict[str, Any]:
    """The entry of the list of models."""
    return {
      "id": self.name,
      "object": "model",
      "created": self.created,
      "owned_by": "t2po_jax",
      "prefix": self.prefix,
      "max_prompt_tokens": self.max_prompt,
      "max_response_tokens": self.max_response,
      "exploration_control": self.controlled,
    }


@dataclasses.dataclass(frozen=True)
class Ask:
  """A checked request.

  Attributes:
    prompts: chats (lists of messages), texts or token ids.
    limit: most tokens of a response.
    sampling: how tokens are drawn.
    choices: responses per prompt.
    stops: strings that end a response; they are cut off.
    stream: whether the response is streamed.
    stream_usage: whether the last chunk reports the usage.
    seed: None for a random one.
    logprobs: whether log-probabilities are returned.
    controlled: whether the exploration control acts.
    epsilon: its threshold.
    signal: [W] float32, the state of the uncertainty signal; None at the start.
  """

  prompts: list[Any]
  limit: int
  sampling: draw.Sampling
  choices: int
  stops: tuple[str, ...]
  stream: bool
  stream_usage: bool
  seed: int | None
  logprobs: bool
  controlled: bool
  epsilon: float
  signal: np.ndarray | None


def parse(body: bytes, model: Model, *, chat: bool) -> Ask:
  """Checks a request.

  Args:
    body: of the HTTP request.
    model: what is served.
    chat: whether messages are expected rather than a prompt.

  Raises:
    Refused: if the request is invalid.
  """
  try:
    request = json.loads(body)
  except (ValueError, RecursionError):
    raise Refused(400, "the body is not valid JSON") from None
  if not isinstance(request, dict):
    raise Refused(400, f"the body is {type(request).__name__}, not an object")
  own = {"messages", "top_logprobs"} if chat else {"prompt"}
  _check_keys(request, _KNOWN | own)
  if not isinstance(request.get("model"), str):
    raise Refused(400, "model: a name is missing", param="model")
  if request["model"] != model.name:
    raise Refused(
      404,
      f"the model {request['model']!r} does not exist; this is {model.name!r}",
      param="model",
      code="model_not_found",
    )
  if request.get("top_logprobs"):
    raise Refused(
      400,
      "top_logprobs: only the chosen token is known; use 0",
      param="top_logprobs",
    )
  controlled, epsilon, signal = _control(request, model)
  most = request.get("max_completion_tokens", request.get("max_tokens"))
  options = request.get("stream_options") or {}
  if not isinstance(options, dict):
    raise Refused(400, "stream_options: not an object", param="stream_options")
  return Ask(
    prompts=[_messages(request)] if chat else _prompts(request),
    limit=_limit(most, model),
    sampling=_sampling(request, model.sampling),
    choices=_whole(request, "n", 1, 1, MOST_CHOICES),
    stops=_stops(request),
    stream=_flag(request, "stream"),
    stream_usage=_flag(options, "include_usage"),
    seed=_seed(request),
    logprobs=_wants_logprobs(request, chat),
    controlled=controlled,
    epsilon=epsilon,
    signal=signal,
  )


def _check_keys(request: Mapping[str, Any], known: set[str]) -> None:
  for key, value in request.items():
    if key in _ONLY:
      if value not in _ONLY[key]:
        raise Refused(400, f"{key}: this server does not support it", param=key)
    elif key not in known | _IGNORED:
      hint = keys.suggestion(key, known)
      raise Refused(400, f"{key}: unknown{hint}", param=key)


def _number(
  request: Mapping[str, Any],
  key: str,
  default: float,
  least: float,
  most: float,
) -> float:
  """A number of a request, checked against its bounds; null: the default."""
  value = request.get(key)
  if value is None:
    return default
  good = isinstance(value, int | float) and not isinstance(value, bool)
  if not good or not math.isfinite(value) or not least <= value <= most:
    raise Refused(
      400,
      f"{key}: found {value!r}, expected a number from {least:g} to {most:g}",
      param=key,
    )
  return value


def _whole(
  request: Mapping[str, Any], key: str, default: int, least: int, most: int
) -> int:
  value = _number(request, key, default, least, most)
  if int(value) != value:
    raise Refused(
      400, f"{key}: found {value!r}, expected a whole number", param=key
    )
  return int(value)


def _flag(request: Mapping[str, Any], key: str) -> bool:
  value = request.get(key)
  if value not in (None, True, False):
    raise Refused(
      400, f"{key}: found {value!r}, expected true or false", param=key
    )
  return bool(value)


def _seed(request: Mapping[str, Any]) -> int | None:
  if request.get("seed") is None:
    return None
  # Any 64 bits; random keys are derived from numbers >= 0.
  return _whole(request, "seed", 0, -(2**63), 2**63) % 2**64


def _wants_logprobs(request: Mapping[str, Any], chat: bool) -> bool:
  if chat:
    return _flag(request, "logprobs")
  return request.get("logprobs") is not None and (
    _whole(request, "logprobs", 0, 0, 1) >= 0
  )


def _limit(most: Any, model: Model) -> int:
  request = {"max_tokens": most}
  return _whole(
    request, "max_tokens", model.max_response, 1, model.max_response
  )


def _sampling(
  request: Mapping[str, Any], default: draw.Sampling
) -> draw.Sampling:
  top_p = _number(request, "top_p", default.top_p, 0.0, 1.0)
  if top_p == 0:
    raise Refused(400, "top_p: found 0, expected more", param="top_p")
  temperature = _number(request, "temperature", default.temperature, 0.0, 2.0)
  if temperature == 0:
    return draw.Sampling(temperature=0.0)  # One program for all of them.
  return draw.Sampling(
    temperature=float(temperature),
    top_k=_whole(request, "top_k", default.top_k, 0, 1 << 20),
    top_p=float(top_p),
    min_p=float(_number(request, "min_p", default.min_p, 0.0, 0.999)),
  )


def _stops(request: Mapping[str, Any]) -> tuple[str, ...]:
  stops = request.get("stop")
  if stops is None:
    return ()
  stops = [stops] if isinstance(stops, str) else stops
  good = isinstance(stops, list) and len(stops) <= MOST_STOPS
  if not good or not all(
    isinstance(s, str) and 0 < len(s) <= MOST_STOP_CHARACTERS for s in stops
  ):
    raise Refused(
      400,
      f"stop: expected a string, or up to {MOST_STOPS} of them, of 1 to "
      f"{MOST_STOP_CHARACTERS} characters",
      param="stop",
    )
  return tuple(stops)


def _messages(request: Mapping[str, Any]) -> list[dict[str, str]]:
  """The messages of a chat, with the content of each as a single string."""
  given = request.get("messages")
  if not isinstance(given, list) or not given:
    raise Refused(
      400, "messages: expected a list of at least one", param="messages"
    )
  messages = []
  for number, message in enumerate(given):
    where = f"messages[{number}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
      raise Refused(
        400,
        f"{where}: expected a role out of {', '.join(ROLES)}",
        param="messages",
      )
    content = message.get("content")
    if isinstance(content, list):
      content = _joined(content)
    if not isinstance(content, str):
      raise Refused(
        400,
        f"{where}: expected content as a string or as parts of text",
        param="messages",
      )
    messages.append({"role": ROLES[message["role"]], "content": content})
  return messages


def _joined(parts: list[Any]) -> str | None:
  """The text of a message in parts; None if they are anything but text."""
  texts = [p["text"] for p in parts if _is_text(p)]
  return "".join(texts) if len(texts) == len(parts) else None


def _is_text(part: Any) -> bool:
  is_text = isinstance(part, dict) and part.get("type") == "text"
  return is_text and isinstance(part.get("text"), str)


def _prompts(request: Mapping[str, Any]) -> list[Any]:
  """One or several prompts, as texts or token ids."""
  given = request.get("prompt")

  def is_ids(value: Any) -> bool:
    return bool(value) and all(type(i) is int for i in value)

  if isinstance(given, str):
    return [given]
  if isinstance(given, list) and is_ids(given):
    return [given]
  if isinstance(given, list) and 0 < len(given) <= MOST_CHOICES:
    if all(isinstance(p, str) for p in given):
      return given
    if all(isinstance(p, list) and is_ids(p) for p in given):
      return given
  raise Refused(
    400,
    "prompt: expected a string, token ids, or a list of either, of at most "
    f"{MOST_CHOICES}",
    param="prompt",
  )


def _control(
  request: Mapping[str, Any], model: Model
) -> tuple[bool, float, np.ndarray | None]:
  """Whether the exploration control acts, its epsilon and the state."""
  given = request.get("exploration_control")
  if given is None:
    return model.controlled, model.epsilon * model.controlled, None
  name = "exploration_control"
  if not isinstance(given, dict) or set(given) - {
    "enabled",
    "epsilon",
    "state",
  }:
    raise Refused(
      400, f"{name}: expected enabled, epsilon or state", param=name
    )
  enabled = _flag(given, "enabled") if "enabled" in given else model.controlled
  epsilon = _number(given, "epsilon", model.epsilon, 0.0, 1e9)
  signal = None
  if given.get("state") is not None:
    signal = read_state(given["state"], model.state_size)
  return enabled, float(epsilon) if enabled else 0.0, signal


# JSON has no infinity.
_INFINITIES = {"inf": math.inf, "-inf": -math.inf}


def read_state(state: Any, size: int) -> np.ndarray:
  """Reads the output of `write_state`.

  Raises:
    Refused: if it is invalid.
  """
  good = isinstance(state, list) and len(state) == size
  numbers = []
  for value in state if good else ():
    number = _INFINITIES.get(value) if isinstance(value, str) else value
    good = good and isinstance(number, int | float)
    numbers.append(number)
  if not good:
    raise Refused(
      400,
      f"exploration_control.state: expected the {size} numbers of an answer",
      param="exploration_control",
    )
  return np.asarray(numbers, np.float32)


def write_state(signal: np.ndarray | None) -> list[float | str] | None:
  """The state of the uncertainty signal, as JSON."""
  if signal is None:
    return None
  return [
    float(x) if math.isfinite(x) else ("inf" if x > 0 else "-inf")
    for x in signal
  ]


def cut(text: str, stops: Sequence[str]) -> int | None:
  """The position of the first stop string in a text; None without one."""
  found = [text.find(stop) for stop in stops if stop in text]
  return min(found, default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
  """The number of characters at the end that may begin a stop string."""
  longest = 0
  for stop in stops:
    for size in range(min(len(stop) - 1, len(text)), longest, -1):
      if text.endswith(stop[:size]):
        longest = size
        break
  return longest


def token_entries(
  attempt: types.Attempt,
  pieces: Sequence[str],
  token_bytes: Sequence[bytes],
  first: int = 0,
) -> list[dict[str, Any]]:
  """The chosen tokens from `first` on, with their measurements.

  Args:
    attempt: the response.
    pieces: the text of each token that is returned.
    token_bytes: what each token id adds to the text.
    first: index of the first token.
  """
  entries = []
  for i in range(first, len(pieces)):
    token = int(attempt.tokens[i])
    data = token_bytes[token] if token < len(token_bytes) else b""
    entries.append(
      {
        "token": pieces[i],
        "bytes": list(data),
        "logprob": float(attempt.logprobs[i]),
        "top_logprobs": [],
        "uncertainty": float(attempt.uncertainty[i]),
        "entropy": float(attempt.entropy[i]),
        "confidence": float(attempt.confidence[i]),
        "forced": bool(attempt.forced[i]),
      }
    )
  return entries


def control_entry(completion: samplers.Completion) -> dict[str, Any]:
  """The exploration control's report on a response."""
  attempt = completion.attempt
  return {
    "phi": attempt.phi if math.isfinite(attempt.phi) else None,
    "fired_at": attempt.fired_at,
    "thinking_tokens": attempt.thinking_tokens,
    "state": write_state(completion.signal),
  }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
  """The usage object of a response."""
  return {
    "prompt_tokens": prompt_tokens,
    "completion_tokens": completion_tokens,
    "total_tokens": prompt_tokens + completion_tokens,
  }


def text_logprobs(entries: Sequence[Mapping[str, Any]], offset: int) -> dict:
  """The `logprobs` object of the completion API."""
  offsets, at = [], offset
  for entry in entries:
    offsets.append(at)
    at += len(entry["token"])
  return {
    "tokens": [entry["token"] for entry in entries],
    "token_logprobs": [entry["logprob"] for entry in entries],
    "top_logprobs": None,
    "text_offset": offsets,
    **{
      name: [entry[name] for entry in entries]
      for name in ("uncertainty", "entropy", "confidence", "forced")
    },
  }
