"""A result and the record beside it, as what there is to show: an entry a matrix, its measures, its spectrum reduced.

A page of 45,000 matrices has to open from one file. So of each spectrum only quantiles are kept, on a scale of
powers of two below the largest singular value.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import ResultError
from ..numerics.metrics import METRICS, SPECTRUM
from ..numerics.snr import TOLERANCE, Degeneracy
from ..results.record import Record, Records
from ..results.result import Module, Result
from ..text import si_bytes

# Of all spectra together; 64 quantiles each of 45,000 matrices.
_MAX_QUANTILES = 2_900_000
_QUANTILES_PER_MATRIX = (16, 256)
# Steps in a halving: a relative step of 1.7e-4, and 32 halvings in 16 bits.
_STEPS = 2048
_ZERO = 65535


# Spectrum's own is the score, and chance says nothing about a matrix.
_METRICS = [metric for metric in METRICS.values() if metric.of_spectrum is not None and metric != SPECTRUM]


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a result, or one expert of a line that is a bank of them, or a matrix without a score.

    Attributes:
        module, group: its names.
        snr: the score; inf and -inf (for NaN) as foreign results have them; None where there is none.
        bank: for one expert of a bank, the module of the bank's line.
        flag: why the score means nothing or is missing: a `Degeneracy` but for `vector`, `infinite`, `not_a_number`,
            or a `NoScore`; "" for none.
        n, m, tau, above, largest: the shape, the threshold, how many singular values exceed it, and the largest one;
            None where there is no record.
        measures: by name, what is known.
        quantiles: uint16, (k,), from the largest singular value to the smallest: -2048 log2 of its share of the
            largest one, and 65535 for zero; of all of them where there are few.
    """

    module: str
    group: str
    snr: float | None
    bank: str | None = None
    flag: str = ""
    n: int | None = None
    m: int | None = None
    tau: float | None = None
    above: int | None = None
    largest: float | None = None
    measures: Mapping[str, float | None] = field(default_factory=dict)
    quantiles: np.ndarray | None = None

    @property
    def is_ranked(self) -> bool:
        """Whether a selection counts it."""
        return self.bank is None and self.snr is not None


@dataclass(frozen=True, slots=True)
class Shown:
    """One result.

    Attributes:
        name: of its file.
        facts: where it comes from: (label, text).
        notes: what a reader should know, a sentence each.
        entries: the lines in the file's order, which breaks ties; then experts of banks; then what has no score.
    """

    name: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def measures(self) -> list[str]:
        return list(dict.fromkeys(name for entry in self.entries for name in entry.measures))

    @property
    def flagged(self) -> Counter[str]:
        return Counter(entry.flag for entry in self.entries if entry.flag)


def read_shown(path: Path) -> Shown:
    """A result, with the record of the same name beside it if there is one and it is of these scores.

    Raises:
        ResultError: see `Result.open`; the record is never a reason to fail.
    """
    result = Result.open(path)
    lines = result.modules
    facts = [("result", path.name), ("scores", str(len(lines)))]
    why_not = "there is no record of the scan beside the result"
    try:
        with result.records() as records:
            return _with_record(path.name, facts, lines, records)
    except ResultError as error:
        if error.reason != "no_record":
            why_not = str(error)
    note = f"{why_not}, so there are scores only: no spectra, and nothing says which scores are degenerate"
    return Shown(path.name, tuple(facts), (note,), tuple(_line(line) for line in lines))


