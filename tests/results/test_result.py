"""`Result.open`, and a result by another metric."""

import json
import math
import os
import shutil
import sqlite3
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from spectrum_stream import scan
from spectrum_stream.cli.app import main
from spectrum_stream.errors import FileError, ResultError
from spectrum_stream.files import FileKind
from spectrum_stream.numerics.metrics import METRICS, SPECTRUM, metric_of, random_value
from spectrum_stream.numerics.precision import Precision
from spectrum_stream.results.journal import Journal
from spectrum_stream.results.record import Record, open_records, record_path
from spectrum_stream.results.result import Module, Result, _read, modules_of, write_results
from spectrum_stream.selection.select import choose, select

from ..support.checkpoints import FUSED_EXPERTS, GOLDEN, TIED, Save, fused_experts, llama_tensors
from ..support.cli import Cli
from ..support.records import IDENTITY, change_record, change_scores, read_all, record

RESULT = Path("model_snr_results/snr_results_x.json")
RECORD = record_path(RESULT)
FUSED = {"model.layers.0.mlp.experts.gate_up_proj": torch.randn(5, 12, 24, generator=torch.manual_seed(1))}

pytestmark = pytest.mark.usefixtures("working_folder")


@pytest.fixture
def scanned(save: Save, working_folder: Path) -> Path:
    scan(str(save(llama_tensors(3, head=False), config=TIED)), name="x")
    return RESULT


@pytest.fixture
def scanned_experts(save: Save, working_folder: Path) -> Path:
    scan(str(save(llama_tensors(4) | FUSED)), name="x")
    return RESULT


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


def reason(path: Path) -> str:
    with pytest.raises((FileError, ResultError)) as error:
        Result.open(path)
    return error.value.reason


def reason_by(path: Path, metric: str = "alpha") -> str:
    result = Result.open(path)
    with pytest.raises(ResultError) as error:
        result.by(METRICS[metric])
    return error.value.reason


def reason_of_record(path: Path) -> str:
    with pytest.raises(ResultError) as error:
        read_all(path)
    return error.value.reason


def scores(modules: tuple[Module, ...]) -> list[tuple[str, str, float | None]]:
    return [(module.name, module.group, module.value) for module in modules]


def scores_in(path: Path) -> list[tuple[str, str, float]]:
    return [(name, entry["type"], entry["snr"]) for name, entry in json.loads(path.read_text()).items()]


# A result with its record


@pytest.mark.parametrize("path", [RESULT, RECORD])
def test_open_adds_the_data_of_the_record(scanned: Path, path: Path, tmp_path: Path) -> None:
    before = state(scanned.parent)
    result = Result.open(path)
    modules = {module.name: module for module in result.modules}
    name = "model.layers.1.mlp.down_proj"
    assert scores(result.modules) == scores_in(scanned)
    assert result.path == RESULT
    assert result.notes == ()
    assert result.model == str((tmp_path / "model").resolve())
    assert modules[name].parameter == f"{name}.weight"
    assert modules[name].numel == 32 * 96
    assert modules["lm_head"].shares == "model.embed_tokens"
    assert modules["model.embed_tokens"].shares is None
    assert result.covered is not None
    assert 0.9 < result.covered <= 1
    assert result.diagnostics().keys() == modules.keys()
    assert state(scanned.parent) == before


def test_open_counts_a_scan_of_some_groups_as_a_part(save: Save) -> None:
    scan(str(save(llama_tensors(2))), name="x", groups=["mlp.*"])
    covered = Result.open(RESULT).covered
    assert covered is not None
    assert 0 < covered < 1


def test_open_without_a_record_has_only_scores(scanned: Path) -> None:
    RECORD.unlink()
    result = Result.open(scanned)
    assert result.notes == ()
    assert {(module.parameter, module.numel, module.shares) for module in result.modules} == {(None, None, None)}
    assert result.model is None
    assert result.covered is None
    assert result.diagnostics() == {}


