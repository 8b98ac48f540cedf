"""The parameters of a model, for `verify`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..checkpoint import open_source
from ..checkpoint.tensors import read_checkpoint
from ..errors import UsageError
from ..model import transformers_names
from ..model.config import ModelConfig
from ..model.names import find_tied_head, is_extra_layer, module_of
from ..model.parameters import Names, renaming
from ..model.schemes import is_companion, parameter_of
from ..model.ties import find_stored_ties


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a model, by the trainer's names.

    Attributes:
        shapes: the shapes by name, in the model's order; None for an unknown shape.
        origin: the origin of the names, a noun phrase.
        tied: names that share another parameter, each with the name of that one.
        warning: a sentence if these are not the names that were asked for.
        stored: the name of each parameter, or of the one that it is a part of, by the name in the checkpoint.
    """

    shapes: Mapping[str, tuple[int, ...] | None]
    origin: str
    tied: Mapping[str, str]
    warning: str | None = None
    stored: Mapping[str, str] = field(default_factory=dict)


def parameters_of(model: str | None, names: Names | Sequence[str] = Names.V5) -> Parameters:
    """Find the parameters of MODEL, by a list, transformers, or the checkpoint.

    Args:
        names: all names in the trainer, and MODEL is then not read; or a member of `Names`. Only `Names.INSTALLED`
            needs transformers.

    Raises:
        UsageError: no_model; conflicting_options; missing_extra, unknown_architecture, for names of transformers.
        SourceError, CheckpointError: MODEL cannot be read.
    """
    if not isinstance(names, Names):
        if model is not None:
            raise UsageError("--model and --names FILE exclude each other", reason="conflicting_options")
        return Parameters(dict.fromkeys(names), "the given list", {})
    if model is None:
        raise UsageError("missing --model", reason="no_model", hint="pass --model MODEL, or --names FILE")
    source = open_source(model)
    config = ModelConfig(source.config)
    if names is Names.INSTALLED:
        shapes, tied = transformers_names.find_model_parameters(config)
        return Parameters(shapes, "the model that transformers builds from config.json", tied)
    checkpoint = read_checkpoint(source)
    rename = renaming(config, names)
    # transformers does not load layers for multi-token prediction.
    drops_extra = names is not Names.CHECKPOINT and rename.warning is None
    stored = [
        (parameter_of(tensor.name), tensor.shape if parameter_of(tensor.name) == tensor.name else None)
        for _, tensor in checkpoint.tensors
        if not is_companion(tensor.name)
        and not (drops_extra and is_extra_layer(module_of(tensor.name), config.layer_count))
    ]
    renamed: dict[str, tuple[int, ...] | None] = {}
    for name, shape in stored:
        there = rename.of(name)
        # A stored tensor that is only a part of a parameter does not have its shape.
        renamed[there] = shape if there not in renamed and there == name else renamed.get(there)
    tied = dict(find_stored_ties(checkpoint, config).owners)
    if (head := find_tied_head((tensor.name for _, tensor in checkpoint.tensors), config)) is not None:
        tied[f"{head[0]}.weight"] = head[1]
    owners = {rename.of(name): rename.of(parameter_of(owner)) for name, owner in tied.items()}
    return Parameters(
        renamed, rename.origin, owners, warning=rename.warning, stored={name: rename.of(name) for name, _ in stored}
    )
