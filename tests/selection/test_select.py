import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.errors import ResultError, UsageError
from spectrum_stream.model.names import is_embedding, is_head, is_norm
from spectrum_stream.results.result import Module
from spectrum_stream.selection.select import ALWAYS, Rule, check_percent, choose, rank, select

from ..support.checkpoints import GOLDEN

MODULES = [Module(f"layers.{i}.up", "up", snr) for i, snr in enumerate([0.5, 2.0, 1.0, 2.0, 0.1])] + [
    Module("head", "head", 9.0)
]


@pytest.mark.parametrize(
    ("percent", "layers"),
    [(19, []), (20, [1]), (40, [1, 3]), (59.9, [1, 3]), (60, [1, 3, 2]), (100, [1, 3, 2, 0, 4])],
)
def test_select_rounds_down_and_keeps_the_model_order_of_ties(percent: float, layers: list[int]) -> None:
    assert select(MODULES, percent).chosen["up"] == tuple(f"layers.{i}.up" for i in layers)


def test_select_counts_a_cut_between_equal_scores() -> None:
    assert select(MODULES, 20).tied == {"up": 2}
    assert select(MODULES, 40).tied == select(MODULES, 100).tied == select(MODULES, 19).tied == {}


def test_select_chooses_a_group_of_one_at_100_percent_only() -> None:
    assert select(MODULES, 99).chosen["head"] == () and select(MODULES, 100).chosen["head"] == ("head",)


def test_select_keeps_the_groups_in_the_order_of_the_file() -> None:
    assert list(select(MODULES[::-1], 50).chosen) == ["head", "up"]


def test_select_chooses_from_the_given_groups_only() -> None:
    assert list(select(MODULES, 50, groups=["up"]).chosen) == ["up"]
    with pytest.raises(UsageError):
        select(MODULES, 50, groups=["down"])


def test_rank_puts_infinity_first() -> None:
    assert rank([*MODULES, Module("layers.9.up", "up", math.inf)])["up"][0].name == "layers.9.up"


@pytest.mark.parametrize("percent", [0, -1, 101, math.nan, math.inf])
def test_rule_rejects_a_percentage_out_of_range(percent: float) -> None:
    for make in (lambda: Rule(percent), lambda: check_percent(percent), lambda: select(MODULES, percent)):
        with pytest.raises(UsageError) as error:
            make()
        assert error.value.reason == "bad_percent"


def test_rule_rejects_bad_counts_and_percentages_of_groups() -> None:
    with pytest.raises(UsageError) as error:
        Rule(50, min_per_group=-1)
    assert error.value.reason == "bad_count"
    for percent in (-1, 101, math.nan):
        with pytest.raises(UsageError) as error:
            Rule(50, percents={"up": percent})
        assert error.value.reason == "bad_percent"
    assert Rule(50, percents={"up": 0}).percents == {"up": 0}


def test_select_reads_a_result_file() -> None:
    assert len(select(GOLDEN / "snr_results_smollm2.json", 50).chosen_names) == 9 * 15
    with pytest.raises(ResultError):
        select(Path("no/such.json"), 50)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10)), min_size=1, max_size=40),
    st.floats(0.01, 100),
)
def test_select_never_leaves_out_a_better_module(rows: list[tuple[str, float]], percent: float) -> None:
    modules = [Module(f"{i}.{group}", group, snr) for i, (group, snr) in enumerate(rows)]
    selection = select(modules, percent)
    keys = {module.name: module.rank_key for module in modules}
    for name, group in selection.ranked.items():
        chosen = selection.chosen[name]
        assert len(chosen) == int(len(group) * percent / 100)
        rest = [module.rank_key for module in group if module.name not in chosen]
        assert not chosen or not rest or min(keys[m] for m in chosen) >= max(rest)


def test_rule_options_change_the_choice() -> None:
    def chosen(rule: Rule) -> list[str]:
        return list(choose(MODULES, rule).chosen["up"])

    assert chosen(Rule(50)) == ["layers.1.up", "layers.3.up"]
    assert chosen(Rule(1, min_per_group=2)) == ["layers.1.up", "layers.3.up"]
    assert chosen(Rule(1, min_per_group=9)) == chosen(Rule(100))
    assert chosen(Rule(40, bottom=True)) == ["layers.4.up", "layers.0.up"]
    assert chosen(Rule(50, percents={"up": 20})) == ["layers.1.up"]


