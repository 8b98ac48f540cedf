"""Spectrum SNR scans of safetensors checkpoints, tensor by tensor, without building the model.

    from spectrum_stream import freeze, plan, scan, select

    print(plan("path/to/model").peak_nbytes)
    result = scan("path/to/model", top_percent=50, on_event=print)
    freeze(model, result.selection)

Names are loaded when they are first used, so that importing the package does not import torch. `plan`, `scan`,
`select` and `freeze` are functions, so no module of the package itself may have these names: its import would replace
the function.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import SpectrumStreamError as SpectrumStreamError
    from .pipeline import Event as Event
    from .pipeline import MatrixScored as MatrixScored
    from .pipeline import ScanFinished as ScanFinished
    from .pipeline import ScanResult as ScanResult
    from .pipeline import ScanStarted as ScanStarted
    from .pipeline import scan as scan
    from .selection.budget import fit as fit
    from .selection.select import Rule as Rule
    from .selection.select import Selection as Selection
    from .selection.select import choose as choose
    from .selection.select import select as select
    from .streaming.plan import Plan as Plan
    from .streaming.plan import PlanOptions as PlanOptions
    from .streaming.plan import plan as plan
    from .trainers.freeze import Frozen as Frozen
    from .trainers.freeze import freeze as freeze

_HOMES = {
    "SpectrumStreamError": "errors",
    "Frozen": "trainers.freeze",
    "freeze": "trainers.freeze",
    "Plan": "streaming.plan",
    "PlanOptions": "streaming.plan",
    "plan": "streaming.plan",
    "Event": "pipeline",
    "MatrixScored": "pipeline",
    "ScanFinished": "pipeline",
    "ScanResult": "pipeline",
    "ScanStarted": "pipeline",
    "scan": "pipeline",
    "Rule": "selection.select",
    "Selection": "selection.select",
    "choose": "selection.select",
    "fit": "selection.budget",
    "select": "selection.select",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from .text import VERSION

        return VERSION
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
