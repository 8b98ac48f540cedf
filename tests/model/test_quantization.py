"""Quantized checkpoints have the scores of the weights that the libraries of each format dequantize."""

from pathlib import Path
from typing import Any

import pytest
import torch

from spectrum_stream import plan, scan, select
from spectrum_stream.errors import SpectrumStreamError
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics import costs
from spectrum_stream.results.result import Result
from spectrum_stream.streaming import parts
from spectrum_stream.trainers import TRAINERS

from ..support.checkpoints import Save, mxfp4, reference_score
from ..support.hub_server import REPO, HubServer, use, values

pytestmark = pytest.mark.usefixtures("working_folder")

FP8 = torch.float8_e4m3fn
CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 16]}}


def by_block(n: int, m: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make a weight in float8, its scales for blocks of 32 x 16 with cut edges, and the dequantized weight."""
    generator = torch.Generator().manual_seed(seed)
    stored = (torch.randn(n, m, generator=generator) * 40).to(FP8)
    scales = torch.rand(-(-n // 32), -(-m // 16), generator=generator) * 0.01 + 0.001
    grid = scales.repeat_interleave(32, 0)[:n].repeat_interleave(16, 1)[:, :m]
    return stored, scales, stored.float() * grid


@pytest.mark.parametrize("shape", [(64, 48), (70, 41), (41, 70), (200, 30)])
@pytest.mark.parametrize("shards", [1, 2])
def test_float8_by_block_has_cut_edges_and_scales_in_another_shard(
    save: Save, shape: tuple[int, int], shards: int
) -> None:
    stored, scales, weight = by_block(*shape)
    # In two shards the scales are in the second, the weight in the first.
    folder = save(
        {"layers.0.up.weight": stored, "layers.0.norm.weight": torch.ones(4), "layers.0.up.weight_scale_inv": scales,
         "layers.0.down.weight": torch.randn(8, 9)},
        shards=shards,
        config=CONFIG,
    )  # fmt: skip
    result = scan(str(folder), name="x")
    (record,) = [r for r in result.records if r.module == "layers.0.up"]
    assert record.quantized == "float8 by block" and record.score is not None and result.complete
    assert record.score.snr == pytest.approx(reference_score(weight), rel=1e-5)


def test_float8_by_block_agrees_with_transformers(save: Save) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(256, 384, generator=generator) * 40).to(FP8)
    scales = torch.rand(2, 3, generator=generator) * 0.01
    theirs = fp8.Fp8Dequantize._dequantize_one(None, stored, scales, torch.float32)
    result = scan(str(save({"a.weight": stored, "a.weight_scale_inv": scales})), name="x")
    assert result.records[0].score is not None
    assert result.records[0].score.snr == pytest.approx(reference_score(theirs), rel=1e-5)


@pytest.mark.parametrize(("strategy", "scheme"), [("tensor", "float8 by tensor"), ("channel", "float8 by row")])
def test_float8_by_tensor_and_row_agrees_with_compressed_tensors(save: Save, strategy: str, scheme: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    weight = torch.randn(60, 90, generator=torch.Generator().manual_seed(0)) * 0.02
    arguments = quantization.QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True)
    largest = weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().amax().reshape(1)
    # This is computed in float32, because theirs is rounded to the dtype of the scales.
    scale = largest / 448
    stored = lifecycle.quantize(weight, scale, None, arguments, dtype=FP8)
    theirs = lifecycle.dequantize(stored, scale, args=arguments, dtype=torch.float32)
    result = scan(str(save({"a.weight": stored, "a.weight_scale": scale})), name="x")
    record = result.records[0]
    assert record.quantized == scheme and record.score is not None
    assert record.score.snr == pytest.approx(reference_score(theirs), rel=1e-5)


@pytest.mark.parametrize(
    ("scales", "why"),
    [
        (None, NoScore.MISSING_SCALES),
        (torch.ones(3, 3), NoScore.BAD_SCALES),
        (torch.ones(48), NoScore.BAD_SCALES),
        (torch.ones(1, 48), NoScore.BAD_SCALES),
        (torch.ones(2, 3, dtype=torch.int32), NoScore.BAD_SCALES),
    ],
)
def test_float8_with_missing_or_wrong_scales_is_reported(save: Save, scales: Any, why: NoScore) -> None:
    stored, _, _ = by_block(64, 48)
    tensors = {"layers.0.up.weight": stored, "layers.0.down.weight": torch.randn(6, 7)}
    if scales is not None:
        tensors["layers.0.up.weight_scale_inv"] = scales
    result = scan(str(save(tensors, config=CONFIG)), name="x")
    assert [(s.tensor, s.no_score) for s in result.plan.failures] == [("layers.0.up.weight", why)]
    assert bool(result.plan.failures[0].detail) == (why is NoScore.BAD_SCALES)
    assert [r.module for r in result.records] == ["layers.0.down"] and not result.complete


@pytest.mark.parametrize("fetch", ["range", "download"])
def test_float8_of_a_repo_has_the_scores_of_a_local_scan(
    save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fetch: str
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for i in range(6):
        stored, scales, _ = by_block(64, 40, seed=i)
        tensors |= {f"layers.{i}.up.weight": stored, f"layers.{i}.up.weight_scale_inv": scales}
    folder = save(tensors, shards=4, config=CONFIG)
    with HubServer({REPO: folder}) as server:
        use(server.url, monkeypatch, tmp_path)
        assert values(scan(REPO, fetch=fetch)) == values(scan(str(folder), name="local"))


def test_float8_with_a_nan_in_its_scales_has_no_score(save: Save) -> None:
    stored, scales, _ = by_block(64, 48)
    scales[0, 0] = torch.nan
    tensors = {"a.weight": stored, "a.weight_scale_inv": scales, "b.weight": torch.ones(2, 3)}
    result = scan(str(save(tensors, config=CONFIG)), name="x")
    assert [r.module for r in result.failed] == ["a"]


def test_plan_of_the_shape_of_deepseek_is_complete(save: Save) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for i in range(2):
        for e in range(8):
            for name, shape in (("gate_proj", (64, 96)), ("up_proj", (64, 96)), ("down_proj", (96, 64))):
                module = f"model.layers.{i}.mlp.experts.{e}.{name}"
                tensors |= {f"{module}.weight": torch.ones(shape).to(FP8)}
                tensors |= {f"{module}.weight_scale_inv": torch.ones(-(-shape[0] // 32), -(-shape[1] // 16))}
        tensors[f"model.layers.{i}.mlp.gate.weight"] = torch.ones(8, 96, dtype=torch.bfloat16)
    a_plan = plan(str(save(tensors, shards=3, config=CONFIG)))
    assert len(a_plan.matrices) == 2 * (8 * 3 + 1) and not a_plan.failures
    assert sum(w.quantization is not None for w in a_plan.matrices) == 2 * 8 * 3


def gpt_oss(layers: int = 2) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for i in range(layers):
        experts = f"model.layers.{i}.mlp.experts."
        for name, n, m in (("gate_up_proj", 48, 64), ("down_proj", 64, 32)):
            tensors[f"{experts}{name}_blocks"], tensors[f"{experts}{name}_scales"] = mxfp4(3, n, m)
            tensors[f"{experts}{name}_bias"] = torch.zeros(3, n, dtype=torch.bfloat16)
        tensors[f"model.layers.{i}.mlp.router.weight"] = torch.randn(3, 64).bfloat16()
    return tensors


def test_mxfp4_of_gpt_oss_agrees_with_transformers(save: Save) -> None:
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = gpt_oss()
    result = scan(str(save(tensors, shards=3)), name="x")
    assert result.complete and {module.name for module in result.modules} == {
        *(f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")),
        *(f"model.layers.{i}.mlp.router" for i in range(2)),
    }
    for record in result.records:
        if record.result_name != record.module and record.score is not None:
            blocks, scales = tensors[f"{record.result_name}_blocks"], tensors[f"{record.result_name}_scales"]
            whole = theirs.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            expert = int(record.module.rsplit(".", 1)[1])
            assert record.quantized == "mxfp4"
            assert record.score.snr == pytest.approx(reference_score(whole[expert]), rel=1e-5)


@pytest.mark.parametrize("fetch", ["range", "download"])
def test_mxfp4_of_a_repo_has_the_scores_of_a_local_scan(
    save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fetch: str
) -> None:
    folder = save(gpt_oss(), shards=3)
    with HubServer({REPO: folder}) as server:
        use(server.url, monkeypatch, tmp_path)
        assert values(scan(REPO, fetch=fetch)) == values(scan(str(folder), name="local"))


@pytest.mark.parametrize("scales", [None, torch.zeros(3, 48, 3, dtype=torch.uint8), torch.zeros(3, 48, 2)])
def test_mxfp4_with_missing_or_wrong_scales_is_reported(save: Save, scales: Any) -> None:
    tensors = gpt_oss(1)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    del tensors[f"{name}_scales"]
    if scales is not None:
        tensors[f"{name}_scales"] = scales
    result = scan(str(save(tensors)), name="x")
    why = NoScore.MISSING_SCALES if scales is None else NoScore.BAD_SCALES
    assert [(s.tensor, s.no_score) for s in result.plan.failures] == [(f"{name}_blocks", why)]
    assert "model.layers.0.mlp.experts.down_proj" in {module.name for module in result.modules}


def test_fused_experts_that_cannot_be_read_are_reported(save: Save) -> None:
    tensors = {
        "model.layers.0.mlp.experts.up_proj": torch.ones(2, 8, 8).to(FP8),
        "model.layers.0.mlp.experts.gate_proj": torch.ones(2, 8, 8).to(FP8),
        "model.layers.0.mlp.experts.gate_proj_scale_inv": torch.ones(2, 2, 1),
        "model.layers.0.mlp.experts.down_proj_blocks": torch.ones(2, 8, 8, dtype=torch.uint8),
        "a.weight": torch.randn(3, 4),
    }
    a_plan = plan(str(save(tensors)))
    assert {s.tensor: s.no_score for s in a_plan.failures} == {
        "model.layers.0.mlp.experts.up_proj": NoScore.MISSING_SCALES,
        "model.layers.0.mlp.experts.gate_proj": NoScore.BAD_SCALES,
        "model.layers.0.mlp.experts.down_proj_blocks": NoScore.UNSUPPORTED_DTYPE,
    }
    assert [w.module for w in a_plan.matrices] == ["a"]


def test_unreadable_fused_experts_fail_only_a_plan_of_their_group(save: Save) -> None:
    tensors = gpt_oss(1)
    del tensors["model.layers.0.mlp.experts.gate_up_proj_scales"]
    folder = str(save(tensors))
    assert plan(folder, groups=["mlp.experts.down_proj"]).failures == ()
    with pytest.raises(SpectrumStreamError):
        plan(folder, groups=["mlp.experts.gate_up_proj"])


def test_record_of_another_block_size_is_not_reused(save: Save) -> None:
    stored, scales, _ = by_block(64, 48)
    tensors = {"a.weight": stored, "a.weight_scale_inv": scales, "b.weight": torch.randn(3, 4)}
    folder = save(tensors, config=CONFIG)
    first = scan(str(folder), name="x")
    save(tensors, config={"quantization_config": {"weight_block_size": [33, 17]}})
    second = scan(str(folder), name="x")
    assert first.modules[0].value != second.modules[0].value


def test_scales_that_are_read_in_small_batches_give_equal_scores(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(save(gpt_oss()))
    whole = scan(folder, name="x")
    monkeypatch.setattr(parts, "_BATCH_NBYTES", 1)
    assert values(scan(folder, name="y")) == values(whole)


def one_score(save: Save, tensors: dict[str, torch.Tensor], config: dict[str, Any], scheme: str) -> float:
    """Scan a checkpoint and return the score of its only quantized weight."""
    tensors = tensors | {"layers.0.norm.weight": torch.ones(8)}
    # With two shards, the weight and its parts are in different ones.
    result = scan(str(save(tensors, shards=2, config={"quantization_config": config})), name="x")
    assert result.complete
    (record,) = [r for r in result.records if r.module == "layers.0.up"]
    assert record.quantized == scheme and record.score is not None and record.parameter == "layers.0.up.weight"
    return record.score.snr


def compressed(
    weight: torch.Tensor, config: dict[str, Any], **parts: torch.Tensor
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Compress a weight with compressed-tensors; return the state, and the dequantized weight."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**config))
    kind = {"int": "pack-quantized", "float": "nvfp4-pack-quantized" if config.get("group_size") == 16 else ""}
    compressor = compressors.BaseCompressor.get_value_from_registry(kind[config["type"]] or "mxfp4-pack-quantized")
    state = compressor.compress({"weight": weight, **parts}, scheme)
    theirs = compressor.decompress(dict(state), scheme)["weight"]
    return theirs, {f"layers.0.up.{name}": part for name, part in state.items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_packed_integers_agree_with_compressed_tensors(save: Save, bits: int, symmetric: bool, strategy: str) -> None:
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(0)) * 0.02
    groups = 3 if strategy == "group" else 1
    blocks = weight.reshape(70, groups, -1)
    low, high = blocks.amin(2), blocks.amax(2)
    scale = (high - low) / ((1 << bits) - 1) if not symmetric else blocks.abs().amax(2) / ((1 << (bits - 1)) - 0.5)
    zero = (-low / scale - (1 << (bits - 1))).round().clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1).to(torch.int8)
    config = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    config |= {"group_size": 32} if strategy == "group" else {}
    parts = {"weight_scale": scale} | ({} if symmetric else {"weight_zero_point": zero})
    theirs, tensors = compressed(weight, config, **parts)
    hub = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": config}}}
    assert one_score(save, tensors, hub, f"int{bits}") == pytest.approx(reference_score(theirs.float()), rel=1e-5)


def test_nvfp4_agrees_with_compressed_tensors(save: Save) -> None:
    weight = torch.randn(60, 96, generator=torch.Generator().manual_seed(0)) * 0.02
    whole = torch.tensor([448 * 6 / float(weight.abs().max())])
    scale = (weight.reshape(60, 6, 16).abs().amax(2) / 6 * whole).to(FP8).float()
    config = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    _, tensors = compressed(weight, config, weight_scale=scale, weight_global_scale=whole)
    assert tensors["layers.0.up.weight_scale"].dtype == FP8
    # These are their steps in float32. Their function would round the weight to bfloat16.
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    arguments = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(**config)
    numbers = helpers.unpack_fp4_from_uint8(tensors["layers.0.up.weight_packed"], 60, 96, dtype=torch.float32)
    theirs = lifecycle.dequantize(numbers, scale, args=arguments, global_scale=whole, dtype=torch.float32)
    snr = one_score(save, tensors, {"quant_method": "compressed-tensors"}, "nvfp4")
    assert snr == pytest.approx(reference_score(theirs.float()), rel=1e-5)


def test_nvfp4_of_modelopt_equals_that_of_compressed_tensors(save: Save) -> None:
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4")
    generator = torch.Generator().manual_seed(0)
    modelopt = {
        "layers.0.up.weight": torch.randint(0, 256, (60, 48), dtype=torch.uint8, generator=generator),
        "layers.0.up.weight_scale": (torch.rand(60, 6, generator=generator) * 400 + 1).to(FP8),
        "layers.0.up.weight_scale_2": torch.tensor(0.0003),
        "layers.0.up.input_scale": torch.tensor(0.1),
    }
    theirs = converters.ModelOptNvfp4Converter(targets=["re:.*"]).process(dict(modelopt))
    assert "layers.0.up.weight_packed" in theirs
    snr = one_score(save, modelopt, {"quant_method": "modelopt"}, "nvfp4")
    again = one_score(save, dict(theirs), {"quant_method": "compressed-tensors"}, "nvfp4")
    assert snr == pytest.approx(again, rel=1e-5)


def test_mxfp4_agrees_with_compressed_tensors(save: Save) -> None:
    weight = torch.randn(60, 96, generator=torch.Generator().manual_seed(0)) * 0.02
    scale = torch.exp2(torch.floor(torch.log2(weight.reshape(60, 3, 32).abs().amax(2))) - 2)
    config = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    theirs, tensors = compressed(weight, config, weight_scale=scale)
    snr = one_score(save, tensors, {"quant_method": "compressed-tensors"}, "mxfp4")
    assert snr == pytest.approx(reference_score(theirs.float()), rel=1e-5)


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_int8_agrees_with_compressed_tensors(save: Save, strategy: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    weight = torch.randn(60, 96, generator=torch.Generator().manual_seed(0)) * 0.02
    arguments = {"num_bits": 8, "type": "int", "strategy": strategy, "symmetric": True}
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**arguments))
    compressor = compressors.BaseCompressor.get_value_from_registry("int-quantized")
    largest = weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().amax().reshape(1)
    state = compressor.compress({"weight": weight, "weight_scale": largest / 127.5}, scheme)
    theirs = compressor.decompress(dict(state), scheme)["weight"]
    assert state["weight"].dtype == torch.int8
    tensors = {f"layers.0.up.{name}": tensor for name, tensor in state.items()}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": arguments}}}
    snr = one_score(save, tensors, config, f"int8 by {'row' if strategy == 'channel' else 'tensor'}")
    assert snr == pytest.approx(reference_score(theirs.float()), rel=1e-5)


def gptq(
    bits: int, order: torch.Tensor | None, first_format: bool, out: int = 64, inner: int = 96, size: int = 32
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Pack a weight like AutoGPTQ (`QuantLinear.pack`): the integers of a column, the lowest bits first."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (inner, out), generator=generator)
    zeros = torch.randint(1, 1 << bits, (inner // size, out), generator=generator)
    scales = (torch.rand(inner // size, out, generator=generator) * 0.01 + 0.001).half()
    groups = torch.arange(inner) // size if order is None else order
    weight = (codes - zeros[groups]) * scales.float()[groups]
    per_word = 32 // bits

    def words(numbers: torch.Tensor) -> torch.Tensor:
        # Along the first dimension.
        lines = numbers.reshape(-1, per_word, numbers.shape[1]).long()
        total = (lines << (torch.arange(per_word) * bits)[None, :, None]).sum(1)
        return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)

    tensors = {
        "layers.0.up.qweight": words(codes),
        "layers.0.up.qzeros": words((zeros - int(first_format)).T.contiguous()).T.contiguous(),
        "layers.0.up.scales": scales,
    }
    if order is not None:
        tensors["layers.0.up.g_idx"] = order.to(torch.int32)
    return tensors, weight


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2", None])
def test_gptq_has_the_scores_of_the_weights_that_were_packed(
    save: Save, bits: int, ordered: bool, checkpoint_format: str | None
) -> None:
    order = None if ordered else torch.randperm(96, generator=torch.Generator().manual_seed(0)) // 32
    tensors, weight = gptq(bits, order, checkpoint_format != "gptq_v2")
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32}
    config |= {"checkpoint_format": checkpoint_format} if checkpoint_format else {}
    assert one_score(save, tensors, config, f"gptq, {bits} bits") == pytest.approx(reference_score(weight), rel=1e-5)


def test_gptq_with_one_group_for_all_columns_is_scored(save: Save) -> None:
    tensors, weight = gptq(4, None, True, size=96)
    config = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    assert one_score(save, tensors, config, "gptq, 4 bits") == pytest.approx(reference_score(weight), rel=1e-5)


def awq() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Make words of AWQ, and the weight that compressed-tensors dequantizes from them."""
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "layers.0.up.qweight": torch.randint(-(2**31), 2**31 - 1, (96, 8), dtype=torch.int32, generator=generator),
        "layers.0.up.qzeros": torch.randint(-(2**31), 2**31 - 1, (3, 8), dtype=torch.int32, generator=generator),
        "layers.0.up.scales": (torch.rand(3, 64, generator=generator) * 0.01 + 0.001).half(),
    }
    theirs = converters.AutoAWQConverter(group_size=32).process(dict(tensors))
    theirs = {name.removeprefix("layers.0.up."): tensor for name, tensor in theirs.items()}
    numbers = helpers.unpack_from_int32(theirs["weight_packed"], 4, torch.Size((64, 96)))
    zeros = helpers.unpack_from_int32(theirs["weight_zero_point"], 4, torch.Size((64, 3)), packed_dim=0)
    scales = theirs["weight_scale"].float()
    weight = (numbers.float().reshape(64, 3, 32) - zeros.float()[..., None]) * scales[..., None]
    return tensors, weight.reshape(64, 96)


