"""Each problem has a separate reason, and the results in this repository have no problem."""

import json
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spectrum_stream import scan
from spectrum_stream.model.names import groups_of
from spectrum_stream.results.check import Reason, check
from spectrum_stream.results.provenance import provenance_path, write_provenance
from spectrum_stream.results.record import record_path
from spectrum_stream.results.result import Result

from ..support.checkpoints import Save, llama_tensors

PUBLISHED = Path(__file__).parents[2] / "model_snr_results"
RESULT = Path("model_snr_results/snr_results_org-x.json")
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def result(save: Save, working_folder: Path) -> Path:
    experts = {"model.layers.0.mlp.experts.down_proj": llama_tensors(1)["lm_head.weight"].reshape(4, 32, 32).clone()}
    scan(str(save(llama_tensors(2) | experts)), name="org/x")
    write_provenance(RESULT, "org/x")
    return RESULT


def reasons(path: Path) -> set[Reason]:
    return {finding.reason for finding in check(path)}


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data) or data, indent=4))


def resign(result: Path) -> Path:
    """Write the provenance again, so that the change is the only finding."""
    write_provenance(result, "org/x")
    return result


def test_check_finds_nothing_in_the_output_of_a_scan(result: Path) -> None:
    assert check(result) == []
    record_path(result).unlink()
    assert check(result) == []


