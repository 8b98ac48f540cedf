"""What commands share: typed text to values, and the sentences that several of them print."""

import logging
import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from ..errors import ResultError, UsageError
from ..numerics.metrics import Metric
from ..results.record import Record
from ..results.remeasuring import read_recorded, record_path
from ..results.result import Module, is_record_of
from ..selection.diagnose import Diagnostics
from ..selection.select import Selection
from ..trainers import DEFAULT
from ..trainers.trainer import Trainer
from . import tables
from .output import LogNotes, Output


def open_output(as_json: bool, quiet: bool) -> Output:
    output = Output(as_json=as_json, quiet=quiet)
    # Of what huggingface_hub has to say, only how long it waits is news here.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in ("spectrum_stream", "huggingface_hub.utils._http"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [LogNotes(output)], False
        logger.setLevel(logging.WARNING)
    return output


def explain(
    output: Output,
    selection: Selection | None,
    doubts: Mapping[str, Diagnostics],
    names: Collection[str] | None = None,
    trainer: Trainer = DEFAULT,
) -> None:
    """Explain the file that was written for a trainer; `names` are those that it was written with."""
    if selection is None:
        return
    for sentence in trainer.explain(selection, names):
        output.line(sentence)
    remark_on(output, selection, doubts)


def remark_on(output: Output, selection: Selection, doubts: Mapping[str, Diagnostics]) -> None:
    for remark in tables.selection_remarks(selection, doubts):
        output.warn(remark)


def recorded_of(output: Output, result: Path, lines: Iterable[Module]) -> tuple[Record, ...]:
    """The record beside a result, where there is one of these lines: a result is of use without."""
    path = record_path(result)
    try:
        records = read_recorded(path).records if path.exists() else ()
        if not records or is_record_of(records, lines):
            return records
        why = f"{path} is the record of other scores"
    except ResultError as error:
        why = str(error)
    output.warn(f"{why}: degenerate and inexact scores are not known")
    return ()


def seed_of(seed: int | None, metric: Metric) -> int:
    if seed is not None and metric is not Metric.RANDOM:
        raise UsageError(
            f"--metric {metric} has no use for a seed", reason="conflicting_options", hint="--metric random --seed N"
        )
    return seed or 0


def again(modules: list[str] | None) -> tuple[str, ...]:
    return ("--modules", ",".join(modules)) if modules else ()


def model_of(model: str | None, model_name: str | None) -> str:
    if (model is None) == (model_name is None):
        raise UsageError(
            "give MODEL once" if model else "which model?",
            reason="no_model" if model is None else "conflicting_options",
            hint="spectrum-stream scan path/to/model --top-percent 50",
        )
    return model or model_name or ""


def patterns_of(modules: list[str] | None) -> list[str] | None:
    patterns = [p.strip() for value in modules or () for p in value.split(",") if p.strip()]
    if modules and not patterns:
        raise UsageError("--modules names no group", reason="no_such_group")
    return patterns or None


def nbytes_of(size: str | None, option: str) -> int | None:
    """Bytes of `800MiB`, `1.5GB`, `1.5G` or a plain number."""
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kKMGT]?)(i?)B?\s*", size)
    if match is None:
        raise UsageError(f"{size!r} is not a size", reason="bad_size", hint=f"{option} 1.5GB")
    exponent = " kMGT".index(match[2].replace("K", "k") or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** exponent)


def count_of(number: str | None, option: str) -> int | None:
    """`2B`, `1.5M` or a plain number."""
    if number is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kKMBGT]?)\s*", number)
    if match is None:
        raise UsageError(f"{number!r} is not a number of weights", reason="bad_count", hint=f"{option} 2B")
    return int(float(match[1]) * 1000 ** " kMBT".index(match[2].replace("K", "k").replace("G", "B") or " "))


def command_line(*words: str) -> str:
    return shlex.join(("spectrum-stream", *words))
