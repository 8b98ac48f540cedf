"""The command that proves a GPU: a bare machine, faults, and the projection."""

import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import torch
import typer
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from benchmarks import gpu, gpu_proofs, gpu_speed, gpu_steps
from benchmarks.checkpoints import known_scores
from benchmarks.gpu_bench import Bench, Findings
from benchmarks.gpu_projection import MODELS, NVME_RATE, Model, Rates, interpolate, project
from benchmarks.workloads import Workload
from spectrum_stream.numerics.device import open_device
from spectrum_stream.numerics.precision import Precision
from tests.support.dated import check_dated_file

ROOT = Path(__file__).parent.parent
# The packages of a machine with a GPU.
BARE = ("torch", "numpy", "safetensors", "typer", "huggingface_hub", "pyyaml", "pytest", "hypothesis")
# Python imports this module when it starts. It hides the packages that a bare machine lacks.
HIDING = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        hidden = name.partition(".")[0] in HIDDEN
        return None if hidden else self.finder.find_spec(name, *args)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
"""


def name_of(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def hidden_packages() -> list[str]:
    """Return the importable names of all installed packages that a bare machine lacks."""
    bare: set[str] = set()
    todo = [name_of(package) for package in BARE]
    while todo:
        name = todo.pop()
        if name not in bare:
            bare.add(name)
            try:
                needed = requires(name) or []
            except PackageNotFoundError:
                continue  # a requirement of another system
            todo += [name_of(line) for line in needed if "extra ==" not in line]
    ours = {"spectrum_stream", "benchmarks", "tests"}
    providers = packages_distributions()
    return [top for top, names in providers.items() if top not in ours and not bare & {name_of(n) for n in names}]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(device="cpu", opened=open_device("cpu"), quick=True, folder=tmp_path, say=lambda line: None)


@pytest.mark.slow
def test_gpu_command_runs_every_section_on_a_bare_machine(tmp_path: Path) -> None:
    hidden = hidden_packages()
    assert {"psutil", "plotly", "transformers"} <= set(hidden)
    assert not {"rich", "torch", "filelock"} & set(hidden)
    (tmp_path / "sitecustomize.py").write_text(f"HIDDEN = {set(hidden)!r}\n{HIDING}")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    check = [sys.executable, "-c", "import psutil"]
    assert subprocess.run(check, env=environment, check=False, capture_output=True).returncode == 1
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads((tmp_path / "out" / "gpu.json").read_text())
    sections = {section["section"]: section for section in saved["sections"]}
    assert [*sections] == [*(section.name for section in gpu.SECTIONS), "projection"]
    for section in sections.values():
        assert not section["failed"]
        assert not section["problems"]
        assert not section["left_out"]
        assert section["tables"] or section["facts"]
        assert all(section["tables"].values())
    assert sections["tests"]["facts"]["exit_code"] == 0
    assert sections["tests"]["facts"]["skipped" if not torch.cuda.is_available() else "passed"] > 0
    precisions = {row["precision"] for row in sections["known spectra"]["tables"]["known spectra"]}
    assert precisions == set(Precision)
    workloads = sections["scores"]["tables"]["device against CPU"]
    assert len(workloads) == 4
    assert all(row["matrices"] >= 7 for row in workloads)
    assert {row["kind"] for row in sections["scores"]["tables"]["hard spectra against known scores"]} >= {
        "near_low_rank",
        "huge_sigma1_1e4",
    }
    assert len(sections["projection"]["tables"]["projections"]) == len(MODELS)
    markdown = (tmp_path / "out" / "gpu.md").read_text()
    for name in sections:
        assert f"## {name[0].upper()}{name[1:]}\n" in markdown
    check_dated_file(markdown, datetime.now(UTC).date())


def test_sections_are_in_the_order_of_the_proof() -> None:
    """Right results come before the limits and the speed, which would mean little without them."""
    assert [section.name for section in gpu.SECTIONS] == [
        "machine",
        "tests",
        "known spectra",
        "batch limit",
        "scores",
        "memory",
        "eigenvalues",
        "products",
        "against Spectrum's loop",
        "ours by shape",
        "overlap",
    ]


def test_budget_leaves_time_within_six_minutes() -> None:
    budget_s = inspect.signature(gpu.main).parameters["budget_s"].default
    # The time of the sections. Torch is loaded before, and the projection is made afterwards.
    assert budget_s <= 340
    assert sum(section.least_s for section in gpu.SECTIONS) < budget_s / 2


def fail(bench: Bench, findings: Findings) -> None:
    """Fail after a row."""
    findings.add_row("rows", n=1, seconds=2.0, read_nbytes=3_000_000)
    raise RuntimeError("no such kernel")


def measure(bench: Bench, findings: Findings) -> None:
    """Measure."""
    findings.facts["rate_gb_per_s"] = 12.345


def stop(bench: Bench, findings: Findings) -> None:
    """Stop the whole run."""
    raise KeyboardInterrupt


def run_sections(monkeypatch: pytest.MonkeyPatch, folder: Path, *sections: gpu.Section) -> list[dict[str, object]]:
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    with pytest.raises((typer.Exit, KeyboardInterrupt)):
        gpu.main(output=folder, device="cpu", quick=False, budget_s=30)
    found: list[dict[str, object]] = json.loads((folder / "gpu.json").read_text())["sections"]
    return found


def test_failed_section_keeps_its_rows_and_the_other_sections(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed, measured, left_out, _ = run_sections(
        monkeypatch,
        tmp_path,
        gpu.Section("bad", fail, 1, 0),
        gpu.Section("good", measure, 1, 0),
        gpu.Section("long", measure, 1, 1000),
    )
    assert "no such kernel" in str(failed["failed"])
    assert failed["tables"] == {"rows": [{"n": 1, "seconds": 2.0, "read_nbytes": 3_000_000}]}
    assert measured["facts"] == {"rate_gb_per_s": 12.345}
    assert left_out["left_out"]
    assert left_out["facts"] == {}
    markdown = (tmp_path / "gpu.md").read_text()
    assert "| n | s | read |\n|---|---|---|\n| 1 | 2 | 3 MB |" in markdown
    assert "| rate GB/s | 12.3 |" in markdown
    assert "no such kernel" in markdown


def test_stopped_run_keeps_its_sections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sections = (gpu.Section("good", measure, 1, 0), gpu.Section("stop", stop, 1, 0))
    (kept,) = run_sections(monkeypatch, tmp_path, *sections)
    assert kept["section"] == "good"


def test_device_that_does_not_exist_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter):
        gpu.main(output=tmp_path, device="cuda:97", quick=True, budget_s=30)


def test_measurement_without_time_is_left_out(bench: Bench) -> None:
    findings = Findings(section="x")
    bench.deadline = time.monotonic() + 10
    assert bench.has_time(findings, "short", 1)
    assert not bench.has_time(findings, "long", 100)
    assert len(findings.left_out) == 1


def test_failed_call_is_left_out_but_failed_device_is_raised(bench: Bench) -> None:
    def fail_with(error: Exception) -> Callable[[], None]:
        def run() -> None:
            raise error

        return run

    findings = Findings(section="x")
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        LinAlgError("linalg.eigh: the algorithm failed to converge"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE"),
    ):
        assert bench.attempt(findings, "call", 0, fail_with(error)) is None
    assert len(findings.left_out) == 3
    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench.attempt(findings, "call", 0, fail_with(RuntimeError("CUDA error: an illegal memory access")))


def spoil_last(eigenvalues: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a routine that is wrong for the last matrix of a batch."""

    def spoiled(k: torch.Tensor) -> torch.Tensor:
        values = eigenvalues(k)
        if k.ndim == 3 and len(k) > 1:
            values[-1, -1] *= 1.01
        return values

    return spoiled


