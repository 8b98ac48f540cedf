"""Compare the limits in the README with the code, and check that they hold."""

import gc
import importlib
import io
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import spectrum_stream
from spectrum_stream import plan
from spectrum_stream.checkpoint import header, open_source
from spectrum_stream.checkpoint import tensors as headers
from spectrum_stream.checkpoint.header import HeaderFault
from spectrum_stream.cli import tables
from spectrum_stream.errors import CheckpointError
from spectrum_stream.model import inventory
from spectrum_stream.model.config import QuantizationConfig
from spectrum_stream.model.matrix import GroupIndex, Skipped
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.model.quantization import MAX_EXPERTS, Unreadable
from spectrum_stream.model.schemes import layers

PACKAGE = Path(spectrum_stream.__file__).parent
ROW = re.compile(r"^\| [^|]+ \| ([0-9,]+) \| `(\w+)` \| `([\w/]+)\.py`, `(\w+)` \|$")
NBYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "U32": 4}
PLAIN = ("BF16", (4, 4))
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


def write(folder: Path, shapes: Shapes, config: Any = None, shard: int = 0) -> Path:
    """Write a sparse shard, so that a tensor of any size takes no room."""
    entries: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + math.prod(shape) * NBYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    folder.mkdir(exist_ok=True)
    name = f"model-{shard:05}-of-00002.safetensors" if shard else "model.safetensors"
    with (folder / name).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def limits() -> list[tuple[str, str, str, str]]:
    text = (PACKAGE / "checkpoint/README.md").read_text("utf-8")
    table = text.partition("<!-- limits -->\n")[2].partition("<!-- /limits -->")[0]
    rows = [ROW.match(line) for line in table.splitlines()[2:]]
    assert rows
    assert all(rows)
    return [row.groups() for row in rows if row is not None]  # type: ignore[misc]


def test_readme_has_the_limits_of_the_code() -> None:
    files = {file for _, _, file, _ in limits()}
    modules = {file: importlib.import_module(f"spectrum_stream.{file.replace('/', '.')}") for file in files}
    for value, _, module, constant in limits():
        assert value == f"{getattr(modules[module], constant):,}"
    found = {name for module in modules.values() for name in vars(module) if name.startswith("MAX_")}
    assert {constant for _, _, _, constant in limits()} == found


def test_readme_has_the_reasons_of_the_limits() -> None:
    reasons = {reason for _, reason, _, _ in limits()}
    assert reasons >= {str(f) for f in HeaderFault if str(f).startswith(("too_many", "name_too"))}
    assert str(NoScore.TOO_MANY_EXPERTS) in reasons
    assert NoScore.TOO_MANY_EXPERTS.sentence.endswith(f"{MAX_EXPERTS:,}")


def test_all_shards_together_have_the_limits_of_tensors_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in (1, 2):
        write(tmp_path, {f"m{shard}.{i}.weight": PLAIN for i in range(3)}, shard=shard)
    source = open_source(str(tmp_path))
    monkeypatch.setattr(headers, "MAX_TENSORS", 5)
    with pytest.raises(CheckpointError) as refused:
        headers.read_checkpoint(source)
    assert refused.value.reason == "too_many_tensors"
    monkeypatch.setattr(headers, "MAX_TENSORS", 6)
    assert len(headers.read_checkpoint(source).tensors) == 6
    monkeypatch.setattr(headers, "MAX_HEADERS_NBYTES", 300)
    with pytest.raises(CheckpointError) as refused:
        headers.read_checkpoint(source)
    assert refused.value.reason == "headers_too_large"


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        ({EXPERTS: ("BF16", (100_000_000, 1, 1))}, {}),
        ({EXPERTS: ("F8_E4M3", (5_000_000, 1, 1)), f"{EXPERTS}_scale": ("F32", (5_000_000,))}, {}),
        ({f"{EXPERTS}_blocks": ("U8", (5_000_000, 1, 1, 16)), f"{EXPERTS}_scales": ("U8", (5_000_000, 1, 1))}, {}),
        (
            {
                f"{EXPERTS}.weight": ("U32", (5_000_000, 1, 8)),
                f"{EXPERTS}.scales": ("BF16", (5_000_000, 1, 1)),
                f"{EXPERTS}.biases": ("BF16", (5_000_000, 1, 1)),
            },
            {"quantization": {"bits": 4, "group_size": 64}},
        ),
        ({"blocks.0.ffn.experts.mlp.w1": ("BF16", (5_000_000, 1))}, {"num_experts": 5_000_000}),
    ],
    ids=["plain", "float8", "mxfp4", "mlx", "dbrx"],
)
def test_millions_of_fused_experts_have_no_score(tmp_path: Path, shapes: Shapes, config: Mapping[str, Any]) -> None:
    started = time.monotonic()
    found = plan(str(write(tmp_path, {"a.weight": PLAIN, **shapes}, config)))
    assert [s.no_score for s in found.failures] == [NoScore.TOO_MANY_EXPERTS]
    # The objects of this many experts take minutes.
    assert time.monotonic() - started < 10


def test_matrices_of_all_fused_experts_together_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {f"layers.{i}.experts.up_proj": ("BF16", (4, 1, 1)) for i in range(3)})
    monkeypatch.setattr(inventory, "MAX_MATRICES", 11)
    with pytest.raises(CheckpointError) as refused:
        plan(str(tmp_path))
    assert refused.value.reason == "too_many_matrices"
    monkeypatch.setattr(inventory, "MAX_MATRICES", 12)
    assert len(plan(str(tmp_path)).matrices) == 12


