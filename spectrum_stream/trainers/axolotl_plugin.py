"""Axolotl's Spectrum plugin: a result file from which the plugin makes the same choice.

The plugin takes the best `spectrum_top_fraction` of each group of ./model_snr_results/snr_results_{slug}.json, adds
the head and the embedding, and makes `unfrozen_parameters` of them. (axolotl 0.19.0, integrations/spectrum/
__init__.py, _generate_unfrozen_params_yaml) So the file holds the chosen modules only, and the fraction must be 1.
A name that would also match others is written as a pattern.
"""

import json
import math
from collections.abc import Collection, Iterable

from ..errors import ResultError
from ..numerics.metrics import SPECTRUM
from ..selection.select import ALWAYS, Selection
from . import axolotl
from .patterns import check_count
from .reading import read_json
from .targets import inexact, targets_of
from .trainer import Entry, Trainer, find_matches


class AxolotlPlugin(Trainer):
    """Axolotl, by its Spectrum plugin."""

    name = "axolotl-snr"
    suffix = "json"
    advice = "set spectrum_top_fraction: 1, and name the file so that the plugin finds it"
    takes = "JSON"
    has_result_schema = True
    always_by_pattern = True
    loads_causal = True

    def render(self, selection: Selection, parameters: Collection[str] | None = None) -> str:
        """Write the JSON.

        Raises:
            ResultError: other_metric, because the file would state another metric as a signal-to-noise ratio;
                inexact, the selection leaves out the head or the embedding, which the plugin always adds;
                not_finite, a score is infinite or NaN; nothing_chosen; unsafe_name; no_such_parameter.
        """
        if set(selection.always) != set(ALWAYS):
            raise inexact(
                "Axolotl's plugin always trains the head and the embedding", "--format axolotl leaves them out"
            )
        if (metric := selection.result.metric) != SPECTRUM:
            raise ResultError(
                f"the plugin's file has no field for {metric.name}", reason="other_metric", hint="--format axolotl"
            )
        targets = targets_of(selection, parameters)
        scores: dict[str, dict[str, float | str]] = {}
        for target in targets.chosen:
            if not math.isfinite(target.rank_key):
                raise ResultError(
                    f"the score of {target.module} is not finite", reason="not_finite", hint="--format axolotl"
                )
            for pattern in axolotl.patterns_of(target, targets):
                scores[pattern] = {"snr": target.rank_key, "type": target.group}
        if not scores:
            raise ResultError("the plugin cannot read an empty result", reason="nothing_chosen")
        return json.dumps(scores, indent=4, allow_nan=False)

    def entries(self, text: str) -> list[Entry]:
        scores = read_json(text)
        check_count(len(scores))
        if not all(isinstance(score, dict) and "type" in score for score in scores.values()):
            raise TypeError("a module has no group")
        return [axolotl.entry_of(pattern) for pattern in scores]

    def matches(self, text: str, names: Iterable[str]) -> set[str]:
        """Return the names that Axolotl trains, given this file and a fraction of 1."""
        return find_matches([*map(axolotl.entry_of, axolotl.ALWAYS_PATTERNS), *self.entries(text)], names)