def test_open_ignores_a_record_with_other_scores(scanned: Path) -> None:
    change_scores(scanned, {"model.norm": 7.5})
    result = Result.open(scanned)
    assert scores(result.modules) == scores_in(scanned)
    assert len(result.notes) == 1
    assert result.model is None
    assert result.diagnostics() == {}
    assert {module.parameter for module in result.modules} == {None}
    assert choose(scanned, select(scanned, 50).rule).result.notes == result.notes
    assert reason(RECORD) == "other_record"


def test_open_accepts_a_record_of_more_groups(scanned: Path) -> None:
    data = {module: entry for module, entry in json.loads(scanned.read_text()).items() if entry["type"] == "lm_head"}
    scanned.write_text(json.dumps(data))
    (head,) = Result.open(scanned).modules
    assert head.shares == "model.embed_tokens"
    assert head.numel == 128 * 32


def test_open_a_record_without_its_result_is_an_unfinished_scan(scanned: Path) -> None:
    scanned.unlink()
    assert reason(RECORD) == "unfinished"
    RECORD.unlink()
    assert reason(RECORD) == "no_such_result"


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", None])
def test_open_a_damaged_record_is_a_note_or_an_error(scanned: Path, content: bytes | None) -> None:
    RECORD.write_bytes(RECORD.read_bytes()[:5000] if content is None else content)
    assert reason_of_record(RECORD) == "corrupt"
    assert reason(RECORD) == "corrupt"
    assert reason_by(scanned) == "corrupt"
    result = Result.open(scanned)
    assert len(result.notes) == 1
    assert scores(result.modules) == scores_in(scanned)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE matrices SET n = 'many'",
        "UPDATE matrices SET tensor = 7, parameter = x'00'",
        "UPDATE matrices SET no_score = 'odd'",
        "UPDATE source SET value = '[1]'",
        "UPDATE source SET value = '{\"shards\": [1]}'",
        "DELETE FROM source",
        "DROP TABLE matrices",
    ],
)
def test_open_a_record_with_other_contents_is_an_error(scanned: Path, damage: str) -> None:
    change_record(RECORD, damage)
    for leftover in RECORD.parent.glob("*.sqlite-*"):
        leftover.unlink()
    assert reason(RECORD) == "corrupt"
    assert len(Result.open(scanned).notes) == 1


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=20))
def test_open_a_record_with_broken_bytes_fails_or_agrees_with_the_result(
    scanned: Path, tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(RECORD.read_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    (tmp_path / "a.json").write_bytes(scanned.read_bytes())
    (tmp_path / "a.sqlite").write_bytes(content)
    try:
        result = Result.open(tmp_path / "a.sqlite")
    except ResultError as error:
        assert error.reason in ("corrupt", "other_record")
    else:
        assert scores(result.modules) == scores_in(scanned)


def test_open_a_record_of_another_version_is_an_error(scanned: Path) -> None:
    change_record(RECORD, "PRAGMA user_version = 1")
    assert reason(RECORD) == "corrupt"


def test_open_during_a_scan_neither_reads_nor_disturbs_its_record(scanned: Path) -> None:
    records = read_all(RECORD)
    with open_records(RECORD) as opened:
        identity = opened.identity
    with Journal(RECORD, identity) as journal:
        journal.reuse({}, {}, lambda record: record.module == "model.norm")
        before = state(scanned.parent)
        assert reason_of_record(RECORD) == "locked"
        assert state(scanned.parent) == before
        assert Result.open(scanned).notes
        assert reason(RECORD) == "locked"
        assert reason_by(scanned) == "locked"
        journal.add(records["model.norm"])
    assert read_all(RECORD).keys() == records.keys()


def test_open_the_rest_of_a_killed_scan_is_an_error(scanned: Path, tmp_path: Path) -> None:
    shutil.copy(RECORD, tmp_path / "a.sqlite")
    (tmp_path / "a.sqlite-wal").write_bytes(b"rows")
    assert reason_of_record(tmp_path / "a.sqlite") == "locked"


def test_records_are_read_with_and_without_their_singular_values(scanned: Path) -> None:
    full, short = read_all(RECORD), read_all(RECORD, spectra=False)
    name = "model.layers.1.mlp.down_proj"
    assert full[name].singular_values.shape == (32,)
    assert short[name].singular_values.size == 0
    assert full[name].score == short[name].score


def test_records_without_a_file_are_an_error() -> None:
    with pytest.raises(ResultError) as error, Result((Module("a", "a", 1.0),)).records():
        pass
    assert error.value.reason == "no_record"


def test_of_accepts_a_result_a_path_or_modules(scanned: Path) -> None:
    result = Result.open(scanned)
    assert Result.of(result) is result
    assert Result.of(scanned) == Result.of(str(scanned)) == result
    assert Result.of(iter(result.modules)) == Result(result.modules)


def test_select_opens_a_result_and_its_record_once_and_no_spectrum(
    scanned_experts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, bool]] = []

    def count_result(path: Path) -> Any:
        opened.append((path.suffix, False))
        return _read(path)

    def count_record(path: Path, *, spectra: bool = True) -> Any:
        opened.append((path.suffix, spectra))
        return open_records(path, spectra=spectra)

    monkeypatch.setattr("spectrum_stream.results.result._read", count_result)
    monkeypatch.setattr("spectrum_stream.results.result.open_records", count_record)
    args = ["spectrum-stream", "select", str(scanned_experts), "--top-percent", "50"]
    monkeypatch.setattr("sys.argv", args)
    assert main() == 0
    assert opened == [(".json", False), (".sqlite", False)]
    opened.clear()
    monkeypatch.setattr("sys.argv", [*args, "--metric", "alpha"])
    assert main() == 0
    assert opened == [(".json", False), (".sqlite", False), (".sqlite", True)]


# The JSON alone


def test_open_notes_the_schema_of_sorted_files() -> None:
    result = Result.open(GOLDEN / "smollm2_sorted.json")
    assert len(result.notes) == 1
    assert set(scores(result.modules)) == set(scores(Result.open(GOLDEN / "snr_results_smollm2.json").modules))


def test_open_ranks_infinity_first_and_nan_last(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"a": {"snr": Infinity, "type": "g"}, "b": {"snr": NaN, "type": "g"}}')
    modules = Result.open(path).modules
    assert modules == (Module("a", "g", math.inf), Module("b", "g", None))
    assert [module.rank_key for module in modules] == [math.inf, -math.inf]


def test_open_ranks_an_integer_beyond_all_floats_first(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"a": {"snr": 1%s, "type": "a"}}' % ("0" * 400))
    assert Result.open(tmp_path / "r.json").modules == (Module("a", "a", math.inf),)


def test_open_reads_the_sorted_schema(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"g": {"layers.1.g": 2.5, "layers.0.g": Infinity}}')
    assert Result.open(path).modules == (Module("layers.1.g", "g", 2.5), Module("layers.0.g", "g", math.inf))


@pytest.mark.parametrize(
    "text",
    ["", "\r\n", "[]", "{}", "null", "3", '{"a": 1}', '{"a": {"snr": "x", "type": "g"}}', "[" * 100_000, "{", "\xff"],
)
def test_open_rejects_a_file_that_is_not_a_result(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text, encoding="latin-1")
    assert reason(tmp_path / "r.json") == "not_a_result"


@pytest.mark.parametrize("path", ["r.json", "r.sqlite"])
def test_open_reports_a_missing_file(tmp_path: Path, path: str) -> None:
    assert reason(tmp_path / path) == "no_such_result"


@pytest.mark.parametrize("path", [".", "..", "/"])
def test_open_reports_a_folder(path: str) -> None:
    assert reason(Path(path)) == "not_a_file"


def test_open_rejects_a_result_above_the_size_limit(tmp_path: Path) -> None:
    (tmp_path / "r.json").touch()
    os.truncate(tmp_path / "r.json", FileKind.RESULT.max_nbytes + 1)
    assert reason(tmp_path / "r.json") == "file_too_large"


@pytest.mark.slow
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda c: st.dictionaries(st.text(), c)))
def test_open_reads_or_rejects_any_json(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(data))
    try:
        assert Result.open(path).modules
    except ResultError as error:
        assert error.reason == "not_a_result"


