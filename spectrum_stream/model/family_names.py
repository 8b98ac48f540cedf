"""The names that transformers 5 gives the parameters of each family, read from `families.json`.

The file has the classes of each family:

    base      the parameters of its base model, `LlamaModel`
    classes   each class, the one that most trainers load first:
                at      the attribute that holds the base model: `model` in `LlamaForCausalLM`
                prefix  the base_model_prefix of transformers, if it is not `at`
                adds    parameters beyond the base model: `lm_head.`
                lacks   parameters of the base model that the class leaves out
                tied    parameters that share another one, each with the one that named_parameters lists
                tied_by_default  the same, unless config.json unties the head
                heads   heads of a language model that share the embedding, if config.json ties them
                ignored regular expressions of stored names that transformers leaves out silently
    ties      whether the family ties the head if config.json does not say
    parts     settings of the config that are configs of other families, each with its default family

A name in it has `*` for a number. A dot at its end stands for the weight and the bias of a module; a module with only
a bias has the whole name. `{q,v}_proj.`
stands for two names, and `vision_tower.<vision_config>` for all parameters of another family.
`python -m tests.support.families` writes the file, from transformers 5.24.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .config import ModelConfig, is_causal_class

DATA = Path(__file__).parent / "families.json"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelClass:
    """A class of models and its parameters.

    Attributes:
        name: `LlamaForCausalLM`.
        at: the beginning of the names of its base model: `model.`; "" for the base model itself.
        prefix: the prefix that transformers adds or removes to make a stored name fit: `model.`.
        shapes: the names of all parameters, as in the file.
        tied: parameters that share another one, each with the one that named_parameters lists.
        heads: those of them that are the head of a language model.
        ignored: expressions for stored names that transformers leaves out silently.
        prefixes: a cache of (the prefix to remove, the prefix to add) by a name without numbers, None if the class
            lacks it. A checkpoint has few such names.
    """

    name: str
    at: str
    prefix: str
    shapes: frozenset[str]
    tied: Mapping[str, str]
    heads: Collection[str]
    ignored: tuple[re.Pattern[str], ...]
    prefixes: dict[str, tuple[str, str] | None] = field(default_factory=dict, compare=False, repr=False)

    def find(self, name: str) -> str | None:
        """Find the parameter that a stored name becomes; None if the class has none.

        The prefix of the base model is added or removed as needed. (transformers 5.24, core_model_loading.py,
        rename_source_key)
        """
        plain = _without_numbers(name)
        if plain not in self.prefixes:
            self.prefixes[plain] = self._find_prefixes(plain)
        if (found := self.prefixes[plain]) is None:
            return None
        removed, added = found
        return added + name.removeprefix(removed)

    def _find_prefixes(self, plain: str) -> tuple[str, str] | None:
        if self.prefix and plain.startswith(self.prefix) and _has(self.shapes, plain.removeprefix(self.prefix)):
            return self.prefix, ""
        if self.prefix and _has(self.shapes, self.prefix + plain):
            return "", self.prefix
        return ("", "") if _has(self.shapes, plain) else None

    def owns(self, name: str) -> bool:
        """Whether a parameter has this name."""
        return _has(self.shapes, _without_numbers(name))

    def find_owner(self, parameter: str) -> str | None:
        """Find the parameter that another one shares; None if it is a parameter of its own.

        That one has no number in its name.
        """
        owner = self.tied.get(shape_of(parameter) if parameter.endswith(".weight") else parameter)
        return f"{owner}weight" if owner is not None and owner.endswith(".") else owner


@dataclass(frozen=True, slots=True)
class Family:
    """The classes of a family, the one that most trainers load first.

    `known` has the parameters of all classes, without the prefix of the base model, and `starts` these prefixes.
    `answers` is a cache: whether any class has a name without numbers.
    """

    classes: Mapping[str, ModelClass]
    known: frozenset[str]
    starts: frozenset[str]
    answers: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    @property
    def causal(self) -> ModelClass | None:
        """The class that AutoModelForCausalLM loads, if the family is one of decoders."""
        first = next(iter(self.classes.values()))
        return first if is_causal_class(first.name) else None

    def find_class(self, config: ModelConfig) -> ModelClass | None:
        """Find the class that config.json names. Old files have other capital letters: `LLaMAForCausalLM`."""
        by_name = {name.casefold(): found for name, found in self.classes.items()}
        names = (name.casefold() for name in config.architectures)
        return next((by_name[name] for name in names if name in by_name), None)

    def guess_class(self, weights: Iterable[str]) -> ModelClass:
        """Guess the class of weights under a config.json that names none.

        Decoders are loaded as causal models. Of other families, it is the first class that has all of the names.
        """
        every = list(weights)
        fitting = (c for c in self.classes.values() if all(map(c.owns, every)))
        return self.causal or next(fitting, next(iter(self.classes.values())))

    def leaves_out(self, name: str, model_class: ModelClass) -> bool:
        """Whether transformers knows a stored name, and leaves it out of a class."""
        plain = _without_numbers(name)
        is_known = self.answers.get(plain)
        if is_known is None:
            is_known = any(plain.startswith(at) and _has(self.known, plain.removeprefix(at)) for at in self.starts)
            self.answers[plain] = is_known
        return is_known or any(pattern.search(name) for pattern in model_class.ignored)


def find_family(config: ModelConfig) -> Family | None:
    """Find the family of a config.json, and of the parts that it names."""
    entry = _entries().get(config.model_type or "")
    if entry is None:
        return None
    parts: dict[str, frozenset[str]] = {}
    for setting, default in entry.get("parts", {}).items():
        part = config.data.get(setting)
        family = part.get("model_type", default) if isinstance(part, Mapping) else default
        inner = _entries().get(family) if isinstance(family, str) else None
        parts[setting] = frozenset(_expand(inner["base"], {})) if inner is not None else frozenset()
    base = frozenset(_expand(entry["base"], parts))
    is_tied = find_tie(config)
    classes = {name: _read_class(name, about, base, parts, is_tied) for name, about in entry["classes"].items()}
    known = {shape.removeprefix(c.at) for c in classes.values() for shape in c.shapes} | base
    return Family(classes, frozenset(known), frozenset(c.at for c in classes.values()))


def can_list_head(config: ModelConfig) -> bool:
    """Whether a head that is not stored can be the embedding: False if the class has no such head."""
    family = find_family(config)
    found = None if family is None else family.find_class(config)
    return found is None or "lm_head." in found.heads


def find_tie(config: ModelConfig) -> bool | None:
    """Whether the head of a model is its embedding: by config.json, or the default of the family.

    None if neither says so. transformers reads the settings of a known family at the top only.
    """
    said = config.data.get("tie_word_embeddings")
    entry = _entries().get(config.model_type or "")
    if entry is None:
        return config.ties_embeddings
    return bool(said) if isinstance(said, (bool, int, float)) else bool(entry.get("ties"))


def shape_of(name: str, *, keeps_bias: bool = False) -> str:
    """Return the name of a parameter as the file has it: `layers.*.mlp.up_proj.`.

    Args:
        keeps_bias: whether a bias has its whole name, as where a module has no weight.
    """
    plain = _without_numbers(name)
    owner, _, last = plain.rpartition(".")
    is_module = owner and (last == "weight" or (last == "bias" and not keeps_bias))
    return f"{owner}." if is_module else plain


def _without_numbers(name: str) -> str:
    """Put `*` for each number. No prefix of the file has a number, so prefixes can be changed after this."""
    return _NUMBER.sub("*", name)


def _has(shapes: Collection[str], plain: str) -> bool:
    """Whether a name without numbers is one of the file's."""
    owner, _, last = plain.rpartition(".")
    if owner and last in ("weight", "bias") and f"{owner}." in shapes:
        return True
    return (not owner or last != "weight") and plain in shapes


