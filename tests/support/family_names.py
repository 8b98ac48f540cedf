"""The names of the parameters of each family, collected from transformers.

`python -m tests.support.families` writes them into `spectrum_stream/model/families.json`. A model is built without
weights, once with tiny settings and once more with each setting changed that can change its modules, and the names of
all variants are put together.
"""

import importlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from spectrum_stream.model.family_names import shape_of
from spectrum_stream.model.names import is_head

from .families import MORE, TABLE, TEXT, shrunk

# The names of the number of layers.
_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}
# Language models and towers that multimodal models are made of.
PARTS = ("idefics3_vision", "pixtral")


def _transformers() -> Any:
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


def _variants(family: str) -> Iterator[Callable[[], Any]]:
    """Yield configs of a family: tiny, and with one setting changed."""
    config_class = _transformers().CONFIG_MAPPING[family]
    small = shrunk(config_class, TEXT) | MORE.get(family, {})
    default = config_class(**small)
    yield partial(config_class, **small)
    for change in _changes(default.to_dict()):
        yield partial(config_class, **small | change)


def _rare_variants(family: str) -> Iterator[Callable[[], Any]]:
    """Yield configs that rarely have other modules: with more layers, other sizes, or a changed part."""
    config_class = _transformers().CONFIG_MAPPING[family]
    small = shrunk(config_class, TEXT) | MORE.get(family, {})
    default = config_class(**small).to_dict()
    # Some layers have another kind, such as every fourth of Qwen3.5.
    whole: list[dict[str, Any]] = [_deepen(small), *_sizes(default)]
    for name in config_class.sub_configs or {}:
        if isinstance(inner := small.get(name), dict):
            plain = {key: value for key, value in inner.items() if key != "layer_types"}
            whole += [{name: inner | change} for change in (*_changes(inner), *_sizes(inner))]
            whole.append({name: plain | _deepen(plain)})
    for change in whole:
        yield partial(config_class, **small | change)