@pytest.mark.parametrize(("module", "group"), [("a\ud800", "b"), ("a", "\udfffb")])
def test_open_rejects_half_a_surrogate_pair_in_a_name(tmp_path: Path, module: str, group: str) -> None:
    path = tmp_path / "snr_results_x.json"
    for text in ({module: {"snr": 1.0, "type": group}}, {group: {module: 1.0}}):
        path.write_text(json.dumps(text))
        assert reason(path) == "not_a_result"


def test_write_results_is_read_back(tmp_path: Path) -> None:
    records = [record("head", "head"), record()]
    write_results(tmp_path / "r.json", records)
    expected = [(r.module, r.group, r.score.snr) for r in records if r.score]
    assert scores(Result.open(tmp_path / "r.json").modules) == expected


# Records to modules


def test_modules_of_gives_a_tied_head_the_embeddings_parameter(scanned: Path) -> None:
    records = list(read_all(RECORD).values())
    for order in (records, records[::-1]):
        shares = {module.name: module.shares for module in modules_of(order) if module.shares}
        assert shares == {"lm_head": "model.embed_tokens"}


def test_modules_of_makes_fused_experts_one_module(save: Save) -> None:
    scan(str(save(fused_experts())), name="x")
    fused = next(module for module in Result.open(RESULT).modules if module.name == FUSED_EXPERTS)
    assert fused.parameter == FUSED_EXPERTS
    assert fused.numel == fused_experts()[FUSED_EXPERTS].numel()
    assert fused.shares is None


