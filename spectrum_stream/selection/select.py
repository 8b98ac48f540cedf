"""From scores to the modules to train: the top percentage of every group, by Spectrum's rules or other ones."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Self

from ..errors import UsageError
from ..model.names import is_embedding, is_head, is_norm, pick_groups, pool_of
from ..results.result import Module, Result

# Spectrum always names these two as trained, even if the model does not have them.
ALWAYS = ("lm_head", "model.embed_tokens")


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule for the choice of modules. The defaults are Spectrum's.

    Attributes:
        percent: of the modules of each group, in (0, 100]; the number of modules is rounded down.
        groups: the groups to choose from, by exact name or glob; None for all.
        percents: percentages of single groups, by exact name or glob, in [0, 100]. An exact name wins over a glob,
            and an earlier glob over a later one.
        min_per_group: choose at least this many of each group, or all if it has fewer; none of a group at 0 percent.
        bottom: choose the lowest scores; a module without a score (NaN in old files) comes last.
        norms, embeddings, head: whether to train these, recognized by their names. A head that is tied to the
            embedding is one parameter with it, so it is trained only if both are allowed.

    Raises:
        UsageError: bad_percent; bad_count, a negative `min_per_group`.
    """

    percent: float
    _: KW_ONLY
    groups: tuple[str, ...] | None = None
    percents: Mapping[str, float] = field(default_factory=dict)
    min_per_group: int = 0
    bottom: bool = False
    norms: bool = True
    embeddings: bool = True
    head: bool = True

    def __post_init__(self) -> None:
        check_percent(self.percent)
        for percent in self.percents.values():
            if not 0 <= percent <= 100:
                raise UsageError(f"the percentage {percent:g} is not between 0 and 100", reason="bad_percent")
        if self.min_per_group < 0:
            raise UsageError("a group cannot have fewer than 0 modules", reason="bad_count")

    @property
    def is_spectrums(self) -> bool:
        """Whether Spectrum has this rule too."""
        return self == Rule(self.percent, groups=self.groups)


