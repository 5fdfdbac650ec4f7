"""An exported folder as a repository of the Hugging Face hub.

The token comes from the environment (`HF_TOKEN`) and is never printed. A new
repository is private; one that exists and is public is not written to unless
that is asked for. `export.json`, which names folders of this machine, stays
here; a model card (`README.md`) says what there is to know instead.
"""

from collections.abc import Callable
import json
import os
import pathlib
import re
from typing import Any

import huggingface_hub
from huggingface_hub import errors

TOKEN = "HF_TOKEN"
_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_KEPT_BACK = ["export.json"]


def check(name: str) -> str:
  """What can be known before anything is written.

  Args:
    name: of the repository, `OWNER/NAME`.

  Returns:
    The token.

  Raises:
    ValueError: if the name cannot be one, or there is no token.
  """
  try:
    huggingface_hub.utils.validate_repo_id(name)
    allowed = _NAME.fullmatch(name) is not None
  except errors.HFValidationError:
    allowed = False
  if not allowed:
    raise ValueError(
      f"--push: found {name!r}, expected OWNER/NAME of letters, digits, '-', "
      "'_' and '.', such as my-name/my-model"
    )
  token = os.environ.get(TOKEN, "").strip()
  if not token:
    raise ValueError(
      f"--push: the environment variable {TOKEN} is empty; set it to a token "
      "that may write, from https://huggingface.co/settings/tokens"
    )
  return token


def push(folder: pathlib.Path, name: str, *, public: bool = False) -> str:
  """Uploads an exported folder.

  Args:
    folder: as `export.export` wrote it.
    name: of the repository, `OWNER/NAME`; it is made if it does not exist.
    public: whether everybody may read it.

  Returns:
    The address of the repository.

  Raises:
    ValueError: if name, token or folder are wrong, or the hub refuses or
      cannot be reached; the folder stays as it is.
  """
  token = check(name)
  card = folder / "README.md"
  if not card.exists():
    card.write_text(_card(folder, name))
  hub = huggingface_hub.HfApi(token=token)
  address: str = _call(
    name,
    token,
    lambda: hub.create_repo(name, private=not public, exist_ok=True),
  )
  repository = _call(name, token, lambda: hub.repo_info(name))
  if not public and not repository.private:
    raise ValueError(
      f"--push: {name} exists and everybody can read it; add --public, or "
      "name another repository"
    )
  _call(
    name,
    token,
    lambda: hub.upload_folder(
      repo_id=name,
      folder_path=folder,
      commit_message="Upload a trained agent",
      ignore_patterns=list(_KEPT_BACK),
    ),
  )
  return str(address)


def _call(name: str, token: str, request: Callable[[], Any]) -> Any:
  """A request of the hub; whatever goes wrong is said in one line."""
  try:
    return request()
  except Exception as error:
    # Which library's errors these are depends on the hub's release; an error
    # of an upload may have the refusal as its cause.
    reason = _reason(error).replace(token, "***")
    raise ValueError(f"--push: {name}: {reason}") from None


def _reason(error: BaseException) -> str:
  """What went wrong, in one line."""
  causes = [error]
  while (cause := causes[-1].__cause__) is not None:
    causes.append(cause)
  statuses = [
    each.response.status_code
    for each in causes
    if isinstance(each, errors.HfHubHTTPError) and each.response is not None
  ]
  endpoint = huggingface_hub.constants.ENDPOINT
  if not statuses:
    detail = " ".join(str(error).split())
    return f"{endpoint}: {type(error).__name__}: {detail}"
  if statuses[0] == 401:
    return f"{endpoint} does not know the token in {TOKEN} (401)"
  if statuses[0] == 403:
    return f"{endpoint} does not let the token in {TOKEN} write there (403)"
  detail = " ".join(str(error).split())
  return f"{endpoint} answers {statuses[0]}: {detail}"


def _card(folder: pathlib.Path, name: str) -> str:
  """A model card: what the folder holds and where it comes from.

  Raises:
    ValueError: if the folder was not written by `export.export`.
  """
  try:
    report = json.loads((folder / "export.json").read_text())
  except (OSError, json.JSONDecodeError) as error:
    raise ValueError(
      f"--push: {folder} holds no export ({error}); give --workdir as well"
    ) from None
  adapter = (folder / "adapter_config.json").is_file()
  base = []
  if adapter:
    described = json.loads((folder / "adapter_config.json").read_text())
    base_model = str(described.get("base_model_name_or_path") or "")
    if _NAME.fullmatch(base_model) and not pathlib.Path(base_model).exists():
      base = [f"base_model: {base_model}"]
  score = report.get("score")
  held_out = "" if score is None else f", held-out success {score:.3f}"
  lines = [
    "---",
    f"library_name: {'peft' if adapter else 'transformers'}",
    *base,
    "pipeline_tag: text-generation",
    "tags: [t2po_jax, reinforcement-learning, agent]",
    "---",
    "",
    f"# {name.partition('/')[2]}",
    "",
    f"{'Low-rank adapters' if adapter else 'A language model'} trained by "
    "multi-turn reinforcement learning with t2po_jax: update "
    f"{report['update']} of a run on `{report['environment']}`{held_out}.",
    "",
  ]
  return "\n".join(lines)