@pytest.mark.parametrize(
    ("module", "parameter"),
    [
        ("a.mlp.experts.down_proj", "a.mlp.experts.down_proj"),
        ("a.mlp.experts.0.down_proj", "a.mlp.experts.0.down_proj.weight"),
        ("a.mlp.experts.0", "a.mlp.experts.0.weight"),
        ("experts", "experts.weight"),
        ("a.up", "a.up.weight"),
    ],
)
def test_parameter_name_is_the_likely_one_without_a_record(module: str, parameter: str) -> None:
    assert Module(module, "g", 1.0).parameter_name == parameter


def test_parameter_name_is_the_one_of_the_record() -> None:
    assert Module("a", "g", 1.0, "b").parameter_name == "b"


def test_rank_key_is_the_largest_for_the_first_choice() -> None:
    assert Module("a", "g", 2.0).rank_key == 2.0
    assert Module("a", "g", 2.0, larger_first=False).rank_key == -2.0
    for larger_first in (True, False):
        assert Module("a", "g", None, larger_first=larger_first).rank_key == -math.inf


# By another metric


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_by_keeps_the_modules_in_the_order_of_the_result(scanned_experts: Path, metric: Any) -> None:
    result = Result.open(scanned_experts)
    found = result.by(metric)
    assert [(m.name, m.group, m.parameter) for m in found.modules] == [
        (m.name, m.group, m.parameter) for m in result.modules
    ]
    assert found.metric == metric
    assert (found.model, found.covered, found.parameters) == (result.model, result.covered, result.parameters)
    assert bool(found.diagnostics()) == (metric == SPECTRUM)


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("spectrum", "random")])
def test_by_gives_the_values_of_the_weights(scanned_experts: Path, name: str) -> None:
    metric, weights = METRICS[name], llama_tensors(4)
    assert metric.of_spectrum is not None
    modules = {module.name: module for module in Result.open(scanned_experts).by(metric).modules}
    for module in ("model.layers.2.mlp.up_proj", "lm_head", "model.layers.1.self_attn.v_proj"):
        w = weights[f"{module}.weight"].double()
        expected = metric.of_spectrum(torch.linalg.svdvals(w).numpy(), *w.shape)
        assert modules[module].value == pytest.approx(expected, rel=1e-3), module
        assert modules[module].rank_key == metric.rank_key(modules[module].value)
        assert modules[module].numel == w.numel()


