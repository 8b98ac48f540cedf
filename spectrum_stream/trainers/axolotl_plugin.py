"""Axolotl's Spectrum plugin: a result file from which it chooses by itself, and chooses what was chosen here.

The plugin takes the best `spectrum_top_fraction` of every group of ./model_snr_results/snr_results_{slug}.json, adds
the head and the embedding, and makes `unfrozen_parameters` of them. (axolotl/integrations/spectrum/__init__.py)
So the file has the chosen modules only, and is to be read with a fraction of 1. Keys that need it are patterns.
"""

import json
import math
from collections.abc import Collection, Iterable

from ..errors import ResultError
from ..numerics.metrics import SPECTRUM
from ..selection.select import ALWAYS, Selection
from . import axolotl
from .targets import inexact, targets_of

SUFFIX = "json"
ADVICE = "set spectrum_top_fraction: 1, and name the file so that the plugin finds it"


def render(selection: Selection, parameters: Collection[str] | None = None) -> str:
    """The JSON.

    Raises:
        ResultError: other_metric, because the file would state another metric as a signal-to-noise ratio;
            inexact, a selection without the head or the embedding, which the plugin always adds; not_finite,
            a score that JSON has no number for; unsafe_name; no_such_parameter.
    """
    if set(selection.always) != set(ALWAYS):
        raise inexact("Axolotl's plugin always trains the head and the embedding", "--format axolotl leaves them out")
    if (metric := selection.result.metric) != SPECTRUM:
        raise ResultError(
            f"the plugin's file has no field for {metric.name}", reason="other_metric", hint="--format axolotl"
        )
    targets = targets_of(selection, parameters)
    scores: dict[str, dict[str, float | str]] = {}
    for target in targets.chosen:
        if not math.isfinite(target.rank_key):
            raise ResultError(
                f"the score of {target.module} is no number", reason="not_finite", hint="--format axolotl"
            )
        for pattern in axolotl.entries(target, targets):
            scores[pattern] = {"snr": target.rank_key, "type": target.group}
    if not scores:
        raise ResultError("the plugin cannot read an empty result", reason="nothing_chosen")
    return json.dumps(scores, indent=4, allow_nan=False)


def matches(text: str, parameter_names: Iterable[str]) -> set[str]:
    """The parameters that Axolotl trains, given this file and a fraction of 1."""
    patterns = [axolotl.Pattern(entry) for entry in (*axolotl.ALWAYS, *json.loads(text))]
    return axolotl.matched(patterns, parameter_names)
