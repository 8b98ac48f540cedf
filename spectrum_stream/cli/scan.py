"""Score the weights of a model: scan. The only command that prompts, with -i."""

import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import ComputeError, UsageError, is_out_of_memory
from ..model.matrix import Experts
from ..model.parameters import Names
from ..numerics.precision import Precision
from ..selection.budget import needs
from ..selection.diagnose import diagnose
from ..selection.select import check_percent, rank
from ..streaming import plan as planning
from ..streaming.fetch import Fetch
from ..streaming.plan import RESULTS_FOLDER, Plan
from ..text import counted, duration, printable, si_bytes
from ..trainers import DEFAULT
from . import tables
from .limits import try_import
from .options import (
    DeviceOption,
    ExpertsOption,
    FetchOption,
    FreshOption,
    GroupsOption,
    InteractiveOption,
    JsonOption,
    MaxDiskOption,
    MaxMemoryOption,
    ModelArgument,
    ModelNameOption,
    NameOption,
    NamesOption,
    OutOption,
    PrecisionOption,
    QuietOption,
    TopPercentOption,
    plan_options,
)
from .output import Output, open_output
from .progress import ProgressView
from .signals import check_signals, held
from .values import model_of

if TYPE_CHECKING:
    # At run time this would import torch, and an error in the command line should not wait for that.
    from ..pipeline import ScanResult

EXAMPLES = (
    "spectrum-stream scan path/to/model --top-percent 50",
    "spectrum-stream scan org/name --top-percent 25 --groups 'mlp.*,self_attn.*' --max-memory 2GB",
    "spectrum-stream scan path/to/model.safetensors --name my-model --precision fp64",
)


def scan_command(
    model: ModelArgument = None,
    top_percent: TopPercentOption = None,
    groups: GroupsOption = None,
    interactive: InteractiveOption = False,
    fetch: FetchOption = Fetch.AUTO,
    max_disk: MaxDiskOption = None,
    names: NamesOption = Names.V5,
    experts: ExpertsOption = Experts.SEPARATE,
    name: NameOption = None,
    out: OutOption = Path(RESULTS_FOLDER),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    precision: PrecisionOption = Precision.AUTO,
    device: DeviceOption = "auto",
    max_memory: MaxMemoryOption = None,
    fresh: FreshOption = False,
    model_name: ModelNameOption = None,
) -> None:
    output = open_output(as_json, quiet)
    typed = model_of(model, model_name)
    if top_percent is not None:
        check_percent(top_percent)
    if interactive:
        _check_interactive(output, groups)
    options = plan_options(
        groups=groups,
        name=name,
        out=out,
        max_memory=max_memory,
        fetch=fetch,
        max_disk=max_disk,
        names=names,
        experts=experts,
        precision=precision,
    )
    plan = planning.plan(typed, **options)
    if interactive:
        groups = _ask_groups(output, plan)
        plan = plan.only(groups)
    run_plan(output, plan, top_percent=top_percent, fresh=fresh, device_name=device, groups=groups)


def run_plan(
    output: Output,
    plan: Plan,
    *,
    top_percent: float | None,
    fresh: bool = False,
    device_name: str = "auto",
    groups: Sequence[str] | None = None,
) -> None:
    """Run a plan, show its progress and its result, and suggest the next command.

    Args:
        groups: the groups as typed, for the next command.
    """
    started = time.monotonic()
    for warning in plan.warnings:
        output.warn(warning)
    try:
        try_import("spectrum_stream.pipeline")
        from ..numerics.device import open_device
        from ..pipeline import ScanFinished, run
    # The class of the error depends on the place where its import fails.
    except Exception as error:
        raise ComputeError(
            f"torch cannot be loaded: {str(error) or type(error).__name__}",
            reason="no_torch",
            hint="raise the limit of memory (ulimit -a)" if is_out_of_memory(error) else None,
        ) from error

    device = open_device(device_name)
    if device.problem:
        output.warn(device.problem)
    output.note(
        f"{plan.source}: {counted(len(plan.matrices), 'matrix', 'matrices')}, "
        f"{si_bytes(plan.read_nbytes)} to read, on {device}; names {tables.names_words(plan)}"
    )
    result: ScanResult | None = None
    try:
        events = run(plan, top_percent=top_percent, fresh=fresh, device=device)
        with held(), contextlib.closing(events), ProgressView(output) as view:
            for event in events:
                check_signals()
                view.on_event(event)
                if isinstance(event, ScanFinished):
                    result = event.result
    except KeyboardInterrupt:
        output.note("interrupted: finished scores are saved, and the same command resumes")
        raise
    assert result is not None
    _present(output, result)
    output.note(f"done in {duration(time.monotonic() - started)}")
    # After a selection, the suggestion is another percentage.
    share = "25" if top_percent == 50 else "50"
    if result.selection is not None and not result.selection.chosen_names:
        share = "100"
    words = ("--groups", ",".join(groups)) if groups else ()
    output.next("select", str(plan.outputs.results), "--top-percent", share, *words)
    if not result.complete:
        raise typer.Exit(3)


def _present(output: Output, result: "ScanResult") -> None:
    selection = result.selection
    diagnostics = diagnose(result.result, selection)
    ranked = selection.ranked if selection else rank(result.modules)
    chosen = selection.chosen if selection else None
    output.show(tables.score_table(ranked, result.result.metric, chosen, diagnostics))
    need = None
    # The weights of other groups take memory too, and a scan of some groups has not counted them.
    is_whole = len(result.plan.matrices) == len(result.plan.inventory.matrices)
    if (
        is_whole
        and selection is not None
        and (need := needs(selection, by_patterns=DEFAULT.always_by_pattern)) is not None
    ):
        output.line()
        output.show(tables.needs_table(need))
    output.data(tables.scan_data(result, need, diagnostics))
    output.line()
    outputs = result.plan.outputs
    content = {outputs.results: "all scores", outputs.sorted: "all scores, sorted"}
    if result.records:
        output.line(f"wrote {outputs.record} (scan record: spectra, errors and settings)")
    for path in result.written:
        output.line(f"wrote {path} ({content.get(path, f'the selection, for {DEFAULT.name}')})")
    if selection is not None:
        for sentence in DEFAULT.explain(selection):
            output.line(sentence)
        for warning in tables.selection_warnings(selection, diagnostics):
            output.warn(warning)
    for warning in tables.scan_warnings(result):
        output.warn(warning)


def _check_interactive(output: Output, groups: Sequence[str] | None) -> None:
    if groups:
        raise UsageError("-i and --groups exclude each other", reason="conflicting_options", hint="leave out one")
    try:
        import questionary  # noqa: F401
    except ImportError:
        raise UsageError(
            "-i needs questionary", reason="missing_extra", hint="pip install 'spectrum-stream[interactive]'"
        ) from None
    if output.as_json or output.quiet or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("-i needs a terminal", reason="not_a_terminal", hint="use --groups")


def _ask_groups(output: Output, plan: Plan) -> list[str]:
    import questionary

    names = [group.name for group in plan.groups]
    choices = [questionary.Choice(printable(name) or "(no name)", value=name, checked=True) for name in names]
    chosen: list[str] | None = questionary.checkbox("Groups to score", choices=choices).ask()
    if not chosen:
        raise UsageError("no group was chosen", reason="no_group")
    output.note(f"to choose the same without a prompt: --groups {shlex.quote(','.join(chosen))}")
    return chosen
