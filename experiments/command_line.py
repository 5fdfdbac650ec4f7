"""Reads a command line with a configuration; says what is wrong in one line."""

import sys

from absl import flags


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
  except KeyError as error:
    # Brings the key in quotes, and sometimes a hint.
    reason = "unknown key " + ". ".join(str(error.args[0]).splitlines())
  except (AttributeError, LookupError, TypeError) as error:
    reason = " ".join(str(error).replace("\\n", " ").split())
  except (OSError, ValueError, flags.Error) as error:
    # An error inside a configuration brings its whole traceback along.
    reason = str(error).strip().splitlines()[-1].strip()
  given = " ".join(part for part in argv[1:] if part.startswith("--config"))
  sys.exit(f"error: {given}: {reason}")
