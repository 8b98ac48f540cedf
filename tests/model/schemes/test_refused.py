"""Formats that cannot be read are rejected by name, from files as their own libraries write them."""

import json
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectrum_stream import plan, scan
from spectrum_stream.errors import CheckpointError
from spectrum_stream.model.no_score import NoScore

from ...support.checkpoints import Save
from ...support.formats import compressed_tensors

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
        ("up.res_centroids.weight", torch.float16, "vptq"),
        ("up.outlier_centroids.weight", torch.float16, "vptq"),
        # https://github.com/LeanModels/DFloat11/issues/33: the names begin with the block.
        ("encoded_exponent", torch.uint8, "dfloat11"),
        ("sign_mantissa", torch.uint8, "dfloat11"),
        ("luts", torch.uint8, "dfloat11"),
        ("up.dense_weights", torch.int64, "spqr"),
        ("up.compressed", torch.bfloat16, "compressed-tensors, sparse"),
    ],
)
def test_values_of_other_libraries_are_rejected_without_a_config(
    save: Save, name: str, dtype: torch.dtype, library: str
) -> None:
    # The names as each library writes them.
    assert rejected(save, {f"layers.0.{name}": torch.ones(8, 16, dtype=dtype)}) == {(f"layers.0.{name}", library)}


@pytest.mark.parametrize(
    ("dtype", "beside", "library"),
    [
        # https://github.com/oobabooga/textgen/pull/206
        ({"qweight": torch.int32}, {"scales": (16, 1), "zeros": (16, 1)}, "GPTQ-for-LLaMa"),
        # https://github.com/nunchux-ai/nunchaku/issues/770
        ({"qweight": torch.int8}, {"wscales": (1, 8), "smooth_factor": (16,), "proj_down": (16, 4)}, "nunchaku"),
        # https://github.com/vllm-project/compressed-tensors/pull/77
        ({"weight_packed": torch.int32}, {"scale_packed": (1, 16)}, "marlin-24"),
        # https://github.com/huggingface/diffusers/pull/14277
        ({"weight": torch.int8}, {"scale": (8, 1), "svd_up": (8, 2), "svd_down": (2, 16)}, "sdnq"),
        # https://github.com/vllm-project/vllm-ascend/pull/15387
        ({"weight": torch.int8}, {"weight_scale": (8, 1), "weight_offset": (8, 1)}, "msmodelslim"),
        # Formats without a config have the name of the tensor beside the weight.
        ({"weight": torch.int8}, {"scale": (8, 1)}, "I8 with .scale"),
        ({"weight": torch.uint8}, {"weight_scale": (1,)}, "U8 with .weight_scale"),
        ({"weight": torch.uint8}, {}, "U8"),
    ],
)
def test_tensor_beside_a_weight_names_its_format(
    save: Save, dtype: dict[str, torch.dtype], beside: dict[str, tuple[int, ...]], library: str
) -> None:
    ((ending, values),) = dtype.items()
    tensors = {f"layers.0.up.{ending}": torch.ones(8, 16, dtype=values)}
    tensors |= {f"layers.0.up.{name}": torch.ones(shape) for name, shape in beside.items()}
    ((tensor, detail),) = rejected(save, tensors)
    assert tensor == f"layers.0.up.{ending}" and library in detail


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "W4A16_AWQ"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_SVD"}, "NVFP4_SVD"),
        ({"quant_method": "sdnq", "weights_dtype": "int8"}, "sdnq"),
        ({"quant_method": "bitnet"}, "bitnet"),
        ({"quant_method": "quark", "export": {"pack_method": "order"}}, "quark"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "marlin-24"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
    ],
)
@pytest.mark.parametrize("beside", [{}, {"weight_scale": (3, 5)}, {"scale": (8, 1)}])
def test_checkpoint_without_any_readable_weight_is_refused_by_the_name_of_its_format(
    save: Save, config: dict[str, Any], name: str, beside: dict[str, tuple[int, ...]]
) -> None:
    tensors = {"layers.0.up.weight": torch.ones(8, 16, dtype=torch.uint8)}
    tensors |= {f"layers.0.up.{ending}": torch.ones(shape) for ending, shape in beside.items()}
    with pytest.raises(CheckpointError) as error:
        plan(str(save(tensors, config={"quantization_config": config})))
    assert error.value.reason == "nothing_to_score" and name in str(error.value)


def test_words_of_another_size_are_refused_by_their_setting(save: Save) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "pack_dtype": "int16"}
    tensors = {"a.qweight": torch.ones(8, 16, dtype=torch.int16), "a.scales": torch.ones(1, 16), **OTHER}
    (failure,) = plan(str(save(tensors, config={"quantization_config": config}))).failures
    assert "pack_dtype" in failure.detail


def test_weights_inside_the_module_of_an_unreadable_weight_have_no_score(save: Save) -> None:
    # The rotations of a transform: https://github.com/vllm-project/compressed-tensors/pull/412
    name = "layers.0.up"
    tensors = {
        f"{name}.weight_packed": torch.ones(8, 4, dtype=torch.int32),
        f"{name}.weight_scale": torch.ones(8, 1),
        f"{name}.v_input.weight": torch.ones(32, 32),
        # A module beside it is one of its own.
        "layers.0.up_norm.weight": torch.ones(32),
        **OTHER,
    }
    config = compressed_tensors("pack-quantized", num_bits=4, type="int", symmetric=True)
    config["transform_config"] = {"config_groups": {"v": {"type": "hadamard"}}}
    a_plan = plan(str(save(tensors, config={"quantization_config": config})), names="checkpoint")
    assert {w.module for w in a_plan.matrices} == {"layers.0.up_norm", "layers.0.plain"}
    assert {s.tensor for s in a_plan.failures} == {f"{name}.weight_packed", f"{name}.v_input.weight"}
    assert all("transform_config" in s.detail for s in a_plan.failures)


def test_tensors_beside_an_unreadable_weight_are_no_weights_of_their_own(save: Save) -> None:
    # The scales of EXL2 are more than a hundredth of the bytes: https://github.com/turboderp-org/exllamav2/issues/494
    tensors = {
        "layers.0.up.q_weight": torch.ones(32, 128, dtype=torch.int32),
        "layers.0.up.q_scale": torch.ones(16, 16, dtype=torch.int32),
        **OTHER,
    }
    (failure,) = plan(str(save(tensors))).failures
    assert (failure.tensor, failure.detail) == ("layers.0.up.q_weight", "exllamav2")
