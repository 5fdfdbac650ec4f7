"""Trains an agent: `python experiments/main.py --config=configs/searchqa.py`.

Presets follow a colon and any key can be set on the command line:
`--config=configs/searchqa.py:smollm2 --config.train.updates=2`.
Run the same command with the same `--workdir` again to go on after a stop.
"""

import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from absl import app, flags, logging  # noqa: E402
import jax  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from experiments import command_line  # noqa: E402
from t2po_jax import build, train  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; default runs/<config>-<time>."
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  workdir = _WORKDIR.value or str(
    pathlib.Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
  )
  print(f"workdir: {workdir}", flush=True)
  try:
    cache = build.cache_dir(config) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    train.train(config, workdir)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  except train.CollapseError as error:
    sys.exit(f"stopped by the collapse guard: {error}")


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=command_line.parse_flags)
