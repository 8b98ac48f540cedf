"""Features that need a separate process: its start, its streams, its terminal, and signals."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrum_stream
from spectrum_stream.model.no_score import NoScore

from ..support.checkpoints import Save, llama_tensors
from ..support.cli import COMMAND, Cli, reason, run_process

pytestmark = pytest.mark.usefixtures("working_folder")

ESCAPE = "\x1b"
COLOR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])[;m]")


def noise(count: int, n: int, m: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.up.weight": torch.randn(n, m, generator=generator) for i in range(count)}


def terminal(*args: str | Path, **env: str) -> Any:
    """Run a command on a new terminal: a pexpect `spawn`."""
    pexpect = pytest.importorskip("pexpect")
    command = [*COMMAND, *map(str, args)]
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {"TERM": "xterm-256color", **env}
    return pexpect.spawn(command[0], command[1:], dimensions=(30, 100), encoding="utf-8", timeout=60, env=environment)


def rest_of(process: Any) -> str:
    """Return the rest of the terminal's output; the process must exit with 0."""
    text: str = process.read()
    process.close()
    assert process.exitstatus == 0, text
    return text


@pytest.mark.parametrize("script", ["spectrum-stream", "hf-spectrum"])
def test_console_script_is_installed(script: str) -> None:
    path = Path(sys.executable).with_name(script)
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == spectrum_stream.__version__


# Streams


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_unwritable_output_gives_one_sentence(save: Save) -> None:
    command = [*COMMAND, "plan", str(save(llama_tensors(2)))]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert reason(done) == "unwritable"
    assert "Traceback" not in done.stderr


def test_closed_pipe_is_not_an_error(save: Save) -> None:
    command = f"{' '.join(COMMAND)} plan {save(llama_tensors(40))} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("group")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "1>&- 2>&-", "0<&-"])
def test_closed_stream_does_not_damage_the_files(save: Save, closed: str) -> None:
    folder = save({"layers.0.up.weight": torch.randn(6, 9)})
    command = f"{' '.join(COMMAND)} scan {folder} --name x {closed}"
    assert subprocess.run(command, shell=True, check=False).returncode == 0
    assert json.loads(Path("model_snr_results/snr_results_x.json").read_text())
    db = sqlite3.connect("model_snr_results/snr_results_x.sqlite")
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_terminal_of_another_encoding_gets_escapes(save: Save, encoding: str) -> None:
    folder = save({"layers.0.世界.weight": torch.randn(6, 9)})
    environment = {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "PATH": "/usr/bin"}
    done = subprocess.run([*COMMAND, "plan", str(folder)], capture_output=True, check=False, env=environment)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert ("世界".encode() if encoding == "utf-8" else b"\\u4e16\\u754c") in done.stdout


# Terminals


@pytest.mark.slow
def test_terminal_shows_a_bar_in_color(save: Save) -> None:
    text = rest_of(terminal("scan", save(noise(12, 300, 400)), "--name", "x"))
    assert re.search(r"12/12.*100%", text)
    assert COLOR.search(text)
    assert "wrote model_snr_results" in text


@pytest.mark.slow
def test_terminal_gets_no_color_with_no_color(save: Save) -> None:
    text = rest_of(terminal("scan", save(noise(12, 300, 400)), "--name", "x", NO_COLOR="1"))
    # Bold and the cursor are no color.
    assert ESCAPE in text
    assert not COLOR.search(text)


@pytest.mark.slow
def test_dumb_terminal_gets_no_escapes(save: Save) -> None:
    text = rest_of(terminal("scan", save(llama_tensors(1)), "--name", "x", TERM="dumb"))
    assert "wrote model_snr_results" in text
    assert ESCAPE not in text


@pytest.mark.slow
def test_interactive_scan_offers_the_groups_in_a_list(save: Save) -> None:
    pytest.importorskip("questionary")
    process = terminal("scan", save(llama_tensors(2)), "--name", "x", "-i")
    process.expect("Groups to score")
    process.expect("self_attn.v_proj")
    time.sleep(0.3)
    process.send(" ")  # the first, input_layernorm, is unticked
    process.send("\r")
    process.expect("--groups")
    assert "wrote model_snr_results" in rest_of(process)
    types = {entry["type"] for entry in json.loads(Path("model_snr_results/snr_results_x.json").read_text()).values()}
    assert "input_layernorm" not in types
    assert "mlp.up_proj" in types


# Signals


