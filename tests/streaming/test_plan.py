import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrum_stream import scan
from spectrum_stream.errors import CheckpointError, UsageError
from spectrum_stream.model.names import pick_groups
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics import costs
from spectrum_stream.streaming.plan import Outputs, Plan, plan

from ..support import header_only
from ..support.checkpoints import TIED, Save, llama_tensors


def reasons(a_plan: Plan) -> dict[str, NoScore]:
    return {s.tensor: s.no_score for s in a_plan.skipped}


@pytest.mark.parametrize("option", ["modules", "target", "max_memory", "wait"])
def test_plan_and_scan_reject_unknown_options(save: Save, option: str) -> None:
    folder = str(save(llama_tensors(1)))
    options: Any = {option: None}
    with pytest.raises(TypeError, match=option):
        plan(folder, **options)
    with pytest.raises(TypeError, match=option):
        scan(folder, **options)


def test_plan_counts_matrices_groups_and_bytes(save: Save) -> None:
    a_plan = plan(str(save(llama_tensors(3), shards=2)))
    groups = {g.name: (g.count, g.shapes) for g in a_plan.groups}
    assert list(groups) == [
        "input_layernorm",
        "lm_head",
        "mlp.down_proj",
        "mlp.up_proj",
        "model.embed_tokens",
        "model.norm",
        "self_attn.q_proj",
        "self_attn.v_proj",
    ]
    assert groups["mlp.up_proj"] == (3, ((96, 32),))
    assert groups["input_layernorm"] == (3, ((1, 32),))
    assert a_plan.read_nbytes == sum(t.nbytes for t in llama_tensors(3).values())


def test_plan_tied_head_follows_its_embedding_and_is_read_once(save: Save) -> None:
    tensors = llama_tensors(1, head=False)
    a_plan = plan(str(save(tensors, config=TIED)))
    names = [w.module for w in a_plan.matrices]
    assert names.index("lm_head") == names.index("model.embed_tokens") + 1
    assert a_plan.read_nbytes == sum(t.nbytes for t in tensors.values())
    assert a_plan.to_dict()["tied"] == {"lm_head": "model.embed_tokens"}


def test_plan_skipped_tensors_have_reasons(save: Save) -> None:
    odd = {
        "a.bias": torch.ones(3),
        "position_ids": torch.arange(3),
        "other.gate_up_proj": torch.ones(2, 3, 4),
        "conv.weight": torch.ones(2, 3, 1),
        "patch.weight": torch.ones(2, 3, 4, 4),
        "scalar.weight": torch.tensor(1.0),
        "empty.weight": torch.ones(0, 4),
        "packed.weight": torch.ones(2, 3, dtype=torch.uint8),
        "fp8.weight": torch.ones(2, 3).to(torch.float8_e4m3fn),
        "fp8.input_scale": torch.tensor(1.0),
        "gptq.qweight": torch.ones(2, 3, dtype=torch.int32),
    }
    a_plan = plan(str(save({"a.weight": torch.ones(2, 3), **odd})))
    assert reasons(a_plan) == {
        "a.bias": NoScore.NOT_A_WEIGHT,
        "position_ids": NoScore.NOT_A_WEIGHT,
        "other.gate_up_proj": NoScore.NOT_A_WEIGHT,
        "conv.weight": NoScore.NOT_A_MATRIX,
        "patch.weight": NoScore.NOT_A_MATRIX,
        "scalar.weight": NoScore.NOT_A_MATRIX,
        "empty.weight": NoScore.EMPTY,
        "packed.weight": NoScore.UNSUPPORTED_DTYPE,
        "fp8.weight": NoScore.MISSING_SCALES,
        "fp8.input_scale": NoScore.NOT_A_WEIGHT,
        "gptq.qweight": NoScore.MISSING_SCALES,
    }
    assert not plan(str(save({"a.weight": torch.ones(2, 3), **odd})), groups=["a"]).failures
    assert [s.tensor for s in a_plan.failures] == ["empty.weight", "fp8.weight", "gptq.qweight", "packed.weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_plan_accepts_every_floating_dtype(save: Save, dtype: torch.dtype) -> None:
    assert len(plan(str(save({"a.weight": torch.ones(2, 3, dtype=dtype)}))).matrices) == 1


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (["mlp.gate"], {"mlp.gate"}),
        (["mlp.*"], {"mlp.gate", "mlp.gate_proj"}),
        (["norm"], {"norm"}),
        (["*"], {"mlp.gate", "mlp.gate_proj", "norm", "input_layernorm"}),
        (["mlp.gate", "norm"], {"mlp.gate", "norm"}),
        (["mlp.gate_[pq]roj"], {"mlp.gate_proj"}),
    ],
)
def test_pick_groups_matches_names_and_globs_only(patterns: list[str], chosen: set[str]) -> None:
    assert pick_groups(["mlp.gate", "mlp.gate_proj", "norm", "input_layernorm"], patterns) == chosen


