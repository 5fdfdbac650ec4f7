"""The benchmark of search servers: it asks, and counts what was asked."""

import json
import subprocess
import sys

from absl.testing import absltest

from tests import places


class SearchServerTest(absltest.TestCase):
  def test_a_few_clients(self):
    script = places.ROOT / "experiments" / "benchmarks" / "search_server.py"
    found = subprocess.run(
      [
        sys.executable,
        str(script),
        *("--clients=4", "--queries=40", "--passages=50"),
      ],
      cwd=places.ROOT,
      capture_output=True,
      text=True,
    )
    self.assertEqual(found.returncode, 0, found.stderr)
    numbers = json.loads(found.stdout.strip().splitlines()[-1])
    self.assertEqual(numbers["clients"], 4)
    self.assertGreaterEqual(numbers["p99_ms"], numbers["median_ms"])
    # Four at a time: no more than four medians' worth in the same time.
    rate = numbers["queries_per_second"]
    self.assertLess(rate, 4e3 / numbers["median_ms"] * 4)
    self.assertGreater(rate, 1)


if __name__ == "__main__":
  absltest.main()
