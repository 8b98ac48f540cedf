import json
import math
import sqlite3
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spectrum_stream import scan
from spectrum_stream.errors import ResultError
from spectrum_stream.numerics.metrics import MEASURES, Metric, random_value
from spectrum_stream.numerics.precision import Precision
from spectrum_stream.results.remeasuring import measured, read_recorded, record_path
from spectrum_stream.results.result import read_results

from ..support.checkpoints import Save, llama_tensors
from ..support.cli import Cli, reason
from ..support.records import record

RESULT = Path("model_snr_results/snr_results_x.json")

pytestmark = pytest.mark.usefixtures("working_folder")


@pytest.fixture
def scanned(save: Save, working_folder: Path) -> Path:
    bank = {"model.layers.0.mlp.experts.gate_up_proj": torch.randn(5, 12, 24, generator=torch.manual_seed(1))}
    scan(str(save(llama_tensors(4) | bank)), name="x")
    return RESULT


@pytest.mark.parametrize("metric", Metric)
def test_lines_are_those_of_the_result_in_its_order(scanned: Path, metric: Metric) -> None:
    lines = measured(scanned, metric)
    assert [(line.name, line.group) for line in lines] == [(r.name, r.group) for r in read_results(scanned)]


@pytest.mark.parametrize("metric", [m for m in Metric if m not in (Metric.SPECTRUM, Metric.RANDOM)])
def test_what_is_stored_measures_as_the_weights_do(save: Save, scanned: Path, metric: Metric) -> None:
    measure, tensors = MEASURES[metric], llama_tensors(4)
    assert measure.of_spectrum is not None
    lines = {line.name: line for line in measured(scanned, metric)}
    for module in ("model.layers.2.mlp.up_proj", "lm_head", "model.layers.1.self_attn.v_proj"):
        w = tensors[f"{module}.weight"].double()
        expected = measure.rank_key(measure.of_spectrum(torch.linalg.svdvals(w).numpy(), *w.shape))
        assert lines[module].snr == pytest.approx(expected, rel=1e-3), module
        assert lines[module].parameter == f"{module}.weight" and lines[module].numel == w.numel()


def test_a_bank_has_the_median_of_its_experts(scanned: Path) -> None:
    records = read_recorded(record_path(scanned)).records
    ranks = [-_stable_rank(r.singular_values) for r in records if ".experts." in r.module]
    assert len(ranks) == 5
    (line,) = (line for line in measured(records, Metric.STABLE_RANK) if "experts" in line.name)
    assert line.snr == pytest.approx(statistics.median(ranks)) and line.numel == 5 * 12 * 24


def _stable_rank(s: np.ndarray) -> float:
    return float((s**2).sum() / s[0] ** 2)


def test_chance_needs_no_record_and_knows_its_seed(scanned: Path) -> None:
    record_path(scanned).unlink()
    lines = measured(scanned, Metric.RANDOM, 7)
    assert [line.snr for line in lines] == [random_value(7, line.name) for line in lines]
    assert measured(scanned, Metric.SPECTRUM) == read_results(scanned)


def test_a_result_of_some_groups_has_no_others(scanned: Path) -> None:
    few = {name: entry for name, entry in json.loads(scanned.read_text()).items() if entry["type"] == "mlp.up_proj"}
    scanned.write_text(json.dumps(few))
    assert {line.group for line in measured(scanned, Metric.ALPHA)} == {"mlp.up_proj"}


def refused(reason: str, result: Path) -> None:
    with pytest.raises(ResultError) as error:
        measured(result, Metric.ALPHA)
    assert error.value.reason == reason


def test_a_record_of_other_modules(scanned: Path) -> None:
    lines = json.loads(scanned.read_text())
    scanned.write_text(json.dumps(lines | {"model.layers.9.up": {"snr": 1.0, "type": "up"}}))
    refused("other_record", scanned)


def test_no_record(scanned: Path) -> None:
    record_path(scanned).unlink()
    refused("no_record", scanned)


