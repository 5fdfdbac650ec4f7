"""What several processes check together; `processes_test.py` starts them.

python two_processes.py FOLDER COORDINATOR PROCESSES PROCESS_ID

Writes the parameters after three updates to FOLDER/params-PROCESSES-ID.npz.
"""

import pathlib
import sys

import jax
import numpy as np

from t2po_jax.configs import base
from t2po_jax.configs import base as settings
from t2po_jax.distributed import processes, sharding
from t2po_jax.learning import learner, objectives
from t2po_jax.models import config as config_lib
from t2po_jax.models import decoder
from t2po_jax.training import checkpoint, experience, policy_update
from tests.learning import learner_test
from tests.training import experience_test


def check_exchange() -> None:
  """Values of any size arrive whole, in order; differences are refused."""
  index, count = processes.index(), processes.count()
  mine = {"index": index, "data": np.arange(300_000 * (index + 1))}
  found = processes.gather(mine)
  assert [other["index"] for other in found] == list(range(count))
  assert [len(other["data"]) for other in found] == [
    300_000 * (n + 1) for n in range(count)
  ]
  shares = processes.gather(processes.share(range(5)))
  assert sorted(sum(shares, [])) == [0, 1, 2, 3, 4]
  processes.require_equal({"same": 1})
  for values, message in (({"a.b": index}, "a.b: found 1 in process 1"),):
    try:
      processes.require_equal(values)
    except ValueError as error:
      assert str(error).startswith(message), error
    else:
      raise AssertionError("different settings were not noticed")


def check_order(folder: pathlib.Path) -> None:
  """Process 0 makes, the others find; its error is everyone's."""
  file = folder / "made"

  def make():
    found = file.exists()
    file.touch()
    return found

  assert processes.first_alone(make) == (processes.index() > 0)

  def fail():
    raise ValueError("no such thing" if processes.index() == 0 else "too late")

  try:
    processes.first_alone(fail)
  except ValueError as error:
    assert "no such thing" in str(error), error
  else:
    raise AssertionError("the error was lost")


def make_learner():
  """A small decoder on a mesh that spans the processes along `fsdp`."""
  policy = decoder.Policy(
    config_lib.ModelConfig("qwen3", 16, 8, 2, 4, 2, 4, 8, qk_norm=True)
  )
  trainer = learner.Learner(
    policy,
    decoder.logical_axes(decoder.shapes(policy.config)),
    sharding.create_mesh(data=1, fsdp=4, tensor=2),
    optimizer=learner_test.OPTIMIZER,
    objective=objectives.PolicyObjective(),
    rows=4,
    chunk=4,
  )
  return policy, trainer


def make_experience(update: int) -> experience.Experience:
  """A made-up rollout with unequal returns, the same in every process."""
  episodes = [
    experience_test.make_episode(
      "task", group, member, [member + update, 1.0], tokens=3 + member
    )
    for group in range(3)
    for member in range(4)
  ]
  none = np.zeros(0, np.float32)
  return experience.Experience(episodes, episodes, None, none, none, 0, {})


def update_three_times(folder: pathlib.Path) -> None:
  """Improves, saves, restores and writes the parameters."""
  config = base.get_config()
  config.train.row_tokens, config.train.micro_rows = 16, 4
  policy, trainer = make_learner()
  params = jax.jit(policy.init)(jax.random.key(0))
  state = trainer.init_state(params)
  improver = policy_update.Improver(settings.read(config), trainer, None)
  for update in (1, 2, 3):
    state, numbers = improver.improve(
      state, make_experience(update), update=update
    )
  assert numbers["learn/grad_norm"] > 0
  count, index = processes.count(), processes.index()
  store = checkpoint.Checkpoints(folder / f"checkpoints-{count}")
  store.save(3, state, {"update": 3})
  restored, position = store.restore(trainer.abstract_state())
  assert position == {"update": 3}
  store.close()
  leaves = jax.tree.leaves(sharding.gather(restored.params))
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[1])
  local = jax.tree.leaves(sharding.put(state.params, device))
  for leaf, other in zip(leaves, local, strict=True):
    assert other.sharding == device
    np.testing.assert_array_equal(leaf, other)
  np.savez(folder / f"params-{count}-{index}.npz", *leaves)


def main(folder: str, coordinator: str, count: str, index: str) -> None:
  jax.config.update("jax_disable_most_optimizations", True)
  if int(count) > 1:
    processes.start(coordinator, count, int(index), heartbeat=60)
    check_exchange()
    check_order(pathlib.Path(folder))
  update_three_times(pathlib.Path(folder))


if __name__ == "__main__":
  main(*sys.argv[1:])
