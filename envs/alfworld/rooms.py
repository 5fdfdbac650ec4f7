"""Rooms, receptacles and objects from which embedded scenes are drawn.

The names are those of the ALFRED dataset, and the contents a plausible subset
of what it allows. There are three sizes: `full` rooms have about as many
receptacles as the benchmark's, `small` ones about five, and `tiny` ones three
or four and fewer object classes, for models trained from scratch.
"""

from collections.abc import Mapping
import dataclasses
import itertools

from t2po_jax.envs.alfworld import problem


@dataclasses.dataclass(frozen=True)
class Size:
  """How much a room contains.

  Attributes:
    receptacles: room -> receptacle class -> least and most of them.
    kinds: most object classes of a room, the first of `HOMES`; None for no
      limit. With few, a small model soon learns to tell them apart.
    objects: least and most objects besides those of the task.
    extra: most additional objects of the task's kind.
    capacity: most objects in one receptacle at the start.
    shared_pose: probability that a cabinet, drawer, shelf or burner can be
      reached from the pose of the previous one.
    always_openable: whether doors and drawers are always openable; otherwise
      some show their contents, as in the benchmark.
  """

  receptacles: Mapping[str, Mapping[str, tuple[int, int]]]
  kinds: int | None
  objects: tuple[int, int]
  extra: int
  capacity: int
  shared_pose: float
  always_openable: bool

  def homes(self, room: str) -> dict[str, tuple[str, ...]]:
    """Object class -> receptacle classes that it may be in."""
    return dict(itertools.islice(HOMES[room].items(), self.kinds))


SIZES = {
  "tiny": Size(
    receptacles={
      "kitchen": {
        "CounterTop": (1, 1),
        "Fridge": (1, 1),
        "Microwave": (1, 1),
        "SinkBasin": (1, 1),
      },
      "living room": {
        "CoffeeTable": (1, 1),
        "Drawer": (0, 1),
        "SideTable": (1, 1),
        "Sofa": (1, 1),
      },
      "bedroom": {
        "Bed": (1, 1),
        "Desk": (1, 1),
        "Drawer": (0, 1),
        "Shelf": (1, 1),
      },
      "bathroom": {
        "Cabinet": (0, 1),
        "CounterTop": (1, 1),
        "SinkBasin": (1, 1),
        "Toilet": (1, 1),
      },
    },
    kinds=8,
    objects=(1, 3),
    extra=0,
    capacity=3,
    shared_pose=0.0,
    always_openable=True,
  ),
  "small": Size(
    receptacles={
      "kitchen": {
        "Cabinet": (1, 1),
        "CounterTop": (1, 1),
        "DiningTable": (0, 1),
        "Fridge": (1, 1),
        "Microwave": (1, 1),
        "SinkBasin": (1, 1),
      },
      "living room": {
        "ArmChair": (0, 1),
        "CoffeeTable": (1, 1),
        "Drawer": (1, 1),
        "SideTable": (1, 1),
        "Sofa": (1, 1),
      },
      "bedroom": {
        "Bed": (1, 1),
        "Desk": (1, 1),
        "Drawer": (1, 1),
        "Dresser": (0, 1),
        "Shelf": (1, 1),
      },
      "bathroom": {
        "Cabinet": (1, 1),
        "CounterTop": (1, 1),
        "GarbageCan": (0, 1),
        "SinkBasin": (1, 1),
        "Toilet": (1, 1),
      },
    },
    kinds=None,
    objects=(3, 5),
    extra=0,
    capacity=3,
    shared_pose=0.0,
    always_openable=True,
  ),
  "full": Size(
    receptacles={
      "kitchen": {
        "Cabinet": (4, 8),
        "CoffeeMachine": (1, 1),
        "CounterTop": (1, 3),
        "DiningTable": (0, 1),
        "Drawer": (2, 5),
        "Fridge": (1, 1),
        "GarbageCan": (1, 1),
        "Microwave": (1, 1),
        "Shelf": (0, 2),
        "SinkBasin": (1, 1),
        "StoveBurner": (4, 4),
        "Toaster": (1, 1),
      },
      "living room": {
        "ArmChair": (1, 2),
        "Cabinet": (0, 3),
        "CoffeeTable": (1, 2),
        "DiningTable": (0, 1),
        "Drawer": (2, 6),
        "Dresser": (0, 1),
        "GarbageCan": (1, 1),
        "Ottoman": (0, 1),
        "Safe": (0, 1),
        "Shelf": (0, 4),
        "SideTable": (1, 3),
        "Sofa": (1, 2),
        "TVStand": (0, 1),
      },
      "bedroom": {
        "ArmChair": (0, 1),
        "Bed": (1, 2),
        "Cabinet": (0, 2),
        "Desk": (1, 1),
        "Drawer": (2, 6),
        "Dresser": (0, 1),
        "GarbageCan": (1, 1),
        "LaundryHamper": (0, 1),
        "Safe": (0, 1),
        "Shelf": (1, 5),
        "SideTable": (1, 2),
      },
      "bathroom": {
        "BathtubBasin": (0, 1),
        "Cabinet": (2, 4),
        "CounterTop": (1, 1),
        "Drawer": (0, 3),
        "GarbageCan": (1, 1),
        "HandTowelHolder": (1, 2),
        "Shelf": (0, 2),
        "SinkBasin": (1, 2),
        "Toilet": (1, 1),
        "ToiletPaperHanger": (1, 1),
        "TowelHolder": (1, 2),
      },
    },
    kinds=None,
    objects=(12, 24),
    extra=1,
    capacity=6,
    shared_pose=0.4,
    always_openable=False,
  ),
}