CHANGES: dict[Reason, Callable[[dict[str, Any]], Any]] = {
    Reason.BAD_ENTRY: lambda d: d.update({UP: d[UP] | {"note": "x"}}),
    Reason.NEGATIVE: lambda d: d[UP].update(snr=-1.0),
    Reason.NOT_FINITE: lambda d: d[UP].update(snr=float("inf")),
    Reason.WRONG_GROUP: lambda d: d[UP].update(type="mlp.up"),
    Reason.WRONG_ORDER: lambda d: dict(reversed(d.items())),
    Reason.WRONG_SCORE: lambda d: d[UP].update(snr=d[UP]["snr"] * (1 + 1e-3)),
    Reason.NOT_IN_RECORD: lambda d: d | {"zz": {"snr": 1.0, "type": "zz"}},
    Reason.EMPTY: lambda d: d.clear(),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_check_finds_a_changed_result(result: Path, reason: Reason) -> None:
    rewrite(result, CHANGES[reason])
    assert {reason, Reason.OTHER_RESULT} <= reasons(result)
    allowed = {reason, *({Reason.WRONG_SCORE} if reason is Reason.NEGATIVE else ())}
    assert reasons(resign(result)) == allowed


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity", "1" + "0" * 400])
def test_check_finds_scores_that_cannot_be_ranked(result: Path, number: str) -> None:
    text = json.dumps({"a": {"snr": 0, "type": "a"}}).replace("0", number)
    result.write_text(text)
    assert Reason.NOT_FINITE in reasons(result)


def test_check_finds_a_module_that_occurs_twice(result: Path) -> None:
    """Readers silently take the second one."""
    text = result.read_text()
    entry = json.dumps(json.loads(text)[UP])
    result.write_text(text.replace(f'"{UP}": {{', f'"{UP}": {entry}, "{UP}": {{'))
    assert reasons(resign(result)) == {Reason.DUPLICATE_MODULE}


def test_check_lists_all_findings(result: Path) -> None:
    rewrite(result, lambda d: [d[UP].update(type="a"), d["lm_head"].update(snr=-1), None][-1])
    assert {Reason.WRONG_GROUP, Reason.NEGATIVE, Reason.OTHER_RESULT, Reason.WRONG_SCORE} <= reasons(result)


@pytest.mark.parametrize("text", ["", "{", "\ufeff{}", '{"a": ' * 100_000])
def test_check_finds_a_file_that_is_not_json(result: Path, text: str) -> None:
    result.write_text(text)
    assert reasons(result) == {Reason.NOT_JSON}


@pytest.mark.parametrize("text", ["[]", "1", "null", '"x"'])
def test_check_finds_json_that_is_not_an_object(result: Path, text: str) -> None:
    result.write_text(text)
    assert reasons(result) == {Reason.BAD_ENTRY}


def test_check_finds_a_missing_file(working_folder: Path) -> None:
    assert reasons(Path("snr_results_x.json")) == {Reason.UNREADABLE}


@pytest.mark.parametrize("name", ["snr_results_org_x.json", "results_x.json", "snr_results_.json"])
def test_check_finds_a_name_without_a_slug(result: Path, name: str) -> None:
    result.rename(result.with_name(name))
    provenance_path(result).rename(provenance_path(result.with_name(name)))
    assert Reason.BAD_FILENAME in reasons(result.with_name(name))


PROVENANCE: dict[Reason, list[Callable[[dict[str, Any]], Any]]] = {
    Reason.BAD_PROVENANCE: [
        lambda d: d.pop("model"),
        lambda d: d.update(commit=1),
        lambda d: d.update(more=1),
        lambda d: d.update(schema_version=2),
        lambda d: d.update(shards=[1]),
        lambda d: [1],
    ],
    Reason.WRONG_SLUG: [lambda d: d.update(model="org/y")],
    Reason.OTHER_RESULT: [lambda d: d.update(result_sha256="0" * 64)],
    Reason.NO_COMMIT: [
        lambda d: [s.update(sha256=None) for s in d["shards"].values()] and None,
        lambda d: [s.update(sha256="x") for s in d["shards"].values()] and None,
    ],
    Reason.PRIVATE_PATH: [
        lambda d: d.update(program="/home/me/spectrum_stream"),
        lambda d: d.update(program="C:\\Users\\me"),
        lambda d: d.update(program="~/models"),
        lambda d: d["precisions"].update({"file:///x": 1}),
    ],
    Reason.OTHER_RECORD: [
        lambda d: d.update(commit="0" * 40),
        lambda d: d["shards"]["model.safetensors"].update(nbytes=1),
        lambda d: d.update(names="transformers-v4"),
    ],
}


@pytest.mark.parametrize(("reason", "change"), [(r, c) for r, changes in PROVENANCE.items() for c in changes])
def test_check_finds_a_changed_provenance(
    result: Path, reason: Reason, change: Callable[[dict[str, Any]], Any]
) -> None:
    path = provenance_path(result)
    data = json.loads(path.read_text())
    changed = change(data)
    path.write_text(json.dumps(changed if isinstance(changed, list) else data))
    assert reasons(result) == {reason}


def test_check_finds_a_missing_or_broken_provenance(result: Path) -> None:
    provenance_path(result).unlink()
    assert reasons(result) == {Reason.NO_PROVENANCE}
    provenance_path(result).write_text("{")
    assert reasons(result) == {Reason.BAD_PROVENANCE}


def test_check_finds_singular_values_of_another_score(result: Path) -> None:
    with sqlite3.connect(record_path(result)) as db:
        (blob,) = db.execute("SELECT singular_values FROM matrices WHERE module = ?", (UP,)).fetchone()
        values = np.frombuffer(blob, "<f4") * np.float32(1.001)
        db.execute("UPDATE matrices SET singular_values = ? WHERE module = ?", (values.tobytes(), UP))
    db.close()
    assert reasons(result) == {Reason.WRONG_SCORE}


def test_check_finds_a_module_that_is_not_in_the_record(result: Path) -> None:
    with sqlite3.connect(record_path(result)) as db:
        db.execute("DELETE FROM matrices WHERE module = ?", (UP,))
    db.close()
    assert reasons(result) == {Reason.NOT_IN_RECORD}


def test_check_finds_a_broken_record(result: Path) -> None:
    record_path(result).write_bytes(b"x")
    assert reasons(result) == {Reason.BAD_RECORD}


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["snr", "type", "a.1.b", "model", "shards", "schema_version"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(json_values, json_values)
def test_check_never_raises(tmp_path: Path, data: Any, provenance: Any) -> None:
    path = tmp_path / "snr_results_x.json"
    path.write_text(json.dumps(data))
    provenance_path(path).write_text(json.dumps(provenance))
    assert check(path)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results folder in git, because a demo or a scan in a clone adds files to the folder."""
    folder = tmp_path_factory.mktemp("published")

    def git(*args: str) -> bytes:
        return subprocess.run(["git", *args], cwd=PUBLISHED, capture_output=True, check=True).stdout

    try:
        for name in git("ls-files").decode().splitlines():
            (folder / name).write_bytes(git("show", f":./{name}"))
    except (OSError, subprocess.CalledProcessError):
        pass
    # A copy of the repository without its history has only the folder.
    return folder if any(folder.iterdir()) else PUBLISHED


def test_check_finds_nothing_in_the_results_of_this_repository(published: Path) -> None:
    found = {path.name: check(path) for path in published.glob("snr_results_*.json")}
    assert len(found) >= 2
    assert not any(found.values()), found


def test_results_folder_has_results_and_their_provenance_only(published: Path) -> None:
    results = set(published.glob("snr_results_*.json"))
    known = results | {provenance_path(result) for result in results} | {published / "README.md"}
    assert {path for path in published.iterdir() if ".sqlite" not in path.name} == known


def test_published_scores_are_those_of_a_scan_today(published: Path, minilm: Path, working_folder: Path) -> None:
    found = scan(str(minilm), name="x")
    theirs = Result.open(published / "snr_results_sentence-transformers-all-MiniLM-L6-v2.json").modules
    assert [(module.name, module.group) for module in found.modules] == [
        (module.name, module.group) for module in theirs
    ]
    for module, published_module in zip(found.modules, theirs, strict=True):
        assert module.value == pytest.approx(published_module.value, rel=1e-5), module.name


def test_check_finds_a_group_without_some_modules_of_its_record(result: Path) -> None:
    """The rest of the group would be ranked like a complete group. A whole group can be left out."""
    rewrite(result, lambda d: {name: entry for name, entry in d.items() if name != UP})
    assert reasons(resign(result)) == {Reason.MISSING_MODULE}
    rewrite(result, lambda d: {name: entry for name, entry in d.items() if entry["type"] != "mlp.up_proj"})
    assert reasons(resign(result)) == set()


@pytest.mark.parametrize(
    ("module", "groups"),
    [
        ("vision_tower.layers.0.layer_norm1", {"vision.layer_norm1", "layer_norm1"}),
        ("model.layers.0.mlp.experts.3.w1", {"mlp.experts.3.w1", "mlp.experts.w1"}),
        ("model.layers.61.eh_proj", {"eh_proj", "mtp.eh_proj"}),
    ],
)
def test_groups_of_a_module_include_those_of_a_scan(module: str, groups: set[str]) -> None:
    assert groups <= groups_of(module)
    assert "other" not in groups_of(module)
