import json
from pathlib import Path

import numpy as np
import pytest
import torch

from spectrum_stream import MatrixScored, ScanFinished, ScanStarted, plan, scan, select
from spectrum_stream.checkpoint import header
from spectrum_stream.errors import CheckpointError, ComputeError, ResultError, UsageError
from spectrum_stream.files import MAX_JSON_VALUES, check_json
from spectrum_stream.model.inventory import MAX_MATRICES
from spectrum_stream.model.names import MAX_NAME_LENGTH, group_of
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics.snr import Degeneracy
from spectrum_stream.pipeline import Event, run
from spectrum_stream.results.record import MAX_ROWS
from spectrum_stream.results.result import MAX_MODULES, Module, Result

from .support.checkpoints import TIED, Save, llama_tensors, reference_score, single_experts

pytestmark = pytest.mark.usefixtures("working_folder")


def results(stem: str = "x") -> dict[str, dict[str, float | str]]:
    loaded: dict[str, dict[str, float | str]] = json.loads(
        Path(f"model_snr_results/snr_results_{stem}.json").read_text()
    )
    return loaded


def collect(model: Path, **options: object) -> list[Event]:
    events: list[Event] = []
    scan(str(model), name="x", on_event=events.append, **options)  # type: ignore[arg-type]
    return events


def started(events: list[Event]) -> ScanStarted:
    assert isinstance(events[0], ScanStarted)
    return events[0]


def computed(events: list[Event]) -> list[str]:
    return [e.record.module for e in events if isinstance(e, MatrixScored)]


def test_scan_scores_equal_the_formula(save: Save) -> None:
    tensors = llama_tensors(3)
    scan(str(save(tensors, shards=3)), name="x")
    found = results()
    assert {f"{module}.weight" for module in found} == set(tensors)
    for module, entry in found.items():
        assert entry["snr"] == pytest.approx(reference_score(tensors[f"{module}.weight"]), rel=1e-5)


def test_scan_tied_head_is_computed_once(save: Save) -> None:
    events = collect(save(llama_tensors(1, head=False), config=TIED))
    found = results()
    assert found["lm_head"]["snr"] == found["model.embed_tokens"]["snr"]
    assert found["lm_head"]["type"] == "lm_head"
    assert computed(events).count("lm_head") == 1


def test_scan_tied_head_alone(save: Save) -> None:
    collect(save(llama_tensors(1, head=False), config=TIED), groups=["lm_head"])
    assert list(results()) == ["lm_head"]


def test_scan_writes_spectrums_files(save: Save) -> None:
    result = scan(str(save(llama_tensors(2))), name="org/a_b", top_percent=50)
    assert [str(p) for p in result.written] == [
        "model_snr_results/snr_results_org-a-b.json",
        "snr_results_org-a-b_sorted.json",
        "snr_results_org-a-b_unfrozenparameters_50percent.yaml",
    ]
    assert all(p.exists() for p in result.written)
    assert result.selection is not None
    assert result.complete


@pytest.mark.parametrize("percent", [0, -1, 100.5, float("nan"), float("inf")])
def test_scan_percentage_out_of_range_fails_before_the_scan(save: Save, percent: float) -> None:
    folder = str(save(llama_tensors(1)))
    for start in (lambda: scan(folder, top_percent=percent), lambda: next(run(plan(folder), top_percent=percent))):
        with pytest.raises(UsageError) as error:
            start()
        assert error.value.reason == "bad_percent"
        assert error.value.exit_code == 2
    assert not Path("model_snr_results").exists()


def test_scan_takes_a_plan_without_options(save: Save) -> None:
    made = plan(str(save(llama_tensors(2))), name="x", groups=["mlp.*"])
    result = scan(made, top_percent=50)
    assert result.plan is made
    assert {m.group for m in result.modules} == {"mlp.up_proj", "mlp.down_proj"}
    with pytest.raises(UsageError) as error:
        scan(made, precision="fp64")
    assert error.value.reason == "conflicting_options"