def test_by_gives_fused_experts_the_median_of_their_values(scanned_experts: Path) -> None:
    ranks = [
        float((r.singular_values**2).sum() / r.singular_values[0] ** 2)
        for r in read_all(RECORD).values()
        if ".experts." in r.module
    ]
    assert len(ranks) == 5
    modules = Result.open(scanned_experts).by(METRICS["stable-rank"]).modules
    (fused,) = (module for module in modules if "experts" in module.name)
    assert fused.value == pytest.approx(statistics.median(ranks))
    assert fused.numel == 5 * 12 * 24


def test_by_random_needs_no_record_and_depends_on_its_seed(scanned_experts: Path) -> None:
    RECORD.unlink()
    result = Result.open(scanned_experts)
    found = result.by(metric_of("random:7"))
    assert [m.value for m in found.modules] == [random_value(7, m.name) for m in found.modules]
    assert result.by(SPECTRUM) is result


def test_by_another_metric_and_back_is_the_same(scanned_experts: Path) -> None:
    result = Result.open(scanned_experts)
    assert result.by(METRICS["alpha"]).by(SPECTRUM).modules == result.modules


def test_by_leaves_out_groups_that_the_result_does_not_have(scanned_experts: Path) -> None:
    data = json.loads(scanned_experts.read_text())
    few = {name: entry for name, entry in data.items() if entry["type"] == "mlp.up_proj"}
    scanned_experts.write_text(json.dumps(few))
    assert {m.group for m in Result.open(scanned_experts).by(METRICS["alpha"]).modules} == {"mlp.up_proj"}


def test_by_rejects_a_record_that_lacks_a_module(scanned_experts: Path) -> None:
    data = json.loads(scanned_experts.read_text())
    scanned_experts.write_text(json.dumps(data | {"model.layers.9.up": {"snr": 1.0, "type": "up"}}))
    assert reason_by(scanned_experts) == "other_record"


def test_by_rejects_a_record_that_changed_after_open(scanned_experts: Path) -> None:
    result = Result.open(scanned_experts)
    change_record(RECORD, "DELETE FROM matrices WHERE module = 'lm_head'")
    with pytest.raises(ResultError) as error:
        result.by(METRICS["alpha"])
    assert error.value.reason == "other_record"


def test_by_needs_a_record(scanned_experts: Path) -> None:
    RECORD.unlink()
    assert reason_by(scanned_experts) == "no_record"


def test_by_does_not_change_the_files(scanned_experts: Path) -> None:
    before = state(scanned_experts.parent)
    Result.open(scanned_experts).by(METRICS["alpha"])
    assert state(scanned_experts.parent) == before


def test_by_does_not_read_a_record_that_a_scan_holds(scanned_experts: Path) -> None:
    with sqlite3.connect(RECORD, isolation_level=None) as db:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE matrices SET detail = 'x'")
        assert reason_by(scanned_experts) == "locked"
        db.execute("ROLLBACK")
    db.close()


@pytest.mark.parametrize(
    ("precision", "has_value"),
    [(Precision.FP32, False), (Precision.MIXED, False), (Precision.FP64, True), (Precision.SVD, True)],
)
def test_by_condition_has_no_value_beyond_float32(tmp_path: Path, precision: Precision, has_value: bool) -> None:
    hard = replace(record("0.up", s=np.array([1.0, 0.5, 1e-4])), precision=precision)
    easy = replace(record("1.up", s=np.array([1.0, 0.5])), precision=precision)
    path = tmp_path / "r.json"
    with Journal(record_path(path), IDENTITY) as journal:
        journal.add(hard)
        journal.add(easy)
    write_results(path, [hard, easy])
    first, second = Result.open(path).by(METRICS["condition"]).modules
    assert first.value == (pytest.approx(1e4) if has_value else None)
    assert first.rank_key == (pytest.approx(-1e4) if has_value else -math.inf)
    assert second.value == 2


