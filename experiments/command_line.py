"""What every program does around its own work.

A program defines its flags in a function and works in another; `run` brings
them together. Nothing is defined when a module is imported, so that any two of
them can be imported by a third. What is wrong is told in one line.
"""

from collections.abc import Callable
import sys
from typing import Any

from absl import app, flags, logging

from t2po_jax import keys


def run(
  program: Callable[..., None],
  define_flags: Callable[[flags.FlagValues], None],
  *,
  parse: Callable[[list[str]], list[str]] | None = None,
  positional: bool = False,
  verbosity: int = logging.WARNING,
) -> None:
  """Runs a program: the whole of a script or console command.

  Args:
    program: called with the parsed flags, and with the positional arguments
      one by one if there may be any. Its `ValueError` or `OSError` ends the
      process with one line and code 1.
    define_flags: defines the flags of this program.
    parse: parses the command line; `parse_flags` if None.
    positional: whether positional arguments are allowed.
    verbosity: of absl's log.
  """

  def main(argv: list[str]) -> None:
    if len(argv) > 1 and not positional:
      raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(verbosity)
    try:
      program(flags.FLAGS, *argv[1:])
    except (ValueError, OSError) as error:
      sys.exit(f"error: {error}")

  define_flags(flags.FLAGS)
  app.run(main, flags_parser=parse or parse_flags)


def parse_flags(argv: list[str]) -> list[str]:
  """For `absl.app.run`: parses all flags.

  Args:
    argv: the command line.

  Returns:
    What is left of it. Ends the program with one line if a flag or a key is
    unknown, a value has the wrong type, or the configuration cannot be read.
  """
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
      # A missing file shows only when it is used.
      _ = flags.FLAGS["config"].value.name
    return rest
  except (AttributeError, LookupError, TypeError) as error:
    reason = " ".join(str(error).replace("\\n", " ").split())
  except (OSError, ValueError, flags.Error) as error:
    # An error inside a configuration brings its whole traceback along.
    reason = str(error).strip().splitlines()[-1].strip()
  given = " ".join(part for part in argv[1:] if part.startswith("--config"))
  reason = _unknown_key(argv) or reason
  sys.exit(f"error: {given}: {reason}" if given else f"error: {reason}")


def _unknown_key(argv: list[str]) -> str:
  """What is wrong with the first unknown key; empty if all are known."""
  files = [part for part in argv[1:] if part.startswith("--config=")]
  # The library looks for keys in the command line itself.
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
    pass  # Something else is wrong.
  finally:
    sys.argv = given
  return ""
