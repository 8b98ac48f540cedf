import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.errors import ResultError, UsageError
from spectrum_stream.model.names import is_embedding, is_head, is_norm
from spectrum_stream.results.result import Module
from spectrum_stream.selection.select import ALWAYS, Rule, choose, rank, select

from ..support.checkpoints import GOLDEN

LINES = [Module(f"layers.{i}.up", "up", snr) for i, snr in enumerate([0.5, 2.0, 1.0, 2.0, 0.1])] + [
    Module("head", "head", 9.0)
]


@pytest.mark.parametrize(
    ("percent", "layers"),
    [(19, []), (20, [1]), (40, [1, 3]), (59.9, [1, 3]), (60, [1, 3, 2]), (100, [1, 3, 2, 0, 4])],
)
def test_the_share_of_each_group_is_rounded_down_and_ties_keep_model_order(percent: float, layers: list[int]) -> None:
    assert select(LINES, percent).chosen["up"] == tuple(f"layers.{i}.up" for i in layers)


def test_a_cut_between_equal_scores_is_known() -> None:
    assert select(LINES, 20).tied == {"up": 2}
    assert select(LINES, 40).tied == select(LINES, 100).tied == select(LINES, 19).tied == {}


def test_a_group_of_one_is_chosen_only_whole() -> None:
    assert select(LINES, 99).chosen["head"] == () and select(LINES, 100).chosen["head"] == ("head",)


def test_groups_keep_the_order_of_the_file() -> None:
    assert list(select(LINES[::-1], 50).chosen) == ["head", "up"]


def test_only_the_groups_asked_for_are_chosen_from() -> None:
    assert list(select(LINES, 50, groups=["up"]).chosen) == ["up"]
    with pytest.raises(UsageError):
        select(LINES, 50, groups=["down"])


def test_infinity_ranks_first() -> None:
    assert rank([*LINES, Module("layers.9.up", "up", math.inf)])["up"][0].name == "layers.9.up"


def test_a_percentage_out_of_range() -> None:
    with pytest.raises(UsageError) as error:
        select(LINES, 101)
    assert error.value.reason == "bad_percent"


def test_a_result_file_is_read() -> None:
    assert len(select(GOLDEN / "snr_results_smollm2.json", 50).chosen_names) == 9 * 15
    with pytest.raises(ResultError):
        select(Path("no/such.json"), 50)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10)), min_size=1, max_size=40),
    st.floats(0.01, 100),
)
def test_what_is_chosen_is_never_beaten_by_what_is_not(lines: list[tuple[str, float]], percent: float) -> None:
    scored = [Module(f"{i}.{group}", group, snr) for i, (group, snr) in enumerate(lines)]
    selection = select(scored, percent)
    keys = {line.name: line.rank_key for line in scored}
    for name, group in selection.ranked.items():
        chosen = selection.chosen[name]
        assert len(chosen) == int(len(group) * percent / 100)
        rest = [line.rank_key for line in group if line.name not in chosen]
        assert not chosen or not rest or min(keys[m] for m in chosen) >= max(rest)


def test_each_of_spectrums_rules_can_be_changed() -> None:
    def chosen(rule: Rule) -> list[str]:
        return list(choose(LINES, rule).chosen["up"])

    assert chosen(Rule(50)) == ["layers.1.up", "layers.3.up"]
    assert chosen(Rule(1, min_per_group=2)) == ["layers.1.up", "layers.3.up"]
    assert chosen(Rule(1, min_per_group=9)) == chosen(Rule(100))
    assert chosen(Rule(40, bottom=True)) == ["layers.4.up", "layers.0.up"]
    assert chosen(Rule(50, percents={"up": 20})) == ["layers.1.up"]


def test_a_group_has_its_own_percentage_by_name_before_glob_and_by_the_first_glob() -> None:
    lines = [Module(f"{i}.{group}", group, 1.0) for i in range(4) for group in ("mlp.up", "mlp.down", "attn")]
    percents = {"mlp.*": 50.0, "mlp.up": 75.0, "*": 0.0}
    counts = {name: len(c) for name, c in choose(lines, Rule(100, percents=percents)).chosen.items()}
    assert counts == {"mlp.up": 3, "mlp.down": 2, "attn": 0}
    assert choose(lines, Rule(100, percents={"attn": 0}, min_per_group=1)).chosen["attn"] == ()
    for wrong, reason in (({"nobody": 5.0}, "no_such_group"), ({"attn": 101.0}, "bad_percent")):
        with pytest.raises(UsageError) as error:
            choose(lines, Rule(50, percents=wrong))
        assert error.value.reason == reason


def test_a_group_that_is_called_like_a_glob_is_no_glob() -> None:
    lines = [Module(f"0.{group}", group, 1.0) for group in ("a?", "ab")]
    assert choose(lines, Rule(100, percents={"a?": 0})).chosen_names == ("0.ab",)


def test_old_scores_that_are_no_numbers_are_not_the_lowest() -> None:
    lines = [Module("0.a", "a", None), Module("1.a", "a", 1.0), Module("2.a", "a", 0.5), Module("3.a", "a", 0.5)]
    assert choose(lines, Rule(50, bottom=True)).chosen["a"] == ("2.a", "3.a")


def test_norms_embeddings_and_the_head_can_be_left_out() -> None:
    names = ["0.norm", "0.up", "model.embed_tokens", "lm_head"]
    lines = [Module(name, name, 1.0) for name in names]
    for rule, left, always in (
        (Rule(100, norms=False), names[1:], ALWAYS),
        (Rule(100, embeddings=False), ["0.norm", "0.up", "lm_head"], ("lm_head",)),
        (Rule(100, head=False), names[:3], ("model.embed_tokens",)),
        (Rule(100, head=False, embeddings=False), names[:2], ()),
    ):
        selection = choose(lines, rule)
        assert (list(selection.chosen_names), selection.always) == (left, always)
    with pytest.raises(UsageError) as error:
        choose(lines[:1], Rule(100, norms=False))
    assert error.value.reason == "nothing_left"


@pytest.mark.parametrize("rule", [Rule(100, head=False), Rule(100, embeddings=False)])
def test_a_tied_head_and_its_embedding_are_left_out_together(rule: Rule) -> None:
    lines = [
        Module("0.up", "up", 1.0),
        Module("model.embed_tokens", "e", 1.0),
        Module("lm_head", "h", 1.0, shares="model.embed_tokens"),
    ]
    selection = choose(lines, rule)
    assert selection.chosen_names == ("0.up",) and selection.always == ()


@pytest.mark.parametrize("module", ["model.layers.0.input_layernorm", "a.ln_1", "ln_f", "q_norm", "x.LayerNorm"])
def test_norms_are_known_by_their_names(module: str) -> None:
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
def test_embeddings_and_heads_are_known_by_their_names(module: str, embedding: bool, head: bool) -> None:
    assert (is_embedding(module), is_head(module)) == (embedding, head)