def test_wrong_eigenvalues_in_a_batch_are_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigvalsh", spoil_last(torch.linalg.eigvalsh))
    findings = Findings(section="eigenvalues")
    gpu_steps.eigenvalues(bench, findings)
    rows = findings.tables["eigenvalues"]
    assert len(findings.problems) == sum(row["batch"] > 1 for row in rows) > 0
    limit = Findings(section="batch limit")
    gpu_proofs.batch_limit(bench, limit)
    assert [row["wrong"] for row in limit.tables["batches"] if row["by"] == "torch alone"] == [1, 1]


def test_wrong_scores_are_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(workload: Workload) -> dict[str, float]:
        return {module: 1.01 * known for module, known in known_scores(workload).items()}

    monkeypatch.setattr("benchmarks.gpu_proofs.known_scores", wrong)
    findings = Findings(section="scores")
    gpu_proofs.scores(bench, findings)
    assert len(findings.problems) == len(findings.tables["hard spectra against known scores"]) > 0


def test_ratio_of_a_layer_follows_from_its_shapes() -> None:
    findings = Findings(section="x")
    for n, theirs, ours in ((1024, 3.0, 1.0), (4096, 30.0, 2.0), (14336, 100.0, 5.0)):
        numbers = {"gesvdj_s": theirs, "ours_s": ours, "times_gesvdj": theirs / ours}
        findings.add_row("against Spectrum's loop", n=n, m=4096, **numbers)
    gpu_speed.add_layer_ratios(findings)
    layer = (2 * 3 + 2 * 30 + 3 * 100) / (2 * 1 + 2 * 2 + 3 * 5)
    assert findings.facts == {"times_gesvdj_for_a_layer_of_llama_3_8b": pytest.approx(layer)}


