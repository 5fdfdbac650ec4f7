"""The OpenAI API over HTTP: a Starlette application around an engine.

Needs the extra `serve`. A client that disconnects frees its slots at once,
whether it was reading a stream or waiting for a complete response.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
import contextlib
import dataclasses
import json
import secrets
import time
from typing import Any

from absl import logging
import numpy as np
from starlette import applications, requests, responses, routing

from t2po_jax import records, types
from t2po_jax.models import tokenizer as tokenizer_lib
from t2po_jax.rollout import sampler as samplers
from t2po_jax.serving import engine as engines
from t2po_jax.serving import protocol

MOST_BYTES = 8 << 20


@dataclasses.dataclass
class Choice:
  """One response of a request in progress.

  Attributes:
    index: of the choice.
    prompt: [T] int32, token ids.
    opening: the text that the answer begins with; it is not sampled.
    ticket: of the engine's job.
    sent: characters of the text that have been streamed.
    sent_tokens: tokens whose log-probabilities have been streamed.
  """

  index: int
  prompt: np.ndarray
  opening: str = ""
  ticket: int = -1
  sent: int = 0
  sent_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Text:
  """The text of a choice so far.

  Attributes:
    text: of the sampled tokens, up to a stop string.
    pieces: the text of each token that is at least partly included.
    stopped: whether a stop string of the request was found.
  """

  text: str
  pieces: list[str]
  stopped: bool


class Server:
  """Serves requests with one engine."""

  def __init__(
    self,
    model: protocol.Model,
    tokenizer: tokenizer_lib.Tokenizer,
    engine: engines.Engine,
    *,
    key: str = "",
  ) -> None:
    """Creates the server.

    Args:
      model: the model that is served.
      tokenizer: of the model.
      engine: samples the responses; it is closed with the application.
      key: the bearer token that clients must send; empty for none.
    """
    self._model = model
    self._tokenizer = tokenizer
    self._engine = engine
    self._key = key
    self._token_bytes = tokenizer.token_bytes()

  def app(self) -> applications.Starlette:
    """The ASGI application."""
    route = routing.Route

    @contextlib.asynccontextmanager
    async def lifespan(app: applications.Starlette) -> AsyncIterator[None]:
      del app
      yield
      await asyncio.to_thread(self._engine.close)

    return applications.Starlette(
      routes=[
        route("/health", self._health),
        route("/v1/models", self._answer(self._models)),
        route("/v1/models/{name:path}", self._answer(self._one_model)),
        route(
          "/v1/chat/completions", self._answer(self._chat), methods=["POST"]
        ),
        route(
          "/v1/completions", self._answer(self._complete), methods=["POST"]
        ),
      ],
      exception_handlers={404: _not_found, 405: _not_found},
      lifespan=lifespan,
    )

  def _answer(
    self, handler: Callable[[requests.Request], Awaitable[responses.Response]]
  ) -> Callable[[requests.Request], Awaitable[responses.Response]]:
    """Wraps a handler: checks the key and turns errors into responses."""

    async def endpoint(request: requests.Request) -> responses.Response:
      try:
        given = request.headers.get("authorization", "")
        wanted = f"Bearer {self._key}"
        if self._key and not secrets.compare_digest(
          given.encode(), wanted.encode()
        ):
          raise protocol.Refused(401, "the key is missing or wrong")
        return await handler(request)
      except protocol.Refused as refused:
        return responses.JSONResponse(refused.body, refused.status)
      except engines.Busy as busy:
        body = protocol.Refused(503, f"try again later: {busy}").body
        return responses.JSONResponse(body, 503, {"Retry-After": "1"})

    return endpoint

  async def _health(self, request: requests.Request) -> responses.Response:
    del request
    return responses.JSONResponse(self._engine.load)

  async def _models(self, request: requests.Request) -> responses.Response:
    del request
    card = self._model.card()
    return responses.JSONResponse({"object": "list", "data": [card]})

  async def _one_model(self, request: requests.Request) -> responses.Response:
    name = request.path_params["name"]
    if name != self._model.name:
      raise protocol.Refused(
        404, f"the model {name!r} does not exist", code="model_not_found"
      )
    return responses.JSONResponse(self._model.card())

  async def _chat(self, request: requests.Request) -> responses.Response:
    return await self._serve(request, chat=True)

  async def _complete(self, request: requests.Request) -> responses.Response:
    return await self._serve(request, chat=False)

  async def _serve(
    self, request: requests.Request, *, chat: bool
  ) -> responses.Response:
    ask = protocol.parse(await _body(request), self._model, chat=chat)
    choices = self._choices(ask, chat=chat)
    exchange = _Exchange(self._engine, self._model.name, chat=chat)
    try:
      self._submit(ask, choices, exchange)
    except BaseException:
      exchange.cancel(choices)
      raise
    if ask.stream:
      return responses.StreamingResponse(
        self._stream(ask, choices, exchange), media_type="text/event-stream"
      )
    whole = asyncio.ensure_future(self._whole(ask, choices, exchange))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
      await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
      if not whole.done():
        return responses.Response(status_code=499)
      return responses.JSONResponse(whole.result())
    finally:
      exchange.cancel(choices)
      for task in (whole, gone):
        task.cancel()

  def _choices(self, ask: protocol.Ask, *, chat: bool) -> list[Choice]:
    """The prompts as token ids, each repeated as often as requested.

    Raises:
      Refused: if one is too long or contains unknown ids.
    """
    choices = []
    for prompt in ask.prompts:
      opening = ""
      if chat:
        messages = prompt
        prefix = opening = self._model.prefix
        if messages[-1]["role"] == "assistant":
          *messages, last = messages
          prefix, opening = last["content"], ""
        ids = self._tokenizer.render_chat(messages, prefix)
      elif isinstance(prompt, str):
        ids = self._tokenizer.encode(prompt)
      else:
        ids = prompt
      if not ids or not all(0 <= i < self._tokenizer.vocab_size for i in ids):
        raise protocol.Refused(
          400, "prompt: empty, or with unknown token ids", param="prompt"
        )
      if len(ids) > self._model.max_prompt:
        raise protocol.Refused(
          400,
          f"the prompt has {len(ids)} tokens; this model takes "
          f"{self._model.max_prompt} at most",
          param="messages" if chat else "prompt",
          code="context_length_exceeded",
        )
      for _ in range(ask.choices):
        ids = np.asarray(ids, np.int32)
        choices.append(Choice(len(choices), ids, opening))
    return choices

  def _submit(
    self, ask: protocol.Ask, choices: Sequence[Choice], exchange: "_Exchange"
  ) -> None:
    seed = secrets.randbits(63) if ask.seed is None else ask.seed
    for choice in choices:
      progress, finished = exchange.listeners(choice.index)
      choice.ticket = self._engine.submit(
        engines.Job(
          prompt=choice.prompt,
          setting=engines.Setting(ask.sampling, ask.controlled, ask.epsilon),
          limit=ask.limit,
          key=engines.key_of((seed, choice.index)),
          signal=ask.signal,
          watched=ask.stream or bool(ask.stops),
          progress=progress,
          finished=finished,
        )
      )

  def _read(
    self, attempt: types.Attempt, stops: Sequence[str], *, final: bool
  ) -> Text:
    """The text of some tokens, cut off at a stop string."""
    pieces = records.pieces_of(attempt.tokens, self._token_bytes, final=final)
    text = "".join(pieces)
    end = protocol.cut(text, stops)
    if end is None:
      return Text(text, pieces, False)
    kept, size = [], 0
    for piece in pieces:
      if size >= end:
        break
      kept.append(piece)
      size += len(piece)
    return Text(text[:end], kept, True)

  async def _events(
    self, ask: protocol.Ask, choices: Sequence[Choice], exchange: "_Exchange"
  ) -> AsyncIterator[tuple[Choice, samplers.Completion, Text, bool]]:
    """Yields (choice, completion, text, ended) for each step of each choice."""
    left = {choice.index for choice in choices}
    while left:
      index, completion, final = await exchange.next()
      if index not in left:
        continue  # Already ended by a stop string.
      choice = choices[index]
      if completion is None:
        raise protocol.Refused(500, "the engine failed; see the server's log")
      attempt = completion.attempt
      text = self._read(attempt, ask.stops, final=final)
      ended = final or text.stopped
      if text.stopped and not final:
        self._engine.cancel([choice.ticket])
      if ended:
        left.discard(index)
      yield choice, completion, text, ended

  async def _whole(
    self, ask: protocol.Ask, choices: Sequence[Choice], exchange: "_Exchange"
  ) -> dict[str, Any]:
    """The response to a request without streaming."""
    made: list[dict[str, Any]] = [{} for _ in choices]
    used = 0
    async for choice, completion, text, ended in self._events(
      ask, choices, exchange
    ):
      if ended:
        used += len(completion.attempt.tokens)
        entry: dict[str, Any] = {"index": choice.index}
        content = choice.opening + text.text
        if exchange.chat:
          entry["message"] = {"role": "assistant", "content": content}
        else:
          entry["text"] = content
        entry["finish_reason"] = _reason(completion, text)
        entry["logprobs"] = None
        if ask.logprobs:
          entry["logprobs"] = self._logprobs(completion, text, 0, exchange.chat)
        entry["exploration_control"] = protocol.control_entry(completion)
        made[choice.index] = entry
    prompt_tokens = _prompt_tokens(ask, choices)
    return exchange.head("") | {
      "choices": made,
      "usage": protocol.usage(prompt_tokens, used),
    }

  async def _stream(
    self, ask: protocol.Ask, choices: Sequence[Choice], exchange: "_Exchange"
  ) -> AsyncIterator[str]:
    """The response to a request as server-sent events."""
    used = 0
    try:
      for choice in choices:
        if exchange.chat:
          delta = {"role": "assistant", "content": choice.opening}
          yield _event(exchange.piece(choice.index, delta))
        elif choice.opening:
          yield _event(exchange.piece(choice.index, choice.opening))
      async for choice, completion, text, ended in self._events(
        ask, choices, exchange
      ):
        end = len(text.text)
        if not ended:
          end -= protocol.held_back(text.text, ask.stops)
        fresh = text.text[choice.sent : end]
        logprobs = None
        if ask.logprobs:
          shown = _covering(text.pieces, end)
          partly = Text(text.text, text.pieces[:shown], False)
          logprobs = self._logprobs(
            completion, partly, choice.sent_tokens, exchange.chat
          )
          choice.sent_tokens = max(shown, choice.sent_tokens)
        if fresh:
          delta = {"content": fresh} if exchange.chat else fresh
          yield _event(exchange.piece(choice.index, delta, logprobs=logprobs))
          choice.sent = end
        if ended:
          used += len(completion.attempt.tokens)
          last = exchange.piece(
            choice.index, {} if exchange.chat else "", _reason(completion, text)
          )
          control = protocol.control_entry(completion)
          last["choices"][0]["exploration_control"] = control
          yield _event(last)
      if ask.stream_usage:
        account = protocol.usage(_prompt_tokens(ask, choices), used)
        chunk = exchange.head(".chunk") | {"choices": [], "usage": account}
        yield _event(chunk)
      yield "data: [DONE]\n\n"
    except protocol.Refused as refused:
      yield _event(refused.body)
    finally:
      exchange.cancel(choices)

  def _logprobs(
    self, completion: samplers.Completion, text: Text, first: int, chat: bool
  ) -> dict[str, Any]:
    """Log-probabilities of the tokens from `first` on."""
    entries = protocol.token_entries(
      completion.attempt, text.pieces, self._token_bytes, first
    )
    if chat:
      return {"content": entries, "refusal": None}
    before = sum(map(len, text.pieces[:first]))
    return protocol.text_logprobs(entries, before)


class _Exchange:
  """Passes results from the engine's thread to the event loop."""

  def __init__(self, engine: engines.Engine, model: str, *, chat: bool) -> None:
    self.chat = chat
    self._engine = engine
    self._model = model
    self._id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
    self._created = int(time.time())
    self._loop = asyncio.get_running_loop()
    self._queue: asyncio.Queue = asyncio.Queue()

  def listeners(
    self, index: int
  ) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    """The engine's callbacks for one choice."""

    def put(*event: Any) -> None:
      try:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
      except RuntimeError:
        logging.info("a response ended after its server")

    return (
      lambda completion: put(index, completion, False),
      lambda completion: put(index, completion, True),
    )

  async def next(self) -> tuple[int, Any, bool]:
    """(choice, completion or None, whether it has ended)."""
    return await self._queue.get()

  def cancel(self, choices: Sequence[Choice]) -> None:
    """Frees the slots of everything still in progress."""
    self._engine.cancel([c.ticket for c in choices if c.ticket >= 0])

  def head(self, suffix: str) -> dict[str, Any]:
    """The fields that every response object begins with."""
    kind = "chat.completion" if self.chat else "text_completion"
    return {
      "id": self._id,
      "object": kind + (suffix if self.chat else ""),
      "created": self._created,
      "model": self._model,
    }

  def piece(
    self,
    index: int,
    delta: Any,
    reason: str | None = None,
    *,
    logprobs: Any = None,
  ) -> dict[str, Any]:
    """One chunk of a stream."""
    choice: dict[str, Any] = {"index": index}
    choice["delta" if self.chat else "text"] = delta
    choice |= {"finish_reason": reason, "logprobs": logprobs}
    return self.head(".chunk") | {"choices": [choice]}


