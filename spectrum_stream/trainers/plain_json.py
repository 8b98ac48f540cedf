"""JSON: all that is known of a selection, for programs."""

import json
import math
from collections.abc import Collection, Iterable

from ..numerics.metrics import SPECTRUM
from ..selection.budget import needs
from ..selection.select import Selection
from .targets import targets_of

SUFFIX = "json"
ADVICE = "a value of null was infinite or NaN"


def render(selection: Selection, parameters: Collection[str] | None = None) -> str:
    """The JSON: the metric, the rule, the parameters that are trained, and each chosen module with its value.

    `snr` is there for Spectrum's score only.

    Raises:
        ResultError: no_such_parameter.
    """
    targets, metric = targets_of(selection, parameters), selection.result.metric
    sizes, need = {line.name: line.numel for line in selection.result.modules}, needs(selection)
    data = {
        "schema_version": 1,
        "metric": metric.name,
        "percent": selection.rule.percent,
        "bottom": selection.rule.bottom,
        "trainable_weights": need.trainable if need else None,
        "total_weights": need.total if need else None,
        "parameters": list(targets.parameters),
        "chosen": [
            {
                "module": target.module,
                "group": target.group,
                "value": value,
                **({"snr": value} if metric == SPECTRUM else {}),
                "parameter": target.parameter,
                "weights": sizes[target.module],
            }
            for target in targets.chosen
            for value in [target.value if target.value is not None and math.isfinite(target.value) else None]
        ],
    }
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def matches(text: str, parameter_names: Iterable[str]) -> set[str]:
    """The parameters that are trained."""
    return set(parameter_names) & set(json.loads(text)["parameters"])
