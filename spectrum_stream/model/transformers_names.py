"""Get the names of parameters from the installed transformers.

transformers builds the model without weights and applies its own renaming to stored names. config.json is untrusted.
So it is compared with the headers first, and a separate process with limits of time and memory builds the model.

`InstalledModel` sends requests to that process. `serve` and everything below it run there. This is the only file that
imports private modules of transformers.
"""

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Self

from ..errors import UsageError
from ..text import printable
from .config import ModelConfig
from .config_limits import find_excess
from .limited_process import LimitedProcess, ProcessFailed, answer_requests

# Limits in seconds. The time to import torch and transformers depends on the disk, not on config.json.
_IMPORT_SECONDS = 180
_BUILD_SECONDS = 20
_SECONDS_PER_NAME = 0.001
_BUILD_NBYTES = 1_000_000_000
# A class can have a parameter for each expert of one stored tensor, and MODEL can be one shard of many.
_FEW_PARAMETERS = 20_000
_PARAMETERS_PER_TENSOR = 4
# Settings for running a model change no name, but they could name code, a file or a repo.
_NOT_NEEDED = ("_name_or_path", "auto_map", "compression_config", "dtype", "quantization_config", "torch_dtype")
_NOT_NEEDED_PARTS = ("implementation", "kernel_config", "use_kernels")


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model of the installed transformers, without weights.

    Attributes:
        class_name: its class.
        shapes: the shape of each parameter by its name, in the order of the model, with all names of a tied one.
        tied: names that will share a parameter, each with the one that named_parameters() lists.
        doubles: names that share a parameter already, which named_parameters() does not list.
    """

    class_name: str
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    doubles: Collection[str]


class InstalledModel:
    """Renames stored names with the installed transformers, in another process.

    Args:
        tensors: the number of tensors in the checkpoint, which limits the size of the model.
        rows: the largest dimension of a tensor.

    Raises:
        UsageError: missing_extra; unknown_architecture, transformers does not include the model, or config.json makes
            it larger than the checkpoint.
    """

    def __init__(self, config: ModelConfig, tensors: int, rows: int = 0) -> None:
        # This finds the package without its import, which takes seconds.
        if find_spec("transformers") is None:
            raise _missing()
        if (excess := find_excess(config.data, tensors, rows)) is not None:
            raise _not_built(excess)
        self._found: dict[str, tuple[str, str] | None] = {}
        try:
            self._process = LimitedProcess(__name__)
        except ProcessFailed as error:
            raise _no_answer(error) from error
        try:
            self._ask({"model_type": config.model_type, "classes": config.architectures}, _IMPORT_SECONDS)
            limit = _FEW_PARAMETERS + _PARAMETERS_PER_TENSOR * tensors
            built = self._ask({"config": _plain(config.data), "limit": limit}, _BUILD_SECONDS)
        except BaseException:
            self.close()
            raise
        shapes = {name: tuple(shape) for name, shape in built["shapes"].items()}
        self.built = BuiltModel(built["class"], shapes, built["tied"], built["doubles"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process. `built` remains usable."""
        self._process.close()

    def find(self, tensors: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Find the parameter that each tensor becomes, or becomes a part of.

        Args:
            tensors: names in the checkpoint.

        Returns:
            by tensor, its name before the prefix of the base model is added or removed, and the parameter. Tensors
            that become no parameter or several are left out.

        Raises:
            UsageError: unknown_architecture, the process gave no answer.
        """
        tensors = list(tensors)
        if new := [name for name in dict.fromkeys(tensors) if name not in self._found]:
            answer = self._ask({"find": new}, _BUILD_SECONDS + _SECONDS_PER_NAME * len(new))
            self._found |= {name: there and (there[0], there[1]) for name, there in zip(new, answer, strict=True)}
        found = {name: there for name in tensors if (there := self._found[name]) is not None}
        # Each part of fused experts is an expert with a score. A part of a matrix is not a matrix to score.
        parts = Counter(found.values())
        return {
            tensor: (renamed, name)
            for tensor, (renamed, name) in found.items()
            if parts[renamed, name] == 1 or len(self.built.shapes[name]) == 3
        }

    def _ask(self, request: Any, seconds: float) -> Any:
        try:
            answer = self._process.ask(request, seconds)
        except ProcessFailed as error:
            raise _no_answer(error) from error
        match answer:
            case {"missing": str(detail)}:
                raise _missing(detail)
            case {"unknown": str(what)}:
                raise _unknown(what)
        return answer


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the settings, at any depth, that are not needed to build a model."""
    return {
        key: _plain_value(value)
        for key, value in config.items()
        if key not in _NOT_NEEDED and not any(part in key for part in _NOT_NEEDED_PARTS)
    }


def _plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _plain(value)
    return [_plain_value(one) for one in value] if isinstance(value, list) else value


def _missing(detail: str = "") -> UsageError:
    return UsageError(
        f"--names transformers needs transformers 5{detail and f', and it cannot be imported: {_short(detail)}'}",
        reason="missing_extra",
        hint="pip install 'spectrum-stream[verify]'",
    )


def _unknown(what: str) -> UsageError:
    return _not_built(f"transformers does not include a model for {_short(what)}")


def _not_built(sentence: str) -> UsageError:
    return UsageError(
        sentence, reason="unknown_architecture", hint="--names checkpoint keeps the names of the checkpoint"
    )


def _no_answer(error: ProcessFailed) -> UsageError:
    return _not_built(f"transformers cannot build the model of config.json: {error}")


def _short(text: str) -> str:
    return printable(" ".join(text[:2000].split())[:300])


def serve() -> None:
    """Build one model and find the parameters of stored names, in the process."""
    answer_requests(_Server().answer, _BUILD_NBYTES)


class _Unknown(Exception):
    """transformers does not include the model, which the message names."""


class _Server:
    """The requests of `InstalledModel`, in the order in which they come."""

    def __init__(self) -> None:
        self._class_name = "a class"

    def answer(self, request: Any) -> Any:
        try:
            match request:
                case {"model_type": kind, "classes": classes}:
                    try:
                        self._find_classes(kind, classes)
                    except ImportError as error:
                        return {"missing": _text_of(error)}
                    return {}
                case {"config": config, "limit": limit}:
                    return self._build(config, limit)
                case {"find": tensors}:
                    # Some renamings begin only after a certain name, which can come after the names that they change.
                    for _ in range(2):
                        found = [self._find(tensor) for tensor in tensors]
                    return found
        except _Unknown as error:
            return {"unknown": str(error)}
        # The config is untrusted, and each model can fail with another error.
        except Exception as error:
            return {"unknown": f"{self._class_name} with this config.json: {_text_of(error)}"}
        raise AssertionError

    def _find_classes(self, kind: str | None, names: Sequence[str]) -> None:
        import transformers
        from transformers import conversion_mapping, core_model_loading  # noqa: F401

        base = transformers.PreTrainedModel
        models = [getattr(transformers, name, None) for name in names]
        # The base of all models has no parameters.
        model_class = next((m for m in models if isinstance(m, type) and issubclass(m, base) and m is not base), None)
        mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
        if model_class is None or kind is None or kind not in mapping:
            raise _Unknown(", ".join(names) or "a config.json without architectures")
        self._class_name, self._classes = model_class.__name__, (model_class, mapping[kind])

    def _build(self, config: Mapping[str, Any], limit: int) -> Any:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        model_class, config_class = self._classes
        with torch.device("meta"), warnings.catch_warnings(), _limited_parameters(limit):
            # The model's warnings are about running it, so they do not matter here.
            warnings.simplefilter("ignore")
            transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
            model = model_class(config_class.from_dict(_with_floats(config)))
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix, self._state = model.base_model_prefix, model.state_dict()
        self._names = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        own = {name for name, _ in model.named_parameters()}
        return {
            "class": type(model).__name__,
            "shapes": {name: list(shape) for name, shape in self._names.items()},
            "tied": _find_tied(model, list(self._names)),
            "doubles": [name for name in self._names if name not in own],
        }

    def _find(self, tensor: str) -> tuple[str, str] | None:
        from transformers.core_model_loading import rename_source_key

        arguments = tensor, self._renamings, self._converters
        name, converter = rename_source_key(*arguments, self._prefix, self._state)
        # If a tensor is split into several parameters, it has no single name.
        if name in self._names and (converter is None or _becomes_one(self._converters, converter)):
            return rename_source_key(*arguments)[0], name
        return None


@contextmanager
def _limited_parameters(limit: int) -> Iterator[None]:
    """Stop the build of a model when it has too many parameters."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    count = 0

    def register(module: Any, name: str, parameter: Any) -> None:
        nonlocal count
        count += parameter is not None
        if count > limit:
            raise ValueError(f"the model has more than {limit} parameters, too many for this checkpoint")

    hook = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        hook.remove()


def _find_tied(model: Any, names: Sequence[str]) -> dict[str, str]:
    """Find the names that will share a parameter, each with the first one.

    named_parameters() lists only the first one.
    """
    # On the meta device no parameters are tied yet. The model lists those that will be tied.
    pairs = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    order = {name: i for i, name in enumerate(names)}
    found = (sorted(pair, key=order.__getitem__) for pair in pairs if set(pair) <= order.keys())
    return {other: first for first, other in found}


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


def _becomes_one(converters: Iterable[Any], pattern: str) -> bool:
    return any(pattern in c.source_patterns and len(c.target_patterns) == 1 for c in converters)


def _text_of(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"more than {_BUILD_NBYTES // 10**9} GB of memory is needed"
    return str(error)[:2000]
