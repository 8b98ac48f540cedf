"""Scans on small, full, read-only and unusual file systems (Linux, as root).

Each file system is mounted in a separate namespace."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ..support.checkpoints import Save, llama_tensors
from ..support.cli import COMMAND

# A mount must not be visible outside of the namespace, so nothing outside is mounted again.
_MOUNT = 'mount -t tmpfs -o "$0" tmpfs "$1" && cd "$1" && shift'
_can_mount = subprocess.run(
    ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_can_mount.returncode != 0, reason="mounts need Linux and root"),
]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(save: Save, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a script in a new file system.

    `$scan` scans a model, and `$program` is the command line.
    """
    model = save(llama_tensors(4))
    monkeypatch.setenv("program", " ".join(COMMAND))
    monkeypatch.setenv("scan", f"{' '.join(COMMAND)} scan {model} --name x --top-percent 50 -q")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    def run(options: str, script: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("mounted")
        command = ["unshare", "-m", "bash", "-c", f"{_MOUNT} && {script}", options, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert "Traceback" not in done.stderr
        assert done.returncode in (0, 1, 2), done.stderr
        if done.returncode:
            assert done.stderr.count("error: ") == 1
        return done

    return run


@pytest.mark.parametrize("kilobytes", [8, 72, 200])
def test_scan_on_a_small_disk_ends_with_a_sentence_and_goes_on_with_more_room(run: Run, kilobytes: int) -> None:
    done = run(f"size={kilobytes}k", "$scan; first=$?; mount -o remount,size=20m . && $scan && exit $first")
    assert done.returncode == 0 or "(unwritable)" in done.stderr or "(disk_full)" in done.stderr


@pytest.mark.parametrize("inodes", [3, 5, 7])
def test_scan_on_a_disk_with_few_inodes_ends_with_a_sentence(run: Run, inodes: int) -> None:
    done = run(f"nr_inodes={inodes}", "$scan; first=$?; ls -A model_snr_results 2>/dev/null | grep tmp; exit $first")
    assert done.returncode == 0 or "(unwritable)" in done.stderr
    assert done.stdout == ""


def test_scan_on_a_read_only_disk_is_an_error(run: Run) -> None:
    assert "(unwritable)" in run("size=10m", "mount -o remount,ro . && $scan").stderr


@pytest.mark.parametrize(
    "odd",
    [
        "mount -t tmpfs -o size=1k tmpfs /proc",
        "mount -t tmpfs -o size=1k tmpfs /sys",
        "mount -t tmpfs -o ro tmpfs /dev/shm",
        "mkdir model_snr_results && mount -t tmpfs -o size=5m tmpfs model_snr_results",
        "mkdir disk && mount -t tmpfs -o size=5m,noexec,nosuid,nodev tmpfs disk && ln -s disk model_snr_results",
    ],
)
def test_scan_works_without_some_file_systems_and_across_them(run: Run, odd: str) -> None:
    assert run("size=10m", f"{odd} && $scan").returncode == 0


def test_scan_without_devices_is_an_error(run: Run) -> None:
    # torch needs /dev/urandom.
    assert "(no_torch)" in run("size=10m", "mount -t tmpfs -o size=1k tmpfs /dev && $scan").stderr


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("$program report $result -o page.html", "unwritable"),
        ("$program select $result --top-percent 5 -o /dev/full", "unwritable"),
        ("$program report $result -o model_snr_results/snr_results_x.sqlite", "conflicting_options"),
        (
            "ln -s model_snr_results/snr_results_x.sqlite l && $program select $result --top-percent 5 -o l",
            "conflicting_options",
        ),
    ],
)
def test_output_on_a_full_disk_or_over_a_record_is_an_error(run: Run, script: str, reason: str) -> None:
    fill = "dd if=/dev/zero of=fill bs=1k 2>/dev/null" if "page" in script else ":"
    before = "$scan && result=model_snr_results/snr_results_x.json && cp -r model_snr_results before"
    done = run(
        "size=2m", f"{before} && {{ {fill}; {script}; }}; last=$?; diff -r model_snr_results before && exit $last"
    )
    assert f"({reason})" in done.stderr
