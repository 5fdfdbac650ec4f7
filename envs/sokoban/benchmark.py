"""The Sokoban benchmark: levels, episodes, scores.

A level is solved when every box is on a goal. Each turn is one move; a move
into a wall, or against a box that cannot be pushed, is invalid and uses up the
turn. An episode ends when the level is solved or at the turn limit: a box that
is stuck does not end it, as is usual in published environments.
"""

from t2po_jax.envs import base, games, prompts
from t2po_jax.envs.sokoban import data, engine, expert
from t2po_jax.envs.sokoban import settings as settings_lib
from t2po_jax.envs.sokoban.wordings import compact, full

_WORDINGS = {"compact": compact, "full": full}


class Push(games.Game):
  """Plays one level after another.

  Attributes:
    level: walls and goals.
    state: the player and the boxes.
  """

  table: "Sokoban"
  level: engine.Level
  state: engine.State

  def begin(self, task_id: str) -> base.Observation:
    """Sets up the level."""
    self.level, self.state = engine.parse(task_id)
    return self._see()

  def _see(self) -> base.Observation:
    wording = self.table.wording
    return base.Observation(
      wording.TASK,
      wording.show(self.level, self.state),
      engine.possible(self.level, self.state),
    )

  def act(self, action: str) -> games.Move:
    """Moves the player."""
    settings, before = self.table.settings, self.state
    direction = action.lower()
    if direction in engine.MOVES:
      self.state = engine.move(self.level, before, direction)
    won = engine.solved(self.level, self.state)
    goals = self.level.goals
    gained = len(self.state.boxes & goals) - len(before.boxes & goals)
    reward = settings.reward_box * gained + settings.reward_success * won
    stuck = any(engine.cornered(self.level, box) for box in self.state.boxes)
    return games.Move(
      self._see(),
      reward=reward,
      done=won,
      possible=self.state != before,
      success=won,
      info={"stuck": float(stuck)},
    )

  def expert(self, seed: int) -> expert.ScriptedExpert:
    """The solver, as a player."""
    settings = self.table.settings
    return expert.ScriptedExpert(
      self.level,
      lambda: self.state,
      self.table.wording,
      hesitation=settings.expert_hesitation,
      doubt=settings.expert_doubt,
      seed=seed,
    )


class Sokoban(games.Table):
  """Sokoban in text; implements `envs.base.Benchmark`.

  A task id is the level itself, see `engine`.
  """

  Settings = settings_lib.Settings
  game = Push

  def __init__(self, settings: settings_lib.Settings) -> None:
    """Draws the levels.

    Raises:
      ValueError: if there are not enough different ones.
    """
    self.settings = settings
    self.max_turns = settings.max_turns
    self.wording = _WORDINGS[settings.wording]
    self.grammar = prompts.Grammar(("action",), self.wording.CLOSING)
    self.splits = data.draw_splits(
      settings.seed,
      base.split_sizes(settings),
      size=settings.size,
      boxes=settings.boxes,
      walls=settings.walls,
      moves=(settings.least_moves, settings.most_moves),
    )

  def render(self, view: prompts.View) -> list[prompts.Message]:
    """The prompt of a turn in the benchmark's wording."""
    return self.wording.render(view)