def test_tests_that_fail_or_take_too_long_are_reported(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_proofs, "_ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    # The whole mark in one piece would make this file one of those that are run on a GPU.
    mark = "@pytest.mark." + "gpu"
    bodies = {"good": "pass", "bad": "raise ValueError"}
    tests = [f"{mark}\ndef test_{name}():\n    {body}\n" for name, body in bodies.items()]
    (tmp_path / "tests" / "test_it.py").write_text("import pytest\n\n" + "\n".join(tests))
    (tmp_path / "tests" / "test_other.py").write_text("import a_package_that_is_missing")
    findings = Findings(section="tests")
    gpu_proofs.run_tests(bench, findings)
    assert [findings.facts[name] for name in ("files", "passed", "failed", "skipped")] == [1, 1, 1, 0]
    assert "test_it.py::test_bad: failed" in findings.problems[0]
    assert not findings.left_out
    # No Python starts in a millisecond.
    bench.deadline = time.monotonic()
    late = Findings(section="tests")
    monkeypatch.setattr(gpu_proofs, "_LEAST_S", 0.001)
    gpu_proofs.run_tests(bench, late)
    assert late.left_out
    assert late.facts["exit_code"] is None


PUBLISHED = {
    "Llama-3-8B": (226, 8.030),
    "Qwen3-30B-A3B": (18_674, 30.532),
    "Llama-3-70B": (562, 70.552),
    "DeepSeek-V3-671B": (45_092, 671.025),
}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_projected_models_have_the_published_sizes(model: Model) -> None:
    matrices, weights = PUBLISHED[model.name]
    assert model.matrices == matrices
    assert model.weights / 1e9 == pytest.approx(weights, abs=6e-4)


def test_projection_follows_its_formula() -> None:
    model = Model("m", {(100, 400, "BF16"): 3, (400, 100, "BF16"): 2, (200, 1000, "F8_E4M3"): 10})
    assert model.nbytes == 5 * 100 * 400 * 2 + 10 * 200 * 1000
    rates = Rates(
        # A transposed matrix takes as long, unless it is measured. The other shape was not measured in this dtype.
        seconds={(400, 100, "BF16"): 0.5, (200, 1000, "BF16"): 100.0},
        eigenvalues={100: 1.0, 400: 16.0},
        product=1e8,
        reading=1e5,
        overhead=1.5,
    )
    found = project(model, rates)
    # Between 100 and 400 the eigenvalues grow as n², so 200 takes 4 s.
    estimated = 10 * (4.0 + 2 * 200**2 * 1000 / 1e8)
    assert found.computing_s == pytest.approx(2.5 + estimated)
    assert found.measured_share == pytest.approx(2.5 / (2.5 + estimated))
    assert found.reading_s == pytest.approx(24.0)
    assert found.nvme_s == pytest.approx(2.4e6 / NVME_RATE)
    assert found.scan_s == pytest.approx(1.5 * (2.5 + estimated))
    assert found.costliest[0] == (200, 1000, "F8_E4M3")
    assert found.costliest[1] == pytest.approx(estimated)


def test_projection_needs_every_shape_or_the_steps() -> None:
    model = Model("m", {(100, 400, "BF16"): 1, (200, 400, "BF16"): 1})
    some = Rates(seconds={(100, 400, "BF16"): 1.0}, eigenvalues={}, product=0.0, reading=1.0, overhead=1.0)
    assert not some.suffice(model)
    assert Rates(seconds={}, eigenvalues={64: 1.0}, product=1.0, reading=1.0, overhead=1.0).suffice(model)
    assert some.measured((400, 100, "BF16")) == 1.0
    assert some.suffice(Model("n", {(400, 100, "BF16"): 1}))


def test_interpolate_beyond_the_measured_sides_grows_with_the_cube() -> None:
    measured = {512: 1.0, 1024: 4.0}
    assert interpolate(1024, measured) == 4.0
    assert interpolate(2048, measured) == pytest.approx(32.0)
    assert interpolate(256, measured) == pytest.approx(1 / 8)