@pytest.mark.parametrize("damage", [b"", b"no database", None])
def test_a_record_that_is_none(scanned: Path, damage: bytes | None) -> None:
    if damage is None:
        with sqlite3.connect(record_path(scanned)) as db:
            db.execute("PRAGMA user_version = 1")
        db.close()
    else:
        record_path(scanned).write_bytes(damage)
    refused("corrupt", scanned)


def test_reading_a_record_changes_nothing(scanned: Path) -> None:
    folder = scanned.parent
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    measured(scanned, Metric.ALPHA)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_record_that_a_scan_holds_is_locked(scanned: Path) -> None:
    with sqlite3.connect(record_path(scanned), isolation_level=None) as db:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE matrices SET detail = 'x'")
        refused("locked", scanned)
        db.execute("ROLLBACK")
    db.close()


@pytest.mark.parametrize(
    ("precision", "known"), [(Precision.FP32, False), (Precision.FP64, True), (Precision.SVD, True)]
)
def test_a_condition_that_float32_cannot_tell_is_none(precision: Precision, known: bool) -> None:
    s = np.array([1.0, 0.5, 1e-4], dtype=np.float32)
    one = replace(record(), n=3, m=4, singular_values=s, precision=precision)
    (line,) = measured([one], Metric.CONDITION)
    assert line.snr == (pytest.approx(-1e4) if known else -math.inf)
    (line,) = measured([replace(one, singular_values=s[:2], n=2)], Metric.CONDITION)
    assert line.snr == -2


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE matrices SET n = 'x'",
        "UPDATE matrices SET n = 0",
        "UPDATE matrices SET n = n + 1, m = m + 1",
        "UPDATE matrices SET parameter = NULL",
        "UPDATE matrices SET group_name = 1",
        "UPDATE matrices SET snr = 'x'",
        "UPDATE matrices SET error = NULL",
        "UPDATE matrices SET no_score = 'fine'",
        "UPDATE matrices SET degeneracy = 'a little'",
        "UPDATE matrices SET singular_values = 'text'",
        "UPDATE matrices SET singular_values = x'0000'",
        "UPDATE matrices SET singular_values = zeroblob(length(singular_values) - 4) || x'0000c07f'",
        "UPDATE source SET value = '[]'",
        "UPDATE source SET value = '{}'",
        """UPDATE source SET value = '{"path": 1, "commit": null, "shards": {}, "versions": {}, "engine": 3}'""",
        "UPDATE source SET value = 'x'",
        "DELETE FROM source",
        "DROP TABLE matrices",
    ],
)
def test_a_record_with_what_no_scan_writes(scanned: Path, change: str) -> None:
    """It may come from a stranger; text where a number belongs must end in a sentence."""
    with sqlite3.connect(record_path(scanned)) as db:
        db.execute(change)
    db.close()
    refused("corrupt", scanned)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_record_of_other_scores_is_used_by_nobody(cli: Cli, save: Save, pooled: bool) -> None:
    tensors = llama_tensors(2) | {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(5, 12, 24, generator=torch.manual_seed(1))
    }
    for i in range(3):
        tensors[f"model.layers.1.mlp.experts.{i}.up_proj.weight"] = torch.randn(
            12, 24, generator=torch.manual_seed(i)
        )
    scan(str(save(tensors)), name="x", experts="pooled" if pooled else "separate")
    good = json.loads(RESULT.read_text())
    for module in ("lm_head", "model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.1.up_proj"):
        RESULT.write_text(json.dumps(good | {module: good[module] | {"snr": good[module]["snr"] * 1.5}}))
        refused("other_record", RESULT)
        for args in (("select", "--top-percent", "50"), ("compare",)):
            assert reason(cli(args[0], RESULT, *args[1:], "--metric", "alpha", code=1)) == "other_record"
        done = cli("select", RESULT, "--top-percent", "50", "--json")
        assert {d["degenerate"] for d in json.loads(done.stdout)["doubts"].values()} == {None}
        (shown,) = json.loads(cli("report", RESULT, "--json").stdout)["results"]
        assert "other scores" in shown["notes"][0] and {m["n"] for m in shown["modules"]} == {None}
    RESULT.write_text(json.dumps(good))
    assert measured(RESULT, Metric.ALPHA)


