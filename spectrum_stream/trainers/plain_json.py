"""JSON: everything known about a selection, for other programs."""

import json
import math
from collections.abc import Collection

from ..numerics.metrics import SPECTRUM
from ..selection.budget import needs
from ..selection.select import Selection
from .reading import read_json
from .targets import targets_of
from .trainer import Entry, Trainer, exact, strings


class PlainJson(Trainer):
    """A program that reads JSON."""

    name = "json"
    suffix = "json"
    advice = "read it with a program of your own; a value of null was infinite or NaN"
    takes = "JSON"

    def render(self, selection: Selection, parameters: Collection[str] | None = None) -> str:
        """Write the metric, the rule, the parameters and the chosen modules.

        Only Spectrum's score is also written as `snr`.

        Raises:
            ResultError: no_such_parameter, nothing_chosen.
        """
        targets, metric = targets_of(selection, parameters), selection.result.metric
        sizes, need = {module.name: module.numel for module in selection.result.modules}, needs(selection)
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

    def entries(self, text: str) -> list[Entry]:
        return [exact(name) for name in strings(read_json(text)["parameters"])]