def _deepen(settings: Mapping[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(_LAYERS & settings.keys(), 8)


def _changes(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield changes of one setting that often change the modules."""
    for name, value in settings.items():
        # These make another kind of model of it.
        if name in ("is_decoder", "is_encoder_decoder", "add_cross_attention"):
            continue
        if isinstance(value, bool):
            yield {name: not value}
        elif name in ("q_lora_rank", "hidden_act", "feed_forward_proj", "shared_expert_intermediate_size"):
            yield {name: "gated-gelu" if name[0] == "f" else None}
        elif name in ("first_k_dense_replace", "num_dense_layers", "mlp_only_layers", "moe_layer_start_index"):
            yield {name: [0] if name[0] == "m" else 0}


def _sizes(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield changes of one size, such as that of an embedding with a projection."""
    for name, value in settings.items():
        if type(value) is int and value > 1 and name.endswith(("_dim", "_size", "_rank")):
            yield {name: 2 * value}
        elif value is None and name.endswith(("_dim", "_size", "_rank")):
            yield {name: 16}


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a model or of a class, as the file has them.

    Attributes:
        shapes: all names.
        tied: names that share another parameter, each with the one that `named_parameters` lists.
        tied_by_default: the same with the default settings.
        heads: heads of language models that share the embedding if config.json ties them.
    """

    shapes: frozenset[str]
    tied: Mapping[str, str]
    tied_by_default: Mapping[str, str]
    heads: Mapping[str, str]


def parameters_of(model: Any) -> Parameters:
    """Find the parameters of a model.

    Models of other families in it count as one: `language_model.<text_config>`.
    """
    transformers = _transformers()
    parts: dict[str, str] = {}
    for path, inner in model.named_modules():
        setting = _setting_of(model, inner)
        is_model = path and isinstance(inner, transformers.PreTrainedModel)
        is_other = type(inner).__module__ != type(model).__module__
        if is_model and is_other and setting and not any(path.startswith(f"{p}.") for p in parts.values()):
            parts.setdefault(setting, path)
    shapes: list[str] = []
    names: list[str] = []
    for name, _ in model.named_parameters(remove_duplicate=False):
        part = next(((s, p) for s, p in parts.items() if name.startswith(f"{p}.")), None)
        names.append(shape_of(name, keeps_bias=True))
        shapes.append(names[-1] if part is None else f"{part[1]}.<{part[0]}>")
    tied: dict[str, str] = {}
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        pair = shape_of(name, keeps_bias=True), shape_of(source, keeps_bias=True)
        # The embedding can belong to another family.
        if (pair[0] in shapes and pair[1] in names) or (pair[1] in shapes and pair[0] in names):
            first, other = sorted(pair, key=names.index)
            tied[other] = first
    # A head shares the embedding only if config.json says so.
    heads = {name: first for name, first in tied.items() if is_head(name.removesuffix("."))}
    tied = {name: first for name, first in tied.items() if name not in heads}
    return Parameters(frozenset(shapes), tied, tied, heads)


def _setting_of(model: Any, inner: Any) -> str | None:
    config = getattr(inner, "config", None)
    found = (s for s in (model.config.sub_configs or {}) if getattr(model.config, s, None) is config)
    return next(found, None) if config is not None else None


@cache
def classes_of(family: str) -> Mapping[str, Parameters]:
    """Return the parameters of all classes of a family, by the name of the class."""
    transformers = _transformers()
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    config_class = transformers.CONFIG_MAPPING[family]
    base = auto.MODEL_MAPPING_NAMES[family]
    base = base if isinstance(base, str) else base[0]
    module = importlib.import_module(getattr(transformers, base).__module__)
    classes: dict[str, Parameters] = {}
    rare = _find_rare(family, getattr(transformers, base))
    for name in module.__all__:
        model_class: Any = getattr(module, name)
        if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
            continue
        if (
            getattr(model_class, "config_class", None) is not config_class
            or "pretrained" in model_class.__name__.lower()
        ):
            continue
        for variant in (*_variants(family), *rare):
            if (found := _try(model_class, variant)) is None:
                continue
            before = classes.get(model_class.__name__, found)
            tied = {name: first for name, first in found.tied.items() if before.tied.get(name) == first}
            shapes, heads = before.shapes | found.shapes, {**before.heads, **found.heads}
            classes[model_class.__name__] = Parameters(shapes, tied, before.tied_by_default, heads)
    # The name of a module stands for its bias too.
    return {name: replace(found, shapes=_without_biases(found.shapes)) for name, found in classes.items()}


def _without_biases(shapes: frozenset[str]) -> frozenset[str]:
    return frozenset(s for s in shapes if not s.endswith(".bias") or s.removesuffix("bias") not in shapes)


def _find_rare(family: str, base: Any) -> list[Callable[[], Any]]:
    """Find the rare configs that give the base model of a family other parameters."""
    known: set[str] = set()
    for variant in _variants(family):
        known |= found.shapes if (found := _try(base, variant)) is not None else set()
    rare = []
    for variant in _rare_variants(family):
        found = _try(base, variant)
        if found is not None and not found.shapes <= known:
            known |= found.shapes
            rare.append(variant)
    return rare


def _try(model_class: Any, variant: Callable[[], Any]) -> Parameters | None:
    """Find the parameters of a class with a config; None if the config is impossible for it."""
    import torch

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = model_class(variant())
    except Exception:
        return None
    return parameters_of(model)


def describe(family: str) -> dict[str, Any]:
    """Return the entry of a family in the file."""
    transformers = _transformers()
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    base_name, classes = _base_name(family), classes_of(family)
    base = classes[base_name].shapes
    first: list[Any] = [
        mapping.get(family)
        for mapping in (
            auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            # Encoders are rarely trained as causal models.
            {} if family in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES else auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        )
    ]
    config = transformers.CONFIG_MAPPING[family]()
    entry: dict[str, Any] = {"base": _fold(base), "classes": {}}
    if getattr(config, "tie_word_embeddings", False):
        entry["ties"] = True
    for name in dict.fromkeys(name for name in (*first, base_name, *classes) if name in classes):
        prefix, own = getattr(transformers, name).base_model_prefix, classes[name].shapes
        has_base = any(shape.startswith(f"{prefix}.") for shape in own) and not own & base
        at = f"{prefix}." if has_base else ""
        inner = {at + shape for shape in base}
        about = {
            "at": prefix if has_base else "",
            "prefix": "" if has_base else prefix,
            "adds": _fold(own - inner),
            "lacks": _fold(shape.removeprefix(at) for shape in inner - own),
            "ignored": sorted(getattr(transformers, name)._keys_to_ignore_on_load_unexpected or ()),
            "heads": dict(classes[name].heads),
            "tied": dict(classes[name].tied),
            "tied_by_default": {
                key: value for key, value in classes[name].tied_by_default.items() if key not in classes[name].tied
            },
        }
        entry["classes"][name] = {key: value for key, value in about.items() if value}
    settings = sorted({shape[shape.index("<") + 1 : -1] for shape in base if shape.endswith(">")})
    if settings:
        entry["parts"] = {setting: getattr(config, setting).model_type for setting in settings}
    return entry


def _base_name(family: str) -> str:
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    name = auto.MODEL_MAPPING_NAMES[family]
    return name if isinstance(name, str) else name[0]


def _fold(shapes: Iterable[str]) -> list[str]:
    """Write names with braces where they differ in one component: `mlp.{down_proj,up_proj}.`."""
    by_owner: dict[tuple[str, str], set[str]] = {}
    for shape in shapes:
        owner, _, last = shape.removesuffix(".").rpartition(".")
        by_owner.setdefault((f"{owner}." if owner else "", "." if shape.endswith(".") else ""), set()).add(last)
    return sorted(
        owner + (f"{{{','.join(sorted(lasts))}}}" if len(lasts) > 1 else min(lasts)) + dot
        for (owner, dot), lasts in by_owner.items()
    )


def render() -> str:
    """Render the file, one line for the modules of each owner."""
    return json.dumps({family: describe(family) for family in (*TABLE, *PARTS)}, indent=1) + "\n"
