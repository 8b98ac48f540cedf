"""Show the plan of a scan: plan."""

from pathlib import Path

from ..model.matrix import Experts
from ..model.parameters import Names
from ..streaming import plan as planning
from ..streaming.fetch import Fetch
from ..streaming.plan import RESULTS_FOLDER
from . import tables
from .options import (
    ExpertsOption,
    FetchOption,
    GroupsOption,
    JsonOption,
    MaxDiskOption,
    MaxMemoryOption,
    ModelArgument,
    ModelNameOption,
    NameOption,
    NamesOption,
    OutOption,
    QuietOption,
    plan_options,
)
from .output import open_output
from .values import model_of

EXAMPLES = (
    "spectrum-stream plan path/to/model",
    "spectrum-stream plan org/name@main --fetch range --max-memory 2GB",
    "spectrum-stream plan org/name --groups 'mlp.*,self_attn.q_proj' --json",
)


def plan_command(
    model: ModelArgument = None,
    groups: GroupsOption = None,
    fetch: FetchOption = Fetch.AUTO,
    max_disk: MaxDiskOption = None,
    names: NamesOption = Names.V5,
    experts: ExpertsOption = Experts.SEPARATE,
    name: NameOption = None,
    out: OutOption = Path(RESULTS_FOLDER),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    max_memory: MaxMemoryOption = None,
    model_name: ModelNameOption = None,
) -> None:
    output = open_output(as_json, quiet)
    typed = model_of(model, model_name)
    options = plan_options(
        groups=groups,
        name=name,
        out=out,
        max_memory=max_memory,
        fetch=fetch,
        max_disk=max_disk,
        names=names,
        experts=experts,
    )
    plan = planning.plan(typed, **options)
    for warning in plan.warnings:
        output.warn(warning)
    output.show(tables.plan_table(plan))
    output.data(plan.to_dict())
    output.line()
    # The scan is suggested with every option that is not at its default.
    given = {
        "--groups": ",".join(groups or ()),
        "--fetch": "" if fetch is Fetch.AUTO else fetch,
        "--max-disk": max_disk,
        "--names": "" if names == Names.V5 else names,
        "--experts": "" if experts is Experts.SEPARATE else experts,
        "--name": name,
        "--out": "" if str(out) == RESULTS_FOLDER else str(out),
        "--max-memory": max_memory,
    }
    words = [word for option, value in given.items() if value for word in (option, str(value))]
    output.next("scan", typed, "--top-percent", "50", *words)