def test_rule_percents_prefer_a_name_and_then_the_first_glob() -> None:
    modules = [Module(f"{i}.{group}", group, 1.0) for i in range(4) for group in ("mlp.up", "mlp.down", "attn")]
    percents = {"mlp.*": 50.0, "mlp.up": 75.0, "*": 0.0}
    counts = {name: len(c) for name, c in choose(modules, Rule(100, percents=percents)).chosen.items()}
    assert counts == {"mlp.up": 3, "mlp.down": 2, "attn": 0}
    assert choose(modules, Rule(100, percents={"attn": 0}, min_per_group=1)).chosen["attn"] == ()
    for wrong, reason in (({"nobody": 5.0}, "no_such_group"), ({"attn": 101.0}, "bad_percent")):
        with pytest.raises(UsageError) as error:
            choose(modules, Rule(50, percents=wrong))
        assert error.value.reason == reason


def test_rule_percents_match_a_group_named_like_a_glob_by_its_name() -> None:
    modules = [Module(f"0.{group}", group, 1.0) for group in ("a?", "ab")]
    assert choose(modules, Rule(100, percents={"a?": 0})).chosen_names == ("0.ab",)


def test_rule_bottom_does_not_choose_a_module_without_a_score_first() -> None:
    modules = [Module("0.a", "a", None), Module("1.a", "a", 1.0), Module("2.a", "a", 0.5), Module("3.a", "a", 0.5)]
    assert choose(modules, Rule(50, bottom=True)).chosen["a"] == ("2.a", "3.a")


def test_rule_leaves_out_norms_embeddings_and_the_head() -> None:
    names = ["0.norm", "0.up", "model.embed_tokens", "lm_head"]
    modules = [Module(name, name, 1.0) for name in names]
    for rule, left, always in (
        (Rule(100, norms=False), names[1:], ALWAYS),
        (Rule(100, embeddings=False), ["0.norm", "0.up", "lm_head"], ("lm_head",)),
        (Rule(100, head=False), names[:3], ("model.embed_tokens",)),
        (Rule(100, head=False, embeddings=False), names[:2], ()),
    ):
        selection = choose(modules, rule)
        assert (list(selection.chosen_names), selection.always) == (left, always)
    with pytest.raises(UsageError) as error:
        choose(modules[:1], Rule(100, norms=False))
    assert error.value.reason == "nothing_left"


@pytest.mark.parametrize("rule", [Rule(100, head=False), Rule(100, embeddings=False)])
def test_rule_leaves_out_a_tied_head_with_its_embedding(rule: Rule) -> None:
    modules = [
        Module("0.up", "up", 1.0),
        Module("model.embed_tokens", "e", 1.0),
        Module("lm_head", "h", 1.0, shares="model.embed_tokens"),
    ]
    selection = choose(modules, rule)
    assert selection.chosen_names == ("0.up",) and selection.always == ()


@pytest.mark.parametrize("module", ["model.layers.0.input_layernorm", "a.ln_1", "ln_f", "q_norm", "x.LayerNorm"])
def test_is_norm_recognizes_names(module: str) -> None:
    assert is_norm(module) and not is_embedding(module) and not is_head(module)


@pytest.mark.parametrize(
    ("module", "embedding", "head"),
    [
        ("model.embed_tokens", True, False),
        ("transformer.wte", True, False),
        ("bert.embeddings.word_embeddings", True, False),
        ("gpt_neox.embed_in", True, False),
        ("embed_out", False, True),
        ("lm_head", False, True),
        ("encoder.layer.0.output", False, False),
        ("model.layers.0.mlp.up_proj", False, False),
        ("model.layers.0.linear", False, False),
        ("embedding_hidden_mapping_in", False, False),
        ("bert.embeddings.LayerNorm", False, False),
        ("word_embeddings_layernorm", False, False),
    ],
)
def test_is_embedding_and_is_head_recognize_names(module: str, embedding: bool, head: bool) -> None:
    assert (is_embedding(module), is_head(module)) == (embedding, head)
