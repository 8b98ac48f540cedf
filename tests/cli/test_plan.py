"""The command `plan`."""

import json
import re
from pathlib import Path

import pytest
import torch

from spectrum_stream import plan

from ..support.checkpoints import Save, llama_tensors
from ..support.cli import Cli, reason
from ..support.formats import float8

pytestmark = pytest.mark.usefixtures("working_folder")


def test_plan_writes_nothing_and_names_the_next_command(cli: Cli, save: Save) -> None:
    folder = save(llama_tensors(2))
    done = cli("plan", folder)
    assert "mlp.up_proj" in done.stdout
    assert "peak memory" in done.stdout
    assert "GPU memory" in done.stdout
    assert f"next: spectrum-stream scan {folder} --top-percent 50" in done.stdout
    assert not list(Path().iterdir())
    assert json.loads(cli("plan", folder, "--json").stdout)["matrices"] == len(llama_tensors(2))


def test_plan_groups_are_repeated_or_separated_by_commas(cli: Cli, save: Save) -> None:
    folder = save(llama_tensors(2))
    for args in (["--groups", "mlp.*,self_attn.q_proj"], ["--groups", "mlp.*", "--groups", "self_attn.q_proj"]):
        data = json.loads(cli("plan", folder, "--json", *args).stdout)
        assert [g["name"] for g in data["groups"]] == ["mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"]


@pytest.mark.parametrize("size", ["1GB", "1.5G", "1024MiB", "3000000000", "1 TB", "900000k"])
def test_plan_accepts_sizes_with_units(cli: Cli, save: Save, size: str) -> None:
    assert json.loads(cli("plan", save(llama_tensors(1)), "--json", "--max-memory", size).stdout)["matrices"]


def test_plan_repeats_names_and_experts_in_the_next_command(cli: Cli, save: Save, tmp_path: Path) -> None:
    tensors = {f"layers.{i}.experts.{e}.up.weight": torch.randn(6, 9) for i in range(2) for e in range(2)}
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{name}\n" for name in tensors))
    folder = save(tensors)
    done = cli("plan", folder, "--names", names, "--experts", "pooled")
    command = re.search(r"^next: spectrum-stream (.+)$", done.stdout, re.MULTILINE)
    assert command is not None
    assert "as in the given file" in done.stdout
    scanned = cli(*command[1].split(), "--json", "--name", "x")
    assert list(json.loads(scanned.stdout)["groups"]) == ["experts.up"]
    assert reason(cli("plan", folder, "--names", tmp_path / "none", code=2)) == "no_such_file"


def test_plan_and_scan_name_the_formats_that_are_dequantized(cli: Cli, save: Save) -> None:
    example = float8()
    folder = save(dict(example.tensors), config={"quantization_config": dict(example.quantization)})
    row = next(line for line in cli("plan", folder).stdout.splitlines() if line.startswith("quantized"))
    assert "1 of 1 matrix" in row
    assert "float8" in row
    # The scales belong to the weight, so they are not among the skipped tensors.
    assert "weight_scale_inv" not in cli("plan", folder).stdout
    assert "1 of 1 matrix is dequantized" in cli("scan", folder, "--name", "x").stderr
    assert "dequantized" not in cli("plan", save(llama_tensors(1), folder="plain")).stdout


def test_plan_warns_if_config_leaves_out_a_large_part(cli: Cli, save: Save) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    few = plan(str(save(llama_tensors(3), config=config)))
    assert any("10 weights" in warning and "config.json" in warning for warning in few.warnings)
    assert not plan(str(save(llama_tensors(3), config=config | {"num_hidden_layers": 3}, folder="all"))).warnings


def test_plan_lists_a_tensor_that_is_left_out_once(cli: Cli, save: Save) -> None:
    shown = cli("plan", save(llama_tensors(1) | {"big_position_ids": torch.zeros(64, 64)})).stdout
    assert shown.count("big_position_ids") == 1