@cache
def _entries() -> Mapping[str, Any]:
    entries: Mapping[str, Any] = json.loads(DATA.read_text("utf-8"))
    return entries


def _read_class(
    name: str,
    about: Mapping[str, Any],
    base: frozenset[str],
    parts: Mapping[str, frozenset[str]],
    is_tied: bool | None,
) -> ModelClass:
    at = f"{about['at']}." if about.get("at") else ""
    inner = base - frozenset(_expand(about.get("lacks", ()), parts))
    prefix = about.get("prefix", about.get("at"))
    heads = about.get("heads", {}) if is_tied else {}
    return ModelClass(
        name=name,
        at=at,
        prefix=f"{prefix}." if prefix else "",
        shapes=frozenset(_expand(about.get("adds", ()), parts)) | {at + shape for shape in inner},
        tied=about.get("tied", {}) | (about.get("tied_by_default", {}) if is_tied else {}) | heads,
        heads=frozenset(heads),
        ignored=tuple(re.compile(pattern) for pattern in about.get("ignored", ())),
    )


def _expand(lines: Iterable[str], parts: Mapping[str, frozenset[str]]) -> Iterable[str]:
    """Yield the names that lines with braces and parts stand for."""
    for line in lines:
        if line.endswith(">"):
            owner, _, setting = line[:-1].partition("<")
            yield from (owner + shape for shape in parts[setting])
            continue
        before, brace, rest = line.partition("{")
        choices, _, after = rest.partition("}")
        yield from (before + choice + after for choice in choices.split(",")) if brace else (line,)
