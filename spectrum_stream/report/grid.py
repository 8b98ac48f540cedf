"""Place modules on the map: the layer is the column, the group is the row. Pure functions of names.

Groups that differ only in a number, such as `mlp.experts.0.up_proj` and `mlp.experts.1.up_proj`, share a row. The
number is the place within a cell, so a model of 256 experts has one row per projection, not 256.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..model.names import expert_of, model_order, pool_of

# This stands for a number in the name of a row.
_ANY = "*"
NO_NAME = "(no name)"

# Ten even steps from low to high, readable without color vision and in grey (Nuñez, Anderton and Renslow 2018).
CIVIDIS = (
    "#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a module on the map.

    Attributes:
        tower: the part of its name before the first number, e.g. `model.layers` or `vision.blocks`.
        family: its group with `*` for each number.
        layer: the first number of its name, as written; "" without one.
        index: the numbers of its group, joined by dots; "" without one. For one of several fused experts, its number.
    """

    tower: str
    family: str
    layer: str
    index: str

    @property
    def row(self) -> tuple[str, str]:
        """The key of its row."""
        return self.tower, self.family


def place_of(module: str, group: str, fused: str | None = None) -> Place:
    """Compute the place of a module.

    Args:
        fused: the module of the fused experts that this one is a part of; it is placed in their cell.
    """
    tower, layer = _split_at_layer(fused or module)
    parts = group.split(".")
    # Without a layer, the group is the whole name of the module, and numbers in it belong to the name.
    numbers = [part for part in parts if part.isdecimal()] if layer else []
    family = ".".join(_ANY if part.isdecimal() and layer else part for part in parts)
    if pool_of(module, group) is not None:
        # The group of pooled experts does not hold their number.
        numbers.append(expert_of(module))
    if fused is not None:
        numbers.append(module.removeprefix(f"{fused}."))
    return Place(tower, family, layer, ".".join(numbers))


def _split_at_layer(module: str) -> tuple[str, str]:
    parts = module.split(".")
    for i, part in enumerate(parts):
        # The same rule as `names.group_of`, which cuts the group.
        if part.isdigit():
            return ".".join(parts[:i]), part
    return "", ""


@dataclass(frozen=True, slots=True)
class Grid:
    """The rows and columns of a map.

    Attributes:
        rows: (tower, family), in order of first appearance.
        columns: layers in numeric order, after "" for modules without a layer.
    """

    rows: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]

    def labels(self) -> list[str]:
        """Return the label of every row: its family, with the tower if needed."""
        towers = Counter(family for _, family in self.rows)
        return [
            f"{tower} · {family or NO_NAME}" if tower and towers[family] > 1 else family or NO_NAME
            for tower, family in self.rows
        ]


def lay(places: Iterable[Place]) -> Grid:
    """Build the grid that holds all these places."""
    rows: dict[tuple[str, str], None] = {}
    columns: set[str] = set()
    for place in places:
        rows.setdefault(place.row)
        columns.add(place.layer)
    return Grid(tuple(rows), tuple(sorted(columns, key=lambda layer: (layer != "", model_order(layer)))))