def test_plan_unknown_group_is_a_usage_error(save: Save) -> None:
    with pytest.raises(UsageError) as error:
        plan(str(save(llama_tensors(1))), groups=["mlp.up"])
    assert error.value.reason == "no_such_group"
    assert "mlp.up_proj" in (error.value.hint or "")


def test_plan_lists_groups_not_chosen(save: Save) -> None:
    a_plan = plan(str(save(llama_tensors(2))), groups=["mlp.*"])
    assert {w.group for w in a_plan.matrices} == {"mlp.up_proj", "mlp.down_proj"}
    assert reasons(a_plan)["model.layers.0.self_attn.q_proj.weight"] == NoScore.NOT_CHOSEN


@pytest.mark.parametrize("name", [" ", "x" * 201])
def test_plan_rejects_names_without_a_file_name(save: Save, name: str) -> None:
    with pytest.raises(UsageError) as error:
        plan(str(save(llama_tensors(1))), name=name)
    assert error.value.reason == "bad_name"


@pytest.mark.parametrize("tensors", [{}, {"a.bias": torch.ones(2)}, {"a.weight": torch.ones(2, 2, dtype=torch.int8)}])
def test_plan_rejects_a_checkpoint_without_matrices(save: Save, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError) as error:
        plan(str(save(tensors)))
    assert error.value.reason == "nothing_to_score"


def test_outputs_have_spectrums_names() -> None:
    outputs = Outputs(Path("model_snr_results"), "snr_results_org-name")
    assert str(outputs.results) == "model_snr_results/snr_results_org-name.json"
    assert str(outputs.sorted) == "snr_results_org-name_sorted.json"
    assert str(outputs.unfrozen(50.0)) == "snr_results_org-name_unfrozenparameters_50percent.yaml"
    assert str(outputs.unfrozen(12.5)) == "snr_results_org-name_unfrozenparameters_12.5percent.yaml"


