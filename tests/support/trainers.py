"""Apply selection files to torch models with the code of the trainers themselves.

Most trainers cannot be imported without all of their dependencies. Then the functions that match names are taken out
of the source and run. DistillKit and the recipes that read lines are not in a registry. Their few lines are copied.
"""

import ast
import importlib.util
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from spectrum_stream.model.names import group_of
from spectrum_stream.results.result import Module
from spectrum_stream.selection.select import Selection


def names_of(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def modules_of(model: torch.nn.Module) -> list[Module]:
    """Return the modules that a scan of the model would find, with random scores."""
    random = np.random.default_rng(0)
    modules = []
    for name, parameter in model.named_parameters():
        if name.endswith(".weight") or parameter.ndim == 3:
            module = name.removesuffix(".weight")
            modules.append(Module(module, group_of(module), float(random.random()), name, parameter.numel()))
    return modules


def wanted_parameters(selection: Selection, names: Collection[str]) -> set[str]:
    """Return the parameters of the chosen modules and of those that are always trained."""
    parameters = {module.name: module.parameter for module in selection.result.modules}
    always = {f"{module}.weight" for module in selection.always} & set(names)
    return {str(parameters[module]) for module in selection.chosen_names} | always


def trainable_parameters(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def source_of(package: str, *path: str) -> Path:
    """Return the path of a source file of an installed package, or skip the test."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs {package} (pip install --no-deps; see the README)")
    return Path(spec.origin).parent.joinpath(*path)


def functions_of(path: Path, names: Collection[str], given: dict[str, Any]) -> SimpleNamespace:
    """Run functions and classes of a source file without its imports; `given` has the names that they use."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") in names]
    assert len(tree.body) == len(names)
    # Annotations use names that are not imported, so they are not evaluated.
    code = compile("from __future__ import annotations\n" + ast.unparse(tree), str(path), "exec", dont_inherit=True)
    space = dict(given)
    exec(code, space)
    return SimpleNamespace(**{name: space[name] for name in names})


def _ignore(*_: object, **__: object) -> None:
    pass


_LOG = SimpleNamespace(info=_ignore, debug=_ignore, warning=_ignore, info_rank0=_ignore)


def _axolotl_freeze() -> Any:
    return functions_of(
        source_of("axolotl", "utils", "freeze.py"),
        [
            "freeze_layers_except",
            "LayerNamePattern",
            "_merge_ranges",
            "_invert_ranges",
            "_create_freeze_parameters_hook",
        ],
        {
            "re": re,
            "LOG": _LOG,
            "is_main_process": lambda: True,
            "List": list,
            "Tuple": tuple,
            "Callable": Any,
        },
    ).freeze_layers_except


def freeze_by_axolotl(model: torch.nn.Module, text: str) -> None:
    _axolotl_freeze()(model, yaml.safe_load(text)["unfrozen_parameters"])


def freeze_by_axolotl_plugin(model: torch.nn.Module, text: str) -> None:
    plugin = functions_of(
        source_of("axolotl", "integrations", "spectrum", "__init__.py"), ["_generate_unfrozen_params_yaml"], {}
    )
    _axolotl_freeze()(model, plugin._generate_unfrozen_params_yaml(json.loads(text), top_fraction=1))


def freeze_by_ms_swift(model: torch.nn.Module, text: str) -> None:
    config = yaml.safe_load(text)
    given = {"np": np, "re": re, "bisect_right": bisect_right, "nullcontext": nullcontext, "logger": _LOG}
    swift = functions_of(
        source_of("swift", "utils", "transformers_utils.py"),
        ["get_n_params_grads", "freeze_parameters", "activate_parameters"],
        given | {"is_deepspeed_zero3_enabled": lambda: False},
    )
    model.requires_grad_(True)
    swift.freeze_parameters(model, config["freeze_parameters_ratio"], [], None)
    assert not trainable_parameters(model)
    swift.activate_parameters(model, config.get("trainable_parameters", []), config.get("trainable_parameters_regex"))