CORRUPTIONS = [
    *(
        f"UPDATE matrices SET {column} = 'x'"
        for column in ("n", "compute_s", "snr", "sigma", "tau", "margin", "error")
    ),
    *(f"UPDATE matrices SET {column} = 5" for column in ("parameter", "tensor", "precision", "quantized", "device")),
    *(f"UPDATE matrices SET {column} = NULL" for column in ("n", "group_name", "snr", "above", "detail", "dtype")),
    *(f"UPDATE matrices SET {column} = x'ff00'" for column in ("precision", "tau", "no_score", "degeneracy")),
    "UPDATE matrices SET module = x'ff00' WHERE rowid = 1",
    "UPDATE matrices SET n = 0",
    "UPDATE matrices SET n = -n",
    "UPDATE matrices SET snr = 9e999",
    "UPDATE matrices SET tau = 9e999",
    "UPDATE matrices SET above = 1000000",
    "UPDATE matrices SET module = CAST(x'eda080' AS TEXT) WHERE rowid = 1",
    "UPDATE matrices SET singular_values = 'x'",
    "UPDATE matrices SET singular_values = zeroblob(length(singular_values) - 4) || x'0000c0bf'",
    "UPDATE matrices SET singular_values = zeroblob(length(singular_values) - 4) || x'0000803f'",
    f"UPDATE source SET value = '{'[' * 10_000}' WHERE key = 'identity'",
    f"UPDATE source SET value = '{'[' * 10_000}' WHERE key = 'names'",
    "UPDATE source SET value = '{\"a\": 1}' WHERE key = 'names'",
    "UPDATE source SET value = json_set(value, '$.shards', json('{\"a\": \"b\"}')) WHERE key = 'identity'",
    f"UPDATE source SET value = json_set(value, '$.shards', json('{{\"a\": 1{'0' * 400}}}')) WHERE key = 'identity'",
    "UPDATE source SET value = json_set(value, '$.path', 7) WHERE key = 'identity'",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result and its record, scanned once."""
    folder = tmp_path_factory.mktemp("whole")
    bank = {"model.layers.0.mlp.experts.gate_up_proj": torch.randn(5, 12, 24, generator=torch.manual_seed(1))}
    save_file(llama_tensors(2) | bank, folder / "model.safetensors")
    scan(str(folder), name="org/x", out=folder / "out")
    return folder / "out" / "snr_results_org-x.json"


@pytest.mark.parametrize("change", CORRUPTIONS)
def test_no_command_trips_over_a_record_of_a_stranger(cli: Cli, whole: Path, change: str) -> None:
    result = Path(whole.name)
    for path in (whole, record_path(whole)):
        Path(path.name).write_bytes(path.read_bytes())
    with sqlite3.connect(record_path(result)) as db:
        assert db.execute(change).rowcount > 0
    db.close()
    refused("corrupt", result)
    # What needs no record does without.
    cli("select", result, "--top-percent", "50")
    (shown,) = json.loads(cli("report", result, "--json").stdout)["results"]
    assert shown["notes"] and {m["n"] for m in shown["modules"]} == {None}
    for args in (
        ("select", result, "--top-percent", "50", "--metric", "alpha"),
        ("compare", result, "--metric", "alpha"),
        ("check", result, "--write-provenance", "--model", "org/x"),
    ):
        assert "(corrupt)" in cli(*args, code=1).stderr, args
    faults = json.loads(cli("check", result, "--json", code=1).stdout)["files"]
    assert "bad_record" in {fault["reason"] for found in faults.values() for fault in found}
    # Its scores and sizes can be sound without its spectra, which this does not read.
    if "singular_values" not in change and "snr = NULL" not in change:
        assert "(corrupt)" in cli("select", record_path(result), "--top-percent", "50", code=1).stderr