def test_awq_agrees_with_compressed_tensors(save: Save) -> None:
    tensors, weight = awq()
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    assert one_score(save, tensors, config, "awq") == pytest.approx(reference_score(weight), rel=1e-5)


@pytest.mark.parametrize("by", ["block", "row", "expert", "exponents"])
def test_float8_fused_experts_are_scored_one_by_one(save: Save, by: str) -> None:
    stored, _, _ = by_block(3 * 64, 48)
    stored = stored.reshape(3, 64, 48)
    generator = torch.Generator().manual_seed(0)
    shape = {"block": (3, 2, 3), "row": (3, 64, 1), "expert": (3, 1, 1), "exponents": (3, 2, 3)}[by]
    scales = torch.rand(shape, generator=generator) * 0.01 + 0.001
    grid = scales
    if by == "exponents":
        kept = torch.randint(110, 130, shape, dtype=torch.uint8, generator=generator)
        scales, grid = kept, torch.exp2(kept.float() - 127)
    height, width = -(-64 // shape[1]), -(-48 // shape[2])
    whole = stored.float() * grid.repeat_interleave(height, 1).repeat_interleave(width, 2)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    result = scan(str(save({name: stored, f"{name}_scale_inv": scales}, config=CONFIG)), name="x")
    assert result.complete and [module.name for module in result.modules] == [name]
    for record, weight in zip(result.records, whole, strict=True):
        assert record.score is not None and record.score.snr == pytest.approx(reference_score(weight), rel=1e-5)


NIBBLES = torch.zeros(60, 48, dtype=torch.uint8)
WORDS = torch.zeros(12, 64, dtype=torch.int32)


@pytest.mark.parametrize(
    ("tensors", "config", "why"),
    [
        ({"a.weight_packed": NIBBLES}, {}, NoScore.MISSING_SCALES),
        ({"a.weight_packed": NIBBLES, "a.weight_scale": torch.ones(60, 6).to(FP8)}, {}, NoScore.MISSING_SCALES),
        ({"a.weight_packed": NIBBLES, "a.weight_scale": torch.ones(60, 5).to(FP8)}, {}, NoScore.BAD_SCALES),
        ({"a.weight_packed": NIBBLES, "a.weight_scale": torch.ones(60, 3)}, {}, NoScore.BAD_SCALES),
        ({"a.weight_packed": WORDS, "a.weight_scale": torch.ones(12, 1)}, {}, NoScore.UNSUPPORTED_DTYPE),
        ({"a.weight_packed": WORDS}, {"bits": 4}, NoScore.MISSING_SCALES),
        ({"a.weight_packed": WORDS, "a.weight_scale": torch.ones(11, 1)}, {"bits": 4}, NoScore.BAD_SCALES),
        ({"a.qweight": WORDS}, {"bits": 4}, NoScore.MISSING_SCALES),
        ({"a.qweight": WORDS, "a.scales": torch.ones(3, 64).half()}, {"bits": 4}, NoScore.MISSING_SCALES),
        ({**gptq(4, None, True)[0], "layers.0.up.scales": torch.ones(4, 64).half()}, {"bits": 4, "group_size": 32},
         NoScore.BAD_SCALES),
        ({**gptq(4, None, True)[0], "layers.0.up.qzeros": torch.ones(3, 9).int()}, {"bits": 4, "group_size": 32},
         NoScore.BAD_SCALES),
        (gptq(4, None, True)[0], {"bits": 3, "group_size": 32}, NoScore.BAD_SCALES),
        (gptq(4, None, True)[0], {"group_size": 32}, NoScore.UNSUPPORTED_DTYPE),
        ({"a.weight": NIBBLES, "a.weight.absmax": torch.ones(9)}, {"quant_method": "bitsandbytes"},
         NoScore.UNSUPPORTED_DTYPE),
        ({"a.weight": NIBBLES.to(torch.int8), "a.SCB": torch.ones(60)}, {}, NoScore.UNSUPPORTED_DTYPE),
        ({"a.weight": NIBBLES}, {"quant_method": "hqq"}, NoScore.UNSUPPORTED_DTYPE),
        ({"a.experts.up_proj": NIBBLES.reshape(2, 30, 48)}, {"quant_method": "hqq"}, NoScore.UNSUPPORTED_DTYPE),
    ],
)  # fmt: skip
def test_unreadable_weight_is_reported_and_the_others_are_scored(
    save: Save, tensors: dict[str, torch.Tensor], config: dict[str, Any], why: NoScore
) -> None:
    other = {"layers.0.norm.weight": torch.ones(8)}
    result = scan(str(save(tensors | other, config={"quantization_config": config})), name="x")
    assert [s.no_score for s in result.plan.failures] == [why] and not result.complete
    assert [r.module for r in result.records] == ["layers.0.norm"]


def test_packed_values_are_never_scored_as_weights(save: Save) -> None:
    a_plan = plan(str(save(gptq(4, None, True)[0] | {"layers.0.norm.weight": torch.ones(8)})))
    assert [w.module for w in a_plan.matrices] == ["layers.0.norm"]


@pytest.mark.parametrize(
    "change",
    [{"layers.0.up.weight_shape": torch.tensor([70, 95])}, {"layers.0.up.weight_g_idx": torch.full((96,), 3)}],
)
def test_scales_that_contradict_the_weight_are_reported(
    save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, torch.Tensor]
) -> None:
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(0))
    config = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "group_size": 32}
    _, tensors = compressed(weight, config, weight_scale=weight.reshape(70, 3, 32).abs().amax(2) / 8)
    hub = {"config_groups": {"group_0": {"weights": config}}}
    other = {"layers.0.down.weight": torch.randn(8, 9)}
    folder = save(tensors | change | other, config={"quantization_config": hub})
    # This scans a repo, since the width of a local weight is known from the start.
    with HubServer({REPO: folder}) as server:
        use(server.url, monkeypatch, tmp_path)
        result = scan(REPO, fetch="range")
    assert [(r.module, r.no_score) for r in result.failed] == [("layers.0.up", NoScore.BAD_SCALES)]
    assert [module.name for module in result.modules] == ["layers.0.down"] and not result.complete


