"""Where the checkout and the real benchmark data lie, for all tests."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Real data and recordings; tests that need them skip without.
DATA = pathlib.Path(os.environ.get("T2PO_DATA") or ROOT / "../shared/data")
