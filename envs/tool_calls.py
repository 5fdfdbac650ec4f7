"""Actions as tool calls, the format that instruction-tuned models know.

Instruction-tuned models such as Qwen and Hermes call tools with

  <tool_call>
  {"name": "search", "arguments": {"query": "..."}}
  </tool_call>

`ToolCalls` adapts any benchmark with tagged actions to such a model: calls in
responses become tagged actions, and tagged actions become calls in prompts,
expert responses and the corpus. Everything else is unchanged. A call that is
not JSON, names an unknown tool, or has wrong arguments is an invalid action,
like a tag that was never closed; so is a tagged action.
"""

from collections.abc import Mapping
import dataclasses
import json
import re
from typing import Any

from t2po_jax.envs import base, prompts

NAME = "tool_call"
_BLOCK = re.compile(rf"(<{NAME}>.*?</{NAME}>)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class CallGrammar(prompts.Grammar):
  """The grammar of responses that end with a tool call.

  Attributes:
    actions: `tool_call`, the only tag that contains the action.
    closing: closes the thought and opens the call; with a single tool, up to
      its argument.
    tools: the available tools.
  """

  tools: tuple[prompts.Tool, ...] = ()

  def write(self, content: str, kind: str = "") -> str:
    """A tool call; `kind`, the tool's name, defaults to the first."""
    tool = self._tool(kind) or self.tools[0]
    call = {"name": tool.name, "arguments": {tool.argument: content}}
    text = json.dumps(call, ensure_ascii=False)
    return f"<{NAME}>\n{text}\n</{NAME}>"

  def read(self, call: str) -> tuple[str, str] | None:
    """Parses the inside of a call into tool and argument; None if malformed."""
    try:
      parsed = json.loads(call)
    except (ValueError, RecursionError):
      return None
    if not isinstance(parsed, dict) or parsed.keys() != {"name", "arguments"}:
      return None
    tool, arguments = self._tool(parsed["name"]), parsed["arguments"]
    if tool is None or not isinstance(arguments, dict):
      return None
    content = arguments.get(tool.argument)
    if len(arguments) != 1 or not isinstance(content, str):
      return None
    return tool.name, content

  def _tool(self, name: Any) -> prompts.Tool | None:
    return next((tool for tool in self.tools if tool.name == name), None)

  def schemas(self) -> list[dict[str, Any]]:
    """The tools in the format that chat templates take (`tools=`)."""
    return [
      {
        "type": "function",
        "function": {
          "name": tool.name,
          "description": tool.meaning,
          "parameters": {
            "type": "object",
            "properties": {tool.argument: {"type": "string"}},
            "required": [tool.argument],
          },
        },
      }
      for tool in self.tools
    ]


def grammar_of(tagged: prompts.Grammar) -> CallGrammar:
  """The tool-call grammar equivalent to a grammar of tagged actions."""
  tools = tagged.tools or tuple(prompts.Tool(tag) for tag in tagged.actions)
  opening = '{"name": "'
  if len(tools) == 1:
    name, argument = tools[0].name, tools[0].argument
    opening += f'{name}", "arguments": {{"{argument}": "'
  return CallGrammar((NAME,), f"</think>\n<{NAME}>\n{opening}", tools=tools)


class ToolCalls(base.Benchmark):
  """A benchmark with tagged actions, played with tool calls.

  Attributes:
    tagged: the wrapped benchmark.
  """

  Settings = base.Settings

  def __init__(self, tagged: base.Benchmark) -> None:
    """Wraps the benchmark."""
    self.tagged = tagged
    self.max_turns = tagged.max_turns
    self.splits: Mapping[str, tuple[str, ...]] = tagged.splits
    self.threadsafe = tagged.threadsafe
    self.grammar: CallGrammar = grammar_of(tagged.grammar)
    tags = "|".join(map(re.escape, tagged.grammar.actions))
    # In prompts: `between <a> and </a>`; anywhere: `<a>what</a>`.
    self._mentioned = re.compile(
      rf"(?:between|inside|into|in) <({tags})> and </\1>"
    )
    self._written = re.compile(rf"\s*<({tags})>(.*?)</\1>", re.DOTALL)
    self._any_tag = re.compile(rf"<(/?(?:{tags}))>", re.IGNORECASE)

  def env(self) -> "ToolEnv":
    """A new environment."""
    return ToolEnv(self, self.tagged.env())

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """The benchmark's messages, with tags replaced by calls."""
    return [
      {**message, "content": self.to_calls(message["content"])}
      for message in self.tagged.render(view)
    ]

  def category(self, task_id: str) -> str:
    """The part of the benchmark that a task belongs to."""
    return self.tagged.category(task_id)

  def corpus(self) -> list[str]:
    """The benchmark's corpus, with tags replaced by calls."""
    return [self.to_calls(text) for text in self.tagged.corpus()]

  def to_calls(self, text: str) -> str:
    """Replaces tagged actions in a text by calls."""

    def call(match: re.Match[str]) -> str:
      space = "\n" if match[0][0].isspace() or self._ends_thought(match) else ""
      return space + self.grammar.write(match[2].strip(), match[1])

    text = self._mentioned.sub(
      lambda match: "in a call " + self.grammar.write("...", match[1]), text
    )
    return self._written.sub(call, text)

  def _ends_thought(self, match: re.Match[str]) -> bool:
    return match.string[: match.start()].endswith("</think>")

  def to_tags(self, response: str) -> str:
    """Replaces well-formed calls in a response by tagged actions.

    Malformed calls stay as they are and are not actions; neither are tags in
    the response itself.
    """
    parts = _BLOCK.split(response)
    for place, part in enumerate(parts):
      if place % 2:
        parts[place] = self._to_tag(part)
      else:
        parts[place] = self._any_tag.sub(r"<\1 >", part)
    return "".join(parts)

  def _to_tag(self, block: str) -> str:
    inside = block.removeprefix(f"<{NAME}>").removesuffix(f"</{NAME}>")
    call = self.grammar.read(inside)
    if call is None or self._any_tag.search(call[1]):
      return self._any_tag.sub(r"<\1 >", block)
    name, content = call
    return f"<{name}>{content}</{name}>"


class ToolEnv(base.Env):
  """An environment of `ToolCalls`."""

  def __init__(self, benchmark: ToolCalls, tagged: base.Env) -> None:
    """Wraps the environment."""
    self._benchmark = benchmark
    self._tagged = tagged

  def reset(self, task_id: str) -> base.Observation:
    """Starts the episode of a task; see `envs.base.Env.reset`."""
    return self._show(self._tagged.reset(task_id))

  def step(self, response: str) -> base.StepResult:
    """Executes one response; see `envs.base.Env.step`."""
    result = self._tagged.step(self._benchmark.to_tags(response))
    shown = self._show(result.observation)
    return dataclasses.replace(result, observation=shown)

  def _show(self, observation: base.Observation) -> base.Observation:
    """The observation, with mentions of tags reworded for calls."""
    text = self._benchmark.to_calls(observation.text)
    return dataclasses.replace(observation, text=text)

  def expert(self, seed: int) -> base.Expert:
    """The environment's expert, with tool calls."""
    return ToolExpert(self._benchmark, self._tagged.expert(seed))

  def close(self) -> None:
    """Releases the environment's resources."""
    self._tagged.close()


class ToolExpert:
  """An expert whose actions are calls."""

  def __init__(self, benchmark: ToolCalls, tagged: base.Expert) -> None:
    self._benchmark = benchmark
    self._tagged = tagged

  def respond(self) -> str:
    """The response to the environment's current state."""
    return self._benchmark.to_calls(self._tagged.respond())
