"""Two rankings of one model's modules: how alike they are, and what one selection has that the other has not.

A base model and a tuned one, two revisions, two measures of one scan, two percentages. Pure numpy.
"""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from ..results.result import Module
from .select import Selection, select


@dataclass(frozen=True, slots=True)
class GroupComparison:
    """One group, in two results.

    Attributes:
        count: modules that both have.
        spearman, kendall: rank correlations of their scores, in [-1, 1], equal scores allowed for (Kendall's is
            tau-b); None where either result has the same score for all of them, or there is one module.
        chosen_a, chosen_b: how many each selection has.
        entered, left: modules that only the second selection has, and only the first; best first.
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
        """Whether scores, and not the places in the model alone, make both rankings."""
        return self.spearman is not None or self.count < 2


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two results, A and B.

    Attributes:
        groups: those of A, then those that only B has.
        only_a, only_b: modules that the other one lacks.
    """

    groups: dict[str, GroupComparison]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def overlap(self) -> float | None:
        """See `overlap`, over the groups that scores decide; None where those have nothing chosen."""
        return overlap(group for group in self.groups.values() if group.is_decided)


def overlap(groups: Iterable[GroupComparison]) -> float | None:
    """What both selections have, as a share of the larger one, in [0, 1]; None where both are empty."""
    groups = list(groups)
    larger = max(sum(g.chosen_a for g in groups), sum(g.chosen_b for g in groups), 0)
    return sum(g.kept for g in groups) / larger if larger else None


def compare(
    a: Sequence[Module], b: Sequence[Module], top_percent: float, top_percent_b: float | None = None
) -> Comparison:
    """Compare two results, module by module, by name.

    Args:
        a, b: their lines; -inf for no score.
        top_percent: what is chosen of every group of A, and of B unless `top_percent_b` says otherwise.

    Raises:
        UsageError: bad_percent; nothing_in_common, they have no module in common.
    """
    if {line.name for line in a}.isdisjoint(line.name for line in b):
        raise UsageError(
            "the two results have no module in common",
            reason="nothing_in_common",
            hint="are they of one model, and by the same names (--names)?",
        )
    chosen_a = select(a, top_percent)
    chosen_b = select(b, top_percent if top_percent_b is None else top_percent_b)
    in_a, in_b = ({line.name: line.snr for line in lines} for lines in (a, b))
    names: dict[str, list[str]] = {line.group: [] for line in (*a, *b)}
    for line in a:
        if line.name in in_b:
            names[line.group].append(line.name)
    everywhere = frozenset(chosen_a.chosen_names), frozenset(chosen_b.chosen_names)
    return Comparison(
        {
            group: _group(group, modules, in_a, in_b, chosen_a, chosen_b, everywhere)
            for group, modules in names.items()
        },
        tuple(module for module in in_a if module not in in_b),
        tuple(module for module in in_b if module not in in_a),
    )


def _group(
    group: str,
    modules: Sequence[str],
    in_a: dict[str, float],
    in_b: dict[str, float],
    chosen_a: Selection,
    chosen_b: Selection,
    everywhere: tuple[frozenset[str], frozenset[str]],
) -> GroupComparison:
    x, y = (np.array([scores[module] for module in modules]) for scores in (in_a, in_b))
    first, second = chosen_a.chosen.get(group, ()), chosen_b.chosen.get(group, ())
    return GroupComparison(
        count=len(modules),
        spearman=spearman(x, y),
        kendall=kendall(x, y),
        chosen_a=len(first),
        chosen_b=len(second),
        # In whatever group: experts can be pooled in one result and apart in the other.
        entered=tuple(module for module in second if module not in everywhere[0]),
        left=tuple(module for module in first if module not in everywhere[1]),
    )


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rho of x and y, (count,): the correlation of their ranks, the mean rank for equal values.

    None where one of them is all the same, or shorter than two.
    """
    ranks_x, ranks_y = (ranks - ranks.mean() if len(ranks) else ranks for ranks in (_ranks(x), _ranks(y)))
    norm = math.sqrt(float(ranks_x @ ranks_x) * float(ranks_y @ ranks_y))
    return max(-1.0, min(1.0, float(ranks_x @ ranks_y) / norm)) if norm else None


def kendall(x: np.ndarray, y: np.ndarray) -> float | None:
    """Kendall's tau-b of x and y, (count,) (Biometrika 33, 1945); None where `spearman` is.

        tau = (concordant - discordant) / sqrt((pairs - tied in x) (pairs - tied in y))

    Discordant pairs are counted as inversions of y in the order of x (Knight, JASA 61, 1966), so that a group of
    tens of thousands, as published mixtures of experts have them, is a matter of a second.
    """
    count = len(x)
    pairs = count * (count - 1) // 2
    codes_x, codes_y = (np.unique(values, return_inverse=True)[1] for values in (x, y))
    tied_x, tied_y, tied_both = (_tied_pairs(codes) for codes in (codes_x, codes_y, codes_x * (count + 1) + codes_y))
    if tied_x == pairs or tied_y == pairs:
        return None
    seen: list[int] = []
    discordant = 0
    # Equal values of x come in the order of y, so that they count as no inversion.
    for done, code in enumerate(codes_y[np.lexsort((codes_y, codes_x))].tolist()):
        place = bisect.bisect_right(seen, code)
        discordant += done - place
        seen.insert(place, code)
    concordant = pairs - tied_x - tied_y + tied_both - discordant
    return (concordant - discordant) / math.sqrt((pairs - tied_x) * (pairs - tied_y))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _tied_pairs(codes: np.ndarray) -> int:
    counts = np.unique(codes, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())
