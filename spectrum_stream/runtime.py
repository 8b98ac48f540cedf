"""Names in memory: what transformers calls the parameter that a stored tensor becomes.

They differ from the checkpoint's in many families: transformers 5 fuses the experts of a layer, and moves the parts
of vision-language models. A pattern with the checkpoint's name then trains nothing. So transformers itself is asked:
the model is built from its config without weights, and each stored name goes the way that it goes when it is loaded.

Needs the extra `verify`. No code from a repo is run.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

from .errors import UsageError
from .matrices import Matrix
from .naming import group_of, module_path
from .quantised import parameter_of


class Target(StrEnum):
    """Whose names results have."""

    CHECKPOINT = "checkpoint"
    TRANSFORMERS = "transformers"


def renamed(
    matrices: Sequence[Matrix], failed: Sequence[str], config: Mapping[str, Any]
) -> tuple[list[Matrix], list[str]]:
    """The matrices by the names of their parameters, and the modules that keep the checkpoint's.

    Args:
        failed: tensors that hold weights and cannot be scored. A parameter that one of them is a part of has no score
            as a whole.

    Raises:
        UsageError: missing_extra; unknown_architecture.
    """
    parameters = parameter_names(
        config, dict.fromkeys([*(w.parameter for w in matrices), *map(parameter_of, failed)])
    )
    incomplete = {parameters[name] for tensor in failed if (name := parameter_of(tensor)) in parameters}
    named: list[Matrix] = []
    unknown: dict[str, None] = {}
    for w in matrices:
        parameter = parameters.get(w.parameter)
        if w.tied_to is not None or parameter is None or parameter in incomplete:
            named.append(w)
            if w.tied_to is None:
                unknown[w.bank or w.module] = None
            continue
        name = module_path(parameter) or parameter
        named.append(replace(w, group=group_of(name), parameter=parameter))
    return named, list(unknown)


def parameter_names(config: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, str]:
    """The parameter of each tensor that becomes one, or a part of one; others are left out.

    Args:
        config: the checkpoint's config.json.
        tensors: names in the checkpoint, in its order, which some of the renamings depend on.

    Raises:
        UsageError: missing_extra; unknown_architecture, transformers has no such model of its own.
    """
    try:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError as error:
        raise UsageError(
            "the names of transformers need transformers 5",
            reason="missing_extra",
            hint="pip install 'spectrum-stream[verify]'",
        ) from error
    model_class, model_config = _classes(transformers, config)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # The model's own advice about how to run it.
            warnings.simplefilter("ignore")
            model = model_class(model_config)
    # A config is a stranger's, and every model has its own way to fail at one.
    except Exception as error:
        raise _unknown(f"{model_class.__name__} with this config.json: {error}") from error
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state, shapes = model.state_dict(), {name: parameter.shape for name, parameter in model.named_parameters()}
    found: dict[str, str] = {}
    for tensor in tensors:
        name, converter = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        # One that is split into several has no one name.
        if name in shapes and (converter is None or _becomes_one(converters, converter)):
            found[tensor] = name
    # The parts of a bank are its experts; parts of a matrix have no score that is the matrix's.
    parts = Counter(found.values())
    return {tensor: name for tensor, name in found.items() if parts[name] == 1 or len(shapes[name]) == 3}


def _classes(transformers: Any, config: Mapping[str, Any]) -> tuple[Any, Any]:
    kind, architectures = config.get("model_type"), config.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    models = [getattr(transformers, name, None) for name in names]
    model_class = next(
        (m for m in models if isinstance(m, type) and issubclass(m, transformers.PreTrainedModel)), None
    )
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if model_class is None or not isinstance(kind, str) or kind not in mapping:
        raise _unknown(", ".join(names) or "a config that names none")
    # How it is to be run is of no account here, and could name code to fetch.
    plain = {key: value for key, value in config.items() if not key.lstrip("_").endswith("_implementation")}
    try:
        return model_class, mapping[kind].from_dict(plain)
    except Exception as error:
        raise _unknown(f"{model_class.__name__} with this config.json: {error}") from error


def _unknown(what: str) -> UsageError:
    return UsageError(
        f"transformers has no model of its own for {' '.join(what.split())[:300]}",
        reason="unknown_architecture",
        hint="--target checkpoint keeps the checkpoint's names",
    )


def _becomes_one(converters: Iterable[Any], pattern: str) -> bool:
    return any(pattern in c.source_patterns and len(c.target_patterns) == 1 for c in converters)