def _with_record(name: str, facts: list[tuple[str, str]], lines: Sequence[Module], records: Records) -> Shown:
    wanted = {line.name: line for line in lines}
    entries: dict[str, Entry] = {}
    experts: dict[str, list[Entry]] = {}
    failed: list[Entry] = []
    methods: Counter[str] = Counter()
    inexact = quantized = 0
    identity, count = records.identity, records.count
    low, high = _QUANTILES_PER_MATRIX
    keep = max(low, min(high, _MAX_QUANTILES // max(count, 1)))
    for record in records.rows:
        methods[record.precision or "none"] += 1
        inexact += record.score is not None and not record.score.is_exact
        quantized += record.quantized is not None
        entry = _entry(record, keep)
        if record.result_name != record.module:
            experts.setdefault(record.result_name, []).append(entry)
        elif record.score is None:
            failed.append(entry)
        elif record.module in wanted:
            entries[record.module] = replace(entry, snr=wanted[record.module].rank_key)
    for parameter in [module for module, parts in experts.items() if len(parts) == 1]:
        # No bank, but a parameter of another name than the checkpoint's.
        (entry,) = experts.pop(parameter)
        if entry.snr is None:
            failed.append(entry)
        elif parameter in wanted:
            entries[parameter] = replace(entry, module=parameter, bank=None)
    shown = [entries.get(line.name) or _bank(line, experts.get(line.name, [])) for line in lines]
    members = [entry for line in lines for entry in sorted(experts.get(line.name, []), key=_by_number)]
    failed += [entry for bank in experts.keys() - wanted.keys() for entry in experts[bank]]
    everything = (*shown, *members, *failed)
    flags = Counter(entry.flag for entry in everything if entry.flag)
    degenerate = {flag: number for flag, number in flags.items() if flag in set(Degeneracy)}
    # A page is made to be handed on, and where a checkpoint lies on this machine is nobody else's business.
    where = str(identity.get("path", "?"))
    commit = identity.get("commit")
    shards = identity.get("shards") or {}
    facts += [
        ("checkpoint", where if commit else Path(where).name),
        ("commit", str(commit or "none: local files")),
        ("shards", f"{len(shards)}, {si_bytes(sum(shards.values()))}"),
        ("record's engine", f"version {identity.get('engine', '?')}"),
        ("matrices", str(count)),
        ("methods", _tally(methods)),
        ("degenerate scores", f"{sum(degenerate.values())}" + (f" ({_tally(degenerate)})" if degenerate else "")),
        ("inexact scores", f"{inexact} may be wrong by more than {TOLERANCE:g} of their value"),
        ("without a score", str(len(failed))),
        ("quantized", str(quantized)),
    ]
    return Shown(name, tuple(facts), (), everything)


def _tally(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {number}" for name, number in sorted(counts.items()))


def _line(line: Module) -> Entry:
    flag = "" if math.isfinite(line.rank_key) else "infinite" if line.rank_key > 0 else "not_a_number"
    return Entry(line.name, line.group, line.rank_key, flag=flag)


def _bank(line: Module, experts: Sequence[Entry]) -> Entry:
    """A bank's line: the score it has, and of each measure the median of its experts', as the score is."""
    if not experts:
        return _line(line)
    values = {
        name: [value for expert in experts if (value := expert.measures.get(name)) is not None]
        for name in experts[0].measures
    }
    medians = {name: float(np.median(known)) if known else None for name, known in values.items()}
    flags = {expert.flag for expert in experts}
    # Where all of them are degenerate, so is the median; one among many moves it little.
    flag = flags.pop() if len(flags) == 1 else ""
    return Entry(line.name, line.group, line.rank_key, flag=flag, measures=medians)


def _by_number(expert: Entry) -> tuple[int, str]:
    digits = expert.module.rpartition(".")[2]
    return len(digits), digits


def _entry(record: Record, keep: int) -> Entry:
    score = record.score
    if score is None:
        return Entry(record.module, record.group, None, _fused(record), str(record.no_score), record.n, record.m)
    values = record.singular_values
    flag = str(score.degeneracy) if score.is_degenerate else ""
    measures = {
        **{metric.name.replace("-", " "): record.value_of(metric) for metric in _METRICS},
        "share above tau": score.above / min(record.n, record.m),
        "margin of tau": score.margin,
        "σ₁ / q25": score.sigma1_over_q25,
        "estimated error": score.error,
    }
    return Entry(
        record.module,
        record.group,
        score.snr,
        _fused(record),
        flag,
        record.n,
        record.m,
        score.tau,
        score.above,
        float(values[0]) if len(values) else None,
        measures,
        quantiles_of(values, keep) if len(values) else None,
    )


def _fused(record: Record) -> str | None:
    return None if record.result_name == record.module else record.result_name


def quantiles_of(singular_values: np.ndarray, keep: int) -> np.ndarray:
    """A spectrum reduced.

    Args:
        singular_values: (k,), descending, k > 0.
        keep: how many to keep; all where there are no more.

    Returns:
        uint16, (min(k, keep),), as `Entry.quantiles`.
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
