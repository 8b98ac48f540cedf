"""AWQ: the words of auto-round and AutoAWQ, their settings, and layouts that are rejected."""

from typing import Any

import pytest
import torch

from spectrum_stream import scan
from spectrum_stream.model.no_score import NoScore

from ...support.checkpoints import Save, reference_score
from ...support.formats import MODULE, awq
from ...support.judges import import_auto_round

pytestmark = pytest.mark.usefixtures("working_folder")

SETTINGS: list[dict[str, Any]] = [
    # transformers, AutoAWQ's own file, auto-round, GPTQModel.
    {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True, "backend": "autoawq",
     "modules_to_not_convert": ["lm_head"], "do_fuse": False},
    {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
    {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32, "sym": False,
     "data_type": "int"},
    {"quant_method": "awq", "method": "awq", "format": "gemm", "checkpoint_format": "gemm", "bits": 4,
     "group_size": 32, "zero_point": True, "version": "gemm", "pack_dtype": "int32", "meta": {}},
]  # fmt: skip


@pytest.mark.parametrize("config", SETTINGS)
def test_awq_agrees_with_auto_round(save: Save, config: dict[str, Any]) -> None:
    tensors = awq().tensors
    words, zeros, scales = (tensors[f"{MODULE}.{name}"] for name in ("qweight", "qzeros", "scales"))
    judge = import_auto_round("auto_round.export.export_to_awq.utils")
    theirs = judge.dequantize_gemm(words, zeros, scales.float(), 4, 32)
    result = scan(str(save(tensors, config={"quantization_config": config})), name="x", names="checkpoint")
    (record,) = result.records
    assert record.quantized == "awq" and record.score is not None
    assert record.score.snr == pytest.approx(reference_score(theirs), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": "gemv"}, NoScore.NOT_UNDERSTOOD),
        ({"version": "marlin"}, NoScore.NOT_UNDERSTOOD),
        ({"backend": "llm-awq"}, NoScore.NOT_UNDERSTOOD),
        ({"packing_format": "auto_round"}, NoScore.NOT_UNDERSTOOD),
        ({"format": "gemv_fast"}, NoScore.NOT_UNDERSTOOD),
        ({"bits": 8}, NoScore.UNSUPPORTED_DTYPE),
        ({"group_size": 64}, NoScore.BAD_SCALES),
        ({"sym": True}, NoScore.BAD_SCALES),
        ({"zero_point": False}, NoScore.BAD_SCALES),
    ],
)
def test_awq_of_other_settings_is_rejected(save: Save, change: dict[str, Any], why: NoScore) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 32} | change
    tensors = {**awq().tensors, "model.layers.0.mlp.plain.weight": torch.ones(2, 3)}
    result = scan(str(save(tensors, config={"quantization_config": config})), name="x", names="checkpoint")
    assert [module.name for module in result.modules] == ["model.layers.0.mlp.plain"]
    found = [s.no_score for s in result.plan.failures] + [r.no_score for r in result.failed]
    assert found == [why]


def test_awq_without_its_zero_points_is_rejected(save: Save) -> None:
    tensors = {name: tensor for name, tensor in awq().tensors.items() if not name.endswith("qzeros")}
    tensors["model.layers.0.mlp.plain.weight"] = torch.ones(2, 3)
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    result = scan(str(save(tensors, config={"quantization_config": config})), name="x", names="checkpoint")
    assert [s.no_score for s in result.plan.failures] == [NoScore.MISSING_SCALES]