@pytest.mark.parametrize("fetch", ["range", "download"])
def test_packed_weights_of_a_repo_have_the_scores_of_a_local_scan(
    save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fetch: str
) -> None:
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}
    folder = save(awq()[0] | {"layers.0.down.weight": torch.randn(8, 9)}, shards=3, config=config)
    with HubServer({REPO: folder}) as server:
        use(server.url, monkeypatch, tmp_path)
        assert values(scan(REPO, fetch=fetch)) == values(scan(str(folder), name="local"))


@pytest.mark.parametrize("width", [93, 96, 100])
def test_packed_integers_may_leave_the_last_word_partly_empty(save: Save, width: int) -> None:
    weight = torch.randn(70, width, generator=torch.Generator().manual_seed(0))
    config = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
    theirs, tensors = compressed(weight, config, weight_scale=weight.abs().amax(1, keepdim=True) / 7.5)
    hub = {"config_groups": {"group_0": {"weights": config}}}
    assert one_score(save, tensors, hub, "int4") == pytest.approx(reference_score(theirs.float()), rel=1e-5)


@pytest.mark.parametrize("nested", [False, True])
def test_block_size_is_read_from_any_part_of_the_config(save: Save, nested: bool) -> None:
    stored = (torch.randn(192, 192, generator=torch.Generator().manual_seed(0)) * 40).to(FP8)
    scales = torch.rand(2, 2, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.001
    whole = stored.float() * scales.repeat_interleave(96, 0).repeat_interleave(96, 1)
    groups = {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [96, 96]}}}
    of_text = {"text_config": {"quantization_config": {"weight_block_size": [96, 96]}}}
    config = of_text if nested else {"quantization_config": {"config_groups": groups}}
    folder = save({"a.weight": stored, "a.weight_scale_inv": scales}, config=config)
    result = scan(str(folder), name="x")
    assert result.records[0].score is not None
    assert result.records[0].score.snr == pytest.approx(reference_score(whole), rel=1e-5)


