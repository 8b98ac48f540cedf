"""Checkpoints that change while they are scanned, disks that are full or read-only, and scans that meet."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectrum_stream import scan
from spectrum_stream.errors import CheckpointError, ResultError, SpectrumStreamError
from spectrum_stream.pipeline import MatrixScored, run
from spectrum_stream.results.journal import Journal
from spectrum_stream.streaming.plan import plan

from .conftest import Save, llama_tensors
from .support.records import IDENTITY


def replaced(path: Path) -> None:
    """By rename, as downloads and editors do it."""
    other = path.with_suffix(".new")
    save_file(llama_tensors(1), other)
    other.rename(path)


def overwritten(path: Path) -> None:
    # Without cutting it first: to touch the map of a file that was cut ends this process.
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\0")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [replaced, overwritten, cut, removed])
@pytest.mark.parametrize("after", [0, 1])
def test_a_shard_that_changes_in_the_middle_publishes_nothing(
    save: Save, working_folder: Path, change: Callable[[Path], None], after: int
) -> None:
    folder = save(llama_tensors(3), shards=2)
    scan(str(folder), name="x", top_percent=50)
    earlier = {path: path.read_bytes() for path in working_folder.rglob("*.*") if path.suffix in (".json", ".yaml")}
    # Another state, so that there is something to scan, and then another one.
    os.utime(folder / "model-00001-of-00002.safetensors")
    a_plan = plan(str(folder), name="x", top_percent=50)
    with pytest.raises(CheckpointError) as error:
        seen = 0
        if not after:
            change(folder / "model-00002-of-00002.safetensors")
        for event in run(a_plan):
            seen += isinstance(event, MatrixScored)
            if after and seen == after:
                # The first shard: its matrices are under way, and what was read of them is right.
                change(folder / "model-00001-of-00002.safetensors") if change is not cut else overwritten(
                    folder / "model-00001-of-00002.safetensors"
                )
                after = 0
    assert error.value.reason in ("changed", "unreadable")
    assert {path: path.read_bytes() for path in earlier} == earlier


def test_scores_of_the_state_before_a_change_are_not_kept(save: Save, working_folder: Path) -> None:
    folder = save(llama_tensors(2))
    a_plan = plan(str(folder), name="x")
    with pytest.raises(CheckpointError):
        for event in run(a_plan):
            if isinstance(event, MatrixScored):
                overwritten(folder / "model.safetensors")
    events: list[object] = []
    result = scan(str(folder), name="x", on_event=events.append)
    assert sum(isinstance(e, MatrixScored) for e in events) == len(result.records)
    fresh = scan(str(folder), name="y")
    assert [r.score for r in result.records] == [r.score for r in fresh.records]


def scanning_until(said: str, folder: Path) -> subprocess.Popen[str]:
    """A scan in a process of its own that has come so far as to say this."""
    command = [sys.executable, "-m", "spectrum_stream", "scan", str(folder), "--name", "x"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(said in line for line in process.stderr)
    return process


@pytest.mark.parametrize("matrices", [1, 40])
def test_a_shard_that_is_cut_under_the_map_is_one_sentence(save: Save, working_folder: Path, matrices: int) -> None:
    size = 3000 if matrices == 1 else 700
    folder = save({f"layers.{i}.up.weight": torch.randn(size, size) for i in range(matrices)})
    process = scanning_until("to read", folder)
    time.sleep(0.2)
    os.truncate(folder / "model.safetensors", 10_000)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and "(changed)" in stderr and "Traceback" not in stderr
    assert not list(working_folder.rglob("*.json"))


def test_a_file_of_the_same_size_and_time_is_told_apart(save: Save, working_folder: Path) -> None:
    folder = save(llama_tensors(1))
    path = folder / "model.safetensors"
    status = path.stat()
    scan(str(folder), name="x")
    tensors = llama_tensors(1)
    tensors["model.layers.0.mlp.up_proj.weight"] *= torch.arange(32)
    save_file(tensors, folder / "other")
    (folder / "other").rename(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns
    events: list[object] = []
    scan(str(folder), name="x", on_event=events.append)
    assert getattr(events[0], "dropped") > 0  # noqa: B009


@pytest.mark.skipif(os.name != "posix" or not Path("/dev/full").exists(), reason="needs a small file system")
def test_a_file_system_that_fills_up_is_one_sentence(save: Save, tmp_path: Path) -> None:
    """A limit to the size of files stands for a full disk where nothing can be mounted."""
    folder = save({f"layers.{i}.up.weight": torch.randn(400, 500) for i in range(60)})
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "from spectrum_stream.cli import main; sys.exit(main())"
    )
    work = tmp_path / "full"
    work.mkdir()
    limited = subprocess.run(
        [sys.executable, "-c", script, "scan", str(folder), "--name", "x"],
        cwd=work, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert limited.returncode == 1 and "(unwritable)" in limited.stderr and "Traceback" not in limited.stderr
    assert not list(work.rglob("*.json")) and not list(work.rglob("*.tmp"))
    after = subprocess.run(
        [sys.executable, "-m", "spectrum_stream", "scan", str(folder), "--name", "x"],
        cwd=work, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert after.returncode == 0 and "resuming" in after.stderr


def held(path: Path, ready: Event, done: Event) -> None:
    with Journal(path, IDENTITY):
        ready.set()
        done.wait(60)


def test_a_second_scan_says_who_holds_the_record_or_waits(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=held, args=(path, ready, done))
    process.start()
    assert ready.wait(60)
    with pytest.raises(ResultError) as error:
        Journal(path, IDENTITY)
    assert error.value.reason == "locked" and f"process {process.pid} on " in str(error.value)
    threading.Timer(0.5, done.set).start()
    with Journal(path, IDENTITY, wait=True) as store:
        assert done.is_set() and store.records() == {}
    process.join()
    # Nothing is left of the lock, and one that is left means nothing.
    assert [p.name for p in tmp_path.iterdir()] == ["r.sqlite"]
    (tmp_path / ".r.holder").write_text("1 elsewhere")
    with Journal(path, IDENTITY):
        pass


def test_two_scans_of_one_model_at_once_lose_nothing(save: Save, working_folder: Path) -> None:
    folder = save({f"layers.{i}.up.weight": torch.randn(300, 400) for i in range(40)})
    command = [sys.executable, "-m", "spectrum_stream", "scan", str(folder), "--name", "x", "--wait"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert len(json.loads(Path("model_snr_results/snr_results_x.json").read_text())) == 40
    assert sum("already scanned" in error for error in errors) == 1, errors


def test_two_models_of_one_slug_at_once_are_not_mixed(save: Save, working_folder: Path) -> None:
    folders = [save(llama_tensors(layers), folder=f"m{layers}") for layers in (2, 3)]
    commands = [[sys.executable, "-m", "spectrum_stream", "scan", str(f), "--name", "a/b", "--wait"] for f in folders]
    both = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], errors
    first = both[0].returncode == 0
    assert "(other_model)" in errors[1 if first else 0]
    published = json.loads(Path("model_snr_results/snr_results_a-b.json").read_text())
    assert len(published) == len(scan(str(folders[0 if first else 1]), name="own").modules)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_scan_with_its_code_and_a_hint(
    save: Save, working_folder: Path, number: signal.Signals, code: int
) -> None:
    folder = save({f"layers.{i}.up.weight": torch.randn(700, 900) for i in range(40)})
    process = scanning_until("left", folder)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code and "same command resumes" in stderr and "Traceback" not in stderr
    assert not list(working_folder.rglob("*.json")) and not list(working_folder.rglob("*.holder"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after_s", [0.1, 0.25, 0.5, 1.0])
def test_a_signal_before_anything_began_is_no_traceback(
    save: Save, working_folder: Path, number: signal.Signals, after_s: float
) -> None:
    command = [sys.executable, "-m", "spectrum_stream", "scan", str(save(llama_tensors(1))), "--name", "x"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(after_s)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    # Before Python has come to this program, the signal is Python's and the system's.
    early = -number if after_s < 0.2 else None
    assert process.returncode in (128 + number, early, 0)
    assert "Traceback" not in stderr or (after_s < 0.2 and "spectrum_stream" not in stderr)


def test_the_errors_here_are_ours(working_folder: Path) -> None:
    with pytest.raises(SpectrumStreamError):
        scan("nowhere/at/all")
