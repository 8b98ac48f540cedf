"""Where a module is on the map: its layer is the column, its group the row. Pure functions of names.

Groups that differ in a number only, `mlp.experts.0.up_proj` and `mlp.experts.1.up_proj`, share a row, and that number
is the place in a cell: a model of 256 experts has a row for each projection, not 256.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..model.names import expert_of, model_order, pool_of

# In place of a number in the name of a row.
_ANY = "*"
NO_NAME = "(no name)"

# From low to high, readable without color vision and in grey (Nuñez, Anderton and Renslow 2018); ten even steps.
CIVIDIS = (
    "#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """A module on the map.

    Attributes:
        tower: what is before the first number of its name: `model.layers`, `vision.blocks`.
        family: its group, numbers replaced by `*`.
        layer: the first number of its name, as written; "" where there is none.
        index: the numbers of its group, joined by dots; "" where there are none. Of a bank of experts, the expert.
    """

    tower: str
    family: str
    layer: str
    index: str

    @property
    def row(self) -> tuple[str, str]:
        return self.tower, self.family


def place_of(module: str, group: str, bank: str | None = None) -> Place:
    """The place of a module; of an expert of a bank, in the cell of its bank."""
    tower, layer = _tower(bank or module)
    parts = group.split(".")
    # A group without a layer is a module's whole name, and whose numbers, if a result has any there, are its own.
    numbers = [part for part in parts if part.isdecimal()] if layer else []
    family = ".".join(_ANY if part.isdecimal() and layer else part for part in parts)
    if pool_of(module, group) is not None:
        # Experts that are ranked as one have a group without their number.
        numbers.append(expert_of(module))
    if bank is not None:
        numbers.append(module.removeprefix(f"{bank}."))
    return Place(tower, family, layer, ".".join(numbers))


def _tower(module: str) -> tuple[str, str]:
    parts = module.split(".")
    for i, part in enumerate(parts):
        # As `naming.group_of` has it, which gives the group.
        if part.isdigit():
            return ".".join(parts[:i]), part
    return "", ""


@dataclass(frozen=True, slots=True)
class Grid:
    """A map of rows and columns.

    Attributes:
        rows: (tower, family), in the order in which they first came.
        columns: layers by number; "" first, for modules without one.
    """

    rows: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]

    def labels(self) -> list[str]:
        """The name of every row: its family, and the tower with it where two towers have one."""
        towers = Counter(family for _, family in self.rows)
        return [
            f"{tower} · {family or NO_NAME}" if tower and towers[family] > 1 else family or NO_NAME
            for tower, family in self.rows
        ]


def lay(places: Iterable[Place]) -> Grid:
    """The map that holds all these places."""
    rows: dict[tuple[str, str], None] = {}
    columns: set[str] = set()
    for place in places:
        rows.setdefault(place.row)
        columns.add(place.layer)
    return Grid(tuple(rows), tuple(sorted(columns, key=lambda layer: (layer != "", model_order(layer)))))
