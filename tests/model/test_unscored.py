"""Tensors that Spectrum's rule leaves out: their share, and the weights of layers among them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spectrum_stream import plan, scan
from spectrum_stream.errors import CheckpointError
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.model.unscored import LIMIT

from ..support.checkpoints import Save, llama_tensors
from ..support.cli import Cli

pytestmark = pytest.mark.usefixtures("working_folder")


def big(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def openclip() -> dict[str, torch.Tensor]:
    """Make tensors with the names and proportions of an OpenCLIP model."""
    tensors = {
        "positional_embedding": big(16, 64),
        "text_projection": big(64, 64),
        "token_embedding.weight": big(128, 64),
        "visual.proj": big(64, 64),
    }
    for i in range(4):
        block = f"transformer.resblocks.{i}"
        tensors |= {
            f"{block}.attn.in_proj_weight": big(192, 64),
            f"{block}.attn.out_proj.weight": big(64, 64),
            f"{block}.mlp.c_fc.weight": big(256, 64),
            f"{block}.mlp.c_proj.weight": big(64, 256),
        }
    return tensors


def test_unscored_share_counts_all_tensors_that_the_rule_leaves_out(save: Save) -> None:
    a_plan = plan(str(save(openclip())))
    unscored = a_plan.inventory.unscored
    assert (unscored.nbytes, unscored.total_nbytes, len(unscored.tensors)) == (428_032 - 311_296, 428_032, 7)
    assert a_plan.to_dict()["unscored"] == {
        "tensors": 7,
        "nbytes": 116_736,
        "share": 116_736 / 428_032,
        "largest": [
            *(f"transformer.resblocks.{i}.attn.in_proj_weight" for i in range(4)),
            "text_projection",
        ],
    }


def test_bare_weights_of_layers_are_failures_and_positions_are_not(save: Save) -> None:
    result = scan(str(save(openclip())), name="x")
    assert {s.no_score for s in result.plan.failures} == {NoScore.BARE_WEIGHT}
    assert "positional_embedding" not in {s.tensor for s in result.plan.failures}
    assert len(result.plan.failures) == 6 and not result.complete


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("attn.in_proj_weight", (96, 64), NoScore.BARE_WEIGHT),
        ("experts.mlp.w1", (96, 64), NoScore.BARE_WEIGHT),
        ("layer.weight_v", (96, 64), NoScore.BARE_WEIGHT),
        ("lstm.weight_ih_l0", (96, 64), NoScore.BARE_WEIGHT),
        ("rel_attn.r_kernel", (64, 16, 64), NoScore.BARE_WEIGHT),
        ("moe.w1.weight", (4, 64, 64), NoScore.STACKED),
        # TransformerEngine, Flax, CSM of transformers 5.24 (models/csm/modeling_csm.py).
        ("layernorm_mlp.fc1_weight", (96, 64), NoScore.BARE_WEIGHT),
        ("q_proj.kernel", (96, 64), NoScore.BARE_WEIGHT),
        ("codebooks_head.weight", (4, 64, 96), NoScore.STACKED),
        ("fc1.parametrizations.weight.original", (96, 64), NoScore.BARE_WEIGHT),
        ("latent_projection", (96, 64), NoScore.BARE_WEIGHT),
        ("attn.pos_proj", (96, 64), NoScore.BARE_WEIGHT),
        ("mask_mlp_w1", (96, 64), NoScore.BARE_WEIGHT),
        ("experts.gate_up_proj_bias", (96, 64), NoScore.NOT_A_WEIGHT),
        ("layer.weight_g", (96, 1), NoScore.NOT_A_WEIGHT),
        ("pos_embed", (1, 96, 64), NoScore.NOT_A_WEIGHT),
        ("attn.rel_pos_h", (96, 64), NoScore.NOT_A_WEIGHT),
        ("relative_position_bias_table", (96, 64), NoScore.NOT_A_WEIGHT),
        ("attn.bias", (1, 1, 96, 96), NoScore.NOT_A_WEIGHT),
        ("mixer.A_log", (96, 64), NoScore.NOT_A_WEIGHT),
        ("codebook.embed", (96, 64), NoScore.NOT_A_WEIGHT),
        ("query_tokens", (1, 96, 64), NoScore.NOT_A_WEIGHT),
        ("rotary_emb.inv_freq", (96, 64), NoScore.NOT_A_WEIGHT),
        ("bn.running_mean", (96, 64), NoScore.NOT_A_WEIGHT),
        ("conv_pos.conv.parametrizations.weight.original1", (64, 64, 128), NoScore.NOT_A_WEIGHT),
        ("patch.weight", (64, 3, 16, 16), NoScore.NOT_A_MATRIX),
        ("wavenet.in_layers.0.weight", (96, 64, 5), NoScore.NOT_A_MATRIX),
        ("pos_conv.conv.weight", (64, 64, 128), NoScore.NOT_A_MATRIX),
    ],
)
def test_large_tensor_without_a_score_has_a_reason(
    save: Save, name: str, shape: tuple[int, ...], reason: NoScore
) -> None:
    a_plan = plan(str(save({"a.weight": big(64, 64), f"blocks.0.{name}": big(*shape)})))
    (skipped,) = a_plan.skipped
    assert skipped.no_score is reason
    assert bool(a_plan.failures) == reason.is_failure
    assert a_plan.inventory.unscored.share == skipped.nbytes / (64 * 64 * 2 + skipped.nbytes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_packed_values_under_an_unknown_name_are_a_failure(save: Save, dtype: torch.dtype) -> None:
    a_plan = plan(str(save({"a.weight": big(64, 64), "b.codes": torch.ones(64, 64).to(dtype)})))
    assert [s.tensor for s in a_plan.failures] == ["b.codes"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_indexes_and_masks_are_not_weights(save: Save, dtype: torch.dtype) -> None:
    assert not plan(str(save({"a.weight": big(64, 64), "b.ids": torch.ones(64, 64).to(dtype)}))).failures


def test_bare_weights_below_the_limit_keep_the_scan_complete(save: Save) -> None:
    tensors = {**llama_tensors(3), "projector.in_proj_weight": big(2, 16)}
    a_plan = plan(str(save(tensors)))
    assert 0 < a_plan.inventory.unscored.share <= LIMIT
    assert not a_plan.failures and not a_plan.inventory.unscored.is_notable


def test_scales_of_a_quantized_weight_are_not_left_out(save: Save) -> None:
    tensors = {
        "a.weight": torch.ones(128, 256).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.ones(1, 2),
    }
    assert plan(str(save(tensors))).inventory.unscored.tensors == ()


def test_bare_weights_of_other_groups_are_not_failures(save: Save) -> None:
    a_plan = plan(str(save(openclip())), groups=["mlp.*"])
    assert not a_plan.failures
    assert a_plan.inventory.unscored.share > 0.27


def test_checkpoint_with_one_bare_weight_names_it(save: Save) -> None:
    with pytest.raises(CheckpointError) as error:
        plan(str(save({"embeddings": big(500, 64)}, config={"model_type": "model2vec"})))
    assert error.value.reason == "nothing_to_score"
    assert "its only tensor, embeddings, is" in str(error.value)


def test_scan_and_plan_print_the_share_in_one_line(cli: Cli, save: Save) -> None:
    folder = save(openclip())
    line = "7 tensors, 27.3 % of the bytes, are left out by Spectrum's rule: "
    assert line in " ".join(cli("plan", folder).stdout.split())
    done = cli("scan", folder, "--name", "x", "--json", code=3)
    assert sum(line in text for text in done.stderr.splitlines()) == 1
    assert json.loads(done.stdout)["unscored"]["share"] == 116_736 / 428_032
    assert Path("model_snr_results/snr_results_x.json").exists()


def test_convolutions_are_said_and_not_a_failure(cli: Cli, save: Save) -> None:
    folder = save({"a.weight": big(64, 64), "patch.weight": big(64, 3, 16, 16)})
    assert "1 tensor, 92.3 % of the bytes, is left out by Spectrum's rule: patch" in cli("scan", folder).stderr


PARTS = st.sampled_from(
    ["weight", "bias", "in_proj_weight", "proj", "pos_embed", "inv_freq", "experts.up_proj", "w1", "mask", "qweight"]
)
SHAPES = st.lists(st.integers(0, 40), max_size=4).map(tuple)
TENSORS = st.dictionaries(
    st.builds(lambda i, part: f"layers.{i}.{part}", st.integers(0, 3), PARTS),
    st.tuples(SHAPES, st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int32])),
    max_size=8,
)


@given(TENSORS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_tensor_is_scored_or_has_a_reason(save: Save, tensors: dict[str, Any]) -> None:
    stored = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    folder = save(stored | {"a.weight": torch.ones(2, 2)})
    a_plan = plan(str(folder))
    scored, skipped = {w.tensor for w in a_plan.matrices}, {s.tensor: s for s in a_plan.skipped if s.dtype}
    assert scored | skipped.keys() == {*stored, "a.weight"} and scored.isdisjoint(skipped)
    assert all(s.nbytes == stored[name].numel() * stored[name].element_size() for name, s in skipped.items())
    # More than the limit of bare weights is never complete.
    bare = [s for s in a_plan.inventory.unscored.tensors if s.no_score is NoScore.BARE_WEIGHT]
    assert not bare or a_plan.failures
    empty = {name: s for name, s in skipped.items() if 0 in s.shape and name.endswith(".weight")}
    assert {s.no_score for s in empty.values()} <= {NoScore.EMPTY}


def ungathered(empty: list[str]) -> dict[str, torch.Tensor]:
    """Make a small Llama in which some tensors are empty, as ZeRO-3 saves them."""
    tensors = llama_tensors(4)
    return {name: w if not any(part in name for part in empty) else w.new_zeros(0) for name, w in tensors.items()}


def test_empty_weights_are_failures_with_a_cause(cli: Cli, save: Save) -> None:
    folder = save(ungathered(["layers.3."]))
    result = scan(str(folder), name="x")
    assert {s.no_score for s in result.plan.failures} == {NoScore.EMPTY}
    assert len(result.plan.failures) == 5 and not result.complete
    done = cli("scan", folder, "--name", "x", code=3)
    (warning,) = [line for line in done.stderr.splitlines() if "not scored" in line]
    assert warning.startswith("warning: 5 weights were not scored, because each is empty")
    assert "zero_to_fp32.py" in warning


def test_checkpoint_with_only_empty_weights_is_rejected_with_the_cause(save: Save) -> None:
    with pytest.raises(CheckpointError) as error:
        plan(str(save(ungathered([""]))))
    assert error.value.reason == "nothing_to_score"
    assert "sharded run" in str(error.value) and "zero_to_fp32.py" in (error.value.hint or "")


@pytest.mark.parametrize("name", ["a.qweight", "a.weight_packed", "layers.0.mlp.experts.up_proj", "conv.weight"])
def test_empty_tensor_that_stores_a_weight_is_a_failure(save: Save, name: str) -> None:
    a_plan = plan(str(save({"b.weight": big(3, 4), name: torch.zeros(0)})))
    assert [s.no_score for s in a_plan.failures] == [NoScore.EMPTY]


@pytest.mark.parametrize("name", ["a.bias", "buffer", "a.g_idx", "layers.0.mlp.experts.up_proj_bias"])
def test_empty_tensor_that_is_not_a_weight_is_not_a_failure(save: Save, name: str) -> None:
    assert not plan(str(save({"b.weight": big(3, 4), name: torch.zeros(0)}))).failures


def test_flat_pieces_beside_empty_weights_are_failures(save: Save) -> None:
    tensors = ungathered(["layers.3."])
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name].flatten()[:1000]
    failures = {s.tensor: s.no_score for s in plan(str(save(tensors))).failures}
    assert failures[name] is NoScore.FLATTENED
    assert "model.layers.2.input_layernorm.weight" not in failures
