"""The inventory: experts that are fused, stacked, separate or missing, and the weights of towers."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrum_stream import freeze, plan, scan, select
from spectrum_stream.model.no_score import NoScore

from ..support.checkpoints import FUSED_EXPERTS, Save, fused_experts, reference_score, single_experts
from ..support.hub_server import REPO, HubServer, use, values

pytestmark = pytest.mark.usefixtures("working_folder")


def test_fused_experts_are_scored_one_by_one_and_have_the_median(save: Save) -> None:
    stored = fused_experts()
    result = scan(str(save(stored, shards=2)), name="x", top_percent=50)
    published = json.loads(Path("model_snr_results/snr_results_x.json").read_text())
    assert list(published) == [
        *(f"model.layers.{i}.mlp.{name}" for name in ("experts.down_proj", "experts.gate_up_proj") for i in range(2)),
        *(f"model.layers.{i}.mlp.router" for i in range(2)),
    ]
    for name, weight in stored.items():
        module = name.removesuffix(".weight")
        experts = [r for r in result.records if r.result_name == module != r.module]
        if weight.ndim == 3 and "experts" in name:
            assert [r.module for r in experts] == [f"{module}.{e}" for e in range(12)]
            scores = [r.score.snr for r in experts if r.score]
            assert scores == pytest.approx([reference_score(w) for w in weight], rel=1e-5)
            assert published[module] == {"snr": statistics.median(scores), "type": module.split(".", 3)[3]}
        else:
            assert not experts
    assert result.selection is not None and [len(c) for c in result.selection.chosen.values()] == [1, 1, 1]


def test_fused_experts_are_read_one_at_a_time(save: Save) -> None:
    a_plan = plan(str(save(fused_experts(experts=64, layers=1))), groups=["mlp.experts.*"])
    assert len(a_plan.matrices) == 2 * 64
    assert {w.nbytes for w in a_plan.matrices} == {2 * 24 * 40, 2 * 20 * 24}
    assert [g.name for g in a_plan.groups] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def test_fused_experts_of_a_repo_have_the_scores_of_a_local_scan(
    save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save(fused_experts())
    with HubServer({REPO: folder}) as server:
        use(server.url, monkeypatch, tmp_path)
        assert values(scan(REPO, fetch="range")) == values(scan(str(folder), name="local"))


def test_fused_experts_with_a_broken_expert_have_no_score_together(save: Save) -> None:
    stored = fused_experts()
    stored[FUSED_EXPERTS][5, 0, 0] = torch.nan
    result = scan(str(save(stored)), name="x")
    assert [r.module for r in result.failed] == [f"{FUSED_EXPERTS}.5"] and not result.complete
    published = json.loads(Path("model_snr_results/snr_results_x.json").read_text())
    assert FUSED_EXPERTS not in published and "model.layers.1.mlp.experts.gate_up_proj" in published
    assert sum(r.score is not None for r in result.records if r.result_name == FUSED_EXPERTS) == 11


def test_fused_experts_of_a_record_are_not_computed_again(save: Save) -> None:
    folder = save(fused_experts())
    first = scan(str(folder), name="x")
    events: list[object] = []
    again = scan(str(folder), name="x", top_percent=100, on_event=events.append)
    assert not [e for e in events if type(e).__name__ == "MatrixScored"]
    assert values(again) == values(first) and again.modules == first.modules


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text"])
def test_fused_experts_that_transformers_saves_are_parameters_of_its_model(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    size = {"vocab_size": 128, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "gpt_oss":
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**size, **heads, **tokens))
    else:
        config = transformers.Llama4TextConfig(**size, **heads, **tokens, intermediate_size_mlp=48)
        model = transformers.Llama4ForCausalLM(config)
    model.save_pretrained(tmp_path / "saved")
    result = scan(str(tmp_path / "saved"), name="x", top_percent=50)
    parameters = dict(model.named_parameters())
    for record in result.records:
        if record.result_name != record.module and record.score is not None:
            fused = parameters[record.result_name]
            expert = int(record.module.rsplit(".", 1)[1])
            assert record.score.snr == pytest.approx(reference_score(fused[expert]), rel=1e-4), record.module
    assert sum(r.result_name != r.module for r in result.records) == 2 * 2 * 4
    assert result.selection is not None
    assert 0 < freeze(model, result.selection).trainable_share < 1
    assert any(".experts." in name and p.requires_grad for name, p in model.named_parameters())


def test_pooled_experts_are_selected_together(save: Save) -> None:
    folder = str(save(single_experts()))
    separate = scan(folder, name="x", top_percent=50)
    assert len({module.group for module in separate.modules}) == 8
    pooled = scan(folder, name="x", top_percent=50, experts="pooled")
    assert {module.group for module in pooled.modules} == {"mlp.experts.up_proj", "mlp.experts.down_proj"}
    values_by_name = {module.name: module.value for module in separate.modules if module.value is not None}
    for module in pooled.modules:
        layer = module.name.split(".experts.")[0]
        name = module.name.rsplit(".", 1)[1]
        assert module.value == statistics.median(values_by_name[f"{layer}.experts.{e}.{name}"] for e in range(4))
    assert pooled.selection is not None
    for group, chosen in pooled.selection.chosen.items():
        layers = [module.split(".")[2] for module in chosen]
        assert len(chosen) == 8 and all(layers.count(layer) == 4 for layer in layers), group
    again = select(Path("model_snr_results/snr_results_x.json"), 50)
    assert again.chosen == pooled.selection.chosen
    # If a percentage would split the experts of a layer, whole layers are chosen, rounded down.
    assert all(len(chosen) == 4 for chosen in select(pooled.modules, 40).chosen.values())


def test_pooled_experts_with_a_broken_expert_have_no_score(save: Save) -> None:
    tensors = single_experts()
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][0, 0] = torch.nan
    result = scan(str(save(tensors)), name="x", experts="pooled")
    names = {module.name for module in result.modules}
    assert not any("layers.1.mlp.experts" in name and "up_proj" in name for name in names)
    assert sum("layers.1.mlp.experts" in name for name in names) == 4 and not result.complete


@pytest.mark.parametrize("config", [None, {"num_local_experts": 4}, {"text_config": {"num_experts": 4}}])
def test_missing_experts_are_reported_and_the_others_are_scored(save: Save, config: Any) -> None:
    tensors = single_experts()
    for e in (1, 3):
        del tensors[f"model.layers.2.mlp.experts.{e}.up_proj.weight"]
    result = scan(str(save(tensors, config=config)), name="x")
    (failure,) = result.plan.failures
    assert failure.no_score is NoScore.MISSING_EXPERTS and failure.tensor == "model.layers.2.mlp.experts.up_proj"
    assert len(result.modules) == 30 and not result.complete


def test_experts_of_all_layers_are_missing_if_the_config_says_more(save: Save) -> None:
    result = scan(str(save(single_experts(), config={"n_routed_experts": 8})), name="x")
    assert {s.no_score for s in result.plan.failures} == {NoScore.MISSING_EXPERTS} and len(result.plan.failures) == 8


def test_result_leaves_out_fused_experts_that_lack_an_expert(save: Save) -> None:
    tensors = {name.replace("down_proj", "gate_proj"): w for name, w in single_experts().items()}
    del tensors["model.layers.2.mlp.experts.1.up_proj.weight"]
    folder = str(save(tensors, config={"model_type": "qwen3_moe"}))
    result = scan(folder, name="x", names="transformers-v5")
    names = {module.name for module in result.modules}
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert "model.layers.2.mlp.experts.gate_up_proj" not in names and not result.complete


def test_stored_fused_experts_with_missing_experts_have_no_score(save: Save) -> None:
    stored = {f"layers.{i}.mlp.experts.up_proj": torch.randn(4 - 2 * (i == 1), 8, 9) for i in range(3)}
    result = scan(str(save(stored, config={"num_local_experts": 4})), name="x")
    assert [s.tensor for s in result.plan.failures] == ["layers.1.mlp.experts.up_proj"]
    assert [module.name for module in result.modules] == [f"layers.{i}.mlp.experts.up_proj" for i in (0, 2)]


def test_missing_projection_of_experts_is_reported(save: Save) -> None:
    tensors = {name.replace("down_proj", "gate_proj"): w for name, w in single_experts().items()}
    tensors = {name: w for name, w in tensors.items() if not ("layers.1." in name and "up_proj" in name)}
    result = scan(str(save(tensors, config={"model_type": "qwen3_moe"})), name="x", names="transformers-v5")
    assert [(s.tensor, s.detail) for s in result.plan.failures] == [
        ("model.layers.1.mlp.experts.up_proj", "0 of 4 experts")
    ]
    assert "model.layers.1.mlp.experts.gate_up_proj" not in {module.name for module in result.modules}


@pytest.mark.parametrize("modules", ["mlp.experts.*.up_proj", "mlp.experts.3.up_proj"])
def test_missing_experts_of_a_chosen_group_stay_a_failure(save: Save, modules: str) -> None:
    tensors = single_experts()
    del tensors["model.layers.2.mlp.experts.1.up_proj.weight"]
    folder = str(save(tensors))
    assert [s.no_score for s in plan(folder, groups=[modules]).failures] == [NoScore.MISSING_EXPERTS]
    assert plan(folder, groups=["mlp.experts.*.down_proj"]).failures == ()


def test_pooled_experts_with_an_unreadable_expert_are_ranked_separately(save: Save) -> None:
    tensors = single_experts()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name] = tensors[name].to(torch.uint8)
    a_plan = plan(str(save(tensors)), experts="pooled", groups=["mlp.experts.up_proj"])
    assert [s.no_score for s in a_plan.failures] == [NoScore.UNSUPPORTED_DTYPE]
    assert {w.module.split(".")[2] for w in a_plan.matrices} == {"0", "2", "3"}


def test_unreadable_weight_of_a_chosen_tower_stays_a_failure(save: Save) -> None:
    tensors = {
        "vision_tower.layers.0.q.weight": torch.randn(6, 9),
        "vision_tower.layers.1.q.weight": torch.randn(6, 9).to(torch.uint8),
        "model.layers.0.q.weight": torch.randn(6, 9),
    }
    folder = str(save(tensors))
    assert len(plan(folder, groups=["vision.q"]).failures) == 1


def test_stacked_experts_of_dbrx_are_scored_one_by_one(save: Save) -> None:
    """The shape in DBRX is (experts x width, hidden)."""
    flat = torch.randn(4 * 12, 16, generator=torch.Generator().manual_seed(0))
    name = "transformer.blocks.0.ffn.experts.mlp.w1"
    result = scan(str(save({name: flat}, config={"ffn_config": {"moe_num_experts": 4}})), name="x")
    scores = [r.score.snr for r in result.records if r.score]
    assert scores == pytest.approx([reference_score(w) for w in flat.reshape(4, 12, 16)], rel=1e-5)
    assert [(module.name, module.parameter) for module in result.modules] == [(name, name)]


@pytest.mark.parametrize("name", ["layers.0.local_experts.up_proj", "layers.0.moe.gate_proj.weight"])
def test_fused_experts_by_other_names_are_found(save: Save, name: str) -> None:
    assert [w.expert for w in plan(str(save({name: torch.randn(2, 6, 9)}))).matrices] == [0, 1]


def test_convolution_among_experts_is_not_fused_experts(save: Save) -> None:
    a_plan = plan(str(save({"m.experts.conv.weight": torch.randn(8, 9, 3), "a.weight": torch.randn(3, 4)})))
    assert [s.no_score for s in a_plan.skipped] == [NoScore.NOT_A_MATRIX]


def test_inventory_of_fused_experts_at_the_top_names_every_module(save: Save) -> None:
    tensors = {"input_linear.weight": torch.randn(2, 6, 9), "layers.0.output_linear.weight": torch.randn(2, 6, 9)}
    a_plan = plan(str(save(tensors)))
    assert {s.tensor for s in a_plan.failures} == {"output_linear", "layers.0.input_linear"}
    assert {s.no_score for s in a_plan.failures} == {NoScore.MISSING_EXPERTS}


@pytest.mark.parametrize(
    ("config", "is_warned"),
    [
        ({"num_hidden_layers": 4}, True),
        ({"text_config": {"num_hidden_layers": 4}}, True),
        ({"num_hidden_layers": 2}, False),
        ({"num_hidden_layers": 1}, False),
        # ALBERT shares the weights of its layers.
        ({"num_hidden_layers": 4, "num_hidden_groups": 2}, False),
        ({}, False),
    ],
)
def test_layers_of_the_config_that_the_checkpoint_lacks_are_reported(
    save: Save, config: dict[str, Any], is_warned: bool
) -> None:
    weights = {
        f"model.layers.{i}.mlp.experts.{e}.up_proj.weight": torch.ones(2, 3) for i in range(2) for e in range(4)
    }
    warnings = plan(str(save(weights, config=config))).warnings
    assert any("2 layers" in w and "has 4" in w for w in warnings) == is_warned
