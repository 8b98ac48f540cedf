"""A selection in the words of one trainer a file, each with that trainer's way of matching names.

An exporter writes what its trainer takes for exactly the chosen parameters, or refuses.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from ..selection.select import Selection
from . import axolotl, distillkit, llama_factory, ms_swift, ms_swift_regex, peft, python, soup
from . import axolotl_plugin as axolotl_snr
from . import plain_json as data
from . import sft_recipes as lines


class Exporter(Protocol):
    """What each of these files is.

    Attributes:
        SUFFIX: of a file's name.
        ADVICE: what to do with the file, a clause.
    """

    SUFFIX: str
    ADVICE: str

    def render(self, selection: Selection, parameters: Collection[str] | None = None) -> str:
        """The file for the trainer. `parameters` are the names of all of the model's, None where they are not known.

        Raises:
            ResultError: what the dialect cannot say exactly.
        """

    def matches(self, text: str, parameter_names: Iterable[str]) -> set[str]:
        """The parameters that the trainer trains, given this text and a model with these parameters."""


FORMATS: Mapping[str, Exporter] = {
    "axolotl": axolotl,
    "axolotl-snr": axolotl_snr,
    "lines": lines,
    "ms-swift": ms_swift,
    "ms-swift-regex": ms_swift_regex,
    "peft": peft,
    "distillkit": distillkit,
    "llama-factory": llama_factory,
    "soup": soup,
    "python": python,
    "json": data,
}