@pytest.mark.parametrize(
    ("broken", "expected"), [(0, False), (1, False), (2, True), (3, True)], ids=["none", "one", "two", "three"]
)
def test_diagnostics_of_fused_experts_are_degenerate_with_half_of_them(broken: int, expected: bool) -> None:
    fused, signal = "layers.0.experts.up", np.array([5.0, 4.9, 4.8, 4.7, 4.6])
    noise = np.array([10.0, 4.0, 3.0, 2.0, 1.0])
    experts = [record(f"{fused}.{e}", s=signal if e < broken else noise, parameter=fused) for e in range(4)]
    assert Result.from_records(experts).diagnostics()[fused].degenerate is expected


def test_diagnostics_of_fused_experts_are_inexact_with_one_of_them() -> None:
    fused = "layers.0.experts.up"
    experts = [record(f"{fused}.{e}", parameter=fused) for e in range(4)]
    assert not Result.from_records(experts).diagnostics()[fused].inexact
    assert experts[1].score is not None
    experts[1] = replace(experts[1], score=replace(experts[1].score, error=1e-3))
    assert Result.from_records(experts).diagnostics()[fused].inexact


# Untrusted records


@pytest.mark.parametrize("pooled", [False, True])
def test_commands_use_no_record_with_other_scores(cli: Cli, save: Save, pooled: bool) -> None:
    apart = {
        f"model.layers.1.mlp.experts.{i}.up_proj.weight": torch.randn(12, 24, generator=torch.manual_seed(i))
        for i in range(3)
    }
    scan(str(save(llama_tensors(2) | FUSED | apart)), name="x", experts="pooled" if pooled else "separate")
    good = RESULT.read_bytes()
    for module in ("lm_head", "model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.1.up_proj"):
        RESULT.write_bytes(good)
        change_scores(RESULT, {module: 1.5})
        assert reason_by(RESULT) == "other_record"
        for args in (("select", RESULT, "--top-percent", "50"), ("compare", RESULT)):
            assert "(other_record)" in cli(*args, "--metric", "alpha", code=1).stderr
        data = json.loads(cli("select", RESULT, "--top-percent", "50", "--json").stdout)
        assert {d["degenerate"] for d in data["diagnostics"].values()} == {None}
        (shown,) = json.loads(cli("report", RESULT, "--json").stdout)["results"]
        assert "other scores" in shown["notes"][0]
        assert {m["n"] for m in shown["modules"]} == {None}
    RESULT.write_bytes(good)
    assert Result.open(RESULT).by(METRICS["alpha"])