def test_layers_with_expert_projections_of_their_own_names_are_rejected(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.experts.0.p{i}.weight": PLAIN for i in range(400)}
    with pytest.raises(CheckpointError) as refused:
        plan(str(write(tmp_path, shapes)))
    assert refused.value.reason == "too_many_missing"


def test_limits_of_a_name_keep_quadratic_loops_short() -> None:
    # The loops over the components and words of a name are quadratic in its length.
    assert header.MAX_NAME_LENGTH <= 1000
    assert header.MAX_COMPONENTS <= 64


def _seconds_per_byte(folder: Path, shapes: Shapes, config: Any) -> float:
    path = write(folder, shapes, config)
    # The time of a garbage collection grows with the number of all objects in the process.
    gc.collect()
    gc.disable()
    try:
        started = time.process_time()
        plan(str(path))
        taken_s = time.process_time() - started
    finally:
        gc.enable()
    with (path / "model.safetensors").open("rb") as file:
        return taken_s / int.from_bytes(file.read(8), "little")


FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def _float8(modules: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    weights = {f"{module}.weight": ("F8_E4M3", (4, 4)) for module in modules}
    return {**weights, **{f"{module}.weight_scale_inv": ("F32", (1, 1)) for module in modules}}


SHAPES: Mapping[str, Callable[[int], Shapes]] = {
    "layers": lambda n: {f"model.layers.{i}.q.weight": PLAIN for i in range(n)},
    "groups": lambda n: {f"model.layers.0.g{i}.weight": PLAIN for i in range(n)},
    "prefixes": lambda n: {f"p{i}.model.layers.{i}.self_attn.q_proj.weight": PLAIN for i in range(n)},
    "float8": lambda n: _float8([f"a{i}" for i in range(n)]),
    "modules that begin alike": lambda n: _float8([f"a{'_' * (i % 300)}{i}" for i in range(n)]),
    # The length of a name must not grow with n, so the number of underscores starts again after 100 modules.
    "beginnings of many modules": lambda n: {
        **_float8([f"a{i // 100}{'_' * (i % 100)}" for i in range(n // 2)]),
        **{f"a{i // 100}{'_' * 100}{i}.b.weight": PLAIN for i in range(n)},
    },
    "nested modules": lambda n: {
        **_float8([".b" * i + ".c" for i in range(60)]),
        **{".b" * 59 + f".c.x{i}": ("F32", (3,)) for i in range(n)},
    },
    "tensors beside a weight": lambda n: {
        "b.weight": PLAIN,
        **_float8(["a"]),
        **{f"a.x{i}_scale": ("F32", (1, 1)) for i in range(n)},
    },
    "missing scales": lambda n: {"b.weight": PLAIN, **{f"layers.{i}.q.weight": ("U8", (4, 4)) for i in range(n)}},
    "unscored": lambda n: {"b.weight": PLAIN, **{f"layers.{i}.w{'_x' * 300}": PLAIN for i in range(n // 10)}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_plan_takes_time_that_is_linear_in_the_size_of_the_header(kind: str, tmp_path: Path) -> None:
    config = FP8 if any(dtype.startswith("F8") for dtype, _ in SHAPES[kind](10).values()) else None

    def measure(tensors: int) -> float:
        shapes = SHAPES[kind](tensors)
        return min(_seconds_per_byte(tmp_path / f"{tensors}-{i}", shapes, config) for i in range(2))

    # There are six times as many tensors, so quadratic time would be about six times as long for each byte.
    assert measure(12_000) < 3 * measure(2000)


def test_table_of_a_plan_ends_after_two_thousand_groups(tmp_path: Path) -> None:
    found = plan(str(write(tmp_path, {f"m{i}.weight": PLAIN for i in range(2003)})))
    text = io.StringIO()
    Console(file=text, width=100).print(tables.plan_table(found))
    assert "and 3 more groups; --json lists all" in text.getvalue()
    assert len(found.to_dict()["groups"]) == 2003


def test_requested_groups_keep_the_skipped_tensors_that_belong_to_them() -> None:
    index = GroupIndex({"mlp.up_proj", "vision.mlp.up_proj", "mlp.experts.3.w1"}, ["attn.*"])
    groups = {
        "layers.0.mlp.up_proj.weight": True,
        "layers.0.up_proj.weight": True,
        "layers.0.p_proj.weight": False,
        "layers.0.mlp.experts.7.w1.weight": True,
        "layers.0.attn.q.weight": True,
        "layers.0.mlp.down_proj.weight": False,
    }
    for parameter, is_among in groups.items():
        s = Skipped(tensor="t", dtype="F32", shape=(), no_score=NoScore.EMPTY, parameter=parameter)
        assert index.has(s) is is_among, parameter


def test_patterns_of_a_config_take_a_limited_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = {f"{'[a-z]*' * 20}[{i}]": {"bits": 8} for i in range(200)}
    rules = layers.Layers(QuantizationConfig({"quant_method": "gptq", "dynamic": patterns}))
    assert not isinstance(rules.config_of("b" * 100), Unreadable)
    monkeypatch.setattr(layers, "_MAX_STEPS", 5_000_000)
    assert isinstance(rules.config_of("b" * 100), Unreadable)
