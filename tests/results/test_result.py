import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spectrum_stream import scan
from spectrum_stream.errors import ResultError
from spectrum_stream.results.journal import Journal
from spectrum_stream.results.record import read_records
from spectrum_stream.results.result import Module, lines_of, parameter_of, read_results, read_scored
from spectrum_stream.selection.select import choose, select

from ..support.checkpoints import FUSED_EXPERTS, GOLDEN, Save, fused_experts, llama_tensors

RESULT = Path("model_snr_results/snr_results_x.json")
RECORD = RESULT.with_suffix(".sqlite")
CONFIG = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}


@pytest.fixture(autouse=True)
def _in_working_folder(working_folder: Path) -> None:
    pass


@pytest.fixture
def scanned(save: Save) -> Path:
    scan(str(save(llama_tensors(3, head=False), config=CONFIG)), name="x")
    return RESULT


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


def reason(path: Path) -> str:
    with pytest.raises(ResultError) as error:
        read_scored(path)
    return error.value.reason


@pytest.mark.parametrize("path", [RESULT, RECORD])
def test_a_record_beside_a_result_names_and_sizes_its_parameters(scanned: Path, path: Path) -> None:
    before = state(scanned.parent)
    read = read_scored(path)
    lines = {line.name: line for line in read.modules}
    assert [line[:3] for line in read.modules] == [line[:3] for line in read_results(scanned)] and not read.notes
    name = "model.layers.1.mlp.down_proj"
    assert lines[name].parameter == f"{name}.weight" and lines[name].numel == 32 * 96
    assert lines["lm_head"].shares == "model.embed_tokens" and lines["model.embed_tokens"].shares is None
    assert read.covered is not None and 0.9 < read.covered <= 1
    assert state(scanned.parent) == before


def test_a_tied_head_shares_the_embeddings_parameter_and_not_the_other_way(scanned: Path) -> None:
    records = list(read_records(RECORD).values())
    for order in (records, records[::-1]):
        assert {line.name: line.shares for line in lines_of(order) if line.shares} == {
            "lm_head": "model.embed_tokens"
        }


def test_a_bank_is_one_parameter_of_all_its_experts(save: Save) -> None:
    scan(str(save(fused_experts())), name="x")
    bank = next(line for line in read_scored(RESULT).modules if line.name == FUSED_EXPERTS)
    assert (
        bank.parameter == FUSED_EXPERTS
        and bank.numel == fused_experts()[FUSED_EXPERTS].numel()
        and bank.shares is None
    )


def test_a_result_alone_says_no_more_than_it_knows(scanned: Path) -> None:
    RECORD.unlink()
    read = read_scored(scanned)
    assert not read.notes and {(line.parameter, line.numel, line.shares) for line in read.modules} == {(None,) * 3}


def test_a_result_counts_before_a_record_of_another_scan(scanned: Path) -> None:
    data = json.loads(scanned.read_text())
    data["model.norm"]["snr"] = 7.5
    scanned.write_text(json.dumps(data))
    read = read_scored(scanned)
    assert Module("model.norm", "model.norm", 7.5) in read.modules and len(read.notes) == 1
    assert all(line.parameter is None for line in read.modules)
    assert choose(scanned, select(scanned, 50).rule).result.notes == read.notes
    assert reason(RECORD) == "other_result"


def test_a_result_of_some_groups_is_of_its_scan(scanned: Path) -> None:
    data = {module: entry for module, entry in json.loads(scanned.read_text()).items() if entry["type"] == "lm_head"}
    scanned.write_text(json.dumps(data))
    (head,) = read_scored(scanned).modules
    assert head.shares == "model.embed_tokens" and head.numel == 128 * 32


