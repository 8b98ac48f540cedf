"""Formats that cannot be read are rejected by name, from files as their own libraries write them."""

import json
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectrum_stream import plan, scan
from spectrum_stream.model.no_score import NoScore

from ...support.checkpoints import Save

pytestmark = pytest.mark.usefixtures("working_folder")

OTHER = {"layers.0.plain.weight": torch.ones(2, 3)}


def rejected(
    save: Save, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None
) -> set[tuple[str, str]]:
    """Return (tensor, detail) of the rejected tensors; the plain weight beside them is scored."""
    options = {} if config is None else {"config": {"quantization_config": config}}
    result = scan(str(save({**tensors, **OTHER}, **options)), name="x", names="checkpoint")
    assert [module.name for module in result.modules] == ["layers.0.plain"] and not result.complete
    assert {s.no_score for s in result.plan.failures} == {NoScore.UNSUPPORTED_DTYPE}
    return {(s.tensor, s.detail) for s in result.plan.failures}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("config", [None, {"quant_method": "bitsandbytes", "load_in_4bit": True}])
def test_four_bits_of_bitsandbytes_are_rejected(save: Save, kind: str, nested: bool, config: Any) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = bitsandbytes.nn.Linear4bit(64, 48, bias=False, quant_type=kind, compress_statistics=nested).to("cpu")
    tensors = {f"layers.0.up.{name}": tensor for name, tensor in linear.state_dict().items()}
    assert f"layers.0.up.weight.quant_state.bitsandbytes__{kind}" in tensors
    assert rejected(save, tensors, config) == {("layers.0.up.weight", "bitsandbytes")}


def test_eight_bits_of_bitsandbytes_are_rejected(save: Save) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = bitsandbytes.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False).to("cpu")
    tensors = {f"layers.0.up.{name}": tensor for name, tensor in linear.state_dict().items()}
    assert "layers.0.up.SCB" in tensors
    assert rejected(save, tensors) == {("layers.0.up.weight", "bitsandbytes")}


# torchao prints about kernels that this machine lacks, and its import warns.
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torchao is compared on Linux")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"])
@pytest.mark.parametrize("config", [None, {"quant_method": "torchao", "quant_type": {}}])
def test_tensors_of_torchao_are_rejected(save: Save, name: str, config: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 48, bias=False)}).bfloat16()
    quantization.quantize_(model, getattr(quantization, name)())
    tensors, metadata = support.flatten_tensor_state_dict(model.state_dict())
    folder = save({**tensors, **OTHER}, **({} if config is None else {"config": {"quantization_config": config}}))
    save_file({**tensors, **OTHER}, folder / "model.safetensors", metadata=metadata)
    assert json.loads(metadata["tensor_names"]) == ["up.weight"]
    failures = plan(str(folder), names="checkpoint").failures
    assert ("up._weight_qdata", "torchao") in {(s.tensor, s.detail) for s in failures}


@pytest.mark.parametrize(
    ("name", "dtype", "library"),
    [
        ("up.weight:qdata", torch.int8, "torchao"),
        ("up.weight._data", torch.int8, "optimum-quanto"),
        ("up.W_q", torch.uint8, "hqq"),
        ("up.q_weight", torch.int32, "exllamav2"),
        ("up.trellis", torch.int16, "exllamav3"),
        ("up.Qidxs", torch.int64, "quip-sharp"),
        ("up.codes", torch.int8, "aqlm"),
        ("up.centroids.weight", torch.float16, "vptq"),
        ("up.dense_weights", torch.int64, "spqr"),
        ("up.compressed", torch.bfloat16, "compressed-tensors, sparse"),
    ],
)
def test_values_of_other_libraries_are_rejected_without_a_config(
    save: Save, name: str, dtype: torch.dtype, library: str
) -> None:
    # The names as each library writes them.
    assert rejected(save, {f"layers.0.{name}": torch.ones(8, 16, dtype=dtype)}) == {(f"layers.0.{name}", library)}
