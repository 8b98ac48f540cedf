"""Float8 checkpoints: scored as what the libraries that own the formats make of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spectrum_stream import feed, plan, scan
from spectrum_stream.decode import Mxfp4, Scaled
from spectrum_stream.errors import SpectrumStreamError
from spectrum_stream.matrices import Skip

from .conftest import Save, reference_score
from .hub_server import HubServer
from .test_remote import REPO, use, values

pytestmark = pytest.mark.usefixtures("working_folder")

FP8 = torch.float8_e4m3fn
CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 16]}}


def by_block(n: int, m: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight in float8, its scales for blocks of 32 x 16, and the weight that they make; the edges are cut."""
    generator = torch.Generator().manual_seed(seed)
    stored = (torch.randn(n, m, generator=generator) * 40).to(FP8)
    scales = torch.rand(-(-n // 32), -(-m // 16), generator=generator) * 0.01 + 0.001
    grid = scales.repeat_interleave(32, 0)[:n].repeat_interleave(16, 1)[:, :m]
    return stored, scales, stored.float() * grid


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 45), st.integers(1, 45), st.booleans(), st.data())
def test_any_part_of_it_is_that_part_of_the_product(
    n: int, m: int, height: int, width: int, turned: bool, data: st.DataObject
) -> None:
    stored = torch.arange(n * m, dtype=torch.float32).reshape(n, m)
    scales = torch.arange(1, 1 + -(-n // height) * -(-m // width), dtype=torch.float32).reshape(-(-n // height), -1)
    whole = stored * scales.repeat_interleave(height, 0)[:n].repeat_interleave(width, 1)[:, :m]
    w = Scaled(stored, scales, (height, width))
    if turned:
        w, whole = w.T, whole.T
    rows = slice(*sorted(data.draw(st.tuples(*[st.integers(0, w.shape[0])] * 2))))
    columns = slice(*sorted(data.draw(st.tuples(*[st.integers(0, w.shape[1])] * 2))))
    if rows.start < rows.stop and columns.start < columns.stop:
        assert torch.equal(w[rows, columns], whole[rows, columns])
        assert torch.equal(w[rows], whole[rows])
    assert w.any() == bool(whole.any()) and w.shape == whole.shape


@pytest.mark.parametrize("shape", [(64, 48), (70, 41), (41, 70), (200, 30)])
@pytest.mark.parametrize("shards", [1, 2])
def test_block_scales_with_cut_edges_and_in_another_shard(save: Save, shape: tuple[int, int], shards: int) -> None:
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
    assert record.quantised == "float8 by block" and record.score is not None and result.complete
    assert record.score.snr == pytest.approx(reference_score(weight), rel=1e-5)


def test_transformers_agrees_about_blocks(save: Save) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(256, 384, generator=generator) * 40).to(FP8)
    scales = torch.rand(2, 3, generator=generator) * 0.01
    theirs = fp8.Fp8Dequantize._dequantize_one(None, stored, scales, torch.float32)
    result = scan(str(save({"a.weight": stored, "a.weight_scale_inv": scales})), name="x")
    assert result.records[0].score is not None
    assert result.records[0].score.snr == pytest.approx(reference_score(theirs), rel=1e-5)


@pytest.mark.parametrize(("strategy", "scheme"), [("tensor", "float8 by tensor"), ("channel", "float8 by row")])
def test_compressed_tensors_agrees_about_tensors_and_channels(save: Save, strategy: str, scheme: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    weight = torch.randn(60, 90, generator=torch.Generator().manual_seed(0)) * 0.02
    arguments = quantization.QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True)
    largest = weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().amax().reshape(1)
    # In float32, for theirs is rounded to the dtype of the scales.
    scale = largest / 448
    stored = lifecycle.quantize(weight, scale, None, arguments, dtype=FP8)
    theirs = lifecycle.dequantize(stored, scale, args=arguments, dtype=torch.float32)
    result = scan(str(save({"a.weight": stored, "a.weight_scale": scale})), name="x")
    record = result.records[0]
    assert record.quantised == scheme and record.score is not None
    assert record.score.snr == pytest.approx(reference_score(theirs), rel=1e-5)


@pytest.mark.parametrize(
    ("scales", "why"),
    [
        (None, Skip.MISSING_SCALES),
        (torch.ones(3, 3), Skip.BAD_SCALES),
        (torch.ones(48), Skip.BAD_SCALES),
        (torch.ones(1, 48), Skip.BAD_SCALES),
        (torch.ones(2, 3, dtype=torch.uint8), Skip.BAD_SCALES),
    ],
)
def test_scales_that_are_missing_or_do_not_fit_are_a_reason(save: Save, scales: Any, why: Skip) -> None:
    stored, _, _ = by_block(64, 48)
    tensors = {"layers.0.up.weight": stored, "layers.0.down.weight": torch.randn(6, 7)}
    if scales is not None:
        tensors["layers.0.up.weight_scale_inv"] = scales
    result = scan(str(save(tensors, config=CONFIG)), name="x")
    assert [(s.tensor, s.why) for s in result.plan.failures] == [("layers.0.up.weight", why)]
    assert bool(result.plan.failures[0].detail) == (why is Skip.BAD_SCALES)
    assert [r.module for r in result.records] == ["layers.0.down"] and not result.complete


@pytest.mark.parametrize("fetch", ["range", "shard"])
def test_a_remote_float8_repo_is_the_same(
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


def test_a_nan_in_float8_is_found(save: Save) -> None:
    stored, scales, _ = by_block(64, 48)
    scales[0, 0] = torch.nan
    tensors = {"a.weight": stored, "a.weight_scale_inv": scales, "b.weight": torch.ones(2, 3)}
    result = scan(str(save(tensors, config=CONFIG)), name="x")
    assert [r.module for r in result.failed] == ["a"]


def test_a_deepseek_shaped_header_is_planned_in_full(save: Save) -> None:
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
    assert sum(w.scales is not None for w in a_plan.matrices) == 2 * 8 * 3


def mxfp4(experts: int, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, n, m // 32, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(118, 126, (experts, n, m // 32), dtype=torch.uint8, generator=generator)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 9), st.integers(1, 4), st.booleans(), st.data())
def test_any_part_of_mxfp4_is_what_transformers_makes_of_it(
    n: int, groups: int, turned: bool, data: st.DataObject
) -> None:
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = mxfp4(1, n, 32 * groups)
    whole = theirs.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T
    w: Any = Mxfp4(blocks[0].flatten(1), scales[0])
    if turned:
        w, whole = w.T, whole.T
    rows = slice(*sorted(data.draw(st.tuples(*[st.integers(0, w.shape[0])] * 2))))
    columns = slice(*sorted(data.draw(st.tuples(*[st.integers(0, w.shape[1])] * 2))))
    assert w.shape == whole.shape and w.any() == bool(whole.any())
    if rows.start < rows.stop and columns.start < columns.stop:
        assert torch.equal(w[rows, columns], whole[rows, columns]) and torch.equal(w[rows], whole[rows])


def gpt_oss(layers: int = 2) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for i in range(layers):
        experts = f"model.layers.{i}.mlp.experts."
        for name, n, m in (("gate_up_proj", 48, 64), ("down_proj", 64, 32)):
            tensors[f"{experts}{name}_blocks"], tensors[f"{experts}{name}_scales"] = mxfp4(3, n, m)
            tensors[f"{experts}{name}_bias"] = torch.zeros(3, n, dtype=torch.bfloat16)
        tensors[f"model.layers.{i}.mlp.router.weight"] = torch.randn(3, 64).bfloat16()
    return tensors


def test_gpt_oss_is_scored_as_what_transformers_makes_of_it(save: Save) -> None:
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = gpt_oss()
    result = scan(str(save(tensors, shards=3)), name="x")
    assert result.complete and {line.module for line in result.scored} == {
        *(f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")),
        *(f"model.layers.{i}.mlp.router" for i in range(2)),
    }
    for record in result.records:
        if record.bank is not None and record.score is not None:
            blocks, scales = tensors[f"{record.bank}_blocks"], tensors[f"{record.bank}_scales"]
            whole = theirs.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            expert = int(record.module.rsplit(".", 1)[1])
            assert record.quantised == "mxfp4"
            assert record.score.snr == pytest.approx(reference_score(whole[expert]), rel=1e-5)


@pytest.mark.parametrize("fetch", ["range", "shard"])
def test_a_remote_gpt_oss_is_the_same(
    save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fetch: str
) -> None:
    folder = save(gpt_oss(), shards=3)
    with HubServer({REPO: folder}) as server:
        use(server.url, monkeypatch, tmp_path)
        assert values(scan(REPO, fetch=fetch)) == values(scan(str(folder), name="local"))


@pytest.mark.parametrize("scales", [None, torch.zeros(3, 48, 3, dtype=torch.uint8), torch.zeros(3, 48, 2)])
def test_a_bank_in_mxfp4_without_its_scales_is_a_reason(save: Save, scales: Any) -> None:
    tensors = gpt_oss(1)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    del tensors[f"{name}_scales"]
    if scales is not None:
        tensors[f"{name}_scales"] = scales
    result = scan(str(save(tensors)), name="x")
    why = Skip.MISSING_SCALES if scales is None else Skip.BAD_SCALES
    assert [(s.tensor, s.why) for s in result.plan.failures] == [(f"{name}_blocks", why)]
    assert "model.layers.0.mlp.experts.down_proj" in {line.module for line in result.scored}


def test_a_float8_bank_is_not_passed_over_in_silence(save: Save) -> None:
    tensors = {
        "model.layers.0.mlp.experts.up_proj": torch.ones(2, 8, 8).to(FP8),
        "model.layers.0.mlp.experts.up_proj_scale_inv": torch.ones(2, 1, 1),
        "model.layers.0.mlp.experts.down_proj_blocks": torch.ones(2, 8, 8, dtype=torch.uint8),
        "a.weight": torch.randn(3, 4),
    }
    a_plan = plan(str(save(tensors)))
    assert {s.tensor: s.why for s in a_plan.failures} == {
        "model.layers.0.mlp.experts.up_proj": Skip.UNSUPPORTED_DTYPE,
        "model.layers.0.mlp.experts.down_proj_blocks": Skip.UNSUPPORTED_DTYPE,
    }


def test_a_bank_without_scales_that_was_asked_for_is_a_failure(save: Save) -> None:
    tensors = gpt_oss(1)
    del tensors["model.layers.0.mlp.experts.gate_up_proj_scales"]
    folder = str(save(tensors))
    assert plan(folder, modules=["mlp.experts.down_proj"]).failures == ()
    with pytest.raises(SpectrumStreamError):
        plan(folder, modules=["mlp.experts.gate_up_proj"])


def test_another_block_size_in_the_config_is_another_state(save: Save) -> None:
    stored, scales, _ = by_block(64, 48)
    tensors = {"a.weight": stored, "a.weight_scale_inv": scales, "b.weight": torch.randn(3, 4)}
    folder = save(tensors, config=CONFIG)
    first = scan(str(folder), name="x")
    save(tensors, config={"quantization_config": {"weight_block_size": [33, 17]}})
    second = scan(str(folder), name="x")
    assert first.scored[0].snr != second.scored[0].snr


def test_scales_are_read_a_few_at_a_time(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(save(gpt_oss()))
    whole = scan(folder, name="x")
    monkeypatch.setattr(feed, "_SCALES_NBYTES", 1)
    assert values(scan(folder, name="y")) == values(whole)