def test_scan_without_percentage_writes_no_selection(save: Save) -> None:
    assert scan(str(save(llama_tensors(1)))).selection is None
    assert not list(Path().glob("*.yaml"))


def test_scan_out_moves_the_results_folder(save: Save, tmp_path: Path) -> None:
    result = scan(str(save(llama_tensors(1))), name="x", out=tmp_path / "else" / "where")
    assert result.written[0] == tmp_path / "else" / "where" / "snr_results_x.json"
    assert result.written[0].exists()
    assert not Path("model_snr_results").exists()


def test_scan_reuses_the_record_for_another_percentage(save: Save) -> None:
    folder = save(llama_tensors(4))
    first = collect(folder, top_percent=50)
    before = Path("model_snr_results/snr_results_x.json").read_bytes()
    again = collect(folder, top_percent=25)
    assert computed(first)
    assert not computed(again)
    assert started(again).done == len(started(again).plan.matrices)
    assert Path("snr_results_x_unfrozenparameters_25percent.yaml").exists()
    assert Path("model_snr_results/snr_results_x.json").read_bytes() == before


def test_scan_rewrites_a_deleted_result_from_the_record(save: Save) -> None:
    folder = save(llama_tensors(2))
    collect(folder)
    before = Path("model_snr_results/snr_results_x.json").read_bytes()
    Path("model_snr_results/snr_results_x.json").unlink()
    assert not computed(collect(folder))
    assert Path("model_snr_results/snr_results_x.json").read_bytes() == before


def test_scan_fresh_computes_everything_again(save: Save) -> None:
    folder = save(llama_tensors(1))
    first, again = collect(folder), collect(folder, fresh=True)
    assert sorted(computed(first)) == sorted(computed(again))
    assert started(again).dropped == 0  # asked for, and no sign of a checkpoint that changed


def test_scan_changed_checkpoint_is_scanned_again(save: Save) -> None:
    collect(save(llama_tensors(1)))
    events = collect(save({name: t * 2 for name, t in llama_tensors(1).items()}))
    assert started(events).dropped == len(computed(events)) > 0


def test_scan_resumes_after_an_interruption(save: Save) -> None:
    folder = save(llama_tensors(3), shards=2)
    events = run(plan(str(folder), name="x"))
    first = [next(events) for _ in range(6)]
    events.close()
    assert not Path("model_snr_results/snr_results_x.json").exists()
    rest = collect(folder)
    assert started(rest).done == 5
    assert not set(computed(first)) & set(computed(rest))
    interrupted = Path("model_snr_results/snr_results_x.json").read_bytes()
    collect(folder, fresh=True)
    assert Path("model_snr_results/snr_results_x.json").read_bytes() == interrupted


def test_scan_with_one_matrix_left_ends_with_the_same_bytes(save: Save) -> None:
    """The last matrix must not get idle cores: its last digits depend on the number of threads."""
    generator = torch.Generator().manual_seed(0)
    folder = save({f"layers.{i}.up.weight": torch.randn(192, 576, generator=generator) for i in range(2)})
    events = run(plan(str(folder), name="x"))
    while not isinstance(next(events), MatrixScored):
        pass
    events.close()
    assert len(computed(collect(folder))) == 1
    resumed = Path("model_snr_results/snr_results_x.json").read_bytes()
    collect(folder, fresh=True)
    assert Path("model_snr_results/snr_results_x.json").read_bytes() == resumed


def test_scan_groups_in_steps_makes_one_result(save: Save) -> None:
    folder = save(llama_tensors(2))
    part = scan(str(folder), name="x", groups=["mlp.*"], top_percent=50)
    assert {module.group for module in part.modules} == {"mlp.up_proj", "mlp.down_proj"}
    whole = collect(folder)
    assert not any("mlp" in module for module in computed(whole))
    assert len(results()) == len(llama_tensors(2))
    part = scan(str(folder), name="x", groups=["mlp.up_proj"], top_percent=50)
    assert len(results()) == len(llama_tensors(2))
    assert part.selection is not None
    assert set(part.selection.chosen) == {"mlp.up_proj"}


