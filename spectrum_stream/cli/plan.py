"""Show what a scan would do."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..model.matrix import Experts
from ..model.parameters import Names
from ..streaming.fetch import Fetch
from ..streaming.plan import RESULTS_FOLDER
from . import tables
from .common import again, command_line, model_of, open_output, patterns_of
from .options import (
    ExpertsOption,
    FetchOption,
    JsonOption,
    MaxDiskOption,
    MaxMemoryOption,
    ModelArgument,
    ModelNameOption,
    ModulesOption,
    NameOption,
    NamesOption,
    OutOption,
    QuietOption,
    TopPercentOption,
)

if TYPE_CHECKING:
    pass
from .scan import _planned


def plan_command(
    model: ModelArgument = None,
    top_percent: TopPercentOption = None,
    modules: ModulesOption = None,
    name: NameOption = None,
    out: OutOption = Path(RESULTS_FOLDER),
    max_memory: MaxMemoryOption = None,
    fetch: FetchOption = Fetch.AUTO,
    max_disk: MaxDiskOption = None,
    names: NamesOption = Names.V5,
    experts: ExpertsOption = Experts.SEPARATE,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    model_name: ModelNameOption = None,
) -> None:
    """Show what a scan would read, score, skip, cost and write. Reads headers only."""
    output = open_output(as_json, quiet)
    typed = model_of(model, model_name)
    plan = _planned(typed, top_percent, patterns_of(modules), name, out, max_memory, fetch, max_disk, names, experts)
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
        "--names": None if names == Names.V5 else names,
        "--experts": None if experts is Experts.SEPARATE else str(experts),
    }
    kept = [word for option, value in given.items() if value is not None for word in (option, value)]
    share = f"{top_percent or 50:g}"
    output.line(f"next: {command_line('scan', typed, '--top-percent', share, *kept, *again(modules))}")
