"""Read a result and its scan record into entries: one per matrix, with its metrics and a reduced spectrum.

A page of 45,000 matrices must open from one file. So it has only quantiles of each spectrum, on a scale of powers of
two below the largest singular value.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import ResultError
from ..model.no_score import NoScore
from ..numerics.metrics import METRICS, SPECTRUM
from ..numerics.snr import TOLERANCE, Degeneracy
from ..results.record import Record, Records
from ..results.result import Module, Result, median_of
from ..text import si_bytes

# The limit for all spectra together: 64 quantiles for each of 45,000 matrices.
_MAX_QUANTILES = 2_900_000
_QUANTILES_PER_MATRIX = (16, 256)
# The limit of entries in a report. A page with so many matrices has about 100 MB.
MAX_ENTRIES = 300_000
# Steps per halving: a relative error of at most 1.7e-4, and 32 halvings in 16 bits.
_STEPS = 2048
_ZERO = 65535
# A foreign result can hold these in place of a score.
INFINITE, NOT_A_NUMBER = "infinite", "not_a_number"

# Spectrum's metric is the score itself, and a random number is not a property of a matrix.
_METRICS = [metric for metric in METRICS.values() if metric.of_spectrum is not None and metric != SPECTRUM]


@dataclass(frozen=True, slots=True)
class Flag:
    """The reason why a score is not meaningful or missing.

    Attributes:
        words: the reason in words.
        is_missing: whether there is no score at all.
    """

    words: str
    is_missing: bool


# All flags that an entry can have. The page gets this list.
FLAGS: Mapping[str, Flag] = {
    **{str(why): Flag(f"degenerate: {why.sentence}", False) for why in Degeneracy},
    INFINITE: Flag("degenerate: infinite in the file", False),
    NOT_A_NUMBER: Flag("no score: NaN in the file", True),
    **{str(why): Flag(f"no score: {why.sentence}", True) for why in NoScore},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownEntry:
    """A module of a result, one of fused experts, or a matrix without a score.

    Attributes:
        module, group: its names.
        snr: the score; in results of other programs also inf, and -inf for NaN; None without a score.
        fused: for one of several fused experts, the module of the result that it is a part of.
        flag: a key of `FLAGS`, but never `vector`; "" for a meaningful score.
        n, m, tau, above, largest: the shape, the threshold, the number of singular values above it, and the largest
            singular value; None without a record.
        metrics: the known values, by name.
        quantiles: uint16, (k,), from the largest singular value to the smallest: -2048 log2 of its ratio to the
            largest one, and 65535 for zero. All singular values if there are few.
    """

    module: str
    group: str
    snr: float | None
    fused: str | None = None
    flag: str = ""
    n: int | None = None
    m: int | None = None
    tau: float | None = None
    above: int | None = None
    largest: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    quantiles: np.ndarray | None = None

    @property
    def is_ranked(self) -> bool:
        """Whether a selection ranks it."""
        return self.fused is None and self.snr is not None


@dataclass(frozen=True, slots=True)
class Shown:
    """One result to show.

    Attributes:
        name: the name of its file.
        facts: its source: (label, text).
        notes: notes for the reader, a sentence each.
        entries: the modules in the file's order, which breaks ties; then each of the fused experts; then the matrices
            without a score.
    """

    name: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    entries: tuple[ShownEntry, ...]

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics that an entry has."""
        return list(dict.fromkeys(name for entry in self.entries for name in entry.metrics))

    @property
    def flag_counts(self) -> Counter[str]:
        """The number of entries by flag."""
        return Counter(entry.flag for entry in self.entries if entry.flag)


def read_shown(path: Path) -> Shown:
    """Read a result, with its record if the scores match.

    Raises:
        ResultError: the result cannot be read, as `Result.open`; too_many, it has more than `MAX_ENTRIES` matrices.
            A bad record is not an error.
    """
    result = Result.open(path)
    _check_count(path.name, len(result.modules))
    facts = [("result", path.name), ("scores", str(len(result.modules)))]
    why_not = "there is no scan record next to the result"
    try:
        with result.records() as records:
            return _with_record(path.name, facts, result.modules, records)
    except ResultError as error:
        if error.reason == "too_many":
            raise
        if error.reason != "no_record":
            why_not = str(error)
    note = f"{why_not}: spectra are not available, and degenerate scores are not marked"
    return Shown(path.name, tuple(facts), (note,), tuple(map(_make_unrecorded, result.modules)))


def _check_count(name: str, count: int) -> None:
    if count > MAX_ENTRIES:
        raise ResultError(
            f"{name} has {count:,} matrices, and a report shows at most {MAX_ENTRIES:,}",
            reason="too_many",
            hint="select and compare read larger results",
        )