def check_percent(percent: float) -> None:
    """Check the percentage of a selection.

    Raises:
        UsageError: bad_percent, it is not in (0, 100].
    """
    if not 0 < percent <= 100:
        raise UsageError(
            f"the percentage {percent:g} is not above 0 and at most 100",
            reason="bad_percent",
            hint="use a number such as --top-percent 50",
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """The modules chosen of each group.

    Attributes:
        rule: the rule that chose them.
        ranked: every group's modules, best first; ties in the order of the model.
        chosen: the names of the chosen modules by group, best first; a small group can have none.
        always: modules that are trained in any case, if the model has them.
        result: the result that was chosen from, with the modules of all groups.
    """

    rule: Rule
    ranked: Mapping[str, tuple[Module, ...]]
    chosen: Mapping[str, tuple[str, ...]]
    always: tuple[str, ...]
    result: Result

    @property
    def top_percent(self) -> float:
        return self.rule.percent

    @property
    def tied(self) -> Mapping[str, int]:
        """The number of modules with the score at a cut between equal scores, by group.

        The order of the model decided between these modules.
        """
        return {
            name: sum(module.rank_key == group[count].rank_key for module in group)
            for name, ranked in self.ranked.items()
            if (group := _in_order_of_choice(ranked, self.rule))
            and 0 < (count := len(self.chosen[name])) < len(group)
            and group[count - 1].rank_key == group[count].rank_key
        }

    @property
    def chosen_names(self) -> tuple[str, ...]:
        return tuple(module for group in self.chosen.values() for module in group)

    @property
    def trained(self) -> tuple[Module, ...]:
        """The modules of the trained parameters, those of `always` first.

        Each parameter appears once.
        """
        return self._owners_of((*self.always, *self.chosen_names))

    @property
    def trained_by_patterns(self) -> tuple[Module, ...]:
        """The same, if only Spectrum's two patterns select head and embedding (Axolotl).

        They do not match a head that is tied to an embedding of another name.
        """
        shares = {module.name: module.shares for module in self.result.modules}
        found = [name for name in self.always if shares.get(name) is None or shares[name] in self.always]
        return self._owners_of((*found, *self.chosen_names))

    def _owners_of(self, names: Iterable[str]) -> tuple[Module, ...]:
        modules = {module.name: module for module in self.result.modules}
        found = [modules[name] for name in names if name in modules]
        # The owner itself can be missing, if the result has only some groups.
        return tuple({module.owner: modules.get(module.owner, module) for module in found}.values())


def rank(modules: Iterable[Module]) -> dict[str, tuple[Module, ...]]:
    """Sort each group's modules, best first.

    Equal ones keep their order, and so do the groups.
    """
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(module.group, []).append(module)
    return {name: tuple(sorted(group, key=lambda m: m.rank_key, reverse=True)) for name, group in groups.items()}


def select(
    result: str | Path | Result | Iterable[Module],
    top_percent: float,
    *,
    groups: Sequence[str] | None = None,
) -> Selection:
    """Choose the top `top_percent` of every group, rounded down.

    A group of one is chosen only at 100.

    Args:
        result: a result file of this program or of Spectrum, or modules (`ScanResult.modules`).
        groups: the groups to choose from, by exact name or glob; None for all.

    Raises:
        UsageError: bad_percent, no_such_group.
        ResultError: the file cannot be read.
    """
    return choose(result, Rule(top_percent, groups=None if groups is None else tuple(groups)))


def choose(result: str | Path | Result | Iterable[Module], rule: Rule) -> Selection:
    """Choose modules by a rule.

    Raises:
        UsageError: no_such_group; nothing_left, the rule leaves out every module.
        ResultError: the file cannot be read.
    """
    return Choices.of(Result.of(result), rule).at(rule.percent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """All selections that a rule can make of a result at any percentage.

    Attributes:
        rule: the rule; `at` replaces its percentage.
        ranked, always, result: as in `Selection`.
        units: the names of each group in the order of choice; experts that are ranked together are one unit.
        percents: the percentages of single groups.
    """

    rule: Rule
    ranked: Mapping[str, tuple[Module, ...]]
    units: Mapping[str, Sequence[Sequence[str]]]
    percents: Mapping[str, float]
    always: tuple[str, ...]
    result: Result

    @classmethod
    def of(cls, result: Result, rule: Rule) -> Self:
        """Rank the modules that a rule can choose.

        Raises:
            UsageError: as `choose`.
        """
        modules = result.modules
        excluded = {module.owner for module in modules if _is_excluded(module.name, rule)}
        excluded_always = {name for name in ALWAYS if _is_excluded(name, rule)}
        ranked = rank(module for module in modules if module.owner not in excluded)
        if rule.groups:
            wanted = pick_groups((module.group for module in modules), rule.groups)
            ranked = {name: group for name, group in ranked.items() if name in wanted}
        if not ranked:
            raise UsageError("the options leave no module to choose from", reason="nothing_left")
        owners = {module.name: module.owner for module in modules}
        return cls(
            rule=rule,
            ranked=ranked,
            units={name: _units(_in_order_of_choice(group, rule)) for name, group in ranked.items()},
            percents=_percents(rule, ranked),
            always=tuple(n for n in ALWAYS if n not in excluded_always and owners.get(n, n) not in excluded),
            result=result,
        )

    def at(self, percent: float) -> Selection:
        """Choose a percentage of every group that has no percentage of its own."""
        rule = replace(self.rule, percent=percent)
        chosen = {}
        for name, units in self.units.items():
            count = _count(len(units), self.percents.get(name, percent), rule)
            chosen[name] = tuple(module for unit in units[:count] for module in unit)
        return Selection(rule, self.ranked, chosen, self.always, self.result)


def _is_excluded(module: str, rule: Rule) -> bool:
    return (
        (not rule.norms and is_norm(module))
        or (not rule.embeddings and is_embedding(module))
        or (not rule.head and is_head(module))
    )


def _percents(rule: Rule, groups: Collection[str]) -> dict[str, float]:
    """Find the groups with a percentage of their own."""
    percents: dict[str, float] = {}
    for pattern, percent in rule.percents.items():
        # The name of a group can also be a glob, such as `a?`. The name wins.
        if pattern in groups:
            percents[pattern] = percent
    for pattern, percent in rule.percents.items():
        if pattern not in groups:
            for name in pick_groups(groups, [pattern]):
                percents.setdefault(name, percent)
    return percents


def _units(group: Iterable[Module]) -> list[list[str]]:
    """Put experts that are ranked together into one unit."""
    units: dict[str, list[str]] = {}
    for module in group:
        units.setdefault(pool_of(module.name, module.group) or module.name, []).append(module.name)
    return list(units.values())


def _count(size: int, percent: float, rule: Rule) -> int:
    """Return the number of modules to choose, by Spectrum's own arithmetic."""
    return 0 if percent == 0 else min(size, max(int(size * percent / 100), rule.min_per_group))


def _in_order_of_choice(ranked: Sequence[Module], rule: Rule) -> Sequence[Module]:
    if not rule.bottom:
        return ranked
    order = {module.name: i for i, module in enumerate(ranked)}
    # Equal modules keep the order of the model, as at the top. A module without a value comes last here too.
    return sorted(ranked, key=lambda m: (m.rank_key == -math.inf, m.rank_key, order[m.name]))
