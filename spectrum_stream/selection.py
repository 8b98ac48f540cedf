"""From scores to the modules to train: the top percentage of every group, by Spectrum's rules."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .matrices import pick_groups
from .planning import check_percent
from .results import Scored, read_results


@dataclass(frozen=True, slots=True)
class Selection:
    """The modules chosen of each group.

    Attributes:
        top_percent: of each group, in (0, 100].
        ranked: every group's modules, best first; ties in the model's order.
        chosen: the modules chosen, best first, by group; a group of few can have none.
    """

    top_percent: float
    ranked: Mapping[str, tuple[Scored, ...]]
    chosen: Mapping[str, tuple[str, ...]]

    @property
    def tied(self) -> tuple[str, ...]:
        """Groups whose last chosen module has the score of the first that was not: position decided."""
        return tuple(
            name
            for name, group in self.ranked.items()
            if 0 < (count := len(self.chosen[name])) < len(group) and group[count - 1].snr == group[count].snr
        )

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(module for group in self.chosen.values() for module in group)


def rank(scored: Iterable[Scored]) -> dict[str, tuple[Scored, ...]]:
    """Each group's modules by score, best first; equal ones keep their order, groups the order they came in."""
    groups: dict[str, list[Scored]] = {}
    for line in scored:
        groups.setdefault(line.group, []).append(line)
    return {name: tuple(sorted(group, key=lambda line: line.snr, reverse=True)) for name, group in groups.items()}


def select(
    result: str | Path | Iterable[Scored], top_percent: float, *, modules: Sequence[str] | None = None
) -> Selection:
    """Choose the top `top_percent` of every group, rounded down: a group of one is chosen at 100 only.

    Args:
        result: a result file, ours or Spectrum's, or the lines of one (`ScanResult.scored`).
        modules: groups to choose from, by exact name or glob; None for all.

    Raises:
        UsageError: bad_percent, no_such_group.
        ResultError: the file cannot be read.
    """
    check_percent(top_percent)
    ranked = rank(read_results(Path(result)) if isinstance(result, (str, Path)) else result)
    if modules is not None:
        wanted = pick_groups(ranked, modules)
        ranked = {name: group for name, group in ranked.items() if name in wanted}
    return Selection(
        top_percent,
        ranked,
        {
            name: tuple(line.module for line in group[: int(len(group) * top_percent / 100)])
            for name, group in ranked.items()
        },
    )
