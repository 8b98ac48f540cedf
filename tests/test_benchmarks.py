"""The benchmark: its matrices have the known spectra, and it finds regressions."""

import copy
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import contenders, history
from benchmarks.checkpoints import known_scores, known_spectrum, make_checkpoint
from benchmarks.hardware import matrix_units
from benchmarks.matrices import OrthonormalColumns, matrix
from benchmarks.measuring import machine
from benchmarks.regression import NotComparable, regressions
from benchmarks.report import markdown
from benchmarks.results import Accuracy, RunResult, Spread, WorkloadResult
from benchmarks.spectra import Kind, bulk_quantiles, draw
from benchmarks.worker import Worker, WorkerError
from benchmarks.workloads import Suite, Weight, Workload, workloads
from spectrum_stream.numerics.snr import score
from tests.support.dated import check_dated_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Powers of two, products of other primes, primes; wide, square, tall, one row.
SHAPES = [(64, 192), (192, 64), (96, 96), (37, 53), (70, 30), (1, 12)]

TINY = Workload(
    "tiny",
    tuple(
        Weight(f"model.layers.{i}.{module}", n, m)
        for i in range(4)
        for module, n, m in (("a", 48, 96), ("b", 80, 60))
    ),
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", Kind)
def test_matrix_has_the_given_singular_values(kind: Kind, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    s = draw(kind, min(shape), max(shape), rng)
    w = matrix(s, *shape, torch.float64, rng)
    assert w.shape == shape
    assert s.shape == (min(shape),)
    assert (np.diff(s) <= 0).all()
    assert s[-1] > 0
    assert np.abs(torch.linalg.svdvals(w).numpy() - s).max() < 1e-14 * s[0] * min(shape)


@pytest.mark.parametrize("kind", Kind)
def test_rounding_to_float32_does_not_change_the_score(kind: Kind) -> None:
    rng = np.random.default_rng(0)
    s = draw(kind, 192, 576, rng)
    rounded = torch.linalg.svdvals(matrix(s, 576, 192, torch.float32, rng).double()).numpy()
    assert score(rounded, 576, 192).snr == pytest.approx(score(s, 576, 192).snr, rel=5e-7)


def test_matrix_and_its_gram_matrix_are_dense() -> None:
    rng = np.random.default_rng(0)
    w = matrix(draw(Kind.BULK_AND_SPIKES, 96, 288, rng), 96, 288, torch.float64, rng)
    for dense in (w, w @ w.T):
        assert (dense.abs() > 1e-6 * dense.abs().max()).double().mean() > 0.99


@pytest.mark.parametrize(("side", "count"), [(64, 64), (60, 60), (31, 31), (84, 20), (1, 1)])
def test_columns_are_orthonormal(side: int, count: int) -> None:
    q = OrthonormalColumns(side, count, np.random.default_rng(1))
    rows = q.rows(0, side)
    assert torch.allclose(rows.T @ rows, torch.eye(count, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(rows, torch.cat([q.rows(0, side // 2), q.rows(side // 2, side)]))
    assert torch.allclose(q.times_transpose(torch.eye(count, dtype=torch.float64)), rows.T, atol=1e-15)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.05])
def test_bulk_quantiles_are_those_of_a_random_matrix(beta: float) -> None:
    short, long = 128, round(128 / beta)
    bulk = bulk_quantiles(short, beta)
    w = torch.from_numpy(np.random.default_rng(0).standard_normal((short, long)))
    assert np.abs(torch.linalg.svdvals(w).numpy() / np.sqrt(long) - bulk).max() < 0.2
    assert 1 - np.sqrt(beta) < bulk[-1]
    assert bulk[0] < 1 + np.sqrt(beta)
    assert (bulk**2).mean() == pytest.approx(1, rel=1e-3)


def test_huge_sigma1_has_the_ratio_of_its_name() -> None:
    for kind, ratio in ((Kind.HUGE_SIGMA1_1E2, 1e2), (Kind.HUGE_SIGMA1_1E3, 1e3), (Kind.HUGE_SIGMA1_1E4, 1e4)):
        s = draw(kind, 192, 576, np.random.default_rng(0))
        assert s[0] / np.quantile(s, 0.25) == pytest.approx(ratio)


@pytest.mark.slow
def test_suite_scores_are_not_degenerate_and_do_not_tie() -> None:
    for workload in workloads(Suite.CI):
        assert all(score(known_spectrum(w), w.n, w.m).degeneracy is None for w in workload.weights)
        scores = sorted(known_scores(workload).values())
        assert len(scores) == len(workload.weights)
        # Closer scores could swap by rounding, so that a wrong set would not be an error.
        assert (np.diff(scores) > 4 * workload.error_limit * np.array(scores[1:])).mean() > 0.95


def test_make_checkpoint_reuses_only_complete_checkpoints(tmp_path: Path) -> None:
    folder = make_checkpoint(TINY, "float32", tmp_path)
    (shard,) = folder.glob("*.safetensors")
    made = shard.stat().st_mtime_ns
    assert make_checkpoint(TINY, "float32", tmp_path) == folder
    assert shard.stat().st_mtime_ns == made
    shard.write_bytes(b"half")
    (folder / "made_from.json").unlink()
    make_checkpoint(TINY, "float32", tmp_path)
    assert shard.stat().st_size > 4 * sum(w.n * w.m for w in TINY.weights)


@pytest.mark.slow
def test_contenders_agree_with_the_known_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task = contenders.Task(str(make_checkpoint(TINY, "float32", tmp_path / "made")), "cpu")
    known = known_scores(TINY)
    assert contenders.ours(task).scores == pytest.approx(known, rel=1e-5)
    assert contenders.spectrum(task).scores == pytest.approx(known, rel=1e-5)
    numpy = contenders.numpy(task)
    assert numpy.scores == pytest.approx({m: known[m] for m in ("model.layers.0.a", "model.layers.0.b")}, rel=1e-5)
    assert numpy.matrices == 2
    assert set(contenders.shapes(task)) == {(48, 96), (80, 60)}


def test_known_spectrum_does_not_depend_on_the_rest_of_the_workload() -> None:
    assert np.array_equal(known_spectrum(TINY.weights[3]), known_spectrum(Weight("model.layers.1.b", 80, 60)))
    assert not np.array_equal(known_spectrum(TINY.weights[3]), known_spectrum(TINY.weights[1]))


@pytest.mark.slow
def test_worker_reports_memory_and_failures() -> None:
    # `eval` and `dict` stand for a contender and its warm-up, since they need no import.
    with Worker(dict) as worker:
        idle = worker.run(eval, "1 + 1")
        assert idle.value == 2
        busy = worker.run(eval, "len(b'x' * 200_000_000 + b'y' + bytes(__import__('time').sleep(0.2) or 1))")
        assert busy.peak_anonymous > idle.peak_anonymous + 150_000_000
        with pytest.raises(WorkerError, match="ZeroDivisionError"):
            worker.run(eval, "1 / 0")
        with pytest.raises(WorkerError, match="the process ended"):
            worker.run(eval, "__import__('os')._exit(9)")


def workload_of(**ratios: float) -> WorkloadResult:
    return WorkloadResult(
        name="tiny",
        dtype="BF16",
        matrices=8,
        nbytes=1000,
        flops=1e9,
        planned_nbytes=10**8,
        seconds={"ours": Spread.of([1.0, 1.1, 0.9])},
        sgemm=Spread.of([2e11]),
        ratios={name: Spread.of([value]) for name, value in ratios.items()},
        numpy_matrices=0,
        read_rate=1000.0,
        peak_anonymous={"ours": 10**8},
        peak_resident={},
        others_cpu_share=0.0,
        precisions={"float32": 8},
        failed=0,
        accuracy=Accuracy(
            max_error=2e-6,
            estimated=3e-6,
            limit=1e-5,
            excused=0,
            unexcused=0,
            same_sets={"top_50": True, "top_25": True},
            precisions={"float32": 8},
        ),
        agreement={},
        shapes=[],
    )


def result_of(*workloads: WorkloadResult) -> RunResult:
    return RunResult(machine(), {"suite": "ci", "repetitions": 3, "cold": False, "device": "cpu"}, [*workloads])


def run_of(**ratios: float) -> dict[str, Any]:
    """Make a saved run with one workload and these ratios, as JSON data."""
    data: dict[str, Any] = json.loads(json.dumps(result_of(workload_of(**ratios)).to_dict()))
    return data


def test_regressions_ignores_equal_and_better_runs() -> None:
    old = run_of(times_spectrum=6.0, scan_over_parts=1.1, floor_share=0.4)
    assert regressions(old, old, 0.2) == []
    assert regressions(old, run_of(times_spectrum=9.0, scan_over_parts=1.0, floor_share=0.6), 0.2) == []
    assert regressions(old, run_of(times_spectrum=4.9, scan_over_parts=1.3, floor_share=0.33), 0.2) == []


@pytest.mark.parametrize("worse", [{"times_spectrum": 4.7}, {"scan_over_parts": 1.33}, {"floor_share": 0.31}])
def test_regressions_finds_a_worse_ratio_but_not_a_longer_time(worse: dict[str, float]) -> None:
    good = {"times_spectrum": 6.0, "scan_over_parts": 1.1, "floor_share": 0.4}
    old, new = run_of(**good), run_of(**(good | worse))
    (sentence,) = regressions(old, new, 0.2)
    assert next(iter(worse)) in sentence
    assert regressions(old, new, 0.3) == []
    slow = copy.deepcopy(old)
    slow["workloads"][0]["seconds"]["ours"]["median"] *= 10
    assert regressions(old, slow, 0.2) == []


def test_regressions_ignores_one_slow_turn() -> None:
    old, new = run_of(times_spectrum=10.0, scan_over_parts=1.0), run_of(times_spectrum=7.0, scan_over_parts=1.4)
    new["workloads"][0]["ratios"]["times_spectrum"]["max"] = 9.0
    new["workloads"][0]["ratios"]["scan_over_parts"]["min"] = 1.1
    assert regressions(old, new, 0.2) == []


@pytest.mark.parametrize(
    "worse",
    [{"max_error": 3e-5}, {"unexcused": 1}, {"same_sets": {"top_50": True, "top_25": False}}],
)
def test_regressions_finds_lost_accuracy(worse: dict[str, Any]) -> None:
    old, new = run_of(), run_of()
    new["workloads"][0]["accuracy"] |= worse
    assert len(regressions(old, new, 0.2)) == 1
    assert regressions(new, old, 0.2) == []


def test_regressions_rejects_runs_of_different_things() -> None:
    for key, value in (("name", "other"), ("matrices", 9), ("dtype", "F32")):
        other = run_of()
        other["workloads"][0][key] = value
        with pytest.raises(NotComparable):
            regressions(run_of(), other, 0.2)
    damaged = run_of()
    del damaged["workloads"][0]["accuracy"]
    with pytest.raises(NotComparable):
        regressions(damaged, run_of(), 0.2)
    for setting, value in (("cold", True), ("device", "cuda")):
        other = run_of()
        other["settings"][setting] = value
        with pytest.raises(NotComparable):
            regressions(run_of(), other, 0.2)


def test_history_has_the_format_of_github_action_benchmark(tmp_path: Path) -> None:
    spread = Spread(1.25, 1.0, 1.6, 3)
    run = result_of(
        replace(
            workload_of(times_spectrum=6.0, floor_share=1 / 3),
            ratios={"times_spectrum": Spread(6.0, 5.5, 6.25, 3), "floor_share": Spread.of([1 / 3])}
            | {"scan_over_parts": spread},
        ),
        replace(workload_of(), name="other", accuracy=None),
    )
    history.save(run, tmp_path / "history.json")
    # The action copies only these five fields of an object.
    extra = (
        f"{run.machine['processor']}, {run.machine['cpus']} cores, {run.machine['matrix_units']}; "
        f"torch {torch.__version__}\n8 matrices, BF16; other programs: 0% of the cores"
    )
    expected = [
        ("tiny: times faster than Spectrum", "times", 6.0, "5.5 to 6.25"),
        ("tiny: share of the floor", "share", 0.3333, None),
        ("tiny: share of the slower part", "share", 0.8, "0.625 to 1.0"),
        ("tiny: planned / peak memory", "times", 1.0, None),
        ("tiny: correct digits", "digits", 5.699, None),
        ("other: planned / peak memory", "times", 1.0, None),
    ]
    assert json.loads((tmp_path / "history.json").read_text()) == [
        {"name": name, "unit": unit, "value": value, "extra": extra} | ({"range": range_} if range_ else {})
        for name, unit, value, range_ in expected
    ]


@pytest.mark.parametrize(
    ("number", "worsen"),
    [
        ("times faster than Spectrum", lambda w: replace(w, ratios=w.ratios | {"times_spectrum": Spread.of([3.0])})),
        ("times faster than numpy", lambda w: replace(w, ratios=w.ratios | {"times_numpy": Spread.of([3.0])})),
        ("share of the floor", lambda w: replace(w, ratios=w.ratios | {"floor_share": Spread.of([0.2])})),
        ("share of the slower part", lambda w: replace(w, ratios=w.ratios | {"scan_over_parts": Spread.of([1.9])})),
        ("planned / peak memory", lambda w: replace(w, peak_anonymous={"ours": 2 * 10**8})),
        ("correct digits", lambda w: replace(w, accuracy=replace(w.accuracy, max_error=1e-4))),
        ("correct digits", lambda w: replace(w, accuracy=replace(w.accuracy, max_error=1.0))),
    ],
)
def test_worse_number_is_smaller_in_the_history(
    number: str, worsen: Callable[[WorkloadResult], WorkloadResult]
) -> None:
    good = workload_of(times_spectrum=6.0, times_numpy=6.0, scan_over_parts=1.1, floor_share=0.4)
    before, after = (
        {entry["name"]: entry["value"] for entry in history.entries(result_of(w))} for w in (good, worsen(good))
    )
    (worse,) = (name for name in before if before[name] > 1.25 * after[name])
    assert worse == f"tiny: {number}"
    assert before.keys() == after.keys()


def test_history_counts_all_negligible_errors_as_equal() -> None:
    values = set()
    for error in (0.0, 1e-12, 1e-6):
        w = workload_of()
        assert w.accuracy is not None
        found = history.entries(result_of(replace(w, accuracy=replace(w.accuracy, max_error=error))))
        values.add(found[-1]["value"])
    assert values == {6.0}


def test_history_rejects_numbers_that_json_cannot_express() -> None:
    with pytest.raises(ValueError, match="JSON"):
        history.save(result_of(workload_of(times_spectrum=math.nan)), Path(os.devnull))


def test_workflow_compares_a_pull_request_with_its_base_on_one_machine() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "benchmark.yml").read_text())
    job = workflow["jobs"]["throughput"]
    assert job["if"] == "github.event_name == 'pull_request'"
    refs = {
        s["with"]["path"]: s["with"].get("ref") for s in job["steps"] if s.get("uses", "").startswith("actions/che")
    }
    assert refs == {"head": None, "base": "${{ github.event.pull_request.base.sha }}"}
    runs = {s["working-directory"]: s["run"] for s in job["steps"] if "working-directory" in s}
    assert list(runs) == ["base", "head"]
    assert all("-m benchmarks --suite ci" in line for line in runs.values())
    (saved,) = re.findall(r"-o (\S+)", runs["base"])
    assert f"--against {saved}" in runs["head"]


def test_workflow_stores_only_the_history_of_main() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "benchmark.yml").read_text())
    jobs = workflow["jobs"]
    assert workflow["permissions"] == {"contents": "read"}
    assert [name for name, job in jobs.items() if "permissions" in job] == ["history"]
    # YAML reads the key `on` as a truth value.
    assert workflow[True]["push"] == {"branches": ["main"]}
    assert jobs["history"]["if"] == "github.event_name == 'push'"
    (store,) = (s for s in jobs["history"]["steps"] if "github-action-benchmark" in s.get("uses", ""))
    assert store["with"]["tool"] == "customBiggerIsBetter"
    assert any(f"--history {store['with']['output-file-path']}" in s.get("run", "") for s in jobs["history"]["steps"])


@pytest.mark.parametrize("path", sorted(RESULTS.iterdir()), ids=lambda path: path.stem)
def test_dated_result_names_hardware_versions_and_command(path: Path) -> None:
    named = re.fullmatch(r"(\d{4}-\d{2}-\d{2})(-[a-z0-9]+){2,}\.md", path.name)
    assert named
    check_dated_file(path.read_text(), datetime.strptime(named[1], "%Y-%m-%d").date())


def test_readme_lists_every_dated_result() -> None:
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    linked = re.findall(r"\(results/(\S+)\)", readme)
    assert sorted(linked) == sorted(path.name for path in RESULTS.iterdir())


def test_report_is_a_dated_result_with_a_row_for_each_workload() -> None:
    run = result_of(
        workload_of(times_spectrum=6.0), replace(workload_of(), name="other", accuracy=None, others_cpu_share=0.5)
    )
    text = markdown(run, "python -m benchmarks --suite ci", date(2026, 1, 2))
    check_dated_file(text, date(2026, 1, 2))
    assert f"torch {torch.__version__}" in text
    assert str(run.machine["matrix_units"]) in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    assert "6.00" in table[2]
    assert "other: other programs took 50% of the processors meanwhile." in text


@pytest.mark.parametrize(
    ("cpuinfo", "units"),
    [
        ("model name\t: Xeon\nflags\t\t: avx avx512_bf16 amx_bf16 amx_tile", "AMX, AVX512-BF16"),
        ("model name\t: EPYC\nflags\t\t: avx2 avx512_bf16", "no AMX, AVX512-BF16"),
        ("model name\t: EPYC\nflags\t\t: avx2", "no AMX"),
        ("Features\t: fp asimd bf16 i8mm", "BF16"),
        ("Features\t: fp asimd", "no BF16"),
    ],
)
def test_matrix_units_are_those_of_the_flags(cpuinfo: str, units: str, tmp_path: Path) -> None:
    assert matrix_units(tmp_path / "cpuinfo") == "matrix units unknown"
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert matrix_units(tmp_path / "cpuinfo") == units


@pytest.mark.slow
def test_tiny_suite_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "workloads", lambda suite: (TINY,))
    saved = tmp_path / "run.json"
    files = ["-o", str(saved), "--history", str(tmp_path / "history.json"), "--report", str(tmp_path / "report.md")]
    arguments = ["--repetitions", "2", "--no-numpy", *files, *(["--cold"] if os.name == "posix" else [])]
    result = CliRunner().invoke(command.app, arguments)
    assert result.exit_code == 0, result.output
    assert "faster than Spectrum" in result.output
    run = json.loads(saved.read_text())
    (workload,) = run["workloads"]
    assert workload["ratios"]["times_spectrum"]["runs"] == 2
    assert workload["accuracy"]["unexcused"] == 0
    assert workload["accuracy"]["same_sets"] == {"top_50": True, "top_25": True}
    assert workload["peak_anonymous"]["ours"] > 10_000_000
    assert regressions(run, run, 0.0) == []
    entries = json.loads((tmp_path / "history.json").read_text())
    assert entries[0]["name"] == "tiny: times faster than Spectrum"
    assert entries[0]["value"] == pytest.approx(workload["ratios"]["times_spectrum"]["median"], rel=1e-3)
    check_dated_file((tmp_path / "report.md").read_text(), date.today())

    # This runs the rest of the command without a new measurement, and compares with a better run.
    better = copy.deepcopy(run)
    better["workloads"][0]["ratios"]["times_spectrum"]["median"] *= 10
    saved.write_text(json.dumps(better))
    saved_result = WorkloadResult(**(workload | revive(workload)))
    monkeypatch.setattr(command, "measure_workload", lambda workload, settings: saved_result)
    assert CliRunner().invoke(command.app, ["--cold", "--against", str(saved)]).exit_code == 1
    saved.write_text(json.dumps(run))
    assert CliRunner().invoke(command.app, ["--cold", "--against", str(saved)]).exit_code == 0
    assert CliRunner().invoke(command.app, ["--against", str(tmp_path / "none.json")]).exit_code == 2
    assert CliRunner().invoke(command.app, ["--workload", "none"]).exit_code == 2


def revive(workload: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a saved workload that the tables need as objects."""
    return {
        "seconds": {name: Spread(**value) for name, value in workload["seconds"].items()},
        "ratios": {name: Spread(**value) for name, value in workload["ratios"].items()},
        "sgemm": Spread(**workload["sgemm"]),
        "accuracy": Accuracy(**workload["accuracy"]),
        "agreement": {},
        "shapes": [],
    }
