"""Every format against the code of the trainer itself, on models of transformers.

Where a trainer's package cannot be imported without all that it needs, the functions that match are taken out of its
source and run. DistillKit and the readers of `lines` are in no registry; what they do is written out here.
"""

import ast
import importlib.util
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from spectrum_stream.errors import ResultError
from spectrum_stream.model.names import group_of
from spectrum_stream.results.result import Module
from spectrum_stream.selection.select import Rule, Selection, choose
from spectrum_stream.trainers import FORMATS

from ..support.families import tiny

transformers = pytest.importorskip("transformers")

SIZE = {
    "vocab_size": 64,
    "num_hidden_layers": 12,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama() -> torch.nn.Module:
    model: torch.nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE, tie_word_embeddings=True))
    return model


def qwen2() -> torch.nn.Module:
    """With biases."""
    model: torch.nn.Module = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZE, tie_word_embeddings=False)
    )
    return model


def gpt_oss() -> torch.nn.Module:
    """With banks of experts, and biases of banks."""
    config = transformers.GptOssConfig(**SIZE, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
    model: torch.nn.Module = transformers.GptOssForCausalLM(config)
    return model


MODELS = [llama, qwen2, gpt_oss]
Make = Callable[[], torch.nn.Module]


def names_of(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def lines_of(model: torch.nn.Module) -> list[Module]:
    """What a scan of the model would give, with scores that say nothing."""
    random = np.random.default_rng(0)
    lines = []
    for name, parameter in model.named_parameters():
        if name.endswith(".weight") or parameter.ndim == 3:
            module = name.removesuffix(".weight")
            lines.append(Module(module, group_of(module), float(random.random()), name, parameter.numel()))
    return lines


def wanted(selection: Selection, names: Collection[str]) -> set[str]:
    parameters = {line.name: line.parameter for line in selection.result.modules}
    always = {f"{module}.weight" for module in selection.always} & set(names)
    return {str(parameters[module]) for module in selection.chosen_names} | always


def trained_by(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def source_of(package: str, *path: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs {package} (pip install --no-deps; see the README)")
    return Path(spec.origin).parent.joinpath(*path)


def functions(path: Path, names: Collection[str], given: dict[str, Any]) -> SimpleNamespace:
    """Functions and classes of a source file, without its imports."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") in names]
    assert len(tree.body) == len(names)
    # Annotations name what is not imported.
    code = compile("from __future__ import annotations\n" + ast.unparse(tree), str(path), "exec", dont_inherit=True)
    space = dict(given)
    exec(code, space)
    return SimpleNamespace(**{name: space[name] for name in names})


def quiet(*_: object, **__: object) -> None:
    pass


LOG = SimpleNamespace(info=quiet, debug=quiet, warning=quiet, info_rank0=quiet)


def axolotl_freeze() -> Any:
    import typing

    return functions(
        source_of("axolotl", "utils", "freeze.py"),
        [
            "freeze_layers_except",
            "LayerNamePattern",
            "_merge_ranges",
            "_invert_ranges",
            "_create_freeze_parameters_hook",
        ],
        {"re": re, "LOG": LOG, "is_main_process": lambda: True, "List": list, "Tuple": tuple, "Callable": typing.Any},
    ).freeze_layers_except


def by_axolotl(model: torch.nn.Module, text: str) -> None:
    axolotl_freeze()(model, yaml.safe_load(text)["unfrozen_parameters"])


def by_axolotls_plugin(model: torch.nn.Module, text: str) -> None:
    plugin = functions(
        source_of("axolotl", "integrations", "spectrum", "__init__.py"), ["_generate_unfrozen_params_yaml"], {}
    )
    axolotl_freeze()(model, plugin._generate_unfrozen_params_yaml(json.loads(text), top_fraction=1))


def by_ms_swift(model: torch.nn.Module, text: str) -> None:
    from bisect import bisect_right
    from contextlib import nullcontext

    config = yaml.safe_load(text)
    given = {"np": np, "re": re, "bisect_right": bisect_right, "nullcontext": nullcontext, "logger": LOG}
    swift = functions(
        source_of("swift", "utils", "transformers_utils.py"),
        ["get_n_params_grads", "freeze_parameters", "activate_parameters"],
        given | {"is_deepspeed_zero3_enabled": lambda: False},
    )
    model.requires_grad_(True)
    swift.freeze_parameters(model, config["freeze_parameters_ratio"], [], None)
    assert not trained_by(model)
    swift.activate_parameters(model, config.get("trainable_parameters", []), config.get("trainable_parameters_regex"))


def by_soup(model: torch.nn.Module, text: str) -> None:
    entries = yaml.safe_load(text)["training"]["unfrozen_parameters"]
    soup = functions(
        source_of("soup_cli", "utils", "freeze.py"), ["apply_unfrozen_parameters"], {"re": re, "logger": LOG}
    )
    soup.apply_unfrozen_parameters(model, entries)


def by_llama_factory(model: torch.nn.Module, text: str) -> None:
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
        "logger": LOG,
        "torch": torch,
        "COMPOSITE_MODELS": {},
        "get_forbidden_modules": lambda *_: set(),
    }
    factory = functions(source_of("llamafactory", "model", "adapter.py"), ["_setup_freeze_tuning"], given)
    factory._setup_freeze_tuning(model, arguments, True, False)


def by_reading_lines(model: torch.nn.Module, text: str) -> None:
    patterns = [line.split("- ")[1] for line in text.splitlines() if line.startswith("- ")]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(re.match(pattern, name) for pattern in patterns)


def by_distillkit(model: torch.nn.Module, text: str) -> None:
    frozen = [re.compile(pattern) for pattern in yaml.safe_load(text)["frozen_res"]]
    for name, parameter in model.named_parameters():
        if any(pattern.search(name) for pattern in frozen):
            parameter.requires_grad = False


def by_its_own_code(model: torch.nn.Module, text: str) -> None:
    space: dict[str, Any] = {}
    exec(text, space)
    space["freeze"](model)


TRAINERS: dict[str, Callable[[torch.nn.Module, str], None]] = {
    "axolotl": by_axolotl,
    "axolotl-snr": by_axolotls_plugin,
    "lines": by_reading_lines,
    "ms-swift": by_ms_swift,
    "ms-swift-regex": by_ms_swift,
    "soup": by_soup,
    "distillkit": by_distillkit,
    "python": by_its_own_code,
}


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("percent", [25, 100])
def test_the_trainer_trains_what_was_chosen(name: str, make: Make, percent: float) -> None:
    model = make()
    selection = choose(lines_of(model), Rule(percent))
    names = names_of(model)
    if (name, make) == ("ms-swift", gpt_oss):
        # `experts.down_proj` is the start of `experts.down_proj_bias`.
        with pytest.raises(ResultError) as error:
            FORMATS[name].render(selection, names)
        assert error.value.reason == "inexact"
        return
    text = FORMATS[name].render(selection, names)
    TRAINERS[name](model, text)
    assert trained_by(model) == FORMATS[name].matches(text, names)
    biases = {n.replace(".weight", ".bias") for n in wanted(selection, names)} if "axolotl" in name else set()
    assert wanted(selection, names) <= trained_by(model) <= wanted(selection, names) | biases


def test_llama_factory_trains_the_layers_that_it_can_name() -> None:
    for first, layers in ((False, range(9, 12)), (True, range(3))):
        model = llama()
        lines = [
            line._replace(value=float(".mlp." in line.name and int(line.name.split(".")[2]) in layers))
            for line in lines_of(model)
        ]
        chosen = choose(lines, Rule(25, groups=("mlp.*",)))
        text = FORMATS["llama-factory"].render(chosen, names_of(model))
        # The module's name, and so the embedding's, is enough for it.
        assert (yaml.safe_load(text)["freeze_trainable_layers"] < 0) == first
        by_llama_factory(model, text)
        assert trained_by(model) == FORMATS["llama-factory"].matches(text, names_of(model))
        assert trained_by(model) == wanted(chosen, names_of(model))


@pytest.mark.parametrize("make", MODELS)
def test_peft_adapts_what_was_chosen_with_the_ranks_it_was_given(make: Make) -> None:
    peft = pytest.importorskip("peft")
    model = make()
    rule = Rule(50, norms=False, head=make is not llama)
    # gpt-oss' router is no Linear, which PEFT says itself.
    lines = [line for line in lines_of(model) if not line.name.endswith("router")]
    selection = choose(lines, rule)
    text = FORMATS["peft"].render(selection, names_of(model))
    chosen = {str(line.parameter) for line in lines if line.name in selection.chosen_names}
    assert chosen == FORMATS["peft"].matches(text, names_of(model))
    options = json.loads(text)
    peft.inject_adapter_in_model(peft.LoraConfig(**options), model)
    ranks: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        # A bank's wrapper knows its parameter; wrappers of two banks of one module are one in the other.
        base = name.replace(".base_layer", "")
        parameter = getattr(module, "parameter_name", None)
        ranks[f"{base}.{parameter or 'weight'}"] = module.r["default"]
    assert set(ranks) == chosen
    snr = {str(line.parameter): (line.group, line.rank_key) for line in lines}
    for name, rank in ranks.items():
        group = [other for other in chosen if snr[other][0] == snr[name][0]]
        better = sum(snr[other][1] > snr[name][1] for other in group) < len(group) // 2
        assert rank == (32 if better and ".experts." not in name else 16), name


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # PEFT's use of transformers
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_peft_adapts_single_layers_of_a_mixture_of_experts(family: str) -> None:
    """It rewrites the targets of such models, by the last parts of their names."""
    peft = pytest.importorskip("peft")
    model = tiny(family)
    lines = [line for line in lines_of(model) if line.group not in ("mlp.gate", "mlp.router")]
    lines = [line for line in lines if not line.name.endswith(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))]
    lines = [line for line in lines if "shared_experts" not in line.name]
    selection = choose(lines, Rule(50, norms=False, head=False, embeddings=False))
    text = FORMATS["peft"].render(selection, names_of(model))
    chosen = {str(line.parameter) for line in lines if line.name in selection.chosen_names}
    assert chosen == FORMATS["peft"].matches(text, names_of(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(**json.loads(text)))
    found = set()
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            parameter = getattr(module, "parameter_name", None)
            found.add(f"{name.replace('.base_layer', '')}.{parameter or 'weight'}")
    assert found == chosen


def test_what_peft_takes_for_experts_is_refused() -> None:
    model = tiny("mixtral")
    selection = choose(lines_of(model), Rule(50, norms=False, head=False, embeddings=False))
    with pytest.raises(ResultError) as error:
        FORMATS["peft"].render(selection, names_of(model))
    assert error.value.reason == "not_adaptable"