CORRUPTIONS = [
    *(
        f"UPDATE matrices SET {column} = 'x'"
        for column in ("n", "compute_s", "snr", "sigma", "tau", "margin", "error")
    ),
    *(f"UPDATE matrices SET {column} = 5" for column in ("parameter", "tensor", "precision", "quantized", "device")),
    *(f"UPDATE matrices SET {column} = NULL" for column in ("n", "group_name", "snr", "above", "detail", "dtype")),
    *(f"UPDATE matrices SET {column} = NULL" for column in ("parameter", "error")),
    *(f"UPDATE matrices SET {column} = x'ff00'" for column in ("precision", "tau", "no_score", "degeneracy")),
    "UPDATE matrices SET module = x'ff00' WHERE rowid = 1",
    "UPDATE matrices SET n = 0",
    "UPDATE matrices SET n = -n",
    "UPDATE matrices SET n = n + 1, m = m + 1",
    "UPDATE matrices SET group_name = 1",
    "UPDATE matrices SET no_score = 'fine'",
    "UPDATE matrices SET degeneracy = 'a little'",
    "UPDATE matrices SET snr = 9e999",
    "UPDATE matrices SET tau = 9e999",
    "UPDATE matrices SET above = 1000000",
    "UPDATE matrices SET module = CAST(x'eda080' AS TEXT) WHERE rowid = 1",
    "UPDATE matrices SET singular_values = 'x'",
    "UPDATE matrices SET singular_values = 'text'",
    "UPDATE matrices SET singular_values = x'00'",
    "UPDATE matrices SET singular_values = x'0000'",
    "UPDATE matrices SET singular_values = NULL",
    "UPDATE matrices SET singular_values = zeroblob(length(singular_values) - 4) || x'0000c0bf'",
    "UPDATE matrices SET singular_values = zeroblob(length(singular_values) - 4) || x'0000803f'",
    "UPDATE matrices SET singular_values = zeroblob(length(singular_values) - 4) || x'0000c07f'",
    f"UPDATE source SET value = '{'[' * 10_000}' WHERE key = 'identity'",
    f"UPDATE source SET value = '{'[' * 10_000}' WHERE key = 'names'",
    "UPDATE source SET value = '{\"a\": 1}' WHERE key = 'names'",
    "UPDATE source SET value = json_set(value, '$.shards', json('{\"a\": \"b\"}')) WHERE key = 'identity'",
    f"UPDATE source SET value = json_set(value, '$.shards', json('{{\"a\": 1{'0' * 400}}}')) WHERE key = 'identity'",
    "UPDATE source SET value = json_set(value, '$.path', 7) WHERE key = 'identity'",
    "UPDATE source SET value = '[]'",
    "UPDATE source SET value = '{}'",
    """UPDATE source SET value = '{"path": 1, "commit": null, "shards": {}, "versions": {}, "engine": 3}'""",
    "UPDATE source SET value = 'x'",
    "DELETE FROM source",
    "DROP TABLE matrices",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scan once, and return the result with its record."""
    folder = tmp_path_factory.mktemp("whole")
    save_file(llama_tensors(2) | FUSED, folder / "model.safetensors")
    scan(str(folder), name="org/x", out=folder / "out")
    return folder / "out" / "snr_results_org-x.json"


@pytest.mark.parametrize("change", CORRUPTIONS)
def test_commands_accept_or_reject_any_untrusted_record(cli: Cli, whole: Path, change: str) -> None:
    result = Path(whole.name)
    for path in (whole, record_path(whole)):
        Path(path.name).write_bytes(path.read_bytes())
    assert change_record(record_path(result), change) != 0
    assert reason_by(result) == "corrupt"
    # These commands work without the record.
    cli("select", result, "--top-percent", "50")
    (shown,) = json.loads(cli("report", result, "--json").stdout)["results"]
    assert shown["notes"]
    assert {m["n"] for m in shown["modules"]} == {None}
    for args in (
        ("select", result, "--top-percent", "50", "--metric", "alpha"),
        ("compare", result, "--metric", "alpha"),
        ("check", result, "--write-provenance", "--model", "org/x"),
    ):
        assert "(corrupt)" in cli(*args, code=1).stderr, args
    findings = json.loads(cli("check", result, "--json", code=1).stdout)["files"]
    assert "bad_record" in {finding["reason"] for found in findings.values() for finding in found}
    # These commands do not read the spectra, so scores and sizes can still be valid.
    is_spectrum = "singular_values" in change or change == "UPDATE matrices SET n = n + 1, m = m + 1"
    if not is_spectrum:
        assert "(corrupt)" in cli("select", record_path(result), "--top-percent", "50", code=1).stderr


def test_value_of_a_record_without_a_score_is_none() -> None:
    failed: Record = replace(record(), score=None, singular_values=np.empty(0, np.float32))
    assert {failed.value_of(metric) for metric in METRICS.values()} == {None}
