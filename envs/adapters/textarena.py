"""Single-player games of TextArena (arXiv 2504.11442).

The games use Python's and NumPy's global generators; each game here keeps its
own generator states and restores them around every call, so that a task does
not depend on the order of play. The adapter does not know which actions are
admissible (`env.actions` may name some) and is not thread-safe, because those
generators are shared. Some games download word lists; those that do not include
FrozenLake, Sokoban, Mastermind, TowerOfHanoi, Minesweeper, 2048, Blackjack,
Bandit, LightsOut and GuessTheNumber.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import importlib
import io
import random
from typing import Any

import numpy as np

from t2po_jax import keys
from t2po_jax.envs import base, games
from t2po_jax.envs.adapters import seeded


@dataclasses.dataclass(frozen=True)
class TextArenaSettings(seeded.Settings):
  """The keys of `config.env` for a TextArena game."""

  game: str = keys.key(
    "FrozenLake-v0", "Id of a single-player game, without wrappers."
  )
  brackets: bool = keys.key(
    True, "Whether to put an action without brackets into brackets."
  )


class TextArena(seeded.SeededTable):
  """Tasks of one game; implements `envs.base.Benchmark`."""

  Settings = TextArenaSettings

  def __init__(self, settings: TextArenaSettings) -> None:
    """Looks up the game.

    Raises:
      ValueError: if it is unknown, or cannot be played alone or offline.
    """
    self.game = Play
    try:
      library: Any = importlib.import_module("textarena")
    except ImportError:
      raise ValueError(
        "env.name: 'textarena' needs the package textarena; install the extra "
        "'textarena'"
      ) from None
    known = library.envs.registration.ENV_REGISTRY
    name = settings.game.removesuffix("-raw")
    if name not in known:
      plain = [n for n in known if not n.endswith(("-raw", "-train"))]
      raise ValueError(f"env.game: unknown {name!r}{keys.nearest(name, plain)}")
    self._make = lambda: library.make(f"{name}-raw")
    self._kinds = library.ObservationType
    super().__init__(settings)

  def make(self) -> Any:
    """A new game of the library."""
    return self._make()

  def read(self, messages: list[tuple[int, str, Any]]) -> tuple[str, str]:
    """Extracts the rules and the events from a player's messages."""
    rules = [text for _, text, kind in messages if kind == self._kinds.PROMPT]
    seen = [
      text
      for _, text, kind in messages
      if kind not in (self._kinds.PROMPT, self._kinds.PLAYER_ACTION)
    ]
    return "\n".join(rules).strip(), "\n".join(seen).strip()


class Play(games.Game):
  """Games of one kind, one after another."""

  table: TextArena

  def __init__(self, table: TextArena) -> None:
    super().__init__(table)
    self._env: Any = None
    self._task = ""
    self._states: tuple[Any, Any] = (None, None)

  @contextlib.contextmanager
  def _own_chance(self, seed: int | None = None) -> Iterator[None]:
    """Restores the game's generator states; suppresses its printing."""
    kept = random.getstate(), np.random.get_state()
    if seed is None:
      random.setstate(self._states[0])
      np.random.set_state(self._states[1])
    else:
      random.seed(seed)
      np.random.seed(seed)
    try:
      with contextlib.redirect_stdout(io.StringIO()):
        yield
    finally:
      self._states = random.getstate(), np.random.get_state()
      random.setstate(kept[0])
      np.random.set_state(kept[1])

  def begin(self, task_id: str) -> base.Observation:
    """Starts the game of a seed.

    Raises:
      EnvError: if the game cannot be set up.
    """
    seed = seeded.read_seed(task_id)
    with self._own_chance(seed):
      try:
        self._env = self.table.make()
        self._env.reset(num_players=1, seed=seed)
        _, messages = self._env.get_observation()
      except Exception as error:
        # For example a wrong number of players, or a missing word list.
        lines = (line.strip("* ") for line in str(error).splitlines())
        reason = next(filter(None, lines), repr(error))
        raise base.EnvError(
          f"{self.table.settings.game} cannot be set up for one player: "
          f"{reason}"
        ) from None
    self._task, text = self.table.read(messages)
    return self._see(text or "The game begins.")

  def _see(self, text: str) -> base.Observation:
    table = self.table
    return table.see(self._task, self._env, text, table.settings.actions)

  def act(self, action: str) -> games.Move:
    """Executes an action; a second rule violation may end the game."""
    settings = self.table.settings
    if settings.brackets and "[" not in action:
      action = f"[{action}]"
    with self._own_chance():
      try:
        done, _ = self._env.step(action)
        _, messages = self._env.get_observation()
        rewards, facts = self._env.close() if done else (None, {})
      except Exception as error:
        raise base.EnvError(f"{settings.game}: {error!r:.80}") from error
    reward = float((rewards or {}).get(0, 0.0))
    wrong = bool(facts.get(0, {}).get("invalid_move"))
    wrong = wrong or bool(getattr(self._env.state, "error_count", 0))
    _, text = self.table.read(messages)
    return games.Move(
      self._see(text or "Nothing is said."),
      reward=settings.reward_scale * reward,
      done=bool(done),
      possible=not wrong,
      success=bool(done) and reward >= settings.success_from,
      info={"score": reward} if done else {},
    )

  def expert(self, seed: int) -> base.Expert:
    """The function given as `env.expert`: (game, generator) -> action."""
    return self.table.demonstrate(self._env, seed)

  def close(self) -> None:
    """Drops the game."""
    self._env = None
