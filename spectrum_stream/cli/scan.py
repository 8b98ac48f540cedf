"""From a checkpoint: plan, scan, demo. The only place that prompts."""

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from ..model.matrix import Experts
from ..model.parameters import Target, read_names
from ..numerics.precision import Precision
from ..selection.budget import needs
from ..selection.diagnose import diagnose
from ..streaming import plan as planning
from ..streaming.fetch import Fetch
from ..streaming.plan import RESULTS_FOLDER
from ..text import counted, duration, printable, si_bytes
from . import tables
from .common import again, command_line, explain, model_of, nbytes_of, open_output, patterns_of
from .options import (
    ExpertsOption,
    FetchOption,
    FreshOption,
    JsonOption,
    MaxDiskOption,
    MaxMemoryOption,
    ModelArgument,
    ModelNameOption,
    ModulesOption,
    NameOption,
    NamesFromOption,
    OutOption,
    QuietOption,
    TargetOption,
    TopPercentOption,
    WaitOption,
)
from .output import Output
from .progress import ProgressView

if TYPE_CHECKING:
    from ..pipeline import ScanResult


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
    target: TargetOption = Target.AUTO,
    names_from: NamesFromOption = None,
    experts: ExpertsOption = Experts.SEPARATE,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    model_name: ModelNameOption = None,
) -> None:
    """Score every weight matrix of MODEL; with --top-percent, write the selection for the trainer too."""
    output = open_output(as_json, quiet)
    typed = model_of(model, model_name)
    patterns = patterns_of(modules)
    if interactive:
        if patterns:
            raise UsageError("-i and --modules exclude each other", reason="conflicting_options")
        patterns = _tick_groups(typed, output)
    plan = _planned(
        typed, top_percent, patterns, name, out, max_memory, fetch, max_disk, target, names_from, experts, precision
    )
    _run(output, plan, fresh, wait, device, patterns)


def _planned(
    model: str,
    top_percent: float | None,
    modules: list[str] | None,
    name: str | None,
    out: Path,
    max_memory: str | None,
    fetch: Fetch,
    max_disk: str | None,
    target: Target,
    names_from: Path | None,
    experts: Experts,
    precision: Precision = Precision.AUTO,
) -> planning.Plan:
    """The plan of what was typed."""
    return planning.plan(
        model,
        top_percent=top_percent,
        groups=modules,
        name=name,
        out=out,
        max_nbytes=nbytes_of(max_memory, "--max-memory"),
        precision=precision,
        fetch=fetch,
        max_disk_nbytes=nbytes_of(max_disk, "--max-disk"),
        target=target,
        names=None if names_from is None else read_names(names_from),
        experts=experts,
    )


def _run(
    output: Output,
    plan: planning.Plan,
    fresh: bool,
    wait: bool,
    device_name: str,
    modules: list[str] | None,
) -> None:
    started = time.monotonic()
    for warning in plan.warnings:
        output.warn(warning)
    # Only now: these import torch, and a bad command line should not wait for that.
    from ..numerics.device import open_device
    from ..pipeline import ScanFinished, run

    device = open_device(device_name)
    output.note(
        f"{plan.source}: {counted(len(plan.matrices), 'matrix', 'matrices')}, "
        f"{si_bytes(plan.read_nbytes)} to read, on {device}; names {tables.whose(plan)}"
    )
    result: ScanResult | None = None
    try:
        with ProgressView(output) as view:
            for event in run(plan, fresh=fresh, device=device, wait=wait):
                view.on_event(event)
                if isinstance(event, ScanFinished):
                    result = event.result
    except KeyboardInterrupt:
        output.note("interrupted: what was scored is recorded, and the same command resumes")
        raise
    assert result is not None
    doubts = diagnose(result.result, result.selection)
    output.show(tables.score_table(result.modules, result.selection, doubts))
    need = needs(result.selection, by_patterns=True) if result.selection else None
    if need is not None:
        output.line()
        output.show(tables.needs_table(need))
    output.data(tables.result_data(result, need))
    output.line()
    for path in result.written:
        output.line(f"wrote {path}")
    if result.records:
        output.line(f"the record of how: {plan.outputs.record}")
    explain(output, result.selection, doubts)
    for remark in tables.remarks(result):
        output.warn(remark)
    output.note(f"done in {duration(time.monotonic() - started)}")
    # With a selection at hand the next question is another share of it.
    share = "25" if plan.top_percent == 50 else "50"
    output.line(f"next: {command_line('select', str(plan.outputs.results), '--top-percent', share, *again(modules))}")
    if not result.complete:
        raise typer.Exit(3)


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
