"""The web site of the shop: pages, forms, history, and the server itself."""

import html
import re
import threading
import urllib.error
import urllib.parse
import urllib.request

from absl.testing import absltest

from t2po_jax import envs
from t2po_jax.envs.webshop import site


def _actions(page):
  return re.findall(r'name="action" value="([^"]*)"', page)


class SiteTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.shop = envs.make("webshop", wording="full", products=40, max_turns=8)
    self.site = site.Site(self.shop, split="train", memory=2, seed=0)

  def _act(self, action):
    self.assertIsNone(self.site.handle("/act", {"action": action}))
    return self.site.show()

  def test_a_purchase(self):
    visit = self.site.visitor.env.visit
    goal = visit.goal
    self.assertIn(goal.instruction, self.site.show())
    self.site.handle("/act", {"words": goal.product.title})
    page = self.site.show()
    self.assertIn(goal.product.price_tag, page)
    self.assertIn(f"<div>{goal.product.title}</div>", page)
    self.assertIn(f"click[{goal.product.asin.lower()}]", _actions(page))
    page = self._act(f"click[{goal.product.asin}]")
    for _, value in goal.options:
      self.assertIn(f"click[{value}]", _actions(page))
      page = self._act(f"click[{value}]")
      self.assertIn(f'class="chosen" name="action" value="click[{value}]', page)
    page = self._act("click[features]")
    self.assertIn(goal.product.bullets[0], page)
    self._act("click[&lt; prev]")  # What a browser would never send.
    page = self._act("click[< prev]")
    self.assertIn('class="impossible"', page)
    page = self._act("click[buy now]")
    self.assertIn("<td>1.000</td>", page)
    self.assertIn("Right!", page)
    self.assertIn(f"{self.site.visitor.task_id}: 1.000", page)
    self.assertEmpty(_actions(page))
    self.assertNotIn("What a model sees", page)
    # Nothing more happens to a finished episode.
    self.assertEqual(self._act("click[back to search]"), page)

  def test_every_button_is_possible(self):
    task = self.site.visitor.task_id
    asin = self.site.visitor.env.visit.goal.product.asin
    title = self.site.visitor.env.visit.goal.product.title
    tried = 0
    for way in ([], [f"click[{asin}]"], [f"click[{asin}]", "click[features]"]):
      way = [f"search[{title}]", *way]
      self.site.handle("/task", {"task": task})
      for action in way:
        page = self._act(action)
      for button in _actions(page):
        self.site.handle("/task", {"task": task})
        for action in (*way, html.unescape(button)):
          self._act(action)
        self.assertTrue(self.site.visitor.results[-1].action_valid, button)
        tried += 1
    self.assertGreater(tried, 15)

  def test_turn_limit(self):
    for _ in range(8):
      page = self._act("search[mug]")
    self.assertIn("No more turns", page)
    self.assertIn("0.000", page)

  def test_the_prompt_of_the_model(self):
    self.site.handle("/act", {"words": "mug"})
    self.assertIn("What a model sees", self.site.show())
    self.assertIn("Your action at step 1: search[mug]", self.site.show())

  def test_texts_are_escaped(self):
    page = self._act("search[<b>]")
    self.assertNotIn("<b>]", page)
    self.assertIn("search[&lt;b&gt;]", page)

  def test_other_tasks(self):
    self.assertIsNone(self.site.handle("/task", {"task": "embedded-3"}))
    self.assertIn("embedded-3", self.site.show())
    self.assertRegex(self.site.handle("/task", {"task": "x"}), "unknown task")
    self.assertRegex(self.site.handle("/other", {}), "no such form")

  def test_server(self):
    server = site.make_server(self.site, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    self.addCleanup(thread.join)
    self.addCleanup(server.server_close)
    self.addCleanup(server.shutdown)
    address = f"http://127.0.0.1:{server.server_port}"
    form = urllib.parse.urlencode({"words": "mug"}).encode()
    with urllib.request.urlopen(f"{address}/act", form, timeout=10) as answer:
      self.assertEqual(answer.url, f"{address}/")
      self.assertIn("Page 1 (Total results:", answer.read().decode())
    for path, data in (("/nothing", None), ("/other", b"a=b")):
      with self.assertRaises(urllib.error.HTTPError):
        urllib.request.urlopen(address + path, data, timeout=10)


if __name__ == "__main__":
  absltest.main()
