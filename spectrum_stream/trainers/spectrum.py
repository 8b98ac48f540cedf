"""Spectrum's own second file: every group's modules, best first."""

import json

from ..selection.select import Selection


def render_sorted(selection: Selection) -> str:
    """`_sorted.json`: {group: {module: snr}}, in descending order of the score."""
    return json.dumps(
        {name: {line.name: line.value for line in group} for name, group in selection.ranked.items()},
        indent=4,
    )