def test_scan_uses_a_result_of_spectrum(save: Save) -> None:
    folder = save({f"layers.{i}.up.weight": torch.ones(2, 3) for i in range(2)})
    theirs = {f"layers.{i}.up": {"snr": float(i), "type": "up"} for i in range(2)}
    Path("model_snr_results").mkdir()
    Path("model_snr_results/snr_results_x.json").write_text(json.dumps(theirs))
    events = collect(folder, top_percent=50)
    assert started(events).foreign is not None
    assert not computed(events)
    assert "layers.1.up" in Path("snr_results_x_unfrozenparameters_50percent.yaml").read_text()
    assert computed(collect(folder, fresh=True))


def test_scan_keeps_a_foreign_result_that_lacks_modules(save: Save) -> None:
    folder = save({f"layers.{i}.up.weight": torch.ones(2, 3) for i in range(2)})
    Path("model_snr_results").mkdir()
    theirs = '{"layers.0.up": {"snr": 1.0, "type": "up"}}'
    Path("model_snr_results/snr_results_x.json").write_text(theirs)
    with pytest.raises(ResultError) as error:
        collect(folder)
    assert error.value.reason == "other_result"
    assert Path("model_snr_results/snr_results_x.json").read_text() == theirs
    assert len(computed(collect(folder, fresh=True))) == 2


def test_scan_foreign_result_by_other_names_says_how_to_use_them(save: Save) -> None:
    tensors = single_experts(1)
    folder = save(tensors, config={"model_type": "qwen3_moe"})
    modules = [name.removesuffix(".weight") for name in tensors]
    Path("model_snr_results").mkdir()
    theirs = {module: {"snr": 1.0, "type": group_of(module)} for module in modules}
    Path("model_snr_results/snr_results_x.json").write_text(json.dumps(theirs))
    with pytest.raises(ResultError) as error:
        collect(folder)
    assert error.value.reason == "other_result"
    assert "--names checkpoint" in str(error.value.hint)
    assert started(collect(folder, names="checkpoint")).foreign is not None


def test_scan_foreign_result_that_lacks_modules_does_not_ask_for_the_names_in_use(save: Save) -> None:
    folder = save(llama_tensors(1))
    Path("model_snr_results").mkdir()
    Path("model_snr_results/snr_results_x.json").write_text('{"a": {"snr": 1.0, "type": "a"}}')
    with pytest.raises(ResultError) as error:
        collect(folder, names="checkpoint")
    assert error.value.reason == "other_result"
    assert "--names" not in str(error.value.hint)


def test_scan_records_a_matrix_with_nan(save: Save) -> None:
    tensors = llama_tensors(2)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    result = scan(str(save(tensors)), name="x", top_percent=100)
    assert [(r.module, r.no_score) for r in result.failed] == [("model.layers.1.mlp.up_proj", NoScore.NOT_FINITE)]
    assert "1 of 3072" in result.failed[0].detail
    assert not result.complete
    assert "model.layers.1.mlp.up_proj" not in results()
    assert "model.layers.0.mlp.up_proj" in results()
    assert len(results()) == len(tensors) - 1


def test_scan_norm_with_infinity_has_no_score(save: Save) -> None:
    tensors = llama_tensors(1)
    tensors["model.norm.weight"][0] = float("inf")
    assert [r.module for r in scan(str(save(tensors)), name="x").failed] == ["model.norm"]


def test_scan_without_scores_writes_nothing(save: Save) -> None:
    with pytest.raises(ComputeError) as error:
        scan(str(save({"a.weight": torch.full((3, 3), float("nan"))})), name="x")
    assert error.value.reason == "all_failed"
    assert not Path("model_snr_results/snr_results_x.json").exists()