def scanning_until(said: str, folder: Path) -> subprocess.Popen[str]:
    """Start a scan in a separate process, and wait until it prints this."""
    command = [*COMMAND, "scan", str(folder), "--name", "x"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(said in line for line in process.stderr)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_a_scan_with_its_code_and_the_scan_resumes(
    cli: Cli, save: Save, working_folder: Path, number: signal.Signals, code: int
) -> None:
    folder = save(noise(40, 700, 900))
    process = scanning_until("to read", folder)
    # Each recorded matrix adds pages to this file, and a short scan prints no progress to wait for.
    log = working_folder / "model_snr_results" / "snr_results_x.sqlite-wal"
    while not log.exists() or log.stat().st_size < 60_000:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "same command resumes" in stderr
    assert "Traceback" not in stderr
    assert not list(working_folder.rglob("*.json"))
    assert not list(working_folder.rglob("*.holder"))
    assert "resuming" in cli("scan", folder, "--name", "x").stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("library", ["_sqlite3.", "libtorch_cpu.", "libtorch_python."])
def test_signal_while_a_scan_starts_ends_it_at_once(save: Save, number: signal.Signals, library: str) -> None:
    """An exception during the import of torch would abort the process."""
    command = [*COMMAND, "scan", str(save(llama_tensors(1))), "--name", "x"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while library not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.parametrize("matrices", [1, 40])
def test_shard_that_is_cut_while_it_is_mapped_gives_one_sentence(
    save: Save, working_folder: Path, matrices: int
) -> None:
    size = 3000 if matrices == 1 else 700
    folder = save(noise(matrices, size, size))
    process = scanning_until("to read", folder)
    time.sleep(0.2)
    os.truncate(folder / "model.safetensors", 10_000)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "(changed)" in stderr
    assert "Traceback" not in stderr
    assert not list(working_folder.rglob("*.json"))


# Full disks


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_full_file_system_gives_one_sentence_and_the_scan_resumes(cli: Cli, save: Save) -> None:
    """A limit of file size stands for a full disk if the test cannot mount one."""
    folder = save(noise(60, 400, 500))
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "from spectrum_stream.__main__ import main; main()"
    )
    command = [sys.executable, "-c", script, "scan", str(folder), "--name", "x"]
    limited = subprocess.run(command, capture_output=True, text=True, check=False)
    assert limited.returncode == 1
    assert reason(limited) == "unwritable"
    assert "Traceback" not in limited.stderr
    assert not list(Path().rglob("*.json"))
    assert not list(Path().rglob("*.tmp"))
    assert "resuming" in cli("scan", folder, "--name", "x").stderr


# Signals at every step


def interrupted(signals: str, steps: str, *args: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a command undisturbed, and with signals at some of its steps."""
    command = [sys.executable, "-m", "tests.support.interrupted", signals, steps, *args]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    undisturbed, *runs = map(json.loads, done.stdout.splitlines())
    assert undisturbed["code"] == 0
    return undisturbed, runs


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(
    ("command", "signals", "steps"),
    [
        ("scan", "SIGINT,SIGTERM", "files"),
        ("scan", "SIGTERM", "8"),
        ("scan", "SIGHUP", "2"),
        ("scan", ",".join(["SIGINT"] * 20), "3"),
        ("select", "SIGTERM", "files"),
        ("select", "SIGINT", "4"),
    ],
)
def test_signal_at_any_step_leaves_whole_files_and_no_traceback(
    save: Save, tmp_path: Path, cli: Cli, command: str, signals: str, steps: str
) -> None:
    folder = save(noise(3, 60, 80))
    args = ["scan", str(folder), "--name", "x", "--top-percent", "50"]
    if command == "select":
        cli(*args)
        args = ["select", "model_snr_results/snr_results_x.json", "--top-percent", "34", "-o", "chosen.yaml"]
    undisturbed, runs = interrupted(signals, steps, *args)
    assert runs
    for run in runs:
        assert run["code"] == 128 + signal.Signals[signals.split(",")[0]], run
        assert "Traceback" not in run["output"]
        assert "Exception ignored" not in run["output"]
        for file, digest in run["files"].items():
            assert ".tmp" not in file and not file.endswith(".holder"), run
            assert Path(file).suffix not in (".json", ".yaml") or undisturbed["files"][file] == digest, run


@pytest.mark.slow
def test_signal_in_the_first_moments_prints_no_traceback(save: Save) -> None:
    command = [*COMMAND, "scan", str(save(llama_tensors(1))), "--name", "x"]
    for i in range(12):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # Python itself takes longer than this to start.
        time.sleep(0.05 + 0.02 * i)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode in (143, -signal.SIGTERM)
        assert "Traceback" not in stderr


# Limits


def run_limited(limit: str, nbytes: int, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process with a limit of the system."""
    script = (
        "import resource, runpy, sys;"
        f"resource.setrlimit(resource.{limit}, ({nbytes}, {nbytes}));"
        "sys.argv = ['spectrum-stream', *sys.argv[1:]];"
        "from spectrum_stream.__main__ import main; main()"
    )
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def large_and_small(folder: Path, side: int) -> Path:
    """Write a checkpoint with small matrices and a large one.

    The product of the large matrix needs 4 side² bytes. Its own bytes are a hole in the file.
    """
    folder.mkdir()
    sides = {"layers.0.up.weight": 64, "layers.1.up.weight": side, "layers.2.up.weight": 64}
    header: dict[str, Any] = {}
    at = 0
    for name, n in sides.items():
        header[name] = {"dtype": "BF16", "shape": [n, n], "data_offsets": [at, at + 2 * n * n]}
        at += 2 * n * n
    text = json.dumps(header).encode()
    small = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16().view(torch.uint8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for place in (0, at - 2 * 64 * 64):
            file.seek(start + place)
            file.write(small.numpy().tobytes())
        file.truncate(start + at)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_matrix_that_does_not_fit_into_memory_has_no_score_and_is_tried_again(
    tmp_path: Path, working_folder: Path
) -> None:
    folder = large_and_small(tmp_path / "model", 16_000)
    for said in ("to read", "resuming"):
        done = run_limited("RLIMIT_DATA", 1_200_000_000, "scan", folder, "--name", "x")
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
        assert said in done.stderr
        assert NoScore.NO_MEMORY.sentence in done.stderr
        names = json.loads(Path("model_snr_results/snr_results_x.json").read_text())
        assert set(names) == {"layers.0.up", "layers.2.up"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("nbytes", [60, 100, 130, 200, 450, 540, 560])
def test_limit_of_memory_gives_one_sentence_for_every_command(save: Save, cli: Cli, nbytes: int) -> None:
    """Libraries in C end the process if they get no memory during their import."""
    folder = save(llama_tensors(1))
    cli("scan", folder, "--name", "x")
    result = "model_snr_results/snr_results_x.json"
    commands: list[tuple[str | Path, ...]] = [
        ("scan", folder, "--name", "x"),
        ("plan", folder),
        ("select", result, "--top-percent", "50"),
        ("report", result),
        ("compare", result, "--metric", "alpha"),
        ("check", result),
    ]
    for args in commands if nbytes < 200 else commands[:1]:
        done = run_limited("RLIMIT_AS", nbytes * 1_000_000, *args)
        assert done.returncode in (0, 1), done
        assert "Traceback" not in done.stderr
        if done.returncode:
            assert reason(done) in ("no_torch", "no_memory", "no_library")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "error"),
    [
        ("torch", "ImportError('libtorch_cpu.so: failed to map segment from shared object')"),
        ("torch", "OSError('libcudart.so.12: cannot open shared object file')"),
        ("torch", "SystemError('returned NULL without setting an exception')"),
        ("torch", "MemoryError()"),
        ("torch", "KeyError('torch')"),
        ("numpy", "ImportError('libopenblas.so: cannot open shared object file')"),
        ("numpy", "AttributeError('partially initialized')"),
        ("rich", "KeyError('rich')"),
        ("typer", "MemoryError()"),
    ],
)
def test_library_that_cannot_be_loaded_is_one_sentence(
    save: Save, working_folder: Path, tmp_path: Path, library: str, error: str
) -> None:
    (tmp_path / "path" / library).mkdir(parents=True)
    (tmp_path / "path" / library / "__init__.py").write_text(f"raise {error}")
    paths = os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")])
    done = run_process("scan", save(llama_tensors(1)), PYTHONPATH=paths)
    assert done.returncode == 1
    assert reason(done) in (["no_torch"] if library == "torch" else ["no_library", "no_memory"])
    assert "Traceback" not in done.stderr


def test_torch_that_cannot_be_loaded_is_one_sentence(save: Save, working_folder: Path, tmp_path: Path) -> None:
    # As torch does where there is no /dev/urandom.
    (tmp_path / "path" / "torch").mkdir(parents=True)
    (tmp_path / "path" / "torch" / "__init__.py").write_text("raise RuntimeError('Unable to open /dev/urandom')")
    paths = os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")])
    done = run_process("scan", save(llama_tensors(1)), PYTHONPATH=paths)
    assert done.returncode == 1
    assert reason(done) == "no_torch"
    assert "Traceback" not in done.stderr
