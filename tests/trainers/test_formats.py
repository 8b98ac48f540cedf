"""Every format, checked by the matching rules of its trainer."""

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.errors import ResultError, UsageError
from spectrum_stream.model.names import group_of
from spectrum_stream.results.result import Module, Result
from spectrum_stream.selection.select import Rule, Selection, choose
from spectrum_stream.trainers import TRAINERS

# Each name is a prefix or a suffix of another, or matches another if its dots are any characters.
MODULES = (
    *(
        f"model.layers.{i}.{module}"
        for i in (0, 1, 2, 10, 11)
        for module in ("mlp.gate", "mlp.gate_proj", "mlp.down_proj", "conv.0", "conv.01", "input_layernorm")
    ),
    "model.layers.1.mlp.gate.norm",
    "model.layers.1xmlp.gate",
    "model.layers.1.1.up",
    "model.layers.101.up",
    "vision.model.layers.1.mlp.gate",
    "a-b.1.up",
    "model.embed_tokens",
    "model.embed_tokens_per_layer",
    "lm_head",
    "norm",
    "h.0",
    "h.00",
)
FUSED = (
    *(f"model.layers.{i}.mlp.experts.{name}" for i in (1, 11) for name in ("down_proj", "gate_up_proj")),
    "tower.model.layers.1.mlp.experts.down_proj",
)
NEIGHBORS = tuple(f"{name}_bias" for name in FUSED) + tuple(
    f"{module}.{suffix}" for module in MODULES for suffix in ("bias", "weight_scale", "inner.weight")
)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[Module], list[str]]:
    """Draw the modules of a result, and the names of all parameters of its model."""
    single = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=14, unique=True))
    fused = draw(st.lists(st.sampled_from(FUSED), max_size=3, unique=True))
    scores = st.floats(0.01, 100)
    modules = [Module(name, group_of(name), draw(scores), f"{name}.weight", 100) for name in single]
    modules += [Module(name, group_of(name), draw(scores), name, 100) for name in fused]
    names = {module.parameter for module in modules if module.parameter}
    if "model.embed_tokens" in single and "lm_head" not in single and draw(st.booleans()):
        modules.append(Module("lm_head", "lm_head", 1.0, "lm_head.weight", 100, "model.embed_tokens"))
    elif draw(st.booleans()):
        names |= {"lm_head.weight", "model.embed_tokens.weight"}
    neighbors = [name for name in NEIGHBORS if name.startswith((*single, *fused))]
    return modules, sorted(names | draw(st.sets(st.sampled_from(neighbors or ["x"]), max_size=30)))


RULES = st.builds(
    Rule,
    st.sampled_from([1, 25, 50, 99, 100]),
    bottom=st.booleans(),
    norms=st.booleans(),
    embeddings=st.booleans(),
    head=st.booleans(),
    min_per_group=st.sampled_from([0, 0, 1]),
)


def biases_of(modules: Sequence[str], names: Sequence[str]) -> set[str]:
    """Return the parameters that Axolotl trains with the chosen ones: its entries are names of modules."""
    return {n for n in names if any(re.fullmatch(rf"{re.escape(m)}\.[^.]+", n) for m in modules)}