def swift_parts(model_type: str) -> tuple[list[str], list[str], list[str]]:
    """Return the starts of the names of language model, tower and aligner, by the table of ms-swift."""
    path = source_of("swift", "model", "model_arch.py")
    names = {
        "qwen2_5_vl": "qwen2_vl", "qwen3_5": "qwen2_vl", "glm4v": "glm4v", "qwen3_vl": "qwen3_vl",
        "gemma3": "llava_hf", "llava": "llava_hf", "mllama": "llama3_2_vision",
    }  # fmt: skip
    spec = importlib.util.spec_from_file_location("model_arch", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arch = module.MODEL_ARCH_MAPPING[names[model_type]]
    return arch.language_model, arch.vision_tower, arch.aligner


def llama_factory_parts() -> dict[str, tuple[list[str], list[str], list[str]]]:
    """Return parts of the names of projector, tower and language model, by the table of LLaMA-Factory."""
    found: dict[str, tuple[list[str], list[str], list[str]]] = {}
    defaults = (["multi_modal_projector"], ["vision_tower"], ["language_model", "lm_head"])
    keys = ("projector_keys", "vision_model_keys", "language_model_keys")
    for node in ast.walk(ast.parse(source_of("llamafactory", "model", "model_utils", "visual.py").read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_register_composite_model":
            given = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
            projector, tower, text = (given.get(key, default) for key, default in zip(keys, defaults, strict=True))
            found[given["model_type"]] = (projector, tower, text)
    return found


def freeze_by_soup(model: torch.nn.Module, text: str) -> None:
    entries = yaml.safe_load(text)["training"]["unfrozen_parameters"]
    soup = functions_of(
        source_of("soup_cli", "utils", "freeze.py"), ["apply_unfrozen_parameters"], {"re": re, "logger": _LOG}
    )
    soup.apply_unfrozen_parameters(model, entries)


def freeze_by_llama_factory(model: torch.nn.Module, text: str) -> None:
    config = yaml.safe_load(text)
    arguments = SimpleNamespace(
        use_llama_pro=False,
        freeze_multi_modal_projector=True,
        freeze_trainable_layers=config["freeze_trainable_layers"],
        freeze_trainable_modules=config["freeze_trainable_modules"].split(","),
        freeze_extra_modules=config["freeze_extra_modules"].split(",") if "freeze_extra_modules" in config else None,
    )
    given = {
        "re": re,
        "logger": _LOG,
        "torch": torch,
        "COMPOSITE_MODELS": {},
        "get_forbidden_modules": lambda *_: set(),
    }
    factory = functions_of(source_of("llamafactory", "model", "adapter.py"), ["_setup_freeze_tuning"], given)
    factory._setup_freeze_tuning(model, arguments, True, False)


def freeze_by_recipes(model: torch.nn.Module, text: str) -> None:
    patterns = [line.split("- ")[1] for line in text.splitlines() if line.startswith("- ")]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(re.match(pattern, name) for pattern in patterns)


def freeze_by_distillkit(model: torch.nn.Module, text: str) -> None:
    frozen = [re.compile(pattern) for pattern in yaml.safe_load(text)["frozen_res"]]
    for name, parameter in model.named_parameters():
        if any(pattern.search(name) for pattern in frozen):
            parameter.requires_grad = False


def freeze_by_its_own_code(model: torch.nn.Module, text: str) -> None:
    space: dict[str, Any] = {}
    exec(text, space)
    space["freeze"](model)


FREEZE_BY: dict[str, Callable[[torch.nn.Module, str], None]] = {
    "axolotl": freeze_by_axolotl,
    "axolotl-snr": freeze_by_axolotl_plugin,
    "lines": freeze_by_recipes,
    "ms-swift": freeze_by_ms_swift,
    "soup": freeze_by_soup,
    "distillkit": freeze_by_distillkit,
    "python": freeze_by_its_own_code,
}
