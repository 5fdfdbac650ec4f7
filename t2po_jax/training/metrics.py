"""Metrics of a run: dicts of scalars to files, console and dashboards.

`Writer` hands each dict to every sink. `metrics.jsonl` in the workdir is the
record: always written, one JSON object a line, each with `step`, `time` (Unix
seconds) and `elapsed` (seconds of running time, summed over restarts). After a
kill it is truncated to the resumed step, so that it reads like the file of an
uninterrupted run. All other sinks are views of it: one console line per update,
TensorBoard by default, Weights & Biases and MLflow on request.

JSON has neither NaN nor infinity: NaN is written as null, infinities as the
strings "inf" and "-inf"; `read` converts them back. Dashboards only get finite
values, and one that fails is dropped with a warning: a run does not end because
a server is down.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import importlib.util
import json
import math
import os
import pathlib
import re
import time
from typing import Any, Protocol
import uuid

from absl import logging
import jax
import numpy as np
import rich
import rich.progress

from t2po_jax import files
from t2po_jax.distributed import processes

FILE = "metrics.jsonl"
_RESERVED = ("step", "time", "elapsed")


def to_floats(values: Mapping[str, Any]) -> dict[str, float]:
  """Turns scalars, on the host or on devices, into floats in one transfer.

  Args:
    values: name -> number, bool or array of one element.

  Returns:
    The same names with Python floats; float32 values are exact.

  Raises:
    ValueError: if a value is not one number; names the key.
  """
  floats = {}
  for name, value in jax.device_get(dict(values)).items():
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind in "OSUMm":
      raise ValueError(
        f"metric {name!r}: found {array.dtype} of shape {array.shape}, "
        "expected one number (see metrics.summary)"
      )
    floats[name] = float(array.reshape(()))
  return floats


def summary(
  values: Iterable[Any],
  prefix: str,
  *,
  quantiles: Sequence[float] = (0.1, 0.5, 0.9),
) -> dict[str, float]:
  """Mean, minimum, maximum, quantiles and count of a ragged collection.

  NaN means "no value" (the first turn has no Gamma) and is left out; infinities
  are kept.

  Args:
    values: numbers and arrays of any shape; all elements count equally.
    prefix: the names become `prefix/mean`, `prefix/p50`, ...
    quantiles: in [0, 1], interpolated linearly.

  Returns:
    `mean`, `min`, `max`, one `p<percent>` per quantile, and `count`, the
    number of values that were no NaN. Without values all but count are NaN.

  Raises:
    ValueError: if a quantile is outside [0, 1].
  """
  for quantile in quantiles:
    if not 0 <= quantile <= 1:
      raise ValueError(f"summary {prefix!r}: quantile {quantile} not in [0, 1]")
  pieces = [np.asarray(value, np.float64).ravel() for value in values]
  flat = np.concatenate(pieces) if pieces else np.zeros(0)
  flat = flat[~np.isnan(flat)]
  names = ["mean", "min", "max", *(f"p{100 * q:g}" for q in quantiles)]
  if flat.size:
    numbers = [flat.mean(), flat.min(), flat.max()]
    numbers += list(np.quantile(flat, quantiles))
  else:
    numbers = [math.nan] * len(names)
  result = {
    f"{prefix}/{n}": float(x) for n, x in zip(names, numbers, strict=True)
  }
  return result | {f"{prefix}/count": float(flat.size)}


def read(path: str | os.PathLike) -> list[dict[str, float]]:
  """Reads a metrics file, without a truncated last line.

  Args:
    path: a `metrics.jsonl`.

  Returns:
    One dict per line, in order; null is NaN, "inf" and "-inf" are infinite.

  Raises:
    ValueError: if a line is not a metrics line; names file and line.
  """
  lines = _whole_lines(pathlib.Path(path))
  return [
    {
      k: math.nan if v is None else float(v)
      for k, v in json.loads(line).items()
    }
    for line in lines
  ]


def print_line(line: str) -> None:
  """Prints one line in process 0, however long."""
  if processes.index():
    return
  rich.get_console().print(line, soft_wrap=True, markup=False, emoji=False)


class Timer:
  """Seconds per stage of work, accumulated until they are taken.

  JAX dispatches asynchronously: a stage that should include device time must
  wait for its results before it ends.
  """

  def __init__(self) -> None:
    self._seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[None]:
    """Adds the duration of the block to the stage, even if it raises."""
    start = time.perf_counter()
    try:
      yield
    finally:
      spent = time.perf_counter() - start
      self._seconds[name] = self._seconds.get(name, 0.0) + spent

  def take(self, prefix: str = "seconds") -> dict[str, float]:
    """Returns `prefix/stage` -> seconds since the last take, and resets."""
    taken = {f"{prefix}/{name}": s for name, s in self._seconds.items()}
    self._seconds = {}
    return taken


@contextlib.contextmanager
def progress(
  label: str, total: int | None = None
) -> Iterator[Callable[[int], None]]:
  """A progress bar for long work; only in process 0 and on a terminal.

  Args:
    label: what is being done.
    total: the number of items, None if unknown.

  Yields:
    A function to call with the number of finished items; thread-safe.
  """
  console = rich.get_console()
  if not console.is_terminal or processes.index():
    yield lambda count: None
    return
  columns = (
    rich.progress.TextColumn("{task.description}", markup=False),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TimeRemainingColumn(),
  )
  with rich.progress.Progress(*columns, console=console, transient=True) as bar:
    task = bar.add_task(label, total=total)
    yield lambda count: bar.update(task, completed=count)


class Writer:
  """Writes the metrics of a run to all sinks, from process 0 only.

  Use it as a context manager, or call `close`.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    resume_step: int = 0,
    console: Sequence[str] = (),
    tensorboard: bool = True,
    wandb_project: str = "",
    mlflow_experiment: str = "",
    settings: Mapping[str, Any] | None = None,
  ) -> None:
    """Opens the sinks; drops what an earlier run wrote from resume_step on.

    Args:
      workdir: the run's folder; created if absent.
      resume_step: lines of this step and later ones will be written again.
      console: names shown in the console line, in this order; a dict that
        has none of them prints nothing.
      tensorboard: whether to write event files to `workdir/tensorboard`.
      wandb_project: Weights & Biases project; empty is off.
      mlflow_experiment: MLflow experiment; empty is off.
      settings: the run's flat configuration, shown by these two.

    Raises:
      ValueError: if workdir is a file, its metrics file is damaged before
        its last line, or a package that was asked for is not installed.
    """
    self._sinks: list[_Sink] = []
    if processes.index():
      return
    for package, name in (
      ("wandb", wandb_project),
      ("mlflow", mlflow_experiment),
    ):
      if name and not _installed(package):
        raise ValueError(
          f"{package} was asked for ({name!r}) but is not installed: "
          f"pip install {package}, or leave the setting empty"
        )
    workdir = pathlib.Path(workdir)
    if workdir.exists() and not workdir.is_dir():
      raise ValueError(f"workdir: {workdir} is a file, expected a folder")
    workdir.mkdir(parents=True, exist_ok=True)
    settings = dict(settings or {})
    self._sinks.append(_JsonLines(workdir / FILE, resume_step))
    self._sinks.append(_ConsoleLine(console))
    if tensorboard:
      self._sinks.append(_TensorBoard(workdir / "tensorboard", resume_step))
    if wandb_project:
      self._sinks.append(
        _WeightsAndBiases(workdir, wandb_project, settings, resume_step)
      )
    if mlflow_experiment:
      self._sinks.append(
        _MLflow(workdir, mlflow_experiment, settings, resume_step)
      )

  def write(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
    """Writes one dict of scalars, synchronously to disk.

    Args:
      step: the update they belong to.
      values: as in `to_floats`; `step`, `time` and `elapsed` are taken.

    Returns:
      The values as floats, on every process.

    Raises:
      ValueError: if a value is not one number, or a name is taken.
    """
    floats = to_floats(values)
    for name in _RESERVED:
      if name in floats:
        raise ValueError(f"metric {name!r}: the name is taken, choose another")
    for sink in list(self._sinks):
      with self._tolerating(sink, f"step {step}"):
        sink.write(int(step), floats)
    return floats

  def write_episodes(
    self, step: int, rows: Sequence[Mapping[str, Any]]
  ) -> None:
    """Shows a table of episodes in the dashboards that support it.

    Args:
      step: the update they belong to.
      rows: one per episode, all with the same keys; may be empty.
    """
    if not rows:
      return
    for sink in list(self._sinks):
      if isinstance(sink, (_WeightsAndBiases, _MLflow)):
        with self._tolerating(sink, f"the episodes of step {step}"):
          sink.write_episodes(int(step), rows)

  def write_report(self, path: pathlib.Path) -> None:
    """Adds an HTML report to the dashboards that support it."""
    for sink in list(self._sinks):
      if isinstance(sink, (_WeightsAndBiases, _MLflow)):
        with self._tolerating(sink, "the report"):
          sink.write_report(path)

  def close(self) -> None:
    """Closes all sinks; a second call does nothing."""
    sinks, self._sinks = self._sinks, []
    for sink in sinks:
      with self._tolerating(sink, "the end"):
        sink.close()

  @contextlib.contextmanager
  def _tolerating(self, sink: "_Sink", moment: str) -> Iterator[None]:
    """Drops a failing dashboard; only the record must not fail."""
    try:
      yield
    except Exception as error:
      if not isinstance(sink, _DASHBOARDS):
        raise
      if sink in self._sinks:
        self._sinks.remove(sink)
      logging.warning(
        "%s failed at %s and gets no more metrics; %s goes on: %s",
        type(sink).__name__.strip("_"),
        moment,
        FILE,
        str(error).split("\n")[0],
      )

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class _Sink(Protocol):
  """The interface of a sink."""

  def write(self, step: int, floats: Mapping[str, float]) -> None: ...

  def close(self) -> None: ...


class _JsonLines:
  """The record of the run in its workdir."""

  def __init__(self, path: pathlib.Path, resume_step: int) -> None:
    self._path = path
    self._elapsed = _cut(path, resume_step)
    self._start = time.monotonic()
    self._file = path.open("a", encoding="utf-8")

  def write(self, step: int, floats: Mapping[str, float]) -> None:
    elapsed = self._elapsed + time.monotonic() - self._start
    record = {
      "step": step,
      "time": round(time.time(), 3),
      "elapsed": round(elapsed, 3),
    }
    record |= {name: _encode(value) for name, value in floats.items()}
    # One write and sync per line: a kill truncates at most one line.
    line = json.dumps(record, allow_nan=False) + "\n"
    with files.writing(self._path):
      self._file.write(line)
      self._file.flush()
      os.fsync(self._file.fileno())

  def close(self) -> None:
    with files.writing(self._path):
      self._file.close()


class _ConsoleLine:
  """One line per update with selected metrics."""

  def __init__(self, names: Sequence[str]) -> None:
    self._names = tuple(names)

  def write(self, step: int, floats: Mapping[str, float]) -> None:
    shown = [f"{n} {floats[n]:.4g}" for n in self._names if n in floats]
    if shown:
      print_line("  ".join([f"step {step}", *shown]))

  def close(self) -> None:
    pass


class _Nowhere:
  """A file whose contents are dropped."""

  def write(self, data: bytes) -> None:
    del data

  def flush(self) -> None:
    pass

  def close(self) -> None:
    pass


class _TensorBoard:
  """Event files; a resumed run hides steps that it will write again."""

  def __init__(self, folder: pathlib.Path, resume_step: int) -> None:
    import tensorboardX

    # File names count seconds: a quick restart must not overwrite a file.
    self._writer = tensorboardX.SummaryWriter(
      str(folder),
      purge_step=resume_step,
      filename_suffix=f".{uuid.uuid4().hex[:8]}",
    )

  def write(self, step: int, floats: Mapping[str, float]) -> None:
    with self._ending_quietly():
      for name, value in _finite(floats).items():
        self._writer.add_scalar(name, value, step)
      self._writer.flush()

  def close(self) -> None:
    with self._ending_quietly():
      self._writer.close()

  @contextlib.contextmanager
  def _ending_quietly(self) -> Iterator[None]:
    """Closes the writer after an error.

    What the library still has to write would fail once more in its thread and
    when the process ends, with a traceback each; so it goes nowhere.
    """
    try:
      yield
    except OSError:
      with contextlib.suppress(Exception):
        files_of: Any = self._writer.file_writer
        events = files_of.event_writer._ev_writer
        events._py_recordio_writer._writer = _Nowhere()
        self._writer.close()
      raise


class _WeightsAndBiases:
  """A run of wandb.ai; resumed under its old id."""

  def __init__(
    self,
    workdir: pathlib.Path,
    project: str,
    settings: Mapping[str, Any],
    resume_step: int,
  ) -> None:
    import wandb

    path = workdir / "wandb_run.txt"
    known = resume_step > 0 and path.exists()
    run_id = path.read_text().strip() if known else uuid.uuid4().hex[:12]
    self._run = wandb.init(
      project=project,
      dir=str(workdir),
      id=run_id,
      resume="allow",
      config=settings,
    )
    path.write_text(run_id + "\n")

  def write(self, step: int, floats: Mapping[str, float]) -> None:
    self._run.log(_finite(floats), step=step)

  def write_episodes(
    self, step: int, rows: Sequence[Mapping[str, Any]]
  ) -> None:
    import wandb

    columns = list(rows[0])
    data = [[row[column] for column in columns] for row in rows]
    table = wandb.Table(columns=columns, data=data)
    self._run.log({"episodes": table}, step=step)

  def write_report(self, path: pathlib.Path) -> None:
    import wandb

    self._run.log({"report": wandb.Html(path.read_text(encoding="utf-8"))})

  def close(self) -> None:
    self._run.finish()


class _MLflow:
  """A run on an MLflow server or file store; resumed under its old id."""

  def __init__(
    self,
    workdir: pathlib.Path,
    experiment: str,
    settings: Mapping[str, Any],
    resume_step: int,
  ) -> None:
    import mlflow

    path = workdir / "mlflow_run.txt"
    known = resume_step > 0 and path.exists()
    self._mlflow = mlflow
    mlflow.set_experiment(experiment)
    run = mlflow.start_run(
      run_id=path.read_text().strip() if known else None,
      run_name=workdir.name,
    )
    path.write_text(run.info.run_id + "\n")
    if not known:
      mlflow.log_params(settings)

  def write(self, step: int, floats: Mapping[str, float]) -> None:
    # MLflow rejects most punctuation in names.
    named = {
      re.sub(r"[^\w\-. :/]", "_", name): value
      for name, value in _finite(floats).items()
    }
    self._mlflow.log_metrics(named, step=step)

  def write_episodes(
    self, step: int, rows: Sequence[Mapping[str, Any]]
  ) -> None:
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    self._mlflow.log_table(columns, f"episodes/update-{step:05d}.json")

  def write_report(self, path: pathlib.Path) -> None:
    self._mlflow.log_artifact(str(path))

  def close(self) -> None:
    self._mlflow.end_run()


_DASHBOARDS = (_TensorBoard, _WeightsAndBiases, _MLflow)


def _encode(value: float) -> float | str | None:
  """A float in a form that JSON allows."""
  if math.isnan(value):
    return None
  if math.isinf(value):
    return "inf" if value > 0 else "-inf"
  return value


def _finite(floats: Mapping[str, float]) -> dict[str, float]:
  """The finite values."""
  return {name: x for name, x in floats.items() if math.isfinite(x)}


def _installed(package: str) -> bool:
  """Whether a package can be imported, not just a folder of that name."""
  spec = importlib.util.find_spec(package)
  return spec is not None and spec.origin is not None


def _whole_lines(path: pathlib.Path) -> list[bytes]:
  """The lines of a metrics file, without newlines or a truncated tail."""
  *lines, tail = path.read_bytes().split(b"\n")
  for number, line in enumerate(lines, 1):
    if _step(line) is None:
      raise ValueError(
        f"{path}:{number}: found {line[:40]!r}, expected a JSON object with "
        "a step; mend the line or choose another workdir"
      )
  # If the tail is a complete object, only the newline was lost.
  return lines + ([tail] if _step(tail) is not None else [])


def _step(line: bytes) -> int | None:
  """The step of a metrics line, None if it is not one."""
  try:
    step = json.loads(line)["step"]
  except (ValueError, TypeError, KeyError):
    return None
  return step if isinstance(step, int) else None


def _cut(path: pathlib.Path, resume_step: int) -> float:
  """Drops truncated and later lines atomically; returns the elapsed seconds."""
  if not path.exists():
    return 0.0
  before = path.read_bytes()
  lines = [
    line
    for line in _whole_lines(path)
    if (step := _step(line)) is not None and step < resume_step
  ]
  after = b"".join(line + b"\n" for line in lines)
  if after != before:
    dropped = before.count(b"\n") - len(lines)
    logging.info(
      "%s: %d lines from step %d on dropped", path, dropped, resume_step
    )
    scratch = path.with_suffix(".tmp")
    with scratch.open("wb") as file:
      file.write(after)
      file.flush()
      os.fsync(file.fileno())
    os.replace(scratch, path)
  return float(json.loads(lines[-1]).get("elapsed", 0.0)) if lines else 0.0