# The first scene number of each room type in the dataset; each has thirty.
SCENE_NUMBERS = {
  "kitchen": 1,
  "living room": 201,
  "bedroom": 301,
  "bathroom": 401,
}

# The rooms in which each task type takes place.
TASK_ROOMS = {
  problem.PLACE: ("kitchen", "living room", "bedroom", "bathroom"),
  problem.LOOK: ("living room", "bedroom"),
  problem.CLEAN: ("kitchen", "bathroom"),
  problem.HEAT: ("kitchen",),
  problem.COOL: ("kitchen",),
  problem.TWO: ("kitchen", "living room", "bedroom", "bathroom"),
}

_SEATS = ("ArmChair", "Ottoman", "Sofa")
_TABLES = ("CoffeeTable", "CounterTop", "Desk", "DiningTable", "SideTable")
_STORAGE = ("Cabinet", "Shelf")
_SHARED = ("Drawer", "Dresser", "Shelf")
_FOOD = ("CounterTop", "DiningTable", "Fridge", "GarbageCan", "SinkBasin")
_DISH = ("CounterTop", "DiningTable", "Fridge", "SinkBasin", *_STORAGE)
_CUTLERY = ("CounterTop", "DiningTable", "Drawer", "SinkBasin")
_TOILETRY = ("Cabinet", "CounterTop", "Drawer", "GarbageCan", "Toilet")

