"""What commands share: typed text to values, and the sentences that several of them print."""

import logging
import os
import re
import shlex
from collections.abc import Collection, Mapping

from ..errors import UsageError
from ..selection.diagnose import Diagnostics
from ..selection.select import Selection
from ..text import counted
from ..trainers import axolotl
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
) -> None:
    """What the YAML for Axolotl says beyond the choice; `names` as it was written with."""
    if selection is None:
        return
    if selection.always:
        always = " and ".join(f"^{module}.weight$" for module in selection.always)
        output.line(f"the YAML also trains {always}, where the model has them, as Spectrum's always does")
    if whole := axolotl.whole_names(selection, names):
        output.line(
            f"with a $ at the end, to match nothing else: {counted(len(whole), 'entry', 'entries')}, "
            f"{whole[0]}{' ...' if whole[1:] else ''}"
        )
    remark_on(output, selection, doubts)


def remark_on(output: Output, selection: Selection, doubts: Mapping[str, Diagnostics]) -> None:
    for remark in tables.selection_remarks(selection, doubts):
        output.warn(remark)


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
