"""Every format against the way its trainer matches names."""

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrum_stream.errors import ResultError, UsageError
from spectrum_stream.model.names import group_of
from spectrum_stream.results.result import Module, Result
from spectrum_stream.selection.select import Rule, Selection, choose
from spectrum_stream.trainers import FORMATS
from spectrum_stream.trainers.patterns import Names, alternatives, literal_prefix

# Names that are the start, the end, or with a dot for any character the whole of others.
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
BANKS = (
    *(f"model.layers.{i}.mlp.experts.{bank}" for i in (1, 11) for bank in ("down_proj", "gate_up_proj")),
    "tower.model.layers.1.mlp.experts.down_proj",
)
ALSO = tuple(f"{bank}_bias" for bank in BANKS) + tuple(
    f"{module}.{what}" for module in MODULES for what in ("bias", "weight_scale", "inner.weight")
)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[Module], list[str]]:
    """The lines of a result, and the names of all parameters of its model."""
    modules = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=14, unique=True))
    banks = draw(st.lists(st.sampled_from(BANKS), max_size=3, unique=True))
    scores = st.floats(0.01, 100)
    lines = [Module(name, group_of(name), draw(scores), f"{name}.weight", 100) for name in modules]
    lines += [Module(name, group_of(name), draw(scores), name, 100) for name in banks]
    names = {line.parameter for line in lines if line.parameter}
    if "model.embed_tokens" in modules and "lm_head" not in modules and draw(st.booleans()):
        lines.append(Module("lm_head", "lm_head", 1.0, "lm_head.weight", 100, "model.embed_tokens"))
    elif draw(st.booleans()):
        names |= {"lm_head.weight", "model.embed_tokens.weight"}
    also = [name for name in ALSO if name.startswith((*modules, *banks))]
    return lines, sorted(names | draw(st.sets(st.sampled_from(also or ["x"]), max_size=30)))


RULES = st.builds(
    Rule,
    st.sampled_from([1, 25, 50, 99, 100]),
    bottom=st.booleans(),
    norms=st.booleans(),
    embeddings=st.booleans(),
    head=st.booleans(),
    min_per_group=st.sampled_from([0, 0, 1]),
)


def added(name: str, modules: Sequence[str], names: Sequence[str]) -> frozenset[str]:
    """What a dialect trains as well, on purpose: Axolotl's entries are modules, so their biases are trained."""
    if not name.startswith("axolotl"):
        return frozenset()
    own = {n for n in names if any(re.fullmatch(rf"{re.escape(m)}\.[^.]+", n) for m in modules)}
    return frozenset(own)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=100, deadline=None)
@given(models(), RULES, st.sampled_from(["told", "recorded", "unknown"]))
def test_what_a_trainer_trains_is_what_was_chosen_or_it_is_refused(
    name: str, model: tuple[list[Module], list[str]], rule: Rule, known: str
) -> None:
    lines, names = model
    try:
        # A scan of some groups sees the names of all.
        selection = choose(Result(tuple(lines), parameters=tuple(names) if known == "recorded" else ()), rule)
    except UsageError as error:
        assert error.reason == "nothing_left"
        return
    if known == "unknown":
        # Then only what the result lists can be kept apart.
        names = [line.parameter for line in lines if line.parameter and line.shares is None]
    hold(name, lines, selection, names, known == "told")


@pytest.mark.parametrize("name", FORMATS)
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
def test_names_that_run_into_each_other_are_kept_apart_or_refused(name: str, module: str, others: list[str]) -> None:
    parameter = module if ".experts." in module else f"{module}.weight"
    lines = [Module(module, "group", 1.0, parameter)]
    hold(name, lines, choose(lines, Rule(100)), [parameter, *others], True)


