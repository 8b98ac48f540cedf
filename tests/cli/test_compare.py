"""The command `compare`."""

import json
import re
import shlex
from pathlib import Path

import pytest

from spectrum_stream import scan

from ..support.checkpoints import GOLDEN, Save, llama_tensors
from ..support.cli import Cli, reason

A, B = (f"model_snr_results/snr_results_{name}.json" for name in "ab")


@pytest.fixture(autouse=True)
def _scanned(save: Save, working_folder: Path) -> None:
    tensors = llama_tensors(4)
    scan(str(save(tensors, folder="a")), name="a")
    # This looks like a tuned model: one layer is mostly signal, and there is no head.
    tensors["model.layers.2.mlp.up_proj.weight"][0] += 1
    tensors.pop("lm_head.weight")
    scan(str(save(tensors, folder="b")), name="b")


def test_compare_two_results_and_its_next_command(cli: Cli) -> None:
    done = cli("compare", A, B, "--top-percent", "25")
    row = next(line for line in done.stdout.splitlines() if line.startswith("mlp.up_proj"))
    assert row.split()[1] == "4"
    assert f"only in {A}, 1 module:\n  lm_head" in done.stdout
    command = re.search(r"^next: spectrum-stream (.+)$", done.stdout, re.MULTILINE)
    assert command is not None
    cli(*shlex.split(command[1]))


def test_compare_json_has_both_results_and_the_changes(cli: Cli) -> None:
    data = json.loads(cli("compare", A, B, "--top-percent", "25", "--json").stdout)
    assert data["only_a"] == ["lm_head"]
    assert data["only_b"] == []
    assert data["a"] == {"result": A, "metric": "spectrum"}
    assert data["b"]["result"] == B
    changed = {name for name, group in data["groups"].items() if group["entered"] or group["left"]}
    assert changed <= {"mlp.up_proj", "lm_head"}
    assert data["groups"]["self_attn.q_proj"]["spearman"] == pytest.approx(1)
    assert data["groups"]["input_layernorm"]["spearman"] is None


@pytest.mark.parametrize("metric", ["stable-rank", "random"])
def test_compare_one_result_by_two_metrics(cli: Cli, metric: str) -> None:
    done = cli("compare", A, "--metric", metric)
    assert f"--metric {metric}" in done.stdout
    data = json.loads(cli("compare", A, "--metric", metric, "--json").stdout)
    assert data["a"]["metric"] == "spectrum"
    assert data["b"]["metric"] == metric


def test_compare_two_results_by_one_metric(cli: Cli) -> None:
    data = json.loads(cli("compare", A, B, "--metric", "alpha", "--json").stdout)
    assert data["a"]["metric"] == data["b"]["metric"] == "alpha"
    assert data["groups"]["self_attn.q_proj"]["kendall"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("args", "code", "why"),
    [
        ([A], 2, "nothing_to_compare"),
        ([A, "no/such.json"], 1, "no_such_result"),
        ([A, B, "--top-percent", "0"], 2, "bad_percent"),
        ([GOLDEN / "snr_results_smollm2.json", "--metric", "alpha"], 1, "no_record"),
    ],
)
def test_compare_fails_with_a_reason(cli: Cli, args: list[str | Path], code: int, why: str) -> None:
    done = cli("compare", *args, code=code)
    assert reason(done) == why
    assert done.stdout == ""
