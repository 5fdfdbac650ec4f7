"""Reads a command line with a configuration; says what is wrong in one line."""

import sys

from absl import flags

from t2po_jax import keys


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
    config = flags.FLAGS["config"].value
    if config is not None:
      _ = config.name  # A missing file shows only when it is used.
    return rest
  except (AttributeError, LookupError, TypeError) as error:
    reason = " ".join(str(error).replace("\\n", " ").split())
  except (OSError, ValueError, flags.Error) as error:
    # An error inside a configuration brings its whole traceback along.
    reason = str(error).strip().splitlines()[-1].strip()
  given = " ".join(part for part in argv[1:] if part.startswith("--config"))
  sys.exit(f"error: {given}: {_unknown_key(argv) or reason}")


def _unknown_key(argv: list[str]) -> str:
  """What is wrong with the first unknown key; empty if all are known."""
  files = [part for part in argv[1:] if part.startswith("--config=")]
  # The library looks for keys in the command line itself.
  given, sys.argv = sys.argv, [argv[0], *files]
  try:
    flags.FLAGS.unparse_flags()
    flags.FLAGS([argv[0], *files])
    config = flags.FLAGS["config"].value
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