def hold(name: str, lines: Sequence[Module], selection: Selection, names: Sequence[str], told: bool) -> None:
    """A format trains what was chosen and nothing else, or refuses."""
    try:
        text = FORMATS[name].render(selection, names if told else None)
    except ResultError as error:
        assert error.reason in REFUSALS[name] | {"nothing_chosen"}, error
        return
    parameters = {line.name: line.parameter for line in lines}
    chosen = {parameters[line.owner] for line in lines if line.name in selection.chosen_names}
    if name != "peft":
        # `^lm_head.weight$` and the other: the module need not be there.
        chosen |= {parameters[line.owner] for line in lines if line.name in selection.always}
        chosen |= {f"{module}.weight" for module in selection.always if module not in parameters} & set(names)
    trained = FORMATS[name].matches(text, names)
    extra = added(name, selection.chosen_names, names)
    assert chosen <= trained <= chosen | extra


@pytest.mark.parametrize("name", FORMATS)
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
def test_a_name_with_a_meaning_means_itself_or_is_refused(name: str, module: str) -> None:
    lines = [Module(f"h.0.{module}", "group", 1.0, f"h.0.{module}.weight")]
    names = [f"h.0.{module}.weight", "h.0.a.weight", "h.0.aa.weight", "h.0..weight"]
    hold(name, lines, choose(lines, Rule(100)), names, True)


def test_what_a_trainer_cannot_take_for_its_size_is_refused() -> None:
    many = [Module(f"h.{i}.a_module_with_a_name", "g", 1.0) for i in range(60_000)]
    for name, lines in (
        ("ms-swift-regex", many[:4000]),
        ("soup", many),
        ("soup", [Module("a" * 600, "g", 1.0)]),
    ):
        with pytest.raises(ResultError) as error:
            FORMATS[name].render(choose(lines, Rule(100)))
        assert error.value.reason == "too_large"


REFUSALS: dict[str, set[str]] = {
    "axolotl": {"unsafe_name"},
    "axolotl-snr": {"inexact", "unsafe_name"},
    "lines": {"unsafe_name"},
    "ms-swift": {"inexact", "needs_names"},
    "ms-swift-regex": set(),
    "peft": {"not_adaptable", "inexact"},
    "distillkit": set(),
    "llama-factory": {"needs_names", "not_expressible"},
    "soup": set(),
    "python": set(),
    "json": set(),
}


def test_every_format_is_held_to_this() -> None:
    assert set(REFUSALS) == set(FORMATS)


@pytest.mark.parametrize(
    ("pattern", "parts", "prefix"),
    [
        ("a|b", ["a", "b"], ""),
        (r"^(?:a\.b|c)$", [r"^(?:a\.b)$", "^(?:c)$"], ""),
        (r"(?:a|b)\Z", [r"(?:a)\Z", r"(?:b)\Z"], ""),
        (r"a\|b", [r"a\|b"], "a|b"),
        ("a[|(]b", ["a[|(]b"], "a"),
        ("(?:a|b)c|d", ["(?:a|b)c", "d"], ""),
        ("(?:a|b)(?:c|d)", ["(?:a|b)(?:c|d)"], ""),
        (r"^(?:model\.x)$", [r"^(?:model\.x)$"], "model.x"),
        (r"model\.x+", [r"model\.x+"], "model.x"),
        (r"model\.x?", [r"model\.x?"], "model."),
        (r"model.x", ["model.x"], "model"),
    ],
)
def test_a_pattern_is_taken_apart_where_it_can_be(pattern: str, parts: list[str], prefix: str) -> None:
    assert alternatives(pattern) == parts and literal_prefix(pattern) == prefix


@given(
    st.lists(st.sampled_from(["a", "b", r"\.", ".", "|", "(?:", ")", "+", "?", "[ab]", "$", "^"]), max_size=8),
    st.data(),
)
def test_looking_at_some_names_finds_what_looking_at_all_does(pieces: list[str], data: st.DataObject) -> None:
    try:
        pattern = re.compile("".join(pieces))
    except re.error:
        return
    names = data.draw(st.lists(st.text("ab.", max_size=5)))
    for anchored in (True, False):
        look = pattern.match if anchored else pattern.search
        found = {match.string for match in Names(names).found(pattern, anchored=anchored)}
        assert found == {name for name in names if look(name)}
