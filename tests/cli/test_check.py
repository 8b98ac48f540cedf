"""`check`, as typed."""

import json
from pathlib import Path

import pytest

from spectrum_stream import scan

from ..conftest import Save, llama_tensors
from .test_app import cli, reason

RESULT = Path("model_snr_results/snr_results_org-x.json")


@pytest.fixture(autouse=True)
def _scanned(save: Save, working_folder: Path) -> None:
    scan(str(save(llama_tensors(2))), name="org/x")


def test_a_contribution_from_the_scan_to_a_good_check() -> None:
    done = cli("check", RESULT, code=1)
    assert "(no_provenance)" in done.stdout
    done = cli("check", RESULT, "--write-provenance", "--model", "org/x")
    assert f"{RESULT}: good" in done.stdout and "next: spectrum-stream select" in done.stdout
    cli("check", RESULT, "-q")


def test_every_file_is_checked_and_every_fault_listed() -> None:
    cli("check", RESULT, "--write-provenance", "--model", "org/x")
    other = RESULT.with_name("snr_results_other.json")
    other.write_text('{"a.1.b": {"snr": -1, "type": "c"}}')
    done = cli("check", RESULT, other, code=1)
    assert f"{RESULT}: good" in done.stdout
    assert all(f"({why})" in done.stdout for why in ("negative", "wrong_group", "no_provenance"))
    data = json.loads(cli("check", RESULT, other, "--json", code=1).stdout)
    assert data["files"][str(RESULT)] == []
    assert [fault["reason"] for fault in data["files"][str(other)]] == ["negative", "wrong_group", "no_provenance"]


def test_names_in_a_result_cannot_reach_the_terminal() -> None:
    RESULT.write_text(json.dumps({"a\x1b[2J": {"snr": -1, "type": "\x1b]0;x\x07"}}))
    assert "\x1b" not in cli("check", RESULT, code=1).stdout


@pytest.mark.parametrize(
    ("args", "code", "why"),
    [
        (["--write-provenance"], 2, "no_model"),
        (["--write-provenance", "--model", "org/y"], 2, "other_model"),
        (["--model", "org/x"], 2, "conflicting_options"),
        ([str(RESULT), "--write-provenance", "--model", "org/x"], 2, "conflicting_options"),
    ],
)
def test_a_provenance_that_cannot_be_written(args: list[str], code: int, why: str) -> None:
    assert reason(cli("check", RESULT, *args, code=code)) == why
