"""The frame shared by all programs.

A program defines its flags in one function and does its work in another; `run`
combines the two. Nothing is defined on import, so that any two programs can be
imported together. Errors are reported in one line.
"""

from collections.abc import Callable
import pathlib
import sys
from typing import Any

from absl import app, flags, logging

from t2po_jax import keys
from t2po_jax.envs import base

# Errors whose message explains what is wrong; all others are bugs.
REPORTED = (ValueError, OSError, base.EnvError)


def run(
  program: Callable[..., None],
  define_flags: Callable[[flags.FlagValues], None],
  *,
  parse: Callable[[list[str]], list[str]] | None = None,
  positional: bool = False,
  verbosity: int = logging.WARNING,
) -> None:
  """Runs a program as a script or console command.

  Args:
    program: called with the parsed flags, followed by the positional arguments
      if these are allowed. An error of `REPORTED` ends the process with one
      line and exit code 1.
    define_flags: defines the flags of this program.
    parse: parses the command line; `parse_flags` if None.
    positional: whether positional arguments are allowed.
    verbosity: the verbosity of absl's log.
  """

  def main(argv: list[str]) -> None:
    if len(argv) > 1 and not positional:
      raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(verbosity)
    try:
      program(flags.FLAGS, *argv[1:])
    except REPORTED as error:
      sys.exit(f"error: {error}")

  define_flags(flags.FLAGS)
  app.run(main, flags_parser=parse or parse_flags)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses all flags; to be passed to `absl.app.run`.

  Args:
    argv: the command line.

  Returns:
    The remaining arguments. Exits with a one-line message if a flag or key is
    unknown, a value has the wrong type, or the configuration cannot be read.
  """
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
      # A missing file is only noticed when it is used.
      _ = flags.FLAGS["config"].value.name
    return rest
  except (AttributeError, LookupError, TypeError) as error:
    reason = " ".join(str(error).replace("\\n", " ").split())
  except (OSError, ValueError, flags.Error) as error:
    # An error inside a configuration comes with its whole traceback.
    reason = str(error).strip().splitlines()[-1].strip()
  given = " ".join(part for part in argv[1:] if part.startswith("--config"))
  reason = _missing_file(argv) or _unknown_key(argv) or reason
  sys.exit(f"error: {given}: {reason}" if given else f"error: {reason}")


def _missing_file(argv: list[str]) -> str:
  """Suggests a configuration file for one that does not exist; else empty."""
  for part in argv[1:]:
    flag, _, value = part.partition("=")
    path = pathlib.Path(value.partition(":")[0])
    if flag == "--config" and value and not path.is_file():
      names = [
        each.stem
        for each in path.parent.glob("*.py")
        if "def get_config(presets" in each.read_text()
      ]
      near = keys.nearest(path.stem, names) if names else ""
      return f"found no file {str(path)!r}{near}"
  return ""


def _unknown_key(argv: list[str]) -> str:
  """A message about the first unknown key; empty if all are known."""
  files = [part for part in argv[1:] if part.startswith("--config=")]
  # The library scans the command line for keys by itself.
  given, sys.argv = sys.argv, [argv[0], *files]
  try:
    flags.FLAGS.unparse_flags()
    flags.FLAGS([argv[0], *files])
    config: Any = flags.FLAGS["config"].value
    for part in argv[1:]:
      if not part.startswith("--config."):
        continue
      path = part.partition("=")[0].split(".")[1:]
      section = config
      for depth, key in enumerate(path):
        if key not in section:
          name = ".".join(path[: depth + 1])
          return f"unknown key {name!r}{keys.nearest(key, section)}"
        section = section[key]
  except (AttributeError, LookupError, TypeError, ValueError, flags.Error):
    pass  # Something else is wrong, and is reported elsewhere.
  finally:
    sys.argv = given
  return ""
