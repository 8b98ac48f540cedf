"""Get the names of parameters from the installed transformers.

transformers builds the model without weights and applies its own renaming to stored names. This is the only file that
imports private modules of transformers.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import UsageError
from .config import ModelConfig


class InstalledModel:
    """A model of the installed transformers, built without weights, and its renaming of stored names.

    Args:
        count: the number of weights in the checkpoint.

    Raises:
        UsageError: missing_extra; unknown_architecture, transformers does not include the model.
    """

    def __init__(self, config: ModelConfig, count: int) -> None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming
        except ImportError as error:
            raise _missing() from error
        # A model takes memory and time for each layer, and the config is untrusted.
        if (config.layer_count or 0) > count:
            raise _unknown(f"{config.layer_count} layers, and {count} weights")
        model = _model(config)
        transforms = get_model_conversion_mapping(model)
        self.class_name = type(model).__name__
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix, self._state = model.base_model_prefix, model.state_dict()
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        # By name, the parameter that it shares: the one that named_parameters() lists.
        self.tied = _find_tied(model, list(self._shapes))

    def find(self, tensors: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Find the parameter that each tensor becomes, or becomes a part of.

        Args:
            tensors: names in the checkpoint, in its order, because some renamings depend on it.

        Returns:
            by tensor, its name before the prefix of the base model is added or removed, and the parameter. Tensors
            that become no parameter or several are left out.
        """
        from transformers.core_model_loading import rename_source_key

        found: dict[str, tuple[str, str]] = {}
        for tensor in tensors:
            arguments = tensor, self._renamings, self._converters
            name, converter = rename_source_key(*arguments, self._prefix, self._state)
            # If a tensor is split into several parameters, it has no single name.
            if name in self._shapes and (converter is None or _becomes_one(self._converters, converter)):
                found[tensor] = rename_source_key(*arguments)[0], name
        # Each part of fused experts is an expert with a score. A part of a matrix is not a matrix to score.
        parts = Counter(found.values())
        return {
            tensor: (renamed, name)
            for tensor, (renamed, name) in found.items()
            if parts[renamed, name] == 1 or len(self._shapes[name]) == 3
        }


def find_model_parameters(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Find the parameters of the model that transformers builds.

    Returns:
        the shape of each parameter by name; and the names that are tied, each with the name that it is tied to.

    Raises:
        UsageError: missing_extra, unknown_architecture.
    """
    model = _model(config)
    every = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    own = dict(model.named_parameters())
    tied = _find_tied(model, list(every))
    tied |= {name: name for name in every.keys() - own.keys() - tied.keys()}
    return every, tied


def _find_tied(model: Any, names: Sequence[str]) -> dict[str, str]:
    """Find the names that will share a parameter, each with the first one, which named_parameters() lists."""
    # On the meta device no parameters are tied yet. The model has a list of those that will be.
    pairs = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    order = {name: i for i, name in enumerate(names)}
    found = (sorted(pair, key=order.__getitem__) for pair in pairs if set(pair) <= order.keys())
    return {other: first for first, other in found}


def _model(config: ModelConfig) -> Any:
    """Build the model without weights."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise _missing() from error
    model_class, model_config = _classes(transformers, config)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # The model's warnings are about running it, so they do not matter here.
            warnings.simplefilter("ignore")
            transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
            model = model_class(model_config)
    # The config is untrusted, and every model has its own way to fail.
    except Exception as error:
        raise _unknown(f"{model_class.__name__} with this config.json: {error}") from error
    return model


def _missing() -> UsageError:
    return UsageError(
        "--names transformers needs transformers 5",
        reason="missing_extra",
        hint="pip install 'spectrum-stream[verify]'",
    )


def _classes(transformers: Any, config: ModelConfig) -> tuple[Any, Any]:
    kind, names = config.model_type, config.architectures
    models = [getattr(transformers, name, None) for name in names]
    model_class = next(
        (m for m in models if isinstance(m, type) and issubclass(m, transformers.PreTrainedModel)), None
    )
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if model_class is None or kind is None or kind not in mapping:
        raise _unknown(", ".join(names) or "a config.json without architectures")
    # Settings about running the model are not needed, and could name code to download.
    plain = {
        key: _with_floats(value)
        for key, value in config.data.items()
        if not key.lstrip("_").endswith("_implementation")
    }
    try:
        return model_class, mapping[kind].from_dict(plain)
    except Exception as error:
        raise _unknown(f"{model_class.__name__} with this config.json: {error}") from error


def _with_floats(value: Any) -> Any:
    # transformers writes an infinity as {"__float__": "Infinity"}.
    if isinstance(value, dict):
        special = value.get("__float__")
        return (
            float(special)
            if special in ("Infinity", "-Infinity", "NaN")
            else {k: _with_floats(v) for k, v in value.items()}
        )
    return [_with_floats(one) for one in value] if isinstance(value, list) else value


def _unknown(what: str) -> UsageError:
    return UsageError(
        f"transformers does not include a model for {' '.join(what.split())[:300]}",
        reason="unknown_architecture",
        hint="--names checkpoint keeps the names of the checkpoint",
    )


def _becomes_one(converters: Iterable[Any], pattern: str) -> bool:
    return any(pattern in c.source_patterns and len(c.target_patterns) == 1 for c in converters)
