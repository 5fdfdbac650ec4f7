"""Takes the core dependencies from requirements.txt; see pyproject.toml."""

import pathlib

import setuptools

lines = pathlib.Path(__file__).with_name("requirements.txt").read_text()
setuptools.setup(
  install_requires=[
    line for line in lines.splitlines() if line[:1] not in ("", "#", "-")
  ]
)