def test_scan_with_unreadable_weights_is_incomplete(save: Save) -> None:
    tensors = {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(2, 3, dtype=torch.int8)}
    result = scan(str(save(tensors)), name="x")
    assert not result.complete
    assert not result.failed
    assert list(results()) == ["a"]


def test_scan_degenerate_scores_are_flagged(save: Save) -> None:
    tensors = {
        "zero.weight": torch.zeros(8, 8),
        "norm.weight": torch.zeros(8),
        "rank_one.weight": torch.ones(8, 8),
        "noise.weight": torch.randn(16, 512, generator=torch.Generator().manual_seed(1)),
    }
    result = scan(str(save(tensors)), name="x")
    flags = {r.module: r.score.degeneracy for r in result.records if r.score}
    assert flags == {
        "noise": Degeneracy.EMPTY_NOISE,
        "norm": Degeneracy.VECTOR,
        "rank_one": Degeneracy.ZERO_NOISE,
        "zero": Degeneracy.ZERO,
    }
    assert results()["zero"]["snr"] == 0.0
    assert results()["norm"]["snr"] == 1.0


def test_scan_events_count_matrices_and_work(save: Save) -> None:
    events = collect(save(llama_tensors(2, head=False), config=TIED))
    scored = [e for e in events if isinstance(e, MatrixScored)]
    assert [e.done for e in scored] == list(range(1, len(scored) + 1))
    assert scored[-1].done == scored[-1].total
    assert scored[-1].work_done == pytest.approx(scored[-1].work_total)
    assert isinstance(events[-1], ScanFinished)


def test_scan_records_keep_singular_values(save: Save) -> None:
    tensors = llama_tensors(1)
    for record in scan(str(save(tensors)), name="x").records:
        w = tensors[record.tensor].to(torch.float64)
        exact = torch.linalg.svdvals(w if w.ndim == 2 else w[None]).numpy()
        np.testing.assert_allclose(record.singular_values, exact, rtol=1e-4, atol=1e-6 * exact[0])


def test_scan_fixed_precision_applies_to_all(save: Save) -> None:
    folder = save(llama_tensors(2))
    collect(folder)
    for precision in ("fp64", "svd"):
        events = collect(folder, precision=precision)
        assert not computed(collect(folder, precision=precision))
        assert {e.record.precision for e in events if isinstance(e, MatrixScored)} == {precision}


@pytest.mark.parametrize("options", [{"fresh": True}, {"precision": "svd"}], ids=str)
def test_scan_fresh_group_keeps_the_others(save: Save, options: dict[str, object]) -> None:
    folder = save(llama_tensors(3))
    collect(folder)
    events = collect(folder, groups=["mlp.up_proj"], **options)
    assert len(computed(events)) == 3
    assert len(results()) == len(llama_tensors(3))


def test_scan_does_not_publish_a_partial_group(save: Save) -> None:
    folder = save(llama_tensors(3), shards=2)
    events = run(plan(str(folder), name="x"))
    first = computed([next(events) for _ in range(10)])
    events.close()
    collect(folder, groups=["model.norm"])
    counts = {g: sum(e["type"] == g for e in results().values()) for g in {e["type"] for e in results().values()}}
    members = plan(str(folder)).inventory.members
    assert first
    assert counts["model.norm"] == 1
    assert all(count == len(members[str(group)]) for group, count in counts.items())


def test_scan_untied_head_is_not_published(save: Save) -> None:
    collect(save(llama_tensors(1, head=False), config=TIED))
    collect(save(llama_tensors(1, head=False), config={**TIED, "tie_word_embeddings": False}))
    assert "lm_head" not in results()


@pytest.mark.parametrize(
    "options", [{"precision": "fp32"}, {"precision": "fp64"}, {"max_nbytes": 300_000_000}], ids=str
)
def test_scan_zero_matrix_scores_zero_by_every_precision(save: Save, options: dict[str, object]) -> None:
    folder = save({"a.weight": torch.zeros(60, 70), "b.weight": torch.zeros(9)})
    assert isinstance(collect(folder, **options)[-1], ScanFinished)
    assert results()["a"]["snr"] == 0.0
    assert results()["b"]["snr"] == 1.0


