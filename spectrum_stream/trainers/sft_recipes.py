"""A list of patterns for readers that take lines and not YAML: philschmid's run_sft.py, and SageMaker's recipes.

They take what follows the first `- ` of each line that starts so, and train the parameters whose name it matches from
the start, as a regular expression in which a dot is any character. (`spectrum_config_path`; philschmid/deep-learning-
pytorch-huggingface training/scripts/run_sft.py, aws-samples/amazon-sagemaker-generativeai sft.py)
Spectrum's own list would match too much there; here every dot is escaped and every name is whole.
"""

import re
from collections.abc import Collection, Iterable

from ..selection.select import Selection
from .axolotl import plain
from .patterns import Names
from .targets import targets_of

SUFFIX = "yaml"
ADVICE = "give it as spectrum_config_path"


def render(selection: Selection, parameters: Collection[str] | None = None) -> str:
    """The lines, which are YAML too.

    Raises:
        ResultError: unsafe_name; no_such_parameter.
    """
    names = targets_of(selection, parameters).parameters
    return "\n".join(["unfrozen_parameters:", *(f"- ^{re.escape(plain(name))}$" for name in names)]) + "\n"


def matches(text: str, parameter_names: Iterable[str]) -> set[str]:
    """The parameters that these readers train, given this text."""
    patterns = [re.compile(line.split("- ")[1]) for line in text.splitlines() if line.startswith("- ")]
    names = Names(parameter_names)
    return {match.string for pattern in patterns for match in names.found(pattern, anchored=True)}