def _event(body: dict[str, Any]) -> str:
  return f"data: {json.dumps(body)}\n\n"


def _covering(pieces: Sequence[str], end: int) -> int:
  """The number of tokens that end before a character."""
  size = 0
  for number, piece in enumerate(pieces):
    size += len(piece)
    if size > end:
      return number
  return len(pieces)


def _reason(completion: samplers.Completion, text: Text) -> str:
  """The `finish_reason` of a response."""
  length = completion.attempt.finish == "length" and not text.stopped
  return "length" if length else "stop"


def _prompt_tokens(ask: protocol.Ask, choices: Sequence[Choice]) -> int:
  """Tokens of all prompts; each prompt counts once, whatever `n` is."""
  return sum(len(choice.prompt) for choice in choices[:: ask.choices])


async def _body(request: requests.Request) -> bytes:
  data = bytearray()
  async for chunk in request.stream():
    data += chunk
    if len(data) > MOST_BYTES:
      raise protocol.Refused(413, f"the body has more than {MOST_BYTES} bytes")
  return bytes(data)


async def _disconnected(request: requests.Request) -> None:
  """Returns when the client has disconnected."""
  while (await request.receive())["type"] != "http.disconnect":
    pass


async def _not_found(
  request: requests.Request, error: Exception
) -> responses.Response:
  del error
  message = f"there is no {request.method} {request.url.path}"
  body = protocol.Refused(404, message).body
  return responses.JSONResponse(body, 404)
