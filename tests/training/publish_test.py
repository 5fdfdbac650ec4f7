"""Exported folders on a stand-in of the Hugging Face hub."""

import base64
import hashlib
from http import server
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from unittest import mock

from absl.testing import absltest, parameterized
import huggingface_hub

from t2po_jax.training import publish
from tests import places
from tests.training import export_test

TOKEN = "hf_whatnobodymaysee"


class Hub(server.ThreadingHTTPServer):
  """What the client asks a hub for, with repositories in memory.

  Attributes:
    repositories: private or not, by name.
    files: bytes by repository and path.
    refusal: status that every request gets, 0 for none.
    asked: method and path of all requests.
  """

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.repositories: dict[str, bool] = {}
    self.files: dict[tuple[str, str], bytes] = {}
    self.objects: dict[str, bytes] = {}
    self.refusal = 0
    self.asked: list[tuple[str, str]] = []
    self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(server.BaseHTTPRequestHandler):
  server: Hub

  def log_message(self, *_):
    pass

  def _answer(self, value, status=200):
    data = json.dumps(value).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def _serve(self):
    hub, path = self.server, self.path.partition("?")[0]
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    hub.asked.append((self.command, path))
    if hub.refusal:
      told = f"no, {self.headers.get('Authorization')}"
      return self._answer({"error": told}, hub.refusal)
    if path.startswith("/lfs/"):
      hub.objects[path.removeprefix("/lfs/")] = body
      return self._answer({})
    if self.headers.get("Authorization") != f"Bearer {TOKEN}":
      return self._answer({"error": "who are you?"}, 401)
    if path == "/api/validate-yaml":
      return self._answer({"warnings": [], "errors": []})
    if path == "/api/repos/create":
      return self._create(json.loads(body))
    if path.endswith(".git/info/lfs/objects/batch"):
      return self._batch(json.loads(body))
    name = "/".join(path.split("/")[3:5])
    if name not in hub.repositories:
      return self._answer({"error": "Repository not found"}, 404)
    if "/preupload/" in path:
      return self._preupload(json.loads(body))
    if "/commit/" in path:
      return self._commit(name, body)
    private = hub.repositories[name]
    return self._answer({"id": name, "private": private, "sha": "0" * 40})

  do_GET = do_POST = do_PUT = _serve

  def _create(self, asked):
    name = f"{asked['organization']}/{asked['name']}"
    address = {"url": f"{self.server.url}/{name}"}
    if name in self.server.repositories:
      return self._answer(address | {"error": "you have it"}, 409)
    private = asked.get("visibility") == "private" or asked.get("private")
    self.server.repositories[name] = bool(private)
    return self._answer(address)

  def _preupload(self, asked):
    return self._answer(
      {
        "files": [
          {
            "path": file["path"],
            "uploadMode": "lfs"
            if file["path"].endswith(".safetensors")
            else "regular",
            "shouldIgnore": False,
          }
          for file in asked["files"]
        ]
      }
    )

  def _batch(self, asked):
    return self._answer(
      {
        "transfer": "basic",
        "objects": [
          {
            **each,
            "actions": {
              "upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}
            },
          }
          for each in asked["objects"]
        ],
      }
    )

  def _commit(self, name, body):
    for line in body.splitlines():
      item = json.loads(line)
      value = item["value"]
      if item["key"] == "file":
        data = base64.b64decode(value["content"])
      elif item["key"] == "lfsFile":
        data = self.server.objects[value["oid"]]
        assert hashlib.sha256(data).hexdigest() == value["oid"]
      else:
        continue
      self.server.files[name, value["path"]] = data
    address = f"{self.server.url}/{name}/commit/{'1' * 40}"
    self._answer({"commitUrl": address, "commitOid": "1" * 40})


class HubTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    place = tempfile.TemporaryDirectory()
    self.addCleanup(place.cleanup)
    self.place = pathlib.Path(place.name)
    self.hub = Hub()
    thread = threading.Thread(target=self.hub.serve_forever, daemon=True)
    thread.start()
    self.addCleanup(self.hub.server_close)
    self.addCleanup(self.hub.shutdown)

  def write_folder(self, **files):
    """A folder as an export leaves it."""
    folder = self.place / "out"
    folder.mkdir()
    report = {
      "workdir": "/home/me/secret",
      "environment": "toy",
      "update": 7,
      "score": 0.5,
    }
    (folder / "export.json").write_text(json.dumps(report))
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    for name, text in files.items():
      (folder / f"{name}.json").write_text(text)
    return folder

  def push(self, folder, name="me/agent", *, token=TOKEN, url="", **options):
    constants = huggingface_hub.constants
    with (
      mock.patch.dict(os.environ, {"HF_TOKEN": token}),
      mock.patch.object(constants, "ENDPOINT", url or self.hub.url),
      mock.patch.object(constants, "HF_HUB_DISABLE_XET", True),
    ):
      return publish.push(folder, name, **options)