def _with_record(name: str, facts: list[tuple[str, str]], modules: Sequence[Module], records: Records) -> Shown:
    wanted = {module.name: module for module in modules}
    entries: dict[str, ShownEntry] = {}
    experts: dict[str, list[ShownEntry]] = {}
    failed: list[ShownEntry] = []
    precisions: Counter[str] = Counter()
    inexact = quantized = 0
    identity, count = records.identity, records.count
    _check_count(name, count)
    low, high = _QUANTILES_PER_MATRIX
    keep = max(low, min(high, _MAX_QUANTILES // max(count, 1)))
    for record in records.rows:
        precisions[record.precision or "none"] += 1
        inexact += record.score is not None and not record.score.is_exact
        quantized += record.quantized is not None
        entry = _make_entry(record, keep)
        if record.result_name != record.module:
            experts.setdefault(record.result_name, []).append(entry)
        elif record.score is None:
            failed.append(entry)
        elif record.module in wanted:
            entries[record.module] = replace(entry, snr=wanted[record.module].rank_key)
    for parameter in [module for module, parts in experts.items() if len(parts) == 1]:
        # A single part is not one of fused experts, but a parameter with another name in the checkpoint.
        (entry,) = experts.pop(parameter)
        if entry.snr is None:
            failed.append(entry)
        elif parameter in wanted:
            entries[parameter] = replace(entry, module=parameter, fused=None)
    shown = [entries.get(module.name) or _make_fused(module, experts.get(module.name, [])) for module in modules]
    members = [entry for module in modules for entry in sorted(experts.get(module.name, []), key=_by_number)]
    failed += [entry for fused in experts.keys() - wanted.keys() for entry in experts[fused]]
    everything = (*shown, *members, *failed)
    flags = Counter(entry.flag for entry in everything if entry.flag)
    degenerate = {flag: number for flag, number in flags.items() if flag in set(Degeneracy)}
    # A page is made to be shared, so it does not have the path of a checkpoint on this machine.
    where = str(identity.get("path", "?"))
    commit = identity.get("commit")
    shards = identity.get("shards") or {}
    facts += [
        ("checkpoint", where if commit else Path(where).name),
        ("commit", str(commit or "none: local files")),
        ("shards", f"{len(shards)}, {si_bytes(sum(shards.values()))}"),
        ("engine of the scan", f"version {identity.get('engine', '?')}"),
        ("matrices", str(count)),
        ("precision", _tally(precisions)),
        ("degenerate scores", f"{sum(degenerate.values())}" + (f" ({_tally(degenerate)})" if degenerate else "")),
        ("inexact scores", f"{inexact} with an estimated relative error above {TOLERANCE:g}"),
        ("without a score", str(len(failed))),
        ("quantized", str(quantized)),
    ]
    return Shown(name, tuple(facts), (), everything)


def _tally(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {number}" for name, number in sorted(counts.items()))


def _make_unrecorded(module: Module) -> ShownEntry:
    snr = module.rank_key
    flag = "" if math.isfinite(snr) else INFINITE if snr > 0 else NOT_A_NUMBER
    return ShownEntry(module=module.name, group=module.group, snr=snr, flag=flag)


def _make_fused(module: Module, experts: Sequence[ShownEntry]) -> ShownEntry:
    """Make the entry of fused experts: their score, and the median of each metric."""
    if not experts:
        return _make_unrecorded(module)
    values = {
        name: [value for expert in experts if (value := expert.metrics.get(name)) is not None]
        for name in experts[0].metrics
    }
    medians = {name: median_of(present) if present else None for name, present in values.items()}
    flags = {expert.flag for expert in experts}
    # If all experts are degenerate, so is the median. A single one among many moves it little.
    flag = flags.pop() if len(flags) == 1 else ""
    return ShownEntry(module=module.name, group=module.group, snr=module.rank_key, flag=flag, metrics=medians)


def _by_number(expert: ShownEntry) -> tuple[int, str]:
    digits = expert.module.rpartition(".")[2]
    return len(digits), digits


def _make_entry(record: Record, keep: int) -> ShownEntry:
    score = record.score
    entry = ShownEntry(
        module=record.module,
        group=record.group,
        snr=None if score is None else score.snr,
        fused=None if record.result_name == record.module else record.result_name,
        flag=str(record.no_score or ""),
        n=record.n,
        m=record.m,
    )
    if score is None:
        return entry
    values = record.singular_values
    return replace(
        entry,
        flag=str(score.degeneracy) if score.is_degenerate else "",
        tau=score.tau,
        above=score.above,
        largest=float(values[0]) if len(values) else None,
        metrics={
            **{metric.name.replace("-", " "): record.value_of(metric) for metric in _METRICS},
            "share above tau": score.above / min(record.n, record.m),
            "margin of tau": score.margin,
            "σ₁ / q25": score.sigma1_over_q25,
            "estimated error": score.error,
        },
        quantiles=quantiles_of(values, keep) if len(values) else None,
    )


def quantiles_of(singular_values: np.ndarray, keep: int) -> np.ndarray:
    """Reduce a spectrum to quantiles.

    Args:
        singular_values: (k,), descending, k > 0.
        keep: the number of quantiles; all singular values are kept if there are fewer.

    Returns:
        uint16, (min(k, keep),), encoded as `ShownEntry.quantiles`.
    """
    values = np.asarray(singular_values, dtype=np.float64)
    count = len(values)
    if count > keep:
        values = np.interp(np.linspace(0, count - 1, keep), np.arange(count), values)
    if values[0] == 0:
        return np.full(len(values), _ZERO, dtype=np.uint16)
    with np.errstate(divide="ignore"):
        halvings = -np.log2(values / values[0])
    steps: np.ndarray = np.rint(np.minimum(halvings * _STEPS, _ZERO)).astype(np.uint16)
    return steps
