"""Runs `eight_devices.py` where one CPU poses as eight devices."""

import os
import pathlib
import subprocess
import sys

from absl.testing import absltest


class EightDevicesTest(absltest.TestCase):
  def test_checks_pass_on_eight_devices(self):
    checks = pathlib.Path(__file__).with_name("eight_devices.py")
    run = subprocess.run(
      [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", checks],
      env={
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
      },
      cwd=checks.parents[1],
      capture_output=True,
      text=True,
    )
    self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
    self.assertRegex(run.stdout, r"\d passed")


if __name__ == "__main__":
  absltest.main()