# Where an object may be, room by room.
HOMES: dict[str, dict[str, tuple[str, ...]]] = {
  "kitchen": {
    "Apple": (*_FOOD, "Microwave"),
    "Bowl": (*_DISH, "Microwave"),
    "Bread": ("CounterTop", "DiningTable", "Fridge", "GarbageCan"),
    "ButterKnife": _CUTLERY,
    "Cup": (*_DISH, "Microwave"),
    "DishSponge": (*_CUTLERY, "Cabinet", "GarbageCan"),
    "Egg": (*_FOOD, "Microwave"),
    "Fork": _CUTLERY,
    "Kettle": ("Cabinet", "CounterTop", "DiningTable", "StoveBurner"),
    "Knife": _CUTLERY,
    "Ladle": (*_CUTLERY, "Cabinet"),
    "Lettuce": _FOOD,
    "Mug": (*_DISH, "CoffeeMachine", "Microwave"),
    "Pan": ("Cabinet", "CounterTop", "Fridge", "SinkBasin", "StoveBurner"),
    "PepperShaker": ("Cabinet", "CounterTop", "DiningTable", "Drawer"),
    "Plate": (*_DISH, "Microwave"),
    "Pot": ("Cabinet", "CounterTop", "Fridge", "SinkBasin", "StoveBurner"),
    "Potato": (*_FOOD, "Microwave"),
    "SaltShaker": ("Cabinet", "CounterTop", "DiningTable", "Drawer"),
    "SoapBottle": ("Cabinet", "CounterTop", "Drawer", "GarbageCan"),
    "Spatula": _CUTLERY,
    "Spoon": _CUTLERY,
    "Tomato": (*_FOOD, "Microwave"),
    "WineBottle": ("Cabinet", "CounterTop", "DiningTable", "Fridge"),
  },
  "living room": {
    "Book": (*_SEATS, *_TABLES, *_SHARED, "Cabinet"),
    "Box": (*_SEATS, *_TABLES, "Cabinet", "Dresser", "Shelf"),
    "CreditCard": (*_SEATS, *_TABLES, *_SHARED, "Safe"),
    "KeyChain": (*_SEATS, *_TABLES, *_SHARED, "Safe"),
    "Laptop": (*_SEATS, *_TABLES, "Dresser"),
    "Newspaper": (*_SEATS, *_TABLES, *_SHARED, "Cabinet", "GarbageCan"),
    "Pillow": _SEATS,
    "RemoteControl": (*_SEATS, *_TABLES, *_SHARED),
    "Statue": (*_TABLES, "Dresser", "Safe", "Shelf"),
    "TissueBox": (*_TABLES, *_SHARED, "Cabinet", "TVStand"),
    "Vase": (*_TABLES, "Cabinet", "Dresser", "Safe", "Shelf"),
    "Watch": (*_TABLES, *_SHARED, "Safe"),
  },
  "bedroom": {
    "AlarmClock": ("Desk", "Dresser", "Shelf", "SideTable"),
    "Book": ("ArmChair", "Bed", "Cabinet", "Desk", "SideTable", *_SHARED),
    "Bowl": ("Cabinet", "Desk", "Dresser", "Shelf", "SideTable"),
    "CD": ("Cabinet", "Desk", "GarbageCan", "Safe", "SideTable", *_SHARED),
    "CellPhone": ("ArmChair", "Bed", "Desk", "Safe", "SideTable", *_SHARED),
    "Cloth": ("ArmChair", "Cabinet", "Desk", "LaundryHamper", *_SHARED),
    "CreditCard": ("ArmChair", "Desk", "Safe", "SideTable", *_SHARED),
    "KeyChain": ("ArmChair", "Desk", "Safe", "SideTable", *_SHARED),
    "Laptop": ("ArmChair", "Bed", "Desk", "Dresser", "SideTable"),
    "Mug": ("Cabinet", "Desk", "Dresser", "Shelf", "SideTable"),
    "Pen": ("Desk", "GarbageCan", "SideTable", *_SHARED),
    "Pencil": ("Desk", "GarbageCan", "SideTable", *_SHARED),
    "Pillow": ("ArmChair", "Bed"),
  },
  "bathroom": {
    "Candle": ("Cabinet", "CounterTop", "Drawer", "Shelf", "Toilet"),
    "Cloth": (*_TOILETRY, "BathtubBasin", "Shelf", "SinkBasin"),
    "DishSponge": (*_TOILETRY, "BathtubBasin", "Shelf", "SinkBasin"),
    "HandTowel": (*_TOILETRY, "HandTowelHolder", "SinkBasin"),
    "Plunger": ("Cabinet",),
    "SoapBar": (*_TOILETRY, "BathtubBasin", "Shelf", "SinkBasin"),
    "SoapBottle": (*_TOILETRY, "Shelf"),
    "SprayBottle": (*_TOILETRY, "Shelf"),
    "TissueBox": (*_TOILETRY, "Shelf"),
    "ToiletPaper": (*_TOILETRY, "Shelf", "ToiletPaperHanger"),
    "Towel": ("TowelHolder",),
  },
}

# The lamp of `problem.LOOK` stands on an open surface.
LAMP = "DeskLamp"
LAMP_HOMES = ("CoffeeTable", "Desk", "Dresser", "Shelf", "SideTable")

OPENABLE = frozenset(("Cabinet", "Drawer", "Fridge", "Microwave", "Safe"))
# These always have a door, in both sizes.
ALWAYS_OPENABLE = frozenset(("Fridge", "Microwave", "Safe"))
SHARED_POSE = frozenset(("Cabinet", "Drawer", "Shelf", "StoveBurner"))

CLEANABLE = frozenset(
  (
    "Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Kettle Knife Ladle"
    " Lettuce Mug Pan Plate Pot Potato SoapBar Spatula Spoon Tomato"
  ).split()
)
HEATABLE = frozenset("Apple Bread Cup Egg Mug Plate Potato Tomato".split())
COOLABLE = frozenset(
  (
    "Apple Bowl Bread Cup Egg Lettuce Mug Pan Plate Pot Potato Tomato"
    " WineBottle"
  ).split()
)
# Objects that can themselves hold something.
VESSELS = frozenset("Bowl Box Cup Mug Pan Plate Pot".split())

# Task type -> receptacle class of its tool, and the objects it works on.
TREATABLE = {
  problem.CLEAN: ("SinkBasin", CLEANABLE),
  problem.HEAT: ("Microwave", HEATABLE),
  problem.COOL: ("Fridge", COOLABLE),
}