def test_plan_slug_comes_from_the_model_as_typed(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(llama_tensors(1), folder="my_org/my_model")
    monkeypatch.chdir(folder.parents[1])
    assert plan("my_org/my_model").outputs.stem == "snr_results_my-org-my-model"
    assert plan("my_org/my_model", name="a/b").outputs.stem == "snr_results_a-b"


def test_plan_to_dict_is_json_data(save: Save) -> None:
    data = plan(str(save(llama_tensors(2)))).to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_plan_time_grows_linearly_with_the_tensors(tmp_path: Path) -> None:
    def seconds(layers: int) -> float:
        names = [f"model.layers.{i}.mlp.{name}_proj.weight" for i in range(layers) for name in ("up", "down")]
        tensors = {name: ("BF16", (8, 16)) for name in names}
        folder = str(header_only.write(tmp_path / str(layers), tensors, 4, {}))
        times = []
        for _ in range(3):
            started = time.process_time()
            plan(folder)
            times.append(time.process_time() - started)
        return min(times)

    # Eight times as many tensors; their square would be 64 times as much.
    assert seconds(4000) < 24 * seconds(500)


def test_plan_memory_follows_the_short_side(save: Save) -> None:
    square, embedding = torch.zeros(64, 64), torch.zeros(64, 5000)
    a_plan, larger = plan(str(save({"a.weight": square}))), plan(str(save({"a.weight": embedding}, folder="b")))
    assert a_plan.peak_nbytes < larger.peak_nbytes < a_plan.peak_nbytes + 64 * 2048 * 4 * a_plan.workers
    assert a_plan.flops < larger.flops


def test_plan_memory_of_a_gpu_follows_the_short_side_and_the_precision(save: Save) -> None:
    folder = str(save({"a.weight": torch.zeros(64, 64), "b.weight": torch.zeros(512, 600)}))
    auto, fp32, fp64 = plan(folder), plan(folder, precision="fp32"), plan(folder, precision="fp64")
    assert auto.device_nbytes == fp64.device_nbytes == costs.device_nbytes(512, 600, 8)
    assert fp32.device_nbytes == costs.device_nbytes(512, 600, 4) < auto.device_nbytes
    assert plan(folder, precision="svd").device_nbytes == 0
    assert auto.to_dict()["device_nbytes"] == auto.device_nbytes


LARGE = {"up": (28672, 8192), "down": (8192, 28672), "q": (8192, 8192), "lm_head": (128_256, 8192)}


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("name", LARGE)
def test_plan_memory_of_70b_shapes_on_two_cores_is_a_gigabyte_and_a_half(
    name: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "count_cores", lambda: cores)
    monkeypatch.setattr(costs, "usable_nbytes", lambda: 1 << 40)
    tensors = {f"{name}.weight": ("BF16", LARGE[name])}
    a_plan = plan(str(header_only.write(tmp_path / "m", tensors, 1, {})))
    assert a_plan.workers == cores
    assert a_plan.peak_nbytes < 1.5 * 2**30


def test_plan_memory_limit_reduces_workers_or_reports_minimum(save: Save) -> None:
    folder = str(save({f"layers.{i}.up.weight": torch.zeros(512, 600) for i in range(2)}))
    free = plan(folder)
    with pytest.raises(UsageError) as error:
        plan(folder, max_nbytes=1000)
    assert error.value.reason == "too_little_memory"
    enough = int(re.findall(r"\((\d+) bytes\)", str(error.value))[0])
    tight = plan(folder, max_nbytes=enough)
    assert tight.workers == 1
    assert tight.peak_nbytes == tight.worst_nbytes == enough
    assert free.worst_nbytes > free.peak_nbytes >= tight.peak_nbytes
    with pytest.raises(UsageError):
        plan(folder, max_nbytes=enough - 1)


def test_plan_only_is_the_plan_of_some_groups(save: Save) -> None:
    folder = str(save(llama_tensors(2)))
    # Other programs change the free space of the disk between the two plans.
    only, planned = (
        replace(p, free_nbytes=0) for p in (plan(folder).only(["mlp.*"]), plan(folder, groups=["mlp.*"]))
    )
    assert only == planned


def test_plan_to_dict_does_not_read_the_disk(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(str(save(llama_tensors(1))))
    data = made.to_dict()
    monkeypatch.setattr(shutil, "disk_usage", None)
    assert made.to_dict() == data
    assert made.room_nbytes == made.free_nbytes > 0


@pytest.mark.slow
def test_plan_of_deepseek_v3_has_the_published_counts(tmp_path: Path) -> None:
    tensors, config = header_only.deepseek_v3()
    folder = str(header_only.write(tmp_path / "m", tensors, 163, config))
    a_plan = plan(folder, names="checkpoint")
    experts = 256 * 3
    layer = 5 + 4  # attention and norms
    sparse = layer + 1 + experts + 3
    assert len(a_plan.matrices) == 3 * (layer + 3) + 59 * sparse + 3 + 3
    assert sum(w.quantization is not None for w in a_plan.matrices) == 3 * (5 + 3) + 59 * (5 + experts + 3)
    assert not a_plan.failures
    assert not a_plan.warnings
    counts = {group.name: group.count for group in a_plan.groups}
    assert counts["mlp.experts.255.up_proj"] == 58
    assert counts["mlp.gate"] == 58
    assert counts["self_attn.o_proj"] == 61
    assert counts["mtp.mlp.experts.255.up_proj"] == 1
    assert counts["mtp.eh_proj"] == 1
    fused = plan(folder, names="transformers-v5")
    assert len(fused.matrices) == 3 * (layer + 3) + 58 * sparse + 3
    fused_experts = {w.result_name for w in fused.matrices if w.result_name != w.module}
    assert len(fused_experts) == 58 * 2
    assert "model.layers.60.mlp.experts.gate_up_proj" in fused_experts


def test_plan_of_gpt_oss_120b_has_the_published_counts(tmp_path: Path) -> None:
    tensors, config = header_only.gpt_oss_120b()
    a_plan = plan(str(header_only.write(tmp_path / "m", tensors, 15, config)))
    assert len(a_plan.matrices) == 36 * (4 + 1 + 2 + 2 * 128) + 3
    assert {w.quantization.scheme for w in a_plan.matrices if w.quantization} == {"mxfp4"}
    assert {(w.n, w.m) for w in a_plan.matrices if w.quantization} == {(5760, 2880), (2880, 2880)}
    assert a_plan.names == "transformers-v5"
    assert not a_plan.failures
    assert not a_plan.warnings
    assert {group.count for group in a_plan.groups if "experts" in group.name} == {36 * 128}
