"""Render results as one HTML file that is self-contained and makes no network requests.

Names are untrusted. They are embedded as JSON in which no tag can begin, the script adds them to the page as text
only, and the content security policy blocks other scripts, all loading and all sending.
"""

import base64
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from ..errors import UsageError
from ..model.names import pool_of
from ..text import VERSION
from .data import FLAGS, Shown, ShownEntry
from .grid import CIVIDIS, Grid, Place, lay, place_of

_STYLE_ID = re.compile(r'getElementById\("([0-9a-f]{64})"\)')
# Joined in this order into one script.
_SCRIPTS = ("numbers.js", "state.js", "map.js", "plots.js", "table.js", "main.js")


def render(results: Sequence[Shown], *, top_percent: float = 50) -> str:
    """Render the page of one result, or of two results side by side. A pure function.

    Args:
        top_percent: the share of each group that is outlined when the page opens, in (0, 100].

    Raises:
        UsageError: missing_extra, plotly is not installed.
    """
    plotly, script, style = _plotly(), "\n".join(map(_asset, _SCRIPTS)), _asset("page.css")
    # Plotly adds styles for geographic maps, which no plot here uses, unless an element with that id exists.
    unwanted = sorted(set(_STYLE_ID.findall(plotly)))
    data, spectra = page_data(results, top_percent=top_percent)
    return Template(_asset("page.html")).substitute(
        policy=_policy([script, plotly], [style]),
        style=style,
        data=island(data),
        spectra="\n".join(
            f'<script type="application/json" id="spectra-{i}">{island(text)}</script>'
            for i, text in enumerate(spectra)
        ),
        unwanted="".join(f'<template id="{name}"></template>' for name in unwanted),
        script=script,
        plotly=plotly,
    )


def page_data(results: Sequence[Shown], *, top_percent: float) -> tuple[dict[str, Any], list[str]]:
    """Build the page's data: columns over all entries, and the encoded spectra.

    The spectra of a result are one string in which each entry has `stride` characters of base64, so that one spectrum
    can be decoded without the others.
    """
    places = [[place_of(e.module, e.group, e.fused) for e in shown.entries] for shown in results]
    grid = lay(place for own in places for place in own)
    groups = list(dict.fromkeys(e.group for shown in results for e in shown.entries))
    encoded = [_spectra(shown.entries) for shown in results]
    data = {
        "schema_version": 1,
        "version": VERSION,
        "top_percent": top_percent,
        "colors": CIVIDIS,
        "flags": {name: flag.words for name, flag in FLAGS.items()},
        "missing": [name for name, flag in FLAGS.items() if flag.is_missing],
        "rows": grid.labels(),
        "columns": list(grid.columns),
        "groups": groups,
        "results": [
            _columns(shown, own, grid, groups) | {"stride": stride}
            for shown, own, (stride, _) in zip(results, places, encoded, strict=True)
        ],
    }
    return data, [text for _, text in encoded]


def _columns(shown: Shown, places: Sequence[Place], grid: Grid, groups: Sequence[str]) -> dict[str, Any]:
    rows = {row: i for i, row in enumerate(grid.rows)}
    columns = {layer: i for i, layer in enumerate(grid.columns)}
    by_group = {group: i for i, group in enumerate(groups)}
    entries = shown.entries
    flags = list(dict.fromkeys(entry.flag for entry in entries))
    by_flag = {flag: i for i, flag in enumerate(flags)}
    pools = [pool_of(entry.module, entry.group) if entry.is_ranked else None for entry in entries]
    by_pool = {pool: i for i, pool in enumerate(dict.fromkeys(pools)) if pool is not None}
    return {
        "name": shown.name,
        "facts": shown.facts,
        "notes": shown.notes,
        "module": [entry.module for entry in entries],
        "group": [by_group[entry.group] for entry in entries],
        "row": [rows[place.row] for place in places],
        "column": [columns[place.layer] for place in places],
        "index": [place.index for place in places],
        # The page ranks by these, so they are exact. All other numbers are only shown, with six digits.
        "snr": [_number(entry.snr) for entry in entries],
        "pool": [-1 if pool is None else by_pool[pool] for pool in pools],
        "is_ranked": [int(entry.is_ranked) for entry in entries],
        "flags": flags,
        "flag": [by_flag[entry.flag] for entry in entries],
        "n": [entry.n for entry in entries],
        "m": [entry.m for entry in entries],
        "tau": [_number(entry.tau, 6) for entry in entries],
        "above": [entry.above for entry in entries],
        "largest": [_number(entry.largest, 6) for entry in entries],
        "points": [0 if entry.quantiles is None else len(entry.quantiles) for entry in entries],
        "metrics": {name: [_number(entry.metrics.get(name), 6) for entry in entries] for name in shown.metrics},
    }


def _number(value: float | None, digits: int | None = None) -> float | str | None:
    """Return a number for JSON.

    Infinities and NaN become strings that JavaScript's `Number()` reads.
    """
    if value is None:
        return None
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if digits is None else float(f"{value:.{digits}g}")


def _spectra(entries: Iterable[ShownEntry]) -> tuple[int, str]:
    spectra = [entry.quantiles for entry in entries]
    width = max((len(s) for s in spectra if s is not None), default=0)
    # Three bytes are four characters, so with a multiple of three values no entry needs padding.
    width += -width % 3
    table = np.zeros((len(spectra), width), dtype="<u2")
    for row, values in zip(table, spectra, strict=True):
        if values is not None:
            row[: len(values)] = values
    return width * 2 // 3 * 4, base64.b64encode(table.tobytes()).decode("ascii")


def island(value: Any) -> str:
    """Encode JSON for a script element, so that it cannot end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    # Plotly creates empty style elements, which the hash of the empty text allows, and adds rules to them. The style
    # attributes that it sets on its drawings cannot be allowed by a hash.
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, scripts))}",
            f"style-src-elem {' '.join(map(_hash, [*styles, '']))}",
            "style-src-attr 'unsafe-inline'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text("utf-8")


def _plotly() -> str:
    # Only this file is needed, and importing the package takes a second.
    package = importlib.util.find_spec("plotly")
    script = package and package.origin and Path(package.origin).parent / "package_data" / "plotly.min.js"
    if not script or not script.exists():
        raise UsageError(
            "the page's plots need plotly", reason="missing_extra", hint="pip install 'spectrum-stream[report]'"
        )
    return script.read_text("utf-8")
