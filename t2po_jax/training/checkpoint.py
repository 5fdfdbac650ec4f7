"""Checkpoints, from which a killed run resumes as if never killed.

A checkpoint is one directory per update, written by Orbax under a temporary
name and renamed when complete: whatever kills the process, a partial checkpoint
is never taken for a complete one. It contains the parameters, the optimizer
state, and the loop position: a JSON object with every cursor of the training
loop (data order, thresholds, metrics). The newest checkpoints are kept, plus
the one with the best held-out score.

Arrays are saved with their sharding, by all processes into one directory, and
restored to any requested sharding, on any mesh. Saving blocks: the next update
donates the very buffers being written, and a full disk is reported at once.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import logging as python_logging
import math
import os
import sys
import time
from typing import Any

from absl import logging
from etils import epath
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from t2po_jax import types
from t2po_jax.distributed import processes

# The items of a checkpoint that hold arrays.
ARRAY_ITEMS = ("params", "optimizer")
# Earlier policies used by rollouts in progress; only if there are any.
VERSIONS = "versions"
# Seconds after which a network file system shows a file to other hosts.
_VISIBLE_SECONDS = 60


class _Keep(checkpoint_managers.PreservationPolicy):
  """Keeps the newest checkpoints and the best one."""

  def __init__(self, newest: int, scores: dict[int, float]) -> None:
    self.newest = newest
    self.scores = scores

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> Sequence[bool]:
    del context
    steps = [info.step for info in checkpoints]
    best = _best({step: self.scores.get(step) for step in steps})
    return [step in steps[-self.newest :] or step == best for step in steps]


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    keep: int = 2,
    read_only: bool = False,
  ) -> None:
    """Opens or creates the directory; removes leftovers of a killed save.

    Args:
      directory: where the checkpoints are, one subdirectory per step; a
        local path, or one of a store that Orbax knows (`gs://...`).
      keep: how many of the newest to keep, >= 1.
      read_only: whether to change nothing, for a run that may be in progress.

    Raises:
      ValueError: if `keep` is out of range.
      OSError: if the directory cannot be created.
    """
    if keep < 1:
      raise ValueError(f"keep is {keep}; it must be at least 1")
    self.directory = epath.Path(directory).absolute()
    self._scores = {}
    try:
      if not read_only:
        self.directory.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(
        self.directory,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=_Keep(keep, self._scores),
          enable_async_checkpointing=False,
          cleanup_tmp_directories=not read_only,
          create=not read_only,
          read_only=read_only,
        ),
        handler_registry=_handlers(),
      )
    except OSError as error:
      raise OSError(
        f"checkpoints cannot be kept in {self.directory}: {_line(error)}"
      ) from error
    self._check_shared()
    for step in self._manager.all_steps():
      # A directory with an unreadable loop position is not a checkpoint: it is
      # never restored, but left in place until its step is saved again.
      record = self._read_loop(step)
      if record is not None:
        self._scores[step] = record["score"]

  def save(
    self,
    step: int,
    state: types.TrainState,
    position: Mapping[str, Any],
    *,
    score: float | None = None,
    versions: Mapping[int, types.Params] | None = None,
  ) -> None:
    """Writes a checkpoint, then removes those no longer needed.

    Args:
      step: number of the update, >= 0.
      state: the learner's state.
      position: the loop position; anything that JSON can represent.
      score: held-out score, larger is better; None or NaN if there is none.
      versions: earlier parameters by update, in addition to the state's.

    Raises:
      ValueError: if the step exists, or the position is not JSON.
      OSError: if it cannot be written; older checkpoints are untouched.
    """
    if step in self._scores:
      raise ValueError(
        f"checkpoint {self.directory / str(step)} exists already"
      )
    try:
      text = json.dumps(dict(position))
    except (TypeError, ValueError) as error:
      raise ValueError(f"the loop position is not JSON: {error}") from error
    score = None if score is None or math.isnan(score) else float(score)
    record = {"position": json.loads(text), "score": score}
    if step in self._manager.all_steps():
      self._manager.delete(step)
    self._scores[step] = score
    items = {
      name: ocp.args.StandardSave(item)
      for name, item in zip(ARRAY_ITEMS, _split(state), strict=True)
    }
    if versions:
      trees = {str(update): tree for update, tree in versions.items()}
      items[VERSIONS] = ocp.args.StandardSave(trees)
    try:
      with _silenced():
        self._manager.save(
          step,
          args=ocp.args.Composite(**items, loop=ocp.args.JsonSave(record)),
          force=True,
        )
    except Exception as error:  # The storage layer raises many kinds.
      del self._scores[step]
      raise OSError(
        f"checkpoint {self.directory / str(step)} could not be written: "
        f"{_line(error)}; newest whole checkpoint: {self.latest()}"
      ) from error
    self._forget()

  def latest(self) -> int | None:
    """The newest step, or None."""
    return max(self._scores, default=None)

  def best(self) -> int | None:
    """The step with the best held-out score (the newest of ties), or None."""
    return _best(self._scores)

  def score(self, step: int) -> float | None:
    """The held-out score a step was saved with, or None."""
    return self._scores[step]

  def restore(
    self, like: types.TrainState, *, step: int | None = None
  ) -> tuple[types.TrainState, dict[str, Any]]:
    """Reads one checkpoint.

    Args:
      like: shapes, dtypes and shardings of the state under this config
        (`jax.ShapeDtypeStruct` or arrays).
      step: of the checkpoint; by default the newest.

    Returns:
      The state, laid out as `like`, and the loop position.

    Raises:
      ValueError: if there is no such checkpoint, it does not fit `like`, or
        it is damaged.
    """
    step = self._choose(step)
    params, optimizer = (
      self._read_arrays(step, name, item)
      for name, item in zip(ARRAY_ITEMS, _split(like), strict=True)
    )
    state = like.replace(params=params, **optimizer)
    return state, self.position(step)

  def steps(self) -> list[int]:
    """The steps of all complete checkpoints, ascending."""
    return sorted(self._scores)

  def position(self, step: int) -> dict[str, Any]:
    """The loop position of a step.

    Raises:
      ValueError: if there is no such checkpoint.
    """
    chosen = self._choose(step)
    record = self._read_loop(chosen)
    if record is None:
      raise self._damaged(chosen, ValueError("its loop position is unreadable"))
    return record["position"]

  def restore_params(
    self, like: types.Params, *, step: int | None = None
  ) -> types.Params:
    """Reads only the parameters; arguments and errors as in `restore`."""
    return self._read_arrays(self._choose(step), "params", like)

  def restore_versions(
    self,
    like: types.Params,
    updates: Sequence[int],
    *,
    step: int | None = None,
  ) -> list[types.Params]:
    """Reads the earlier parameters in a checkpoint.

    Args:
      like: as in `restore`, of one of them.
      updates: the updates to read.
      step: as in `restore`.
    """
    if not updates:
      return []
    wanted = {str(update): like for update in updates}
    kept = self._read_arrays(self._choose(step), VERSIONS, wanted)
    return [kept[str(update)] for update in updates]

  def close(self) -> None:
    """Waits for pending operations and releases the directory."""
    self._manager.close()

  def _check_shared(self) -> None:
    """Raises an error unless all processes see the same directory."""
    if processes.count() == 1:
      return
    mark, text = self.directory / "shared", str(time.time_ns())
    if processes.index() == 0:
      mark.write_text(text)
    expected = processes.gather(text)[0]
    seen = processes.gather(_appears(mark, expected))
    if processes.index() == 0:
      mark.unlink()
    if not all(seen):
      raise ValueError(
        f"{self.directory}: process {seen.index(False)} does not see what "
        "process 0 writes; name a --workdir, or train.checkpoints, on storage "
        "that all processes share"
      )

  def _choose(self, step: int | None) -> int:
    """Checks the step to restore; None means the newest."""
    chosen = self.latest() if step is None else step
    if chosen is None:
      raise ValueError(f"{self.directory} holds no checkpoint")
    if chosen not in self._scores:
      raise ValueError(
        f"{self.directory} holds no checkpoint {chosen}; found "
        f"{sorted(self._scores)}"
      )
    return chosen

  def _read_loop(self, step: int) -> dict[str, Any] | None:
    """The loop record of a step, None if it cannot be read."""
    try:
      args = ocp.args.Composite(loop=ocp.args.JsonRestore())
      return self._manager.restore(step, args=args)["loop"]
    except Exception:  # The storage layer raises many kinds.
      return None

  def _read_arrays(self, step: int, name: str, like: Any) -> Any:
    """Reads one item of a checkpoint, after checking its shapes."""
    place = self.directory / str(step)
    try:
      stored = self._manager.item_metadata(step)[name]
      stored = _shapes(stored.tree, name)
    except Exception as error:
      raise self._damaged(step, error) from error
    wanted = _shapes(like, name)
    for path in [*wanted, *stored]:
      if stored.get(path) != wanted.get(path):
        raise ValueError(
          f"checkpoint {place}: {path} is {stored.get(path, 'missing')}; the "
          f"config asks for {wanted.get(path, 'no such array')}"
        )
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      like,
    )
    args = ocp.args.Composite(**{name: ocp.args.StandardRestore(abstract)})
    try:
      return self._manager.restore(step, args=args)[name]
    except Exception as error:
      raise self._damaged(step, error) from error

  def _damaged(self, step: int, error: Exception) -> ValueError:
    """The error for a damaged checkpoint."""
    older = max((s for s in self._scores if s < step), default=None)
    return ValueError(
      f"checkpoint {self.directory / str(step)} is damaged ({_line(error)}); "
      f"remove that directory to go on from "
      f"{'the start' if older is None else f'checkpoint {older}'}"
    )

  def _forget(self) -> None:
    """Drops the scores of deleted checkpoints."""
    kept = set(self._manager.all_steps())
    for step in list(self._scores):
      if step not in kept:
        del self._scores[step]


def _appears(file: epath.Path, text: str) -> bool:
  """Waits for a file's contents, as long as storage may need to show them."""
  for _ in range(_VISIBLE_SECONDS):
    if file.exists() and file.read_text() == text:
      return True
    time.sleep(1.0)
  return False


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
  """The storage handler of each item."""
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  for name in (*ARRAY_ITEMS, VERSIONS):
    handler = ocp.StandardCheckpointHandler()
    registry.add(name, ocp.args.StandardSave, handler)
    registry.add(name, ocp.args.StandardRestore, handler)
  handler = ocp.JsonCheckpointHandler()
  registry.add("loop", ocp.args.JsonSave, handler)
  registry.add("loop", ocp.args.JsonRestore, handler)
  return registry


