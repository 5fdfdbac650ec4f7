"""What the WebShop benchmark projects, and from how many products."""

from absl.testing import absltest

from t2po_jax.experiments.benchmarks import webshop_steps

MEASURED = {
  "products": 23_628.72,
  "open_seconds": 2.0,
  "search_ms": 1.0,
  "index_mib": 3.0,
  "products_mib": 0.0,
  "peak_memory_mib": 100.0,
}


class ProjectTest(absltest.TestCase):
  def test_in_proportion(self):
    lines = webshop_steps.project(MEASURED)
    self.assertLen(lines, 6)
    self.assertRegex(lines[2], r"^search_ms +50$")

  def test_not_from_a_small_shop(self):
    (line,) = webshop_steps.project(MEASURED | {"products": 1000})
    self.assertIn("found 1000 products, expected at least 20000", line)


if __name__ == "__main__":
  absltest.main()
