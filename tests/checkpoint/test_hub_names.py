"""The names that people type for a repo, models in subfolders, and servers that send less than the Hub."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import httpx

from spectrum_stream import scan
from spectrum_stream.checkpoint import open_source
from spectrum_stream.checkpoint.client import client
from spectrum_stream.checkpoint.hub import Address, parse_address
from spectrum_stream.errors import SpectrumStreamError
from spectrum_stream.streaming.plan import plan
from spectrum_stream.trainers.parameters import parameters_of

from ..support import hub_server
from ..support.checkpoints import Save, llama_tensors
from ..support.hub_server import COMMIT, REPO, Bytes, HubServer, use, values

CONFIG = {"architectures": ["LlamaForCausalLM"]}
GPTQ = {"bits": 4, "group_size": 32}
SUB = f"{REPO}/merged/f16"


@pytest.fixture
def folder(save: Save) -> Path:
    folder = save(llama_tensors(3), shards=2, config=CONFIG)
    (folder / "quantize_config.json").write_text(json.dumps(GPTQ))
    return folder


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """Serve a repo with a model in a subfolder, and nothing at its top."""
    files = {f"merged/f16/{p.name}": Bytes(p.read_bytes()) for p in folder.iterdir()}
    single = Bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    others = {"epoch_1/model.safetensors": single, "files/a.safetensors": single, "files/b.safetensors": single}
    repo = {"README.md": Bytes(b"x"), "ggufs/Q8_0.gguf": Bytes(b"GGUF")} | files | others
    with HubServer({REPO: repo}) as server:
        use(server.url, monkeypatch, tmp_path)
        yield server


def refused(model: str) -> SpectrumStreamError:
    with pytest.raises(SpectrumStreamError) as error:
        plan(model)
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize("fetch", ["range", "download", "cache"])
def test_hub_folder_of_a_repo_is_scanned_like_a_local_one(
    hub: HubServer, folder: Path, working_folder: Path, fetch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = scan(str(folder), name="local")
    remote = scan(f"hf://{SUB}", fetch=fetch)
    assert values(remote) == values(local)
    assert remote.plan.source.where == f"hf://{SUB}"
    assert remote.plan.source.config == local.plan.source.config == CONFIG | {"quantization_config": GPTQ}
    assert remote.plan.outputs.results.name == "snr_results_org-model-merged-f16.json"
    assert parameters_of(SUB).shapes == parameters_of(str(folder)).shapes
    assert not [p for p in working_folder.rglob("*") if p.suffix == ".safetensors" or p.name.endswith(".shards")]
    if fetch != "cache":
        return
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for model in (SUB, f"{hub.url}/{REPO}/blob/main/merged/f16/model-00001-of-00002.safetensors"):
        offline = scan(model, name="offline")
        assert values(offline) == values(local)
        assert offline.plan.source.where == f"hf://{SUB}"
        assert offline.plan.source.config == remote.plan.source.config
    assert refused(f"hf://{REPO}/epoch_1").reason == "offline"
    assert not hub.requests


@pytest.mark.parametrize(
    "form",
    ["{sub}", "{sub}@main", "hf://{sub}", "hf://{sub}@main", "hf://{repo}@main/merged/f16", "models/{sub}",
     "{url}/{repo}/tree/main/merged/f16", "{url}/{repo}/tree/main/merged/f16/?x=y#z",
     "{url}/{repo}/blob/main/merged/f16/model-00001-of-00002.safetensors",
     "{url}/{repo}/resolve/main/merged/f16/config.json", "https://huggingface.co/{repo}/tree/main/merged/f16",
     "huggingface.co/{repo}/tree/main/merged/f16", "{host}/{repo}/tree/main/merged/f16",
     "{sub}/model.safetensors.index.json"],
)  # fmt: skip
def test_hub_parses_every_address_of_a_folder(hub: HubServer, working_folder: Path, form: str) -> None:
    host = hub.url.removeprefix("http://")
    source = plan(form.format(repo=REPO, sub=SUB, url=hub.url, host=host)).source
    assert source.where.removesuffix("/model.safetensors.index.json") == f"hf://{SUB}"
    assert source.name.startswith(SUB)
    assert len(source.shards) == 2
    assert source.commit == COMMIT


def test_hub_page_of_one_file_of_many_is_that_file(hub: HubServer, working_folder: Path) -> None:
    source = plan(f"{hub.url}/{REPO}/resolve/main/files/b.safetensors").source
    assert [s.name for s in source.shards] == ["b.safetensors"]
    assert source.where == f"hf://{REPO}/files/b.safetensors"
    assert refused(f"hf://{REPO}/files").reason == "no_index"
    assert f"hf://{REPO}/files/a.safetensors" in (refused(f"hf://{REPO}/files").hint or "")
    assert refused(f"hf://{REPO}/ggufs/Q8_0.gguf").reason == "no_safetensors"


def test_hub_repo_with_weights_in_folders_names_them(hub: HubServer, working_folder: Path) -> None:
    error = refused(REPO)
    assert error.reason == "no_safetensors"
    assert "merged/f16" in str(error)
    assert f"hf://{REPO}/" in (error.hint or "")
    missing = refused(f"hf://{REPO}/merged/f32")
    assert missing.reason == "no_such_path"
    assert f"hf://{SUB}" in (missing.hint or "")


ADDRESSES = {
    "org/name@refs/pr/3": Address("org/name", "refs/pr/3"),
    "org/name/a/b@v1": Address("org/name", "v1", "a/b"),
    "hf://org/name@refs/pr/3/a": Address("org/name", "refs/pr/3", "a"),
    "https://huggingface.co/org/name/tree/refs%2Fpr%2F3/a": Address("org/name", "refs/pr/3", "a"),
    "https://huggingface.co/org/name?show_file_info=model.safetensors": Address("org/name"),
    "models/org/name": Address("org/name"),
    "hf://gpt2": Address("gpt2"),
    "gpt2@main": Address("gpt2", "main"),
    "org/name/model.safetensors": Address("org/name", None, "model.safetensors"),
}


@pytest.mark.parametrize(("model", "address"), ADDRESSES.items(), ids=ADDRESSES)
def test_parse_address(model: str, address: Address) -> None:
    assert parse_address(model) == address


@pytest.mark.parametrize(
    "model",
    ["./org/name", "../a/b", "/org/name/x", "org/name/", "org//name", "a/b/../c", "x.safetensors", "x/a.json", "",
     "org/name@", "a/b/c\\d", "C:\\x\\y", "org/na me"],
)  # fmt: skip
def test_parse_address_asks_nobody_about_a_path(model: str) -> None:
    assert parse_address(model) is None


# An address of something else, and a part of the hint.
WRONG = {
    "https://hf-mirror.com/org/name": "HF_ENDPOINT=https://hf-mirror.com",
    "hf-mirror.com/org/name": "HF_ENDPOINT=https://hf-mirror.com",
    "modelscope.cn/models/org/name": "modelscope download",
    "https://example.com/models/org/name": "org/name",
    "modelscope://org/name": "modelscope download",
    "s3://bucket/x": "aws s3",
    "file:///x/y": "path",
    "foo://org/name": "org/name",
    "org/name:main": "org/name@main",
    "https://huggingface.co/org/name:main": "org/name@main",
    "https://huggingface.co/org/name/commit/0a1b": "org/name@0a1b",
    "https://huggingface.co/org/name/discussions/1": "org/name",
    "hf://datasets/org/name": "model",
    "spaces/org/name": "model",
}


@pytest.mark.parametrize(("model", "hint"), WRONG.items(), ids=WRONG)
def test_parse_address_of_something_else_has_a_hint(model: str, hint: str) -> None:
    with pytest.raises(SpectrumStreamError) as error:
        parse_address(model)
    assert error.value.reason == "bad_address"
    assert hint in (error.value.hint or "")


def test_open_source_does_not_ask_about_a_missing_path_in_a_folder(hub: HubServer, working_folder: Path) -> None:
    (working_folder / "outputs" / "run").mkdir(parents=True)
    assert refused("outputs/run/checkpoint-100").reason == "no_such_path"
    assert not hub.requests
    # A name with a slash can be a repo. One with two can be a folder in a repo.
    assert refused("no/such/model").reason == "no_such_path"
    assert [r.path for r in hub.requests] == ["/api/models/no/such/revision/main"]


def test_open_source_without_a_network_fails_soon(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        use(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch, tmp_path)
    asked: list[httpx.Request] = []
    session = client()
    send = session.send

    def note(request: httpx.Request, **options: Any) -> httpx.Response:
        asked.append(request)
        return send(request, **options)

    monkeypatch.setattr(session, "send", note)
    assert refused(REPO).reason == "unreachable"
    assert refused(f"{REPO}/x").reason == "no_such_path"
    assert len(asked) == 4, "two tries for each"


@pytest.fixture
def mirror(save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """Serve a repo from a server that does not name the commit of a file."""
    with HubServer({REPO: save(llama_tensors(3), shards=2, config=CONFIG)}, names_commit=False) as server:
        use(server.url, monkeypatch, tmp_path)
        yield server


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fetch", ["auto", "range", "download"])
def test_hub_server_without_commits_is_scanned(
    mirror: HubServer, working_folder: Path, fetch: str, ranges: bool, tmp_path: Path
) -> None:
    mirror.ranges = ranges
    remote = scan(REPO, fetch=fetch)
    assert values(remote) == values(scan(str(tmp_path / "model"), name="local"))
    assert not [p for p in working_folder.rglob("*") if p.suffix == ".safetensors"]


def test_hub_server_without_commits_and_ranges_is_asked_again(
    mirror: HubServer, working_folder: Path, tmp_path: Path
) -> None:
    cuts: list[hub_server.Turn] = []

    def cut(turn: hub_server.Turn) -> None:
        is_cut = turn.handler.path.endswith("00002.safetensors") and not cuts
        cuts.extend([turn] if is_cut else [])
        body = turn.blob.read(0, turn.blob.nbytes)
        turn.answer(200, {"Content-Length": str(len(body))}, body[:100] if is_cut else body)
        turn.handler.close_connection = is_cut

    mirror.ranges = False
    mirror.script("whole", *[cut] * 100)
    assert values(scan(REPO)) == values(scan(str(tmp_path / "model"), name="local"))
    assert cuts


def test_hub_server_without_commits_cannot_fill_the_cache(mirror: HubServer, working_folder: Path) -> None:
    with pytest.raises(SpectrumStreamError) as error:
        scan(REPO, fetch="cache")
    assert error.value.reason == "bad_response"
    assert "X-Repo-Commit" in str(error.value)
    assert "--fetch range" in (error.value.hint or "")


@pytest.mark.parametrize(
    ("body", "said"),
    [({"id": REPO, "sha": COMMIT}, "siblings"), ({"id": REPO, "siblings": []}, "sha")],
    ids=["siblings", "sha"],
)
def test_hub_server_with_half_an_answer_is_named(
    hub: HubServer, working_folder: Path, body: dict[str, object], said: str
) -> None:
    hub.script("api", hub_server.status(200, json.dumps(body).encode()))
    error = refused(REPO)
    assert error.reason == "bad_response"
    assert said in str(error)


def test_hub_pointer_and_adapter_are_named(
    save: Save, working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pointer = Bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 4976698672\n")
    weights = Bytes((save(llama_tensors(1)) / "model.safetensors").read_bytes())
    config = Bytes(b'{"base_model_name_or_path": "org/base"}')
    repos = {
        "org/pointer": {"model.safetensors": pointer},
        "org/adapter": {"adapter_model.safetensors": weights, "adapter_config.json": config},
    }
    with HubServer(repos) as server:
        use(server.url, monkeypatch, tmp_path)
        assert "Git LFS pointer" in str(refused("org/pointer"))
        adapter = refused("org/adapter")
    assert adapter.reason == "adapter"
    assert "org/base" in str(adapter)


def test_open_source_of_a_repo_names_the_same_shards_as_a_folder(hub: HubServer, folder: Path) -> None:
    assert [s.name for s in open_source(SUB).shards] == [s.name for s in open_source(str(folder)).shards]
