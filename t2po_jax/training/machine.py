"""The environment of a run: commit, versions and hardware."""

import json
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

import t2po_jax

FILE = "machine.json"


class CompileCounter:
  """Counts programs that XLA builds; after the warm-up there are none."""

  def __init__(self) -> None:
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, *_: Any, **__: Any) -> None:
    self.count += event == "/jax/core/compile/backend_compile_duration"


def describe() -> dict[str, str]:
  """Commit, versions, processor and devices, as text."""
  devices = jax.devices()
  return {
    "version": t2po_jax.__version__,
    "commit": _commit(),
    "Python": platform.python_version(),
    "JAX": jax.__version__,
    "devices": f"{len(devices)} {devices[0].device_kind}",
    "processor": _processor(),
    "cores": str(os.cpu_count()),
  }


def note(workdir: pathlib.Path) -> None:
  """Writes `machine.json`; a resumed run overwrites it."""
  text = json.dumps(describe(), indent=2) + "\n"
  (workdir / FILE).write_text(text)


def _commit() -> str:
  """The commit of this checkout; `unknown` without one."""
  root = pathlib.Path(t2po_jax.__file__).resolve().parents[1]
  if not (root / ".git").exists():
    return "unknown"
  try:
    answers = [
      subprocess.run(
        ["git", "-C", str(root), *command],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
      ).stdout.strip()
      for command in (
        ("rev-parse", "--short", "HEAD"),
        ("status", "--porcelain", "--untracked-files=no"),
      )
    ]
  except (OSError, subprocess.SubprocessError):
    return "unknown"
  return answers[0] + (" with changes" if answers[1] else "")


def _processor() -> str:
  """The processor's name, from Linux or the platform module."""
  path = pathlib.Path("/proc/cpuinfo")
  if path.is_file():
    for line in path.read_text().splitlines():
      if line.startswith("model name"):
        return line.split(":", 1)[1].strip()
  return platform.processor() or platform.machine()
