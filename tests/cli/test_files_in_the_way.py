"""Commands reject links, FIFOs, devices, sockets and folders in place of files."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ..support.checkpoints import Save, llama_tensors
from ..support.cli import Cli, reason

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")

RESULT = "model_snr_results/snr_results_x.json"
RECORD = "model_snr_results/snr_results_x.sqlite"


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        # The name of a socket must be short, so the tests run in the folder.
        server.bind(os.path.relpath(path))


def make_ring(path: Path) -> None:
    path.symlink_to(f"{path.name}-2")
    path.with_name(f"{path.name}-2").symlink_to(path.name)


KINDS: dict[str, Callable[[Path], object]] = {
    "loop": lambda path: path.symlink_to(path.name),
    "ring": make_ring,
    "fifo": os.mkfifo,
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "memory": lambda path: path.symlink_to("/proc/self/mem"),
    "socket": bind,
    "folder": Path.mkdir,
}
# The file that is replaced, the command, and the reasons besides those of `files.py`.
PLACES: dict[str, tuple[str, list[str], set[str]]] = {
    "model": ("m", ["plan", "m"], {"missing_shard", "no_safetensors"}),
    "model file": ("m/model.safetensors", ["plan", "m/model.safetensors"], {"missing_shard", "no_safetensors"}),
    "shard": ("m/model.safetensors", ["plan", "m"], {"missing_shard"}),
    "shard of scan": ("m/model.safetensors", ["scan", "m"], {"missing_shard"}),
    "index": ("n/model.safetensors.index.json", ["plan", "n"], {"no_index"}),
    "named index": ("n/model.safetensors.index.json", ["plan", "n/model.safetensors.index.json"], {"no_safetensors"}),
    "config": ("m/config.json", ["plan", "m"], set()),
    "other config": ("m/quantize_config.json", ["plan", "m"], set()),
    "adapter config": ("m/adapter_config.json", ["plan", "m"], set()),
    "modules": ("m/modules.json", ["plan", "m"], set()),
    "result of select": (RESULT, ["select", RESULT, "--top-percent", "50", "-o", "s"], set()),
    "result of report": (RESULT, ["report", RESULT], set()),
    "result of compare": (RESULT, ["compare", RESULT, "--metric", "alpha"], set()),
    "result of check": (RESULT, ["check", RESULT], set()),
    "result of verify": (RESULT, ["verify", RESULT, "--names", "names"], set()),
    "record": (RECORD, ["report", RECORD], {"corrupt"}),
    "selection": ("s.yaml", ["verify", "s.yaml", "--names", "names"], set()),
    "names of verify": ("names", ["verify", "s.yaml", "--names", "names"], set()),
    "names of plan": ("names", ["plan", "m", "--names", "names"], set()),
    "names of select": ("names", ["select", RESULT, "--top-percent", "50", "--names", "names", "-o", "s"], set()),
    "output": ("o", ["select", RESULT, "--top-percent", "50", "-o", "o"], {"unwritable"}),
    "provenance": ("model_snr_results/provenance_x.json", ["check", RESULT], set()),
}


@contextmanager
def at_once() -> Iterator[None]:
    """Fail if the block waits for another process."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def scanned(cli: Cli, save: Save, working_folder: Path) -> Path:
    save(llama_tensors(1, hidden=8)).rename("m")
    save({"a.weight": torch.randn(3, 4)}, shards=2).rename("n")
    cli("scan", "m", "--name", "x")
    cli("select", RESULT, "--top-percent", "50", "-o", "s.yaml")
    Path("names").write_text("\n".join(llama_tensors(1, hidden=8)))
    return working_folder


@pytest.mark.parametrize("place", PLACES)
def test_other_things_than_files_give_one_sentence_at_once(cli: Cli, scanned: Path, place: str) -> None:
    name, command, others = PLACES[place]
    reasons = {"not_a_file", "unreadable", "file_too_large"} | others
    for kind, make in KINDS.items():
        path = Path(name)
        if path.exists() or path.is_symlink():
            path.rename(f"{path}-before-{kind}")
        make(path)
        with at_once():
            done = cli(*command, code=None)
        assert done.returncode in (0, 1, 2), kind
        if done.returncode and command[0] != "check":
            assert reason(done) in reasons, kind
        # Without these files the command still works, or it does not read the folder as the file.
        can_go_on = kind == "folder" and (name.startswith(("m/", "n/")) or place == "output")
        can_go_on |= place == "output" and kind in ("zero", "memory")
        assert done.returncode or can_go_on, kind
        path.unlink() if not path.is_dir() or path.is_symlink() else path.rmdir()
