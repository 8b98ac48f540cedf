from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream import scan
from spectrum_stream.errors import ResultError, UsageError
from spectrum_stream.results.result import Module, Result
from spectrum_stream.selection.budget import Needs, Recipe, fit, needs
from spectrum_stream.selection.select import Rule, choose

from ..support.checkpoints import GOLDEN, Save, llama_tensors

MODULES = [Module(f"layers.{i}.up", "up", float(i), f"layers.{i}.up.weight", 100) for i in range(8)] + [
    Module("model.embed_tokens", "model.embed_tokens", 3.0, "model.embed_tokens.weight", 1000),
    Module("lm_head", "lm_head", 3.0, "lm_head.weight", 1000, shares="model.embed_tokens"),
]


def test_needs_counts_a_tied_head_once() -> None:
    assert needs(choose(MODULES, Rule(50))) == Needs(1000 + 4 * 100, 1800)
    # The embedding may be missing from the result.
    assert needs(choose([*MODULES[:8], MODULES[9]], Rule(50))) == Needs(1400, 1800)


def test_needs_sums_the_bytes_of_trained_and_frozen_weights() -> None:
    need = Needs(100, 1100)
    assert need.nbytes(Recipe.ADAMW) == 100 * 16 + 1000 * 4
    assert need.nbytes(Recipe.ADAMW_MIXED) == 100 * 16 + 1000 * 2
    assert need.nbytes(Recipe.ADAMW_BF16) == 100 * 8 + 1000 * 2
    assert need.nbytes(Recipe.ADAMW_8BIT) == pytest.approx(100 * 6.03125 + 1000 * 2)
    assert need.share == 1 / 11


def test_fit_counts_the_modules_that_are_always_trained() -> None:
    assert len(fit(MODULES, Rule(100), max_numel=1399).chosen_names) == 3
    assert len(fit(MODULES, Rule(100), max_numel=1400).chosen_names) == 4
    assert len(fit(MODULES, Rule(100, head=False, embeddings=False), max_numel=400).chosen_names) == 4


def test_fit_keeps_both_budgets() -> None:
    nbytes = int(Needs(1200, 1800).nbytes(Recipe.ADAMW_BF16))
    assert len(fit(MODULES, Rule(100), max_numel=1500, max_nbytes=nbytes, recipe=Recipe.ADAMW_BF16).chosen_names) == 2


def test_fit_reports_a_budget_without_room_for_a_module() -> None:
    for rule in (Rule(100), Rule(100, percents={"*": 0})):
        with pytest.raises(UsageError) as error:
            fit(MODULES, rule, max_numel=1099)
        assert error.value.reason == "over_budget"


def test_fit_needs_the_sizes_of_a_record() -> None:
    path: Path = GOLDEN / "snr_results_smollm2.json"
    assert needs(choose(path, Rule(50))) is None
    with pytest.raises(ResultError) as error:
        fit(path, Rule(100), max_numel=10**12)
    assert error.value.reason == "unknown_sizes"


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10), st.integers(1, 1000)), min_size=1, max_size=30),
    st.integers(1, 20_000),
    st.booleans(),
    st.sampled_from([0, 2]),
)
def test_fit_finds_the_largest_percentage_within_the_budget(
    rows: list[tuple[str, float, int]], max_numel: int, bottom: bool, least: int
) -> None:
    modules = [Module(f"{i}.{group}", group, snr, None, numel) for i, (group, snr, numel) in enumerate(rows)]
    rule = Rule(100, bottom=bottom, min_per_group=least)
    try:
        selection = fit(modules, rule, max_numel=max_numel)
    except UsageError as error:
        assert error.reason == "over_budget"
        smallest = choose(modules, Rule(0.01, bottom=bottom, min_per_group=least))
        # The first module of the selection exceeds the budget.
        assert (
            not smallest.chosen_names
            or sum(modules[int(m.split(".")[0])].numel or 0 for m in smallest.chosen_names) > max_numel
        )
        return
    need = needs(selection)
    assert need is not None and need.trainable <= max_numel
    if (percent := round(selection.rule.percent + 0.01, 2)) <= 100:
        more = needs(choose(modules, Rule(percent, bottom=bottom, min_per_group=least)))
        assert more is not None and more.trainable > max_numel


@pytest.mark.parametrize("unseen", ["lm_head", "model.embed_tokens"])
def test_fit_needs_the_size_of_every_module_that_is_always_trained(unseen: str) -> None:
    names = ("lm_head.weight", "model.embed_tokens.weight")
    modules = tuple(module._replace(shares=None) for module in MODULES if module.name != unseen)
    with pytest.raises(ResultError) as error:
        fit(Result(modules, covered=1.0, parameters=names), Rule(100), max_numel=10_000)
    assert error.value.reason == "partial"
    assert fit(
        Result(modules, covered=1.0, parameters=names), Rule(100, head=False, embeddings=False), max_numel=10_000
    )
    # A model without such a module does not need its size.
    kept = tuple(name for name in names if name != f"{unseen}.weight")
    assert fit(Result(modules, covered=1.0, parameters=kept), Rule(100), max_numel=10_000)


def test_fit_accepts_a_model_with_tensors_that_have_no_score(save: Save, working_folder: Path) -> None:
    """Convolutions and biases have no score, and do not count as missing."""
    tensors = llama_tensors(2) | {"conv.weight": torch.randn(8, 8, 30), "a.bias": torch.zeros(4000)}
    scan(str(save(tensors)), name="x")
    assert fit(Path("model_snr_results/snr_results_x.json"), Rule(100), max_numel=20_000).chosen_names
    scan(str(save(tensors)), name="y", groups=["mlp.*"])
    with pytest.raises(ResultError) as error:
        fit(Path("model_snr_results/snr_results_y.json"), Rule(100), max_numel=20_000)
    assert error.value.reason == "partial"


def test_fit_accepts_fused_experts_without_a_score(save: Save, working_folder: Path) -> None:
    experts = torch.randn(4, 8, 12)
    experts[2, 0, 0] = torch.nan
    scan(str(save(llama_tensors(2) | {"model.layers.0.mlp.experts.up_proj": experts})), name="x")
    assert fit(Path("model_snr_results/snr_results_x.json"), Rule(100), max_numel=20_000).chosen_names