def _split(state: types.TrainState) -> tuple[types.Params, dict[str, Any]]:
  """The array items of a state, in the order of `ARRAY_ITEMS`."""
  rest = {"step": state.step, "opt_state": state.opt_state}
  if state.critic is not None:
    rest["critic"] = state.critic
  return state.params, rest


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
  """Keeps the storage layer's threads from printing what they also raise."""
  before, report = logging.get_verbosity(), sys.unraisablehook
  logging.set_verbosity(logging.FATAL)

  def report_others(unraisable: Any) -> None:
    # Writes that end after one has failed find nobody who waits for them.
    if str(unraisable.exc_value) != "Event loop is closed":
      report(unraisable)

  sys.unraisablehook = report_others
  try:
    yield
  except Exception:
    # The threads' pending exceptions would be reported later, until exit.
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    raise
  else:
    sys.unraisablehook = report
  finally:
    logging.set_verbosity(before)


def _shapes(tree: Any, name: str) -> dict[str, str]:
  """Path -> shape and dtype as text, for every array of a tree."""
  return {
    f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}": (
      f"{tuple(leaf.shape)} {leaf.dtype}"
    )
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def _best(scores: Mapping[int, float | None]) -> int | None:
  """The step with the largest score, the newest of ties."""
  known = [(score, step) for step, score in scores.items() if score is not None]
  return max(known)[1] if known else None


def _line(error: BaseException) -> str:
  """The start of an error's first line; storage errors print their specs."""
  return processes.first_line(error)[:160]
