"""The command `check`."""

import json
from pathlib import Path

import pytest

from spectrum_stream import scan

from ..support.checkpoints import Save, llama_tensors
from ..support.cli import Cli, reason

RESULT = Path("model_snr_results/snr_results_org-x.json")


@pytest.fixture(autouse=True)
def _scanned(save: Save, working_folder: Path) -> None:
    scan(str(save(llama_tensors(2))), name="org/x")


def test_check_accepts_a_contribution_with_its_provenance(cli: Cli) -> None:
    done = cli("check", RESULT, code=1)
    assert "(no_provenance)" in done.stdout
    done = cli("check", RESULT, "--write-provenance", "--model", "org/x")
    assert f"{RESULT}: OK" in done.stdout
    assert "next: spectrum-stream select" in done.stdout
    cli("check", RESULT, "-q")


def test_check_lists_every_finding_of_every_file(cli: Cli) -> None:
    cli("check", RESULT, "--write-provenance", "--model", "org/x")
    other = RESULT.with_name("snr_results_other.json")
    other.write_text('{"a.1.b": {"snr": -1, "type": "c"}}')
    done = cli("check", RESULT, other, code=1)
    assert f"{RESULT}: OK" in done.stdout
    assert all(f"({why})" in done.stdout for why in ("negative", "wrong_group", "no_provenance"))
    data = json.loads(cli("check", RESULT, other, "--json", code=1).stdout)
    assert data["files"][str(RESULT)] == []
    assert [fault["reason"] for fault in data["files"][str(other)]] == ["negative", "wrong_group", "no_provenance"]


def test_check_shows_hostile_names_inert(cli: Cli) -> None:
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
def test_check_rejects_a_wrong_provenance(cli: Cli, args: list[str], code: int, why: str) -> None:
    assert reason(cli("check", RESULT, *args, code=code)) == why
