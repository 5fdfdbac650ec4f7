"""Opens the trace viewer: `experiments/view.py --workdir=runs/mine`.

  python experiments/view.py --workdir=runs/a,plain=runs/b
  python experiments/view.py --workdir=runs/mine --export=traces.html \
    --filter=kind=eval,success=no --limit=50

A local page for the episodes and metrics of runs or evaluations: a list with
filters, every episode as a dialogue with tokens coloured by a measurement, two
episodes of a task side by side, learning curves. Runs may still be in progress.
It listens on 127.0.0.1 only. `--export` writes a single self-contained HTML
file instead.
"""

import pathlib
from typing import Any
import webbrowser

from absl import flags

from t2po_jax.experiments import command_line
from t2po_jax.viewing import runs, site


def define_flags(given: flags.FlagValues = flags.FLAGS) -> None:
  """All flags of this program."""
  own: dict[str, Any] = {"flag_values": given}
  flags.DEFINE_list(
    "workdir",
    None,
    "Folders of runs or evaluations, as folder or label=folder.",
    **own,
  )
  flags.DEFINE_integer(
    "port", 8400, "Port; 0 takes a free one.", 0, 65535, **own
  )
  flags.DEFINE_bool("browser", False, "Open a browser.", **own)
  flags.DEFINE_string("export", None, "Write this HTML file instead.", **own)
  flags.DEFINE_list(
    "filter", [], "For --export: filters of the list, key=value.", **own
  )
  flags.DEFINE_integer(
    "limit", 100, "For --export: most episodes of a run.", 1, **own
  )
  flags.mark_flag_as_required("workdir", given)


def read_filters(given: list[str]) -> dict[str, str]:
  """Filters from `key=value` texts.

  Raises:
    ValueError: for an unknown key.
  """
  known = ("kind", "category", "task_id", "update", "success", "aborted")
  known += runs.COUNTS
  wanted = {}
  for text in given:
    key, _, value = text.partition("=")
    if key not in known:
      raise ValueError(
        f"--filter: found {key!r}, expected one of {', '.join(known)}"
      )
    wanted[key] = value
  return wanted


def view(given: flags.FlagValues) -> None:
  """Serves the page, or writes it to a file.

  Raises:
    ValueError: if flags or folders are invalid.
  """
  page = site.Site(runs.open_runs(given.workdir))
  if given.export:
    path = pathlib.Path(given.export)
    count = site.export(page, path, read_filters(given.filter), given.limit)
    size = path.stat().st_size / 1e6
    print(f"{count} episodes written to {path} ({size:.1f} MB)")
    return
  server = site.make_server(page, given.port)
  address = f"http://{site.ADDRESS}:{server.server_port}/"
  print(f"{address} (Ctrl-C ends it)", flush=True)
  if given.browser:
    webbrowser.open(address)
  try:
    server.serve_forever()
  except KeyboardInterrupt:
    server.server_close()


def run() -> None:
  """The command `t2po-view`."""
  command_line.run(view, define_flags)


if __name__ == "__main__":
  run()