class PushTest(HubTest):
  @parameterized.parameters(False, True)
  def test_a_new_repository_holds_the_folder(self, public):
    folder = self.write_folder()
    address = self.push(folder, public=public)
    self.assertEqual(address, f"{self.hub.url}/me/agent")
    self.assertEqual(self.hub.repositories, {"me/agent": not public})
    names = {"README.md", "config.json", "model.safetensors"}
    self.assertEqual(
      self.hub.files,
      {("me/agent", name): (folder / name).read_bytes() for name in names},
    )
    card = (folder / "README.md").read_text()
    self.assertIn("update 7 of a run on `toy`, held-out success 0.500", card)
    self.assertNotIn("secret", card)

  def test_a_repository_that_exists_gets_a_commit(self):
    self.hub.repositories["me/agent"] = True
    self.push(self.write_folder())
    self.assertLen(self.hub.files, 3)

  def test_a_public_one_is_not_written_to_by_accident(self):
    self.hub.repositories["me/agent"] = False
    folder = self.write_folder()
    with self.assertRaisesRegex(ValueError, "everybody can read it; add --pub"):
      self.push(folder)
    self.assertEmpty(self.hub.files)
    self.push(folder, public=True)
    self.assertLen(self.hub.files, 3)

  def test_an_adapter_names_its_base(self):
    folder = self.write_folder(
      adapter_config='{"base_model_name_or_path": "owner/base-1b"}'
    )
    self.push(folder)
    card = self.hub.files["me/agent", "README.md"].decode()
    self.assertIn("library_name: peft\nbase_model: owner/base-1b\n", card)

  @parameterized.parameters(401, 403, 500)
  def test_refusals_get_one_line_without_the_token(self, status):
    self.hub.refusal = status
    with self.assertRaisesRegex(
      ValueError, f"--push: me/agent: .*{status}"
    ) as (raised):
      self.push(self.write_folder())
    self.assertNotIn("\n", str(raised.exception))
    self.assertNotIn(TOKEN, str(raised.exception))

  def test_a_wrong_token_is_told(self):
    with self.assertRaisesRegex(ValueError, "does not know the token in HF_TO"):
      self.push(self.write_folder(), token="hf_other")

  def test_a_hub_out_of_reach_gets_one_line(self):
    folder = self.write_folder()
    with self.assertRaisesRegex(ValueError, "127.0.0.1:9: Conn") as raised:
      self.push(folder, url="http://127.0.0.1:9")
    self.assertNotIn("\n", str(raised.exception))

  @parameterized.parameters(
    "agent", "me/", "a/b/c", "me/a b", "me/ä", "me/a--b"
  )
  def test_wrong_names_ask_nobody(self, name):
    with self.assertRaisesRegex(ValueError, "--push: found .* OWNER/NAME"):
      self.push(self.write_folder(), name)
    self.assertEmpty(self.hub.asked)

  def test_no_token_asks_nobody(self):
    with self.assertRaisesRegex(ValueError, "variable HF_TOKEN is empty"):
      self.push(self.write_folder(), token=" ")
    self.assertEmpty(self.hub.asked)

  def test_another_folder_is_no_export(self):
    folder = self.place / "other"
    folder.mkdir()
    with self.assertRaisesRegex(ValueError, "other holds no export"):
      self.push(folder)
    self.assertEmpty(self.hub.asked)


class CommandTest(HubTest):
  def run_command(self, *arguments, **variables):
    found = subprocess.run(
      [
        sys.executable,
        str(places.ROOT / "experiments" / "export.py"),
        *arguments,
      ],
      env={
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "HF_ENDPOINT": self.hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        **variables,
      },
      capture_output=True,
      text=True,
    )
    self.assertNotIn("Traceback", found.stderr)
    self.assertNotIn(TOKEN, found.stdout + found.stderr)
    return found

  def test_from_a_run_to_the_hub_and_again(self):
    workdir, *_ = export_test.make_run(self.place)
    out = self.place / "out"
    found = self.run_command(
      f"--workdir={workdir}", f"--out={out}", "--push=me/agent"
    )
    self.assertEqual(found.returncode, 0, found.stderr)
    self.assertIn(f"{self.hub.url}/me/agent", found.stdout)
    self.assertEqual(self.hub.repositories, {"me/agent": True})
    sent = {name for _, name in self.hub.files}
    kept = {path.name for path in out.iterdir()}
    self.assertEqual(kept - sent, {"export.json"})
    self.assertIn("model.safetensors", sent)
    # The folder alone is enough to send it once more.
    self.hub.refusal = 403
    found = self.run_command(f"--out={out}", "--push=me/agent")
    self.assertEqual(found.returncode, 1)
    last = found.stderr.strip().splitlines()[-1]
    self.assertStartsWith(last, "error: --push: me/agent: ")
    self.assertIn("(403)", last)


if __name__ == "__main__":
  absltest.main()