@pytest.mark.parametrize("size", [10**12, 10**30])
def test_huge_block_size_takes_no_memory(save: Save, size: int) -> None:
    stored, _, _ = by_block(64, 48)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, size]}}
    scales = torch.rand(2, 1) + 1
    result = scan(str(save({"a.weight": stored, "a.weight_scale_inv": scales}, config=config)), name="x")
    assert result.records[0].score is not None
    whole = stored.float() * scales.repeat_interleave(32, 0)
    assert result.records[0].score.snr == pytest.approx(reference_score(whole), rel=1e-4)


def test_huge_group_size_is_the_whole_row(save: Save) -> None:
    tensors, weight = gptq(4, None, True, size=96)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 10**30}
    assert one_score(save, tensors, config, "gptq, 4 bits") == pytest.approx(reference_score(weight), rel=1e-5)


def test_awq_without_zero_points_is_symmetric(save: Save) -> None:
    tensors, _ = awq()
    zeros = tensors.pop("layers.0.up.qzeros")
    eights = tensors | {"layers.0.up.qzeros": torch.full_like(zeros, -2004318072)}  # 0x88888888
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False}
    assert one_score(save, tensors, config, "awq") == pytest.approx(one_score(save, eights, config, "awq"), rel=1e-6)


@pytest.mark.parametrize(
    "name", ["layers.0.up.B", "layers.0.up.weight:qdata", "layers.0.up.W_q", "layers.0.up.weight._data"]
)
def test_unsupported_format_is_rejected_by_any_name_of_its_values(save: Save, name: str) -> None:
    tensors = {name: torch.ones(8, 16, dtype=torch.uint8), "layers.0.norm.weight": torch.ones(8)}
    config = {"quantization_config": {"quant_method": "marlin"}}
    result = scan(str(save(tensors, config=config)), name="x")
    assert [(s.tensor, s.no_score, s.detail) for s in result.plan.failures] == [
        (name, NoScore.UNSUPPORTED_DTYPE, "marlin")
    ]


