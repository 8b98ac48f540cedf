"""From scores to the modules to train: the top percentage of every group, by Spectrum's rules or by others."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from ..errors import UsageError
from ..model.names import is_embedding, is_head, is_norm, pick_groups, pool_of
from ..results.result import Module, Result, read_scored

# Spectrum always trains these two, whatever the model calls them and whether or not it has them.
ALWAYS = ("lm_head", "model.embed_tokens")


class Rounding(StrEnum):
    """How a share of a group that is no whole number of modules is rounded. Spectrum's is `floor`."""

    FLOOR = "floor"
    CEIL = "ceil"


@dataclass(frozen=True, slots=True)
class Rule:
    """What is chosen. The defaults are Spectrum's.

    Attributes:
        percent: of the modules of each group, in (0, 100].
        groups: to choose from, by exact name or glob; None for all.
        percents: of single groups instead, by exact name or glob, in [0, 100]. An exact name counts before a glob,
            and a glob before later ones.
        rounding: of the number of modules.
        min_per_group: choose at least so many of each group, or all if it has fewer; not of one at 0 percent.
        bottom: choose the lowest scores; a module without one, in old files NaN, comes last.
        norms, embeddings, head: whether those may be trained, told by their names. A head that is tied to the
            embedding is trained only if both may be: they are one parameter.
    """

    percent: float
    groups: tuple[str, ...] | None = None
    percents: Mapping[str, float] = field(default_factory=dict)
    rounding: Rounding = Rounding.FLOOR
    min_per_group: int = 0
    bottom: bool = False
    norms: bool = True
    embeddings: bool = True
    head: bool = True

    @property
    def is_spectrums(self) -> bool:
        """Whether Spectrum could have been asked for it."""
        return self == Rule(self.percent, self.groups)


@dataclass(frozen=True, slots=True)
class Selection:
    """The modules chosen of each group.

    Attributes:
        rule: by which.
        ranked: every group's modules, best first; ties in the model's order.
        chosen: the modules chosen, first choice first, by group; a group of few can have none.
        always: modules that are trained whatever was chosen, where the model has them.
        result: what was chosen from, with the modules of other groups as well.
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
        """Groups whose last chosen module has the score of the first that was not, since position decided there.

        And how many modules have that score.
        """
        return {
            name: sum(line.snr == group[count].snr for line in group)
            for name, ranked in self.ranked.items()
            if (group := _in_order_of_choice(ranked, self.rule))
            and 0 < (count := len(self.chosen[name])) < len(group)
            and group[count - 1].snr == group[count].snr
        }

    @property
    def chosen_names(self) -> tuple[str, ...]:
        return tuple(module for group in self.chosen.values() for module in group)

    @property
    def trained(self) -> tuple[Module, ...]:
        """The lines of the parameters that are trained, those of `always` first; each parameter once."""
        return self._lines_of((*self.always, *self.chosen_names))

    @property
    def trained_by_patterns(self) -> tuple[Module, ...]:
        """The same where Spectrum's two patterns are all that is said of head and embedding, as in Axolotl: they find
        no head that is an embedding of another name."""
        shares = {line.name: line.shares for line in self.result.modules}
        found = [module for module in self.always if shares.get(module) is None or shares[module] in self.always]
        return self._lines_of((*found, *self.chosen_names))

    def _lines_of(self, modules: Iterable[str]) -> tuple[Module, ...]:
        lines = {line.name: line for line in self.result.modules}
        chosen = [lines[module] for module in modules if module in lines]
        # The owner itself can be missing from a result that has some groups only.
        return tuple({line.owner: lines.get(line.owner, line) for line in chosen}.values())


def check_percent(top_percent: float) -> None:
    """Check a percentage of a rule.

    Raises:
        UsageError: bad_percent, unless 0 < top_percent <= 100.
    """
    if not 0 < top_percent <= 100:
        raise UsageError(f"the percentage {top_percent:g} is not above 0 and at most 100", reason="bad_percent")


def rank(scored: Iterable[Module]) -> dict[str, tuple[Module, ...]]:
    """Each group's modules by score, best first; equal ones keep their order, groups the order they came in."""
    groups: dict[str, list[Module]] = {}
    for line in scored:
        groups.setdefault(line.group, []).append(line)
    return {name: tuple(sorted(group, key=lambda line: line.snr, reverse=True)) for name, group in groups.items()}


