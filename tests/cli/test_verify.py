"""The command `verify` against a model on the Hub: a folder of a repo, and a revision."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.checkpoints import Save, llama_tensors
from ..support.cli import Cli
from ..support.hub_server import COMMIT, REPO, HubServer, use

pytestmark = pytest.mark.usefixtures("working_folder")

V1 = "ab" * 20


@pytest.fixture
def server(save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A repo that has a model of two layers in `sub`, one of a layer at its top, and a revision `v1`."""
    top = save(llama_tensors(1), config={"model_type": "llama"}, folder="repo")
    save(llama_tensors(2), config={"model_type": "llama"}, folder="repo/sub")
    with HubServer({REPO: top}) as server:
        server.commits |= {"v1": V1, V1: V1}
        use(server.url, monkeypatch, tmp_path)
        yield server


def write(name: str) -> str:
    Path("a.yaml").write_text(f"unfrozen_parameters:\n- ^{name}$\n")
    return "a.yaml"


@pytest.mark.parametrize("model", [f"{REPO}/sub", f"hf://{REPO}/sub"])
def test_verify_reads_a_folder_of_a_repo(cli: Cli, server: HubServer, model: str) -> None:
    # Only the model in the folder has a second layer.
    file = write("model.layers.1.mlp.up_proj.weight")
    cli("verify", file, "--model", model)
    cli("verify", file, "--model", REPO, code=4)
    cli("verify", write("model.layers.2.mlp.up_proj.weight"), "--model", model, code=4)


@pytest.mark.parametrize("model", [f"{REPO}/sub@v1", f"hf://{REPO}@v1/sub", f"hf://{REPO}/sub@v1"])
def test_verify_reads_another_revision(cli: Cli, server: HubServer, model: str) -> None:
    cli("verify", write("model.layers.1.mlp.up_proj.weight"), "--model", model)
    paths = [request.path for request in server.requests if request.kind != "api"]
    assert any(path.startswith(f"/{REPO}/resolve/{V1}/sub/") for path in paths)
    assert not any(COMMIT in path or "/main/" in path for path in paths)
    assert "no_such_revision" in cli("verify", "a.yaml", "--model", model.replace("v1", "v2"), code=1).stderr
