"""Before any test: libtpu is there to compile for TPUs, not to look for one."""

import importlib.util
import os
import pathlib

if importlib.util.find_spec("libtpu") and not (
  pathlib.Path("/dev/accel0").exists() or pathlib.Path("/dev/vfio/0").exists()
):
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
