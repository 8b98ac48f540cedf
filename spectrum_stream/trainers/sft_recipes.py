"""A list of patterns for recipes that read lines instead of YAML: philschmid's run_sft.py, and SageMaker's.

For each line that begins with `- `, the recipes take the text up to the next `- `. It is a plain regular expression,
in which a dot is any character. They train the parameters with a name that it matches from the start.
(`spectrum_config_path`; philschmid/deep-learning-pytorch-huggingface, training/scripts/run_sft.py;
aws-samples/amazon-sagemaker-generativeai, sft.py; neither is in a registry)

Spectrum's own list would match too much there. Here every dot is escaped and every name is whole.
"""

import re
from collections.abc import Collection
from itertools import islice

from ..selection.select import Selection
from .axolotl import plain
from .patterns import MAX_ENTRIES, check_count
from .targets import targets_of
from .trainer import Entry, Trainer

# A line, as `str.splitlines` splits them, that begins with `- `.
_BREAKS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
_ENTRY = re.compile(rf"(?<![^{_BREAKS}])- ([^{_BREAKS}]*)")


class SftRecipes(Trainer):
    """The recipes, by lines of patterns."""

    name = "lines"
    suffix = "yaml"
    advice = "pass it as spectrum_config_path"
    loads_causal = True

    def render(self, selection: Selection, parameters: Collection[str] | None = None) -> str:
        """Write the lines, which are YAML too.

        Raises:
            ResultError: unsafe_name; no_such_parameter, nothing_chosen.
        """
        names = targets_of(selection, parameters).parameters
        return "\n".join(["unfrozen_parameters:", *(f"- ^{re.escape(plain(name))}$" for name in names)]) + "\n"

    def entries(self, text: str) -> list[Entry]:
        found = [entry[1] for entry in islice(_ENTRY.finditer(text), MAX_ENTRIES + 1)]
        check_count(len(found))
        # The recipes cut an entry at the next `- `.
        patterns = (entry.split("- ", 1)[0] if "- " in entry else entry for entry in found)
        return [Entry(pattern, pattern) for pattern in patterns]
