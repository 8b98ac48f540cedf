"""Draw the map in a terminal: in colors or digits, and in bands if the terminal is too narrow."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from ..results.result import median_of
from ..text import printable
from .data import Shown, ShownEntry
from .grid import CIVIDIS, Grid, Place, lay, place_of

_CELL_WIDTH = 2
# As on the page, the scale is logarithmic if scores spread over more than this factor.
_LOG_FACTOR = 20
# The limit of rows times layers in a map. Published models have at most 126 layers and about 20 rows.
_MAX_CELLS = 20_000
# The row and the layer of a cell.
_Key = tuple[tuple[str, str], str]


class TerminalMap:
    """A rich renderable: groups down, layers across, each row with its own scale.

    The second character of a cell is `*` if the module is chosen, and `+` if some of its experts are. The first is
    `!` if the score is degenerate, `x` without a score, and otherwise, without colors, a digit: 0 is the lowest tenth
    of the row's range.
    """

    def __init__(self, shown: Shown, chosen: Iterable[str]) -> None:
        chosen = set(chosen)
        places = [place_of(entry.module, entry.group, entry.fused) for entry in shown.entries]
        self._grid: Grid = lay(places)
        self._cells = _cells(shown.entries, places, chosen)
        by_row: dict[tuple[str, str], list[_Cell]] = {}
        for (row, _), cell in self._cells.items():
            by_row.setdefault(row, []).append(cell)
        self._scales = {row: _scale(cells) for row, cells in by_row.items()}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows, layers = len(self._grid.rows), len(self._grid.columns)
        if rows * layers > _MAX_CELLS:
            yield Text(f"a map of {rows:,} groups and {layers:,} layers is too large for a terminal")
            yield Text("write a page with -o report.html, which shows a part at a time")
            return
        labels = [printable(label) for label in self._grid.labels()]
        widest = max(map(len, labels), default=0)
        label_width = min(widest, max(12, options.max_width // 3))
        at_once = max(1, (options.max_width - label_width - 1) // _CELL_WIDTH)
        columns = self._grid.columns
        # A scale needs more than sixteen colors.
        has_color = console.color_system in ("256", "truecolor") and not console.no_color
        for first in range(0, len(columns), at_once):
            band = columns[first : first + at_once]
            yield Text(" " * (label_width + 1) + _heading(band), style="dim")
            for label, row in zip(labels, self._grid.rows, strict=True):
                if not any((row, layer) in self._cells for layer in band):
                    continue
                line = Text(printable(_fit(label, label_width)))
                line.append(" ")
                for layer in band:
                    line.append_text(self._cell(row, layer, has_color))
                line.rstrip()
                yield line
        yield Text("each row, from its lowest score to its highest: ", end="")
        yield _legend(has_color)
        yield Text("* chosen  + some chosen  ! degenerate score  x no score", style="dim")

    def _cell(self, row: tuple[str, str], layer: str, has_color: bool) -> Text:
        if (row, layer) not in self._cells:
            return Text(" " * _CELL_WIDTH)
        cell = self._cells[row, layer]
        scale = self._scales[row]
        if cell.value is None or scale is None:
            return Text(f"{cell.warning}{cell.mark}")
        share = scale(cell.value)
        if has_color:
            return Text(f"{cell.warning}{cell.mark}", style=_style(share))
        return Text(f"{cell.warning.strip() or min(9, int(share * 10))}{cell.mark}")


class _Cell(NamedTuple):
    """One cell.

    Attributes:
        value: the score of its matrix, or the median of the matrices that share the cell; None without a score.
        warning: one character: `x` without a score, `!` for a degenerate one, else a space.
        mark: one character: `*` if all its modules are chosen, `+` if some are, else a space.
    """

    value: float | None
    warning: str
    mark: str


def _cells(entries: Sequence[ShownEntry], places: Sequence[Place], chosen: set[str]) -> dict[_Key, _Cell]:
    together: dict[_Key, list[tuple[ShownEntry, Place]]] = {}
    for entry, place in zip(entries, places, strict=True):
        together.setdefault((place.row, place.layer), []).append((entry, place))
    cells = {}
    for key, found in together.items():
        # The score of fused experts is their median, so the single experts do not count again. If the fused experts
        # are not in the result, they have no score.
        own = [entry for entry, place in found if place.index == ""][:1]
        own = own or [entry for entry, _ in found if entry.fused is None]
        values = [entry.snr for entry in own if entry.snr is not None]
        flags = {entry.flag for entry in own}
        picked = sum(entry.module in chosen for entry in own)
        cells[key] = _Cell(
            median_of(values) if values else None,
            "x" if not values else "!" if "" not in flags else " ",
            " " if not picked else "*" if picked == len(own) else "+",
        )
    return cells


class _Scale:
    def __init__(self, low: float, high: float) -> None:
        self._is_log = low > 0 and high / low > _LOG_FACTOR
        self._low, self._high = self._to(low), self._to(high)

    def _to(self, value: float) -> float:
        return math.log(value) if self._is_log else value

    def __call__(self, value: float) -> float:
        """Map a value to [0, 1]: 0 at the lowest, 1 at the highest and above.

        The result is 0.5 if all are equal.
        """
        if self._low == self._high:
            return 0.5
        if value == math.inf or (value <= 0 and self._is_log):
            return float(value > 0)
        # The difference of two halves is finite. The difference of large numbers may not be.
        low, high = self._low / 2, self._high / 2
        return min(1.0, max(0.0, (self._to(value) / 2 - low) / (high - low))) if low < high else 0.5


def _scale(cells: Iterable[_Cell]) -> _Scale | None:
    finite = [cell for cell in cells if cell.value is not None and math.isfinite(cell.value)]
    # A degenerate score would stretch the scale of the others.
    values = [cell.value for cell in finite if cell.warning == " "] or [cell.value for cell in finite]
    known = [value for value in values if value is not None]
    return _Scale(min(known), max(known)) if known else None


def _heading(band: Sequence[str]) -> str:
    """Label the first layer and every fifth one, if there is room."""
    named = [i for i, layer in enumerate(band) if i == 0 or (layer.isdecimal() and int(layer[-9:]) % 5 == 0)]
    named = [i for i in named if i == 0 or i > 1 or len(band[0]) < _CELL_WIDTH] + [len(band)]
    parts = []
    for here, following in pairwise(named):
        room = (following - here) * _CELL_WIDTH
        label = printable(band[here]) or "-"
        parts.append(label.ljust(room) if len(label) <= room else " " * room)
    return "".join(parts).rstrip()


def _fit(label: str, width: int) -> str:
    # The end of a group's name is more informative than its beginning.
    return label.ljust(width) if len(label) <= width else f"~{label[len(label) - width + 1 :]}"


def _style(share: float) -> Style:
    at = min(share, 0.999999) * (len(CIVIDIS) - 1)
    low, high = (_rgb(CIVIDIS[int(at) + step]) for step in (0, 1))
    r, g, b = (round(x + (y - x) * (at - int(at))) for x, y in zip(low, high, strict=True))
    ink = "black" if 0.299 * r + 0.587 * g + 0.114 * b > 128 else "white"
    return Style(color=ink, bgcolor=f"rgb({r},{g},{b})", bold=True)


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def _legend(has_color: bool) -> Text:
    if not has_color:
        return Text("0 to 9")
    legend = Text()
    for i in range(10):
        legend.append("  ", _style(i / 9))
    return legend
