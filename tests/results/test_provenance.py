import hashlib
import json
from pathlib import Path

import pytest

from spectrum_stream import __version__, scan
from spectrum_stream.errors import ResultError, SpectrumStreamError, UsageError
from spectrum_stream.results.provenance import provenance_path, slug_of, write_provenance
from spectrum_stream.results.record import record_path

from ..support.checkpoints import Save, llama_tensors
from ..support.hub_server import COMMIT, REPO, HubServer, use
from ..support.records import change_record

RESULT = Path("model_snr_results/snr_results_org-x.json")

pytestmark = pytest.mark.usefixtures("working_folder")


@pytest.fixture
def model(save: Save, working_folder: Path) -> Path:
    folder = save(llama_tensors(2), shards=2)
    scan(str(folder), name="org/x")
    return folder


def refused(reason: str, result: Path, model: str | None) -> SpectrumStreamError:
    with pytest.raises((ResultError, UsageError)) as error:
        write_provenance(result, model)
    assert error.value.reason == reason
    return error.value


def test_provenance_of_a_local_checkpoint_has_the_hashes_of_its_shards(model: Path) -> None:
    data = json.loads(write_provenance(RESULT, "org/x").read_text())
    for shard, entry in data["shards"].items():
        content = (model / shard).read_bytes()
        assert entry == {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert len(data["shards"]) == 2
    assert data["commit"] is None
    assert data["model"] == "org/x"
    assert data["result_sha256"] == hashlib.sha256(RESULT.read_bytes()).hexdigest()
    assert __version__ in data["program"]


def test_provenance_has_no_path_of_this_machine(model: Path) -> None:
    text = write_provenance(RESULT, "org/x").read_text()
    assert str(model) not in text and str(Path.cwd()) not in text


def test_provenance_of_a_single_file_names_it(model: Path) -> None:
    shard = next(model.glob("*.safetensors"))
    scan(str(shard), name="org/one")
    data = json.loads(write_provenance(RESULT.with_name("snr_results_org-one.json"), "org/one").read_text())
    assert list(data["shards"]) == [shard.name]


def test_provenance_of_a_repo_has_its_commit_and_needs_no_name(
    save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with HubServer({REPO: save(llama_tensors(2), shards=2)}) as server:
        use(server.url, monkeypatch, tmp_path)
        result = scan(REPO, fetch="range").written[0]
    data = json.loads(write_provenance(result).read_text())
    assert data["commit"] == COMMIT and data["model"] == REPO
    refused("other_model", result, REPO.replace("/", "_"))


def test_provenance_of_a_local_checkpoint_needs_a_name(model: Path) -> None:
    refused("no_model", RESULT, None)
    refused("other_model", RESULT, "org/y")
    assert not provenance_path(RESULT).exists()


def test_provenance_fails_if_the_weights_changed(model: Path) -> None:
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    shard.touch()
    refused("changed", RESULT, "org/x")
    shard.unlink()
    refused("unreadable", RESULT, "org/x")


@pytest.mark.parametrize("content", [b"", b"secret", b"secret of nine bytes or more", bytes(8) + b"x"])
def test_provenance_does_not_publish_the_hash_of_a_file_that_is_not_a_shard(model: Path, content: bytes) -> None:
    secret = model / "secret"
    secret.write_bytes(content)
    status = secret.stat()
    facts = {"shards": {"secret": len(content)}, "versions": {"secret": [status.st_mtime_ns, status.st_ino]}}
    for key, value in facts.items():
        statement = f"UPDATE source SET value = json_set(value, '$.{key}', json(?)) WHERE key = 'identity'"
        assert change_record(record_path(RESULT), statement, json.dumps(value)) == 1
    refused("changed", RESULT, "org/x")
    assert not provenance_path(RESULT).exists()


def test_provenance_needs_a_record(model: Path) -> None:
    record_path(RESULT).unlink()
    refused("no_record", RESULT, "org/x")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("snr_results_a.b-c.json", "a.b-c"),
        ("snr_results_.json", ""),
        ("results_a.json", None),
        ("snr_results_a", None),
    ],
)
def test_slug_of_a_file_name(name: str, slug: str | None) -> None:
    assert slug_of(Path("x") / name) == slug


def test_paths_of_a_result_keep_dots_in_its_slug() -> None:
    assert provenance_path(Path("snr_results_Llama-3.1.json")).name == "provenance_Llama-3.1.json"
    assert record_path(Path("snr_results_Llama-3.1.json")).name == "snr_results_Llama-3.1.sqlite"
