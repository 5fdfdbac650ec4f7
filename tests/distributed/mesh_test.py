"""Runs checks in a process whose CPU poses as eight devices."""

import os
import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized

from tests import places


class EightDevicesTest(parameterized.TestCase):
  @parameterized.parameters(
    "eight_devices.py", "eight_collectives.py", "eight_samplers.py"
  )
  def test_checks_pass_on_eight_devices(self, name):
    checks = pathlib.Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
      [*command, checks],
      env={
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
      },
      cwd=places.ROOT,
      capture_output=True,
      text=True,
    )
    self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
    self.assertRegex(run.stdout, r"\d passed")


if __name__ == "__main__":
  absltest.main()