def select(
    result: str | Path | Result | Iterable[Module],
    top_percent: float,
    *,
    groups: Sequence[str] | None = None,
) -> Selection:
    """Choose the top `top_percent` of every group, rounded down: a group of one is chosen at 100 only.

    Args:
        result: a result file, ours or Spectrum's, or the lines of one (`ScanResult.scored`).
        groups: to choose from, by exact name or glob; None for all.

    Raises:
        UsageError: bad_percent, no_such_group.
        ResultError: the file cannot be read.
    """
    return choose(result, Rule(top_percent, None if groups is None else tuple(groups)))


def choose(result: str | Path | Result | Iterable[Module], rule: Rule) -> Selection:
    """Choose by a rule.

    Raises:
        UsageError: bad_percent; no_such_group; bad_count, a negative `min_per_group`; nothing_left, the rule leaves
            out every module.
        ResultError: the file cannot be read.
    """
    _check(rule)
    read = result_of(result)
    lines = read.modules
    excluded = {line.owner for line in lines if _is_excluded(line.name, rule)}
    excluded_always = {module for module in ALWAYS if _is_excluded(module, rule)}
    ranked = rank(line for line in lines if line.owner not in excluded)
    if rule.groups:
        wanted = pick_groups((line.group for line in lines), rule.groups)
        ranked = {name: group for name, group in ranked.items() if name in wanted}
    if not ranked:
        raise UsageError("the options leave no module to choose from", reason="nothing_left")
    percents = _percents(rule, ranked)
    owners = {line.name: line.owner for line in lines}
    return Selection(
        rule,
        ranked,
        {
            name: tuple(line.name for line in _first(_in_order_of_choice(group, rule), percents[name], rule))
            for name, group in ranked.items()
        },
        tuple(m for m in ALWAYS if m not in excluded_always and owners.get(m, m) not in excluded),
        read,
    )


def result_of(result: str | Path | Result | Iterable[Module]) -> Result:
    """A result, from its file or its lines.

    Raises:
        ResultError: the file cannot be read.
    """
    if isinstance(result, Result):
        return result
    return read_scored(Path(result)) if isinstance(result, (str, Path)) else Result(tuple(result))


def _check(rule: Rule) -> None:
    check_percent(rule.percent)
    for percent in rule.percents.values():
        if not 0 <= percent <= 100:
            raise UsageError(f"the percentage {percent:g} is not between 0 and 100", reason="bad_percent")
    if rule.min_per_group < 0:
        raise UsageError("a group cannot have fewer than 0 modules", reason="bad_count")


def _is_excluded(module: str, rule: Rule) -> bool:
    return (
        (not rule.norms and is_norm(module))
        or (not rule.embeddings and is_embedding(module))
        or (not rule.head and is_head(module))
    )


def _percents(rule: Rule, groups: Iterable[str]) -> dict[str, float]:
    """The percentage of each group."""
    names = list(groups)
    percents = dict.fromkeys(names, rule.percent)
    # The later one is overwritten: exact names come last, the first glob after the others.
    for pattern in sorted(reversed(list(rule.percents)), key=lambda p: p in percents):
        for name in pick_groups(names, [pattern]):
            if pattern == name or pattern not in percents:
                percents[name] = rule.percents[pattern]
    return percents


def _first(group: Sequence[Module], percent: float, rule: Rule) -> list[Module]:
    """The lines that are chosen; experts that are ranked as one count as one."""
    units: dict[str, list[Module]] = {}
    for line in group:
        units.setdefault(pool_of(line.name, line.group) or line.name, []).append(line)
    count = _count(len(units), percent, rule)
    return [line for unit in list(units.values())[:count] for line in unit]


def _count(size: int, percent: float, rule: Rule) -> int:
    """How many modules of a group are chosen; Spectrum's own arithmetic for `floor`."""
    if percent == 0:
        return 0
    share = size * percent / 100
    count = math.ceil(share) if rule.rounding is Rounding.CEIL else int(share)
    return min(size, max(count, rule.min_per_group))


def _in_order_of_choice(ranked: Sequence[Module], rule: Rule) -> Sequence[Module]:
    if not rule.bottom:
        return ranked
    order = {line.name: i for i, line in enumerate(ranked)}
    # Equal ones keep the model's order, as they do at the top. NaN is read as -inf and means nothing.
    return sorted(ranked, key=lambda line: (line.snr == -math.inf, line.snr, order[line.name]))
