"""The parameters of a model, for `verify`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..checkpoint import open_source
from ..checkpoint.tensors import read_checkpoint
from ..errors import UsageError
from ..model.config import ModelConfig
from ..model.names import find_tied_head, is_fused_experts, is_head, module_of
from ..model.parameters import Names, Naming, find_base_model, find_naming
from ..model.schemes import is_companion, parameter_of
from ..model.ties import find_stored_ties
from .expressions import Expressions
from .patterns import Names as SortedNames

_SCORE = "score.weight"


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The parameters of a model, by the trainer's names.

    Attributes:
        shapes: the shapes by name, in the model's order; None for an unknown shape.
        origin: the origin of the names, a noun phrase.
        tied: names that share another parameter, each with the name of that one.
        stored: the name of each parameter, or of the one that it is a part of, by the name in the checkpoint.
        base_model: a sentence if config.json names a base model, and the trainer loads another class.
        naming: the origin of each name, if they come from the checkpoint.
        config: config.json of the model; None for a list of names.
        is_ordered: whether the names are in the order of the model in memory, with all shapes.
    """

    shapes: Mapping[str, tuple[int, ...] | None]
    origin: str
    tied: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None
    naming: Naming | None = None
    config: ModelConfig | None = None
    is_ordered: bool = False

    @property
    def own(self) -> list[str]:
        """The names that are not tied to another parameter."""
        return [name for name in self.shapes if name not in self.tied]

    @cached_property
    def names(self) -> SortedNames:
        """The same names, prepared to match entries against them."""
        return SortedNames(self.own, self.expressions)

    @cached_property
    def expressions(self) -> Expressions:
        """The process for expressions, with one time limit for all of them."""
        return Expressions()

    def with_classifier(self) -> "Parameters":
        """Return the parameters of the model with a head `score`, as transformers loads a causal model for classes.

        A list of names, and a model of another class, stay as they are.
        (transformers 5.24, modeling_layers.py, GenericForSequenceClassification)
        """
        if self.config is None or not self.config.is_causal or _SCORE in self.shapes:
            return self
        shapes = {name: shape for name, shape in self.shapes.items() if not is_head(module_of(name))}
        tied = {name: owner for name, owner in self.tied.items() if not is_head(module_of(name))}
        return replace(self, shapes={**shapes, _SCORE: None}, tied=tied, is_ordered=False)

    @property
    def is_established(self) -> bool:
        """Whether all of these are the names that were asked for."""
        return self.naming is None or self.naming.is_established

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each oddity of the names."""
        return () if self.naming is None else self.naming.warnings


def parameters_of(
    model: str | None, names: Names | Sequence[str] = Names.V5, *, loads_causal: bool = False
) -> Parameters:
    """Find the parameters of MODEL, by a list, transformers, or the checkpoint.

    Args:
        names: all names in the trainer, and MODEL is then not read; or a member of `Names`. Only `Names.INSTALLED`
            needs transformers.
        loads_causal: whether the trainer loads a causal model even if config.json names its base model.

    Raises:
        UsageError: no_model; conflicting_options; missing_extra, unknown_architecture, for names of transformers.
        SourceError, CheckpointError: MODEL cannot be read.
    """
    if not isinstance(names, Names):
        if model is not None:
            raise UsageError("--model and --names FILE exclude each other", reason="conflicting_options")
        return Parameters(shapes=dict.fromkeys(names), origin="the given list")
    if model is None:
        raise UsageError("missing --model", reason="no_model", hint="pass --model MODEL, or --names FILE")
    source = open_source(model)
    config, sentence = ModelConfig(source.config), None
    if loads_causal and names is not Names.CHECKPOINT and (base := find_base_model(config)) is not None:
        config = ModelConfig({**config.data, "architectures": [base.causal]})
        sentence = (
            f"config.json names {base.name}, but the trainer loads {base.causal}: the names of its parameters have "
            f"the prefix `{base.prefix}`"
        )
    checkpoint = read_checkpoint(source)
    stored = {
        parameter_of(tensor.name): tensor.shape if parameter_of(tensor.name) == tensor.name else None
        for _, tensor in checkpoint.tensors
        if not is_companion(tensor.name)
    }
    ties = find_stored_ties(checkpoint, config).owners
    owners = {parameter_of(name): parameter_of(owner) for name, owner in ties.items()}
    if (head := find_tied_head((tensor.name for _, tensor in checkpoint.tensors), config)) is not None:
        owners[f"{head[0]}.weight"] = parameter_of(head[1])
    rows = max((side for _, tensor in checkpoint.tensors for side in tensor.shape), default=0)
    naming = find_naming(config, names, [*stored, *owners], shared=owners, rows=rows)
    if naming.built is not None:
        tied = {name: name for name in naming.built.doubles} | dict(naming.built.tied)
        # transformers keeps two parameters apart if they are stored with different values.
        own = {parameter for name, parameter in naming.parameters.items() if name not in owners}
        tied = {name: owner for name, owner in tied.items() if name not in own}
        origin = "the model that transformers builds from config.json"
        return Parameters(
            shapes=naming.built.shapes,
            origin=origin,
            tied=tied,
            base_model=sentence,
            config=config,
            is_ordered=True,
        )
    is_renamed = naming.names != Names.CHECKPOINT
    shapes: dict[str, tuple[int, ...] | None] = {}
    for name, shape in stored.items():
        # Without established names, a weight is a parameter under its stored name. Other tensors are buffers.
        there = naming.parameters.get(name, name if name in naming.unknown and not is_renamed else None)
        if there is not None:
            # A stored tensor that is only a part of a parameter does not have its shape.
            is_part = is_renamed and is_fused_experts(module_of(there)) and there != name
            shapes[there] = None if is_part or there in shapes else shape
    parameter = {name: naming.parameters.get(name, name) for name in (*stored, *owners)}
    return Parameters(
        shapes=shapes,
        origin=f"the checkpoint, as {names.replace('-v', ' ')} renames them" if is_renamed else "the checkpoint",
        tied={parameter[name]: parameter[owner] for name, owner in owners.items()},
        stored={name: parameter[name] for name in stored},
        base_model=sentence,
        naming=naming,
        config=config,
    )