def test_scan_weights_at_the_edge_of_float64(save: Save) -> None:
    w = torch.randn(24, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e306
    assert scan(str(save({"a.weight": w})), name="x").complete


def test_scan_rejects_an_unknown_precision(save: Save) -> None:
    folder = save(llama_tensors(1))
    assert collect(folder, precision="auto")
    with pytest.raises(UsageError):
        collect(folder, precision="bogus")


def test_scan_memory_limit_reaches_the_computation(save: Save) -> None:
    hard = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) + 30_000
    folder = save({"a.weight": hard, "b.weight": torch.ones(2, 3)})
    tight = scan(str(folder), name="x", max_nbytes=plan(str(folder), max_nbytes=10**9).peak_nbytes)
    assert [r.module for r in tight.inexact] == ["a"]
    assert tight.complete
    assert not scan(str(folder), name="x", fresh=True).inexact


def test_scan_does_not_mix_models_of_one_slug(save: Save) -> None:
    collect(save(llama_tensors(1), folder="a"))
    with pytest.raises(ResultError) as error:
        collect(save(llama_tensors(1), folder="b"))
    assert error.value.reason == "other_model"


def test_scan_shard_deleted_after_the_plan_fails(save: Save) -> None:
    folder = save(llama_tensors(1))
    the_plan = plan(str(folder), name="x")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        list(run(the_plan))


def test_scan_hostile_names_are_rejected_as_patterns(save: Save) -> None:
    folder = save({"a\n- evil.weight": torch.ones(2, 3)})
    scan(str(folder), name="x")
    assert list(results()) == ["a\n- evil"]
    with pytest.raises(ResultError) as error:
        scan(str(folder), name="x", top_percent=100)
    assert error.value.reason == "unsafe_name"


def test_select_accepts_the_result_of_a_scan(save: Save) -> None:
    result = scan(str(save(llama_tensors(4))), name="x", top_percent=50)
    again = select(Result.open(result.written[0]), 50)
    assert result.selection is not None
    assert (result.selection.ranked, result.selection.always) == (again.ranked, again.always)
    assert result.selection.chosen == select(result.modules, 50).chosen
    assert result.selection.chosen == select(result.written[0], 50).chosen
    assert isinstance(result.modules[0], Module)


def test_scan_retries_a_failed_precision(save: Save) -> None:
    folder = save({"a.weight": torch.randn(4, 6, dtype=torch.float64) * 1e25, "b.weight": torch.ones(2, 3)})
    first = scan(str(folder), name="x", precision="fp32")
    assert [r.module for r in first.failed] == ["a"]
    assert scan(str(folder), name="x").complete


def test_limits_of_readers_are_above_those_of_a_scan(save: Save) -> None:
    """Every file that a scan may write can be read again."""
    assert MAX_MATRICES <= MAX_ROWS <= MAX_MODULES
    assert header.MAX_NAME_LENGTH <= MAX_NAME_LENGTH
    found = scan(str(save(llama_tensors(2))), name="x")
    values_of_a_module = 3
    check_json(found.written[0].read_bytes(), values_of_a_module * len(found.modules))
    assert MAX_MODULES * values_of_a_module < MAX_JSON_VALUES


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("modules", [None, ["mlp.*"]])
def test_scan_record_has_all_parameter_names(save: Save, tied: bool, modules: list[str] | None) -> None:
    """A tied head is not a separate parameter, whether the plan includes it or not."""
    tensors = llama_tensors(1, head=not tied) | {"model.layers.0.mlp.up_proj.bias": torch.ones(4)}
    found = scan(str(save(tensors, config=TIED if tied else {})), name="x", groups=modules)
    assert Result.open(found.written[0]).parameters == tuple(sorted(tensors))
