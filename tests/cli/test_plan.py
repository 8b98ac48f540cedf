"""The command `plan`."""

import json
import re
from pathlib import Path

import pytest
import torch

from ..support.checkpoints import Save, llama_tensors
from ..support.cli import Cli, reason

pytestmark = pytest.mark.usefixtures("working_folder")


def test_plan_writes_nothing_and_names_the_next_command(cli: Cli, save: Save) -> None:
    folder = save(llama_tensors(2))
    done = cli("plan", folder)
    assert "mlp.up_proj" in done.stdout
    assert "peak memory" in done.stdout
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
