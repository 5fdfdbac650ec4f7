"""Diagnoses exploration control: `experiments/mechanism.py RUN [RUN ...]`.

Reads the episodes written by runs (all of every evaluation, and the first
`log.trajectories` of every rollout) and predicts, without another training run,
how well turn-level resampling can work: the area under the ROC curve with which
|dPhi| < eta and simpler signs detect useless, repeated and losing turns. An
area of 0.5 means that a sign is uninformative. In a simulation with a tabular
policy, resampling paid off from about 0.8 on (docs/study.md).

  python experiments/mechanism.py runs/gigpo --update=0 --kind=eval

With `--replay=CONFIG`, the configuration of the runs, it replays every
resampled turn in the environment, once with the kept response and once with the
first discarded one, and counts which of the two led further.

It also shows the uncertainty M over the positions of a thought, which the
thinking intervention expects to rise and fall. `--out=FILE` writes everything
as JSON.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import math
import pathlib
from typing import Any

from absl import flags
from ml_collections import config_flags
import numpy as np

from t2po_jax import records, types
from t2po_jax.configs import base as settings
from t2po_jax.envs import base
from t2po_jax.experiments import command_line
from t2po_jax.rollout import mechanism, statistics
from t2po_jax.setup import build


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  flags.DEFINE_integer(
    "update", None, "Only episodes of this update; default: all.", **own
  )
  flags.DEFINE_enum(
    "kind",
    None,
    ["train", "eval"],
    "Only these episodes; default: both.",
    **own,
  )
  flags.DEFINE_integer(
    "bins", 8, "Parts of a thought in the curve of M.", lower_bound=1, **own
  )
  config_flags.DEFINE_config_file(
    "replay",
    lock_config=True,
    help_string="Configuration with which to replay resampled turns.",
    **own,
  )
  flags.DEFINE_string("out", None, "JSON file to write.", **own)


def restore(record: Mapping[str, Any]) -> types.Trajectory:
  """A trajectory from its record; prompts, recorded only as text, are empty."""

  def attempt(entry: Mapping[str, Any]) -> types.Attempt:
    size = len(entry["tokens"])
    forced = np.zeros(size, bool)
    forced[np.array(entry["forced"], int)] = True
    measures = {
      name: np.array(
        [math.nan if x is None else x for x in entry[name]], np.float32
      )
      for name in records.MEASURES
    }
    return types.Attempt(
      tokens=np.array(entry["tokens"], np.int32),
      forced=forced,
      text=entry["text"],
      finish=entry["finish"],
      fired_at=entry["fired_at"],
      thinking_tokens=entry["thinking_tokens"],
      phi=math.nan if entry["phi"] is None else entry["phi"],
      **measures,
    )

  return types.Trajectory(
    task_id=record["task_id"],
    category=record["category"],
    group=record["group"],
    member=record["member"],
    success=record["success"],
    aborted=record["aborted"],
    turns=tuple(
      types.Turn(
        prompt=np.zeros(0, np.int32),
        response=attempt(turn),
        anchor=turn["observation"],
        action=turn["action"],
        reward=turn["reward"],
        penalty=turn["penalty"],
        format_valid=turn["format_valid"],
        action_valid=turn["action_valid"],
        phi_change=(
          math.nan if turn["phi_change"] is None else turn["phi_change"]
        ),
        prompt_shortened=False,
        discarded=tuple(attempt(other) for other in turn["discarded"]),
        info=turn.get("info", {}),
      )
      for turn in record["turns"]
    ),
  )


def _overlap(one: types.Turn, other: types.Turn) -> float:
  """Jaccard similarity of the token sets of two responses."""
  a, b = set(one.response.tokens.tolist()), set(other.response.tokens.tolist())
  return len(a & b) / max(len(a | b), 1)


# Sign -> score of a turn, given the previous one; computed from what is known
# before the response is executed.
SIGNS: Mapping[str, Callable[[types.Turn, types.Turn], float]] = {
  "small change of Phi": lambda turn, last: -turn.phi_change,
  "small Phi": lambda turn, last: -turn.response.phi,
  "large Phi": lambda turn, last: turn.response.phi,
  "same action": lambda turn, last: float(turn.action == last.action),
  "same observation": lambda turn, last: float(turn.anchor == last.anchor),
  "alike responses": _overlap,
  "long response": lambda turn, last: float(len(turn.response.tokens)),
  "large entropy": lambda turn, last: float(np.mean(turn.response.entropy)),
}
LABELS = ("useless", "repeated", "losing")


def detect(
  trajectories: Sequence[types.Trajectory],
) -> dict[str, dict[str, float]]:
  """The ROC area of every sign for every label.

  Only turns after the first count: a change needs a previous turn.

  Args:
    trajectories: episodes that were not aborted.

  Returns:
    sign -> label -> area; under `share`, the fraction of turns with the label.
    A turn is `losing` if its episode failed.
  """
  pairs = [
    (trajectory, number)
    for trajectory in trajectories
    for number in range(1, len(trajectory.turns))
  ]
  flags_of = {
    id(t): {
      "useless": mechanism.useless_turns(t),
      "repeated": mechanism.repeats(t),
      "losing": [not t.success] * len(t.turns),
    }
    for t in trajectories
  }
  labels = {
    name: [flags_of[id(t)][name][number] for t, number in pairs]
    for name in LABELS
  }
  areas = {
    "share": {
      name: float(np.mean(values)) if values else math.nan
      for name, values in labels.items()
    }
  }
  for sign, score in SIGNS.items():
    scores = [score(t.turns[n], t.turns[n - 1]) for t, n in pairs]
    areas[sign] = {
      name: mechanism.roc_area(scores, values)
      for name, values in labels.items()
    }
  return areas


def _worth(
  benchmark: base.Benchmark, trajectory: types.Trajectory, at: int, text: str
) -> float:
  """How far a response leads at a turn, after the same previous turns.

  2 for success, 1 for an observation not seen before, 0 otherwise.
  """
  env = benchmark.env()
  try:
    seen = {env.reset(trajectory.task_id).text}
    for turn in trajectory.turns[:at]:
      seen.add(env.step(turn.response.text).observation.text)
    result = env.step(text)
  finally:
    env.close()
  if result.success:
    return 2.0
  fresh = result.observation.text not in seen
  return float(result.action_valid and not result.done and fresh)


def second_tries(
  benchmark: base.Benchmark, trajectories: Sequence[types.Trajectory]
) -> dict[str, float]:
  """The effect of resampling, by playing both responses.

  Args:
    benchmark: must be deterministic.
    trajectories: episodes that were not aborted.

  Returns:
    `turns`, the number of resampled turns, and the fractions in which the kept
    response led further than the first discarded one (`better`), equally far
    (`equal`) or less far (`worse`); NaN if there are none.
  """
  gains = [
    _worth(benchmark, trajectory, number, turn.response.text)
    - _worth(benchmark, trajectory, number, turn.discarded[0].text)
    for trajectory in trajectories
    for number, turn in enumerate(trajectory.turns)
    if turn.discarded
  ]

  def share(flags: list[bool]) -> float:
    return float(np.mean(flags)) if flags else math.nan

  return {
    "turns": float(len(gains)),
    "better": share([gain > 0 for gain in gains]),
    "equal": share([gain == 0 for gain in gains]),
    "worse": share([gain < 0 for gain in gains]),
  }


def load(
  folder: pathlib.Path, *, update: int | None, kind: str | None
) -> list[types.Trajectory]:
  """The recorded episodes of a run that were not aborted.

  Raises:
    ValueError: if there are none.
  """
  place = folder / records.FOLDER
  chosen = [
    entry
    for entry in records.read_index(place)
    if update in (None, entry["update"]) and kind in (None, entry["kind"])
  ]
  trajectories = [
    restore(records.read_episode(place, entry)) for entry in chosen
  ]
  trajectories = [
    trajectory for trajectory in trajectories if not trajectory.aborted
  ]
  if not trajectories:
    raise ValueError(f"{place}: no episodes of update {update}, kind {kind}")
  return trajectories


def table(detected: Mapping[str, Mapping[str, float]]) -> str:
  """The ROC areas as a Markdown table."""
  rows = [f"| sign | {' | '.join(LABELS)} |", "|---" * (1 + len(LABELS)) + "|"]
  for sign, areas in detected.items():
    cells = (f"{areas[name]:.2f}" for name in LABELS)
    rows.append(f"| {sign} | {' | '.join(cells)} |")
  return "\n".join(rows)


def _plain(value: Any) -> Any:
  """Nested values as JSON allows them: NaN is None."""
  if isinstance(value, Mapping):
    return {name: _plain(x) for name, x in value.items()}
  if isinstance(value, list):
    return [_plain(x) for x in value]
  return None if isinstance(value, float) and math.isnan(value) else value


def analyse(given: flags.FlagValues, *folders: str) -> None:
  """Prints the diagnostics of runs; writes them if requested.

  Raises:
    ValueError: if no folder is given, or one contains no episodes.
  """
  if not folders:
    raise ValueError("name the folder of a run")
  record, benchmark = {}, None
  if given.replay is not None:
    benchmark = build.benchmark(settings.read(given.replay))
  for folder in folders:
    trajectories = load(
      pathlib.Path(folder), update=given.update, kind=given.kind
    )
    attempts = [turn.response for t in trajectories for turn in t.turns]
    curve = mechanism.thought_curve(attempts, bins=given.bins)
    detected = detect(trajectories)
    turns = sum(len(t.turns) for t in trajectories)
    print(f"{folder}: {len(trajectories)} episodes, {turns} turns")
    print(table(detected))
    print("M over a thought:", " ".join(f"{value:.3f}" for value in curve))
    again = second_tries(benchmark, trajectories) if benchmark else {}
    if again:
      print("sampled again:", *(f"{k} {v:.2f}" for k, v in again.items()))
    record[folder] = {
      "second_tries": again,
      "episodes": len(trajectories),
      "turns": turns,
      "roc": detected,
      "thought_curve": curve.tolist(),
      "numbers": statistics.describe(trajectories),
    }
  if given.out:
    text = json.dumps(_plain(record), indent=2, allow_nan=False)
    pathlib.Path(given.out).write_text(text + "\n")


def run() -> None:
  """The command `t2po-mechanism`."""
  command_line.run(analyse, define_flags, positional=True)


if __name__ == "__main__":
  run()
