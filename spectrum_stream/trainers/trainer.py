"""A trainer: the file that it reads, its rule to match names, and its other settings that matter.

Each trainer is one subclass of `Trainer` in a separate file, and one row of the registry in `trainers/__init__.py`.
`select` writes its file and `verify` reads it. Neither knows any trainer by name.
"""

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from ..errors import ResultError
from ..model.names import is_encoder, module_of
from ..selection.select import Selection
from .parameters import Parameters
from .patterns import Entry as Entry
from .patterns import How, Names, check_count
from .targets import targets_of


class Reason(StrEnum):
    """The reason for a finding of `verify`; the values are stable codes."""

    NO_MATCH = "no_match"  # the entry matches no parameter
    TOO_MANY = "too_many"  # it also matches parameters that it does not name: layers.10 for layers.1
    BAD_PATTERN = "bad_pattern"  # the trainer cannot compile it
    DIGIT_RANGE = "digit_range"  # a class of characters that looks like a range of numbers: [10-20]
    DUPLICATE = "duplicate"  # the list is in the file twice, and the trainer reads one
    REJECTED = "rejected"  # the trainer rejects the config
    PLUGIN = "plugin"  # a plugin replaces the list when the training starts
    FRACTION = "fraction"  # a fraction that is not between 0 and 1
    TOWER = "tower"  # the config freezes the towers, which the entry names
    ALL_FROZEN = "all_frozen"  # nothing would be trained
    NOTHING_FROZEN = "nothing_frozen"  # everything would be trained
    TIED_HEAD = "tied_head"  # the head shares the parameter of the embedding
    NOT_IN_MODEL = "not_in_model"  # a module of a result is not a parameter of the model
    ROW_RANGE = "row_range"  # a range of rows that the parameter does not have, or that is sharded
    FSDP = "fsdp"  # sharding that cannot freeze a part of a flattened parameter
    CHECKPOINTING = "checkpointing"  # gradients would stop at the first frozen layer
    BASE_MODEL = "base_model"  # config.json names a base model, and the trainer loads another class
    ADAPTER = "adapter"  # the config trains an adapter instead of the weights

    @property
    def is_note(self) -> bool:
        """Whether the training works as selected in spite of the finding."""
        return self in (Reason.TIED_HEAD, Reason.BASE_MODEL)


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem, or a note, that `verify` reports.

    Attributes:
        entry: the entry of the file, or its setting; empty for the file as a whole.
        detail: the problem, a clause.
    """

    reason: Reason
    entry: str
    detail: str


class Trainer(ABC):
    """A trainer, or one of the files that it reads.

    The methods that read a file raise ResultError for a problem that they can explain. They may also raise a
    YAMLError, SyntaxError or RecursionError for text in another language, and a ValueError, KeyError, TypeError,
    AttributeError, IndexError or OverflowError for a text that is not a selection. Those that match names raise
    PatternError for an entry that is not a regular expression, or that takes too long to match. `verify` turns all of
    them into sentences.

    Attributes:
        name: the value of `--format`.
        suffix: the suffix of the file, without a dot.
        advice: the use of the file, a clause.
        takes: the language of the file, for messages.
        trains_adapters: whether the trainer trains adapters of the chosen modules instead of their weights.
        has_result_schema: whether the file has the schema of a result, so that `verify` must not read it as one.
        always_by_pattern: whether head and embedding are named by Spectrum's two patterns only. These do not match a
            head that is tied to an embedding of another name.
        loads_causal: whether it loads a causal model even if config.json names the base model of one.
        label: the word for the trainer in the name of the file; default: `name`.
        dot: an expression of the trainer for a dot, which ends an entry before a longer name; "" if there is none.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    advice: ClassVar[str]
    takes: ClassVar[str] = "YAML"
    trains_adapters: ClassVar[bool] = False
    has_result_schema: ClassVar[bool] = False
    always_by_pattern: ClassVar[bool] = False
    dot: ClassVar[str] = ""
    loads_causal: ClassVar[bool] = False

    @property
    def label(self) -> str:
        return self.name

    @abstractmethod
    def render(self, selection: Selection, parameters: Collection[str] | None = None) -> str:
        """Write the file that makes the trainer train exactly the chosen parameters.

        Args:
            parameters: the names of all parameters of the model in the trainer; None if they are not known.

        Raises:
            ResultError: the format cannot express the selection exactly.
        """

    @abstractmethod
    def entries(self, text: str) -> list[Entry]:
        """Read the entries of a file.

        For a list of frozen parameters, these are the entries that stay trained.
        """

    def matches(self, text: str, names: Iterable[str]) -> set[str]:
        """Return the names that the trainer trains with this file and these parameters."""
        return find_matches(self.entries(text), names)

    def trained(self, text: str, parameters: Parameters) -> set[str]:
        """Return the parameters of a model that the trainer trains with this file, if its config or sizes matter."""
        return self.matches(text, parameters.names)

    def loads_classifier(self, text: str) -> bool:
        """Whether the trainer loads the model with a head `score` for classes or rewards, instead of its own."""
        return False

    def conflicts(self, text: str, parameters: Parameters) -> list[Finding]:
        """Find settings of the file that do not work with frozen parameters."""
        return []

    def advise(self, entry: str) -> str | None:
        """Explain why an entry matches nothing, if its spelling shows it, and how to write it."""
        return None

    def advise_all(self, text: str) -> str:
        """Explain why a file trains all parameters, and how to change it."""
        return "choose fewer"

    def explain(self, selection: Selection, parameters: Collection[str] | None = None) -> list[str]:
        """Return sentences about the file: its use, and its contents beyond the choice.

        Args:
            parameters: as in `render`.
        """
        if parameters is not None:
            has_more = bool(targets_of(selection, parameters).always)
        else:
            has_more = bool(selection.always) and not is_encoder(map(module_of, selection.result.parameters))
        if not has_more or self.trains_adapters:
            return [self.advice]
        always = " and ".join(selection.always)
        return [
            self.advice,
            f"like Spectrum, it also trains {always} if the model has them; "
            "use --no-head and --no-embeddings with select to leave them out",
        ]


def find_matches(entries: Iterable[Entry], names: Iterable[str]) -> set[str]:
    """Return the names that any of the entries matches.

    Raises:
        PatternError, ResultError: as `Names.search`.
    """
    return Names.of(names).matched(list(entries))


def exact(name: str) -> Entry:
    """Return an entry that is the whole name of a parameter."""
    return Entry(name, name, How.NAME)


def strings(value: Any) -> list[str]:
    """Return a list of strings unchanged.

    Raises:
        ResultError: not_a_selection, `value` is something else, such as a string; too_large.
    """
    if isinstance(value, list):
        check_count(len(value))
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        # The message leaves out the value. It can take all memory, because YAML repeats a part of it by name.
        raise ResultError(
            "the parameters are not a list of texts",
            reason="not_a_selection",
            hint="write a list with one name an entry, and quote names with a colon",
        )
    return value


def adapter_findings(setting: str, kind: object) -> list[Finding]:
    """Report a kind of tuning that trains an adapter instead of weights."""
    if kind in ("full", "freeze"):
        return []
    shown = kind if isinstance(kind, str) else reprlib.repr(kind)
    return [
        Finding(
            Reason.ADAPTER, f"{setting}: {shown[:200]}", "trains an adapter; the weights of the model stay frozen"
        )
    ]