def test_a_record_without_its_result_is_of_a_scan_that_has_not_ended(scanned: Path) -> None:
    scanned.unlink()
    assert reason(RECORD) == "unfinished"
    RECORD.unlink()
    assert reason(RECORD) == "no_such_result"


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", None])
def test_a_damaged_record_is_an_error_and_its_result_is_still_read(scanned: Path, content: bytes | None) -> None:
    RECORD.write_bytes(RECORD.read_bytes()[:5000] if content is None else content)
    with pytest.raises(ResultError) as error:
        read_records(RECORD)
    assert error.value.reason == "corrupt" and reason(RECORD) == "corrupt"
    read = read_scored(scanned)
    assert len(read.notes) == 1 and len(read.modules) == len(read_results(scanned))


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
def test_a_record_with_other_contents_is_an_error(scanned: Path, damage: str) -> None:
    with sqlite3.connect(RECORD) as db:
        db.execute(damage)
    db.close()
    for leftover in RECORD.parent.glob("*.sqlite-*"):
        leftover.unlink()
    assert reason(RECORD) == "corrupt"
    assert len(read_scored(scanned).notes) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_record_with_broken_bytes_is_an_error_or_agrees_with_its_result(
    scanned: Path, tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(RECORD.read_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    (tmp_path / "a.json").write_bytes(scanned.read_bytes())
    (tmp_path / "a.sqlite").write_bytes(content)
    try:
        read = read_scored(tmp_path / "a.sqlite")
    except ResultError as error:
        assert error.reason in ("corrupt", "other_result")
    else:
        assert [line[:3] for line in read.modules] == [line[:3] for line in read_results(scanned)]


def test_a_record_of_another_version_is_not_misread(scanned: Path) -> None:
    with sqlite3.connect(RECORD) as db:
        db.execute("PRAGMA user_version = 1")
    db.close()
    assert reason(RECORD) == "corrupt"


def test_a_scan_that_goes_on_is_neither_read_nor_disturbed(scanned: Path) -> None:
    records = read_records(RECORD)
    db = sqlite3.connect(RECORD)
    identity = json.loads(db.execute("SELECT value FROM source").fetchone()[0])
    db.close()
    with Journal(RECORD, identity) as store:
        store.drop(["model.norm"])
        before = state(scanned.parent)
        with pytest.raises(ResultError) as error:
            read_records(RECORD)
        assert error.value.reason == "locked" and state(scanned.parent) == before
        assert read_scored(scanned).notes and reason(RECORD) == "locked"
        store.add(records["model.norm"])
    assert read_records(RECORD).keys() == records.keys()


def test_what_a_killed_scan_left_is_not_taken_for_the_whole(scanned: Path, tmp_path: Path) -> None:
    shutil.copy(RECORD, tmp_path / "a.sqlite")
    (tmp_path / "a.sqlite-wal").write_bytes(b"rows")
    with pytest.raises(ResultError) as error:
        read_records(tmp_path / "a.sqlite")
    assert error.value.reason == "locked"


def test_records_are_read_with_and_without_their_singular_values(scanned: Path) -> None:
    full, short = read_records(RECORD), read_records(RECORD, spectra=False)
    name = "model.layers.1.mlp.down_proj"
    assert full[name].singular_values.shape == (32,) and short[name].singular_values.size == 0
    assert full[name].score == short[name].score


def test_the_schema_of_sorted_files_is_said(tmp_path: Path) -> None:
    read = read_scored(GOLDEN / "smollm2_sorted.json")
    assert len(read.notes) == 1
    assert {s[:3] for s in read.modules} == {s[:3] for s in read_results(GOLDEN / "snr_results_smollm2.json")}


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
def test_a_parameter_that_is_not_known_has_the_likely_name(module: str, parameter: str) -> None:
    assert parameter_of(Module(module, "g", 1.0)) == parameter


@pytest.mark.parametrize(("module", "group"), [("a\ud800", "b"), ("a", "\udfffb")])
def test_half_a_pair_of_surrogates_is_no_name(tmp_path: Path, module: str, group: str) -> None:
    path = tmp_path / "snr_results_x.json"
    for text in ({module: {"snr": 1.0, "type": group}}, {group: {module: 1.0}}):
        path.write_text(json.dumps(text))
        with pytest.raises(ResultError) as error:
            read_results(path)
        assert error.value.reason == "not_a_result"