def test_weight_in_two_tensors_has_no_score(save: Save) -> None:
    tensors = awq()[0] | {"layers.0.up.weight": torch.randn(64, 96), "layers.0.norm.weight": torch.ones(8)}
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}
    result = scan(str(save(tensors, config=config)), name="x")
    assert {s.tensor for s in result.plan.failures} == {"layers.0.up.weight", "layers.0.up.qweight"}
    assert {s.no_score for s in result.plan.failures} == {NoScore.STORED_TWICE}
    assert [module.name for module in result.modules] == ["layers.0.norm"]


def test_buffer_of_integers_is_not_a_failure(save: Save) -> None:
    config = {"quantization_config": {"quant_method": "awq"}}
    tensors = {
        "a.weight": torch.ones(3, 4),
        "position_ids": torch.arange(6).reshape(1, 6),
        "max_blocks": torch.arange(3),
    }
    assert not plan(str(save(tensors, config=config))).failures


def test_prefetched_scales_stay_within_their_limit(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for i in range(40):
        stored, scales, _ = by_block(64, 40, seed=i)
        tensors |= {f"layers.{i}.up.weight": stored, f"layers.{i}.up.weight_scale_inv": scales}
    folder = str(save(tensors, config=CONFIG))
    whole = scan(folder, name="x")
    # The limit has room for one matrix at a time. The scan must not deadlock.
    monkeypatch.setattr(costs, "PARTS_AHEAD_NBYTES", 1)
    assert values(scan(folder, name="y")) == values(whole)


def test_scales_are_not_parameters_of_an_export(save: Save) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for i in range(2):
        stored, scales, _ = by_block(64, 40, seed=i)
        tensors |= {f"layers.{i}.up.weight": stored, f"layers.{i}.up.weight_scale_inv": scales}
    path = scan(str(save(tensors, config=CONFIG)), name="x").written[0]
    assert Result.open(path).parameters == ("layers.0.up.weight", "layers.1.up.weight")
    assert TRAINERS["ms-swift"].render(select(path, 50)).count("layers.") == 1


def test_mask_of_bytes_in_a_quantized_model_is_not_a_failure(save: Save) -> None:
    tensors = awq()[0] | {"layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM"}}
    result = scan(str(save(tensors, config=config)), name="x")
    assert result.complete and [r.quantized for r in result.records] == ["awq"]


def test_failure_of_another_group_is_not_a_failure_of_the_plan(save: Save) -> None:
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": torch.randn(6, 9),
        "model.layers.0.mlp.down_proj.weight": torch.ones(20, 1, dtype=torch.uint8),
    }
    folder = str(
        save(tensors, config={"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    for names in ("checkpoint", "transformers-v5"):
        assert not plan(folder, groups=["self_attn.*"], names=names).failures
        assert len(plan(folder, names=names).failures) == 1
