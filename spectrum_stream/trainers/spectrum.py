"""Spectrum's second file, which no trainer reads: the modules of every group, best first."""

import json

from ..selection.select import Selection


def render_sorted(selection: Selection) -> str:
    """Write `_sorted.json`: {group: {module: snr}}, highest score first."""
    return json.dumps(
        {name: {module.name: module.value for module in group} for name, group in selection.ranked.items()},
        indent=4,
    )
