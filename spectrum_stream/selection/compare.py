"""Compare two rankings of a model's modules: their correlation, and the differences of their selections.

For a base model and a tuned one, two revisions, or two metrics of one scan. Pure numpy.
"""

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..results.result import Module, Result
from .select import select


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupComparison:
    """One group in two results.

    Attributes:
        count: the number of modules that are in both.
        spearman, kendall: rank correlations of their values, in [-1, 1], corrected for ties (Kendall's is tau-b);
            None if one result has the same value for all of them, or there is one module.
        chosen_a, chosen_b: the number of modules in each selection.
        entered, left: the modules that only the second selection has, and those that only the first has; best first.
    """

    count: int
    spearman: float | None
    kendall: float | None
    chosen_a: int
    chosen_b: int
    entered: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def kept(self) -> int:
        return self.chosen_a - len(self.left)

    @property
    def is_decided(self) -> bool:
        """Whether values decide both rankings, and not only the order of the model."""
        return self.spearman is not None or self.count < 2


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two results, A and B.

    Attributes:
        groups: the groups of A, then those that only B has.
        only_a, only_b: the modules that the other result does not have.
    """

    groups: dict[str, GroupComparison]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def overlap(self) -> float | None:
        """The overlap of the groups that values decide, see `overlap`.

        It is None if nothing is chosen there.
        """
        return overlap(group for group in self.groups.values() if group.is_decided)


def overlap(groups: Iterable[GroupComparison]) -> float | None:
    """Compute the common share of the larger selection, in [0, 1].

    Return None if both are empty.
    """
    groups = list(groups)
    larger = max(sum(g.chosen_a for g in groups), sum(g.chosen_b for g in groups), 0)
    return sum(g.kept for g in groups) / larger if larger else None


def compare(
    a: str | Path | Result | Iterable[Module], b: str | Path | Result | Iterable[Module], top_percent: float
) -> Comparison:
    """Compare two results, module by module, by name.

    Args:
        a, b: result files or modules.
        top_percent: the percentage to choose of every group.

    Raises:
        UsageError: bad_percent; nothing_in_common, they have no module in common.
        ResultError: a file cannot be read.
    """
    chosen_a, chosen_b = select(a, top_percent), select(b, top_percent)
    in_a, in_b = ({m.name: m.rank_key for m in chosen.result.modules} for chosen in (chosen_a, chosen_b))
    if in_a.keys().isdisjoint(in_b):
        raise UsageError(
            "the two results have no module in common",
            reason="nothing_in_common",
            hint="compare results of one model, scanned with the same --names",
        )
    names: dict[str, list[str]] = {}
    for module in chosen_a.result.modules:
        common = names.setdefault(module.group, [])
        if module.name in in_b:
            common.append(module.name)
    for module in chosen_b.result.modules:
        names.setdefault(module.group, [])
    # The selections of all groups count, because experts can be ranked together in one result and apart in the other.
    all_a, all_b = frozenset(chosen_a.chosen_names), frozenset(chosen_b.chosen_names)
    groups = {}
    for group, modules in names.items():
        x, y = (np.array([keys[module] for module in modules]) for keys in (in_a, in_b))
        first, second = chosen_a.chosen.get(group, ()), chosen_b.chosen.get(group, ())
        groups[group] = GroupComparison(
            count=len(modules),
            spearman=spearman(x, y),
            kendall=kendall(x, y),
            chosen_a=len(first),
            chosen_b=len(second),
            entered=tuple(module for module in second if module not in all_a),
            left=tuple(module for module in first if module not in all_b),
        )
    return Comparison(
        groups,
        tuple(module for module in in_a if module not in in_b),
        tuple(module for module in in_b if module not in in_a),
    )


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Compute Spearman's rho of x and y, (count,), with mean ranks for equal values.

    None if all values of one of them are equal, or count is below two.
    """
    ranks_x, ranks_y = (ranks - ranks.mean() if len(ranks) else ranks for ranks in (_find_ranks(x), _find_ranks(y)))
    norm = math.sqrt(float(ranks_x @ ranks_x) * float(ranks_y @ ranks_y))
    return max(-1.0, min(1.0, float(ranks_x @ ranks_y) / norm)) if norm else None


def kendall(x: np.ndarray, y: np.ndarray) -> float | None:
    """Compute Kendall's tau-b of x and y, (count,) (Biometrika 33, 1945).

    Return None where `spearman` is None.

        tau = (concordant - discordant) / sqrt((pairs - tied in x) (pairs - tied in y))

    Discordant pairs are counted as inversions of y in the order of x (Knight, JASA 61, 1966). So a group of tens of
    thousands of modules, as in published mixtures of experts, takes about a second.
    """
    count = len(x)
    pairs = count * (count - 1) // 2
    codes_x, codes_y = (np.unique(values, return_inverse=True)[1] for values in (x, y))
    tied_x, tied_y, tied_both = (
        _count_tied_pairs(codes) for codes in (codes_x, codes_y, codes_x * (count + 1) + codes_y)
    )
    if tied_x == pairs or tied_y == pairs:
        return None
    seen: list[int] = []
    discordant = 0
    # Equal values of x are in the order of y, so that they are not counted as inversions.
    for done, code in enumerate(codes_y[np.lexsort((codes_y, codes_x))].tolist()):
        place = bisect.bisect_right(seen, code)
        discordant += done - place
        seen.insert(place, code)
    concordant = pairs - tied_x - tied_y + tied_both - discordant
    return (concordant - discordant) / math.sqrt((pairs - tied_x) * (pairs - tied_y))


def _find_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _count_tied_pairs(codes: np.ndarray) -> int:
    counts = np.unique(codes, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())
