"""Compare two rankings of a model's modules: their correlation, and the differences of their selections.

For a base model and a tuned one, two revisions, or two metrics of one scan. Pure numpy.
"""

from collections.abc import Iterable, Sequence
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
    counts = [len(modules) for modules in names.values()]
    x, y = (np.array([keys[m] for modules in names.values() for m in modules], dtype=float) for keys in (in_a, in_b))
    rhos, taus = _correlate(x, y, counts)
    groups = {}
    for group, count, rho, tau in zip(names, counts, rhos, taus, strict=True):
        first, second = chosen_a.chosen.get(group, ()), chosen_b.chosen.get(group, ())
        groups[group] = GroupComparison(
            count=count,
            spearman=rho,
            kendall=tau,
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
    return _correlate(x, y, [len(x)])[0][0]


def kendall(x: np.ndarray, y: np.ndarray) -> float | None:
    """Compute Kendall's tau-b of x and y, (count,) (Biometrika 33, 1945).

    Return None where `spearman` is None.

        tau = (concordant - discordant) / sqrt((pairs - tied in x) (pairs - tied in y))
    """
    return _correlate(x, y, [len(x)])[1][0]


_Correlations = list[float | None]


def _correlate(x: np.ndarray, y: np.ndarray, counts: Sequence[int]) -> tuple[_Correlations, _Correlations]:
    """Compute Spearman's rho and Kendall's tau-b of many groups at once.

    With one group at a time, numpy would take minutes for 100,000 groups.

    Args:
        x, y: (count,), without NaN, group after group.
        counts: the number of values in each group.

    Returns:
        rho and tau of each group; both None if all values of x or of y are equal.
    """
    sizes = np.array(counts, dtype=np.int64)
    pairs = sizes * (sizes - 1) // 2
    group = np.repeat(np.arange(len(sizes)), sizes)
    codes_x, codes_y = _encode(group, x), _encode(group, y)
    tied_x, tied_y, tied_both = (
        _sum_by(group, _tied_with_others(codes), len(sizes)) // 2
        for codes in (codes_x, codes_y, _encode(codes_x, codes_y))
    )
    discordant = _count_inversions(group, codes_x, codes_y, len(sizes))
    concordant = pairs - tied_x - tied_y + tied_both - discordant
    ranks_x, ranks_y = _find_ranks(group, codes_x, sizes), _find_ranks(group, codes_y, sizes)
    products, squares_x, squares_y = (
        _sum_by(group, values, len(sizes)) for values in (ranks_x * ranks_y, ranks_x**2, ranks_y**2)
    )
    is_decided = (tied_x < pairs) & (tied_y < pairs)
    with np.errstate(divide="ignore", invalid="ignore"):
        # The product of the sums could exceed the range of int64.
        rho = np.clip(products / (np.sqrt(squares_x) * np.sqrt(squares_y)), -1, 1)
        tau = np.clip((concordant - discordant) / (np.sqrt(pairs - tied_x) * np.sqrt(pairs - tied_y)), -1, 1)
    rhos, taus = (
        [value if known else None for value, known in zip(values.tolist(), is_decided.tolist(), strict=True)]
        for values in (rho, tau)
    )
    return rhos, taus


def _encode(group: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Number the pairs of group and value in ascending order; equal pairs share one."""
    order = np.lexsort((values, group))
    is_new = (np.diff(group[order]) != 0) | (values[order][1:] != values[order][:-1])
    codes = np.zeros(len(order), dtype=np.int64)
    codes[order[1:]] = np.cumsum(is_new)
    return codes


def _sum_by(group: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Add the integers of each group exactly; `group` is ascending."""
    ends = np.concatenate(([0], np.cumsum(values)))
    first, last = (np.searchsorted(group, np.arange(count), side=side) for side in ("left", "right"))
    sums: np.ndarray = ends[last] - ends[first]
    return sums


def _tied_with_others(codes: np.ndarray) -> np.ndarray:
    """Return for each value the number of other equal values."""
    return np.bincount(codes)[codes] - 1 if len(codes) else codes


def _find_ranks(group: np.ndarray, codes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return twice the distance of each mean rank to its group's mean (an integer)."""
    if not len(codes):
        return codes
    counts = np.bincount(codes)
    before = np.cumsum(sizes) - sizes
    ranks: np.ndarray = (2 * np.cumsum(counts) - counts)[codes] - 2 * before[group] - sizes[group]
    return ranks


def _count_inversions(group: np.ndarray, codes_x: np.ndarray, codes_y: np.ndarray, count: int) -> np.ndarray:
    """Count the pairs of each group with y in the other order than x.

    (Knight, JASA 61, 1966.) The codes are split into halves by one bit after another, from the highest. In a stable
    order, two codes of one half are inverted at the bit that separates them. So this takes n log n steps of numpy.
    """
    # Equal values of x are sorted by y, so that they are not counted as inversions.
    order = np.lexsort((codes_y, codes_x))
    codes, owners = codes_y[order], group[order]
    found = np.zeros(count, dtype=np.int64)
    for bit in reversed(range(int(codes.max(initial=0)).bit_length())):
        is_high = codes >> bit & 1
        before = np.cumsum(is_high) - is_high
        half = codes >> bit + 1
        inverted = np.where(is_high, 0, before - before[np.searchsorted(half, half)])
        found += np.bincount(owners, weights=inverted, minlength=count).astype(np.int64)
        order = np.argsort(codes >> bit, kind="stable")
        codes, owners = codes[order], owners[order]
    return found