@pytest.mark.parametrize("name", TRAINERS)
@given(models(), RULES, st.sampled_from(["told", "recorded", "unknown"]))
def test_format_trains_exactly_the_choice_or_fails(
    name: str, model: tuple[list[Module], list[str]], rule: Rule, source: str
) -> None:
    modules, names = model
    try:
        # A scan of some groups sees the names of all parameters.
        selection = choose(Result(tuple(modules), parameters=tuple(names) if source == "recorded" else ()), rule)
    except UsageError as error:
        assert error.reason == "nothing_left"
        return
    if source == "unknown":
        # The format then knows only the parameters of the result.
        names = [module.parameter for module in modules if module.parameter and module.shares is None]
    check(name, selection, names, source == "told")


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("model.layers.1.mlp.gate", ["model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.gate.norm.weight"]),
        ("model.layers.1.mlp.up", ["model.layers.10.mlp.up.weight", "model.layers.11.mlp.up.weight"]),
        ("h.1.1.up", ["h.101.up.weight", "h.1x1.up.weight"]),
        ("h.0", ["h.00.weight", "h.0.weight_scale"]),
        ("model.layers.1.mlp.experts.down", ["model.layers.1.mlp.experts.down_bias"]),
        ("model.layers.1.mlp.experts.down", ["vision.model.layers.1.mlp.experts.down"]),
        ("model.layers.1.mlp.up", ["vision.model.layers.1.mlp.up.weight"]),
    ],
)
def test_format_separates_names_that_contain_each_other_or_fails(name: str, module: str, others: list[str]) -> None:
    parameter = module if ".experts." in module else f"{module}.weight"
    check(name, choose([Module(module, "group", 1.0, parameter)], Rule(100)), [parameter, *others], True)


def check(name: str, selection: Selection, names: Sequence[str], told: bool) -> None:
    """Assert that a format trains exactly the choice, or fails for a reason of `REFUSALS`."""
    modules = selection.result.modules
    try:
        text = TRAINERS[name].render(selection, names if told else None)
    except ResultError as error:
        assert error.reason in REFUSALS[name] | {"nothing_chosen"}, error
        return
    parameters = {module.name: module.parameter for module in modules}
    chosen = {parameters[module.owner] for module in modules if module.name in selection.chosen_names}
    if not TRAINERS[name].trains_adapters:
        chosen |= {parameters[module.owner] for module in modules if module.name in selection.always}
        # The head and the embedding may be missing from the result.
        chosen |= {f"{module}.weight" for module in selection.always if module not in parameters} & set(names)
    trained = TRAINERS[name].matches(text, names)
    extra = biases_of(selection.chosen_names, names) if name.startswith("axolotl") else set()
    assert chosen <= trained <= chosen | extra


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize(
    "module",
    [
        "2",
        "null",
        "a|b",
        "a.*",
        "(a",
        "a]",
        "a$",
        "^a",
        "a: b",
        "- a",
        "#a",
        "{a}",
        "\"'",
        "a\\",
        "a\x1b[31m",
        "é\u202e\U0001f600",
        "a b",
    ],
)
def test_format_writes_special_characters_literally_or_fails(name: str, module: str) -> None:
    chosen = Module(f"h.0.{module}", "group", 1.0, f"h.0.{module}.weight")
    names = [f"h.0.{module}.weight", "h.0.a.weight", "h.0.aa.weight", "h.0..weight"]
    check(name, choose([chosen], Rule(100)), names, True)


MANY = tuple(Module(f"h.{i}.a_module_with_a_name", "g", 1.0) for i in range(60_000))


@pytest.mark.parametrize(
    ("name", "result"),
    [
        # The neighbor makes the list inexact, and the expression is too long.
        ("ms-swift", Result(MANY[:4000], parameters=("h.0.a_module_with_a_name.weight_scale",))),
        ("soup", Result(MANY)),
        ("soup", Result((Module("a" * 600, "g", 1.0),))),
    ],
    ids=["expression", "entries", "length"],
)
def test_format_fails_for_more_entries_than_its_trainer_accepts(name: str, result: Result) -> None:
    with pytest.raises(ResultError) as error:
        TRAINERS[name].render(choose(result, Rule(100)))
    assert error.value.reason == "too_large"


REFUSALS: dict[str, set[str]] = {
    "axolotl": {"unsafe_name"},
    "axolotl-snr": {"inexact", "unsafe_name"},
    "lines": {"unsafe_name"},
    "ms-swift": set(),
    "peft": {"not_adaptable", "inexact"},
    "distillkit": set(),
    "llama-factory": {"needs_names", "not_expressible"},
    "soup": set(),
    "python": set(),
    "json": set(),
}


def test_refusals_lists_every_format_in_order() -> None:
    assert list(REFUSALS) == list(TRAINERS)
