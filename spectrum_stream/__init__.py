"""Spectrum SNR scans of safetensors checkpoints, one tensor at a time, without building the model.

    from spectrum_stream import freeze, plan, scan, select

    print(plan("path/to/model").peak_nbytes)
    result = scan("path/to/model", top_percent=50, on_event=print)
    freeze(model, result.selection)

Names are loaded when they are first used, so that importing the package imports no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .budgets import fit as fit
    from .errors import SpectrumStreamError as SpectrumStreamError
    from .freezing import Frozen as Frozen
    from .freezing import freeze as freeze
    from .planning import Plan as Plan
    from .planning import plan as plan
    from .scanning import Event as Event
    from .scanning import MatrixScored as MatrixScored
    from .scanning import ScanFinished as ScanFinished
    from .scanning import ScanResult as ScanResult
    from .scanning import ScanStarted as ScanStarted
    from .scanning import scan as scan
    from .selection import Rule as Rule
    from .selection import Selection as Selection
    from .selection import choose as choose
    from .selection import select as select

_HOMES = {
    "SpectrumStreamError": "errors",
    "Frozen": "freezing",
    "freeze": "freezing",
    "Plan": "planning",
    "plan": "planning",
    "Event": "scanning",
    "MatrixScored": "scanning",
    "ScanFinished": "scanning",
    "ScanResult": "scanning",
    "ScanStarted": "scanning",
    "scan": "scanning",
    "Rule": "selection",
    "Selection": "selection",
    "choose": "selection",
    "fit": "budgets",
    "select": "selection",
}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
