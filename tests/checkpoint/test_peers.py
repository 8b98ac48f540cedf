"""Scans from servers by other authors: olah, with the Hub's protocol, and nginx, with HTTP.

olah has no ranges for its own repos and answers 200. nginx has ranges, and checks signatures that expire.
"""

import base64
import hashlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spectrum_stream import scan
from spectrum_stream.pipeline import ScanFinished, run
from spectrum_stream.streaming.plan import plan

from ..support.checkpoints import Save, llama_tensors
from ..support.hub_server import COMMIT, REPO, HubServer, use, values
from ..support.programs import executable

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECRET = "not a real one"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(command: list[str], port: int, log: Path) -> Iterator[None]:
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield
        finally:
            process.terminate()


@pytest.fixture
def folder(save: Save) -> Path:
    return save(llama_tensors(3), shards=2)


@pytest.fixture
def olah(folder: Path, tmp_path: Path) -> Iterator[str]:
    """Run olah with a folder as its own repo, which must be a git repo."""
    command = executable("olah-cli", str(ROOT / ".venv-olah" / "bin" / "olah-cli"), os.environ.get("OLAH_CLI", ""))
    repo = tmp_path / "mirrors" / "models" / REPO
    shutil.copytree(folder, repo)
    identity = ("-c", "user.email=a@b.c", "-c", "user.name=a")
    for git in (["init", "-q", "-b", "main"], ["add", "-A"], [*identity, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", *git], cwd=repo, check=True)
    port = free_port()
    config = tmp_path / "olah.toml"
    config.write_text(f"""
[basic]
host = "127.0.0.1"
port = {port}
repos-path = "{tmp_path}/repos"
mirrors-path = ["{tmp_path}/mirrors"]
hf-scheme = "http"
hf-netloc = "127.0.0.1:1"
mirror-scheme = "http"
mirror-netloc = "127.0.0.1:{port}"
[accessibility]
offline = true
""")
    arguments = [command, "-c", str(config), "--log-path", str(tmp_path / "logs")]
    with serving(arguments, port, tmp_path / "olah.log"):
        yield f"http://127.0.0.1:{port}"


def test_olah_repo_scans_by_every_fetch(
    olah: str, folder: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(olah, monkeypatch, tmp_path)
    local = scan(str(folder), name="local")
    # olah has no ranges, so `range` is a download too. The cache comes last, because later scans would use it.
    for fetch, used in (("auto", "download"), ("range", "download"), ("download", "download"), ("cache", "cache")):
        remote = scan(REPO, name=fetch, fetch=fetch)
        assert set(remote.plan.fetches.values()) == {used}
        assert values(remote) == values(local)


def nginx(folder: Path, tmp_path: Path, port: int) -> list[str]:
    """Run nginx, which serves a folder as a repo, and as /blobs/ to requests with a signature."""
    command = executable("nginx", "/usr/sbin/nginx")
    api = tmp_path / "api.json"
    names = [p.name for p in folder.iterdir()]
    siblings = ", ".join(f'{{"rfilename": "{name}"}}' for name in names)
    api.write_text(f'{{"id": "{REPO}", "sha": "{COMMIT}", "siblings": [{siblings}]}}')
    config = tmp_path / "nginx.conf"
    config.write_text(f"""
daemon off;
pid {tmp_path}/nginx.pid;
error_log {tmp_path}/error.log;
user root;
events {{}}
http {{
    access_log off;
    client_body_temp_path {tmp_path}/body;
    proxy_temp_path {tmp_path}/proxy;
    fastcgi_temp_path {tmp_path}/fastcgi;
    uwsgi_temp_path {tmp_path}/uwsgi;
    scgi_temp_path {tmp_path}/scgi;
    log_format headers '$status|$http_authorization|$http_range';
    server {{
        listen 127.0.0.1:{port};
        location = /api/models/{REPO}/revision/main {{ alias {api}; default_type application/json; }}
        location /{REPO}/resolve/{COMMIT}/ {{ alias {folder}/; add_header X-Repo-Commit {COMMIT}; }}
        location /blobs/ {{
            alias {folder}/;
            access_log {tmp_path}/blobs.log headers;
            secure_link $arg_md5,$arg_expires;
            secure_link_md5 "$secure_link_expires$uri {SECRET}";
            if ($secure_link = "") {{ return 403; }}
            if ($secure_link = "0") {{ return 403; }}
        }}
    }}
}}
""")
    return [command, "-e", f"{tmp_path}/start.log", "-c", str(config)]


def signed(port: int, name: str, expires: int) -> str:
    digest = hashlib.md5(f"{expires}/blobs/{name} {SECRET}".encode()).digest()
    md5 = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    return f"http://localhost:{port}/blobs/{name}?md5={md5}&expires={expires}"


def test_nginx_real_model_scans_by_range(
    smollm2: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port = free_port()
    with serving(nginx(smollm2, tmp_path, port), port, tmp_path / "nginx.log"):
        use(f"http://127.0.0.1:{port}", monkeypatch, tmp_path)
        remote = scan(REPO, fetch="range")
    assert set(remote.plan.fetches.values()) == {"range"}
    assert values(remote) == values(scan(str(smollm2), name="local"))


@pytest.mark.parametrize("fetch", ["range", "download"])
def test_nginx_expired_signature_is_renewed_without_token(
    smollm2: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fetch: str
) -> None:
    port = free_port()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with (
        serving(nginx(smollm2, tmp_path, port), port, tmp_path / "nginx.log"),
        HubServer({REPO: smollm2}, elsewhere=lambda name: signed(port, name, int(time.time()) + 2)) as hub,
    ):
        use(hub.url, monkeypatch, tmp_path)
        a_plan = plan(REPO, fetch=fetch)
        time.sleep(3.1)
        (end,) = [event for event in run(a_plan) if isinstance(event, ScanFinished)]
    assert values(end.result) == values(scan(str(smollm2), name="local"))
    answers = [line.split("|") for line in (tmp_path / "blobs.log").read_text().splitlines()]
    assert {authorization for _, authorization, _ in answers} == {"-"}
    assert {r.headers.get("authorization") for r in hub.requests} == {"Bearer hf_secret"}
    shards = len(a_plan.fetches)
    if fetch == "range":
        expired = [status for status, _, _ in answers if status == "403"]
        assert shards <= len(expired) <= 4 * shards, "as many as were under way when it expired"
        assert len(hub.of_kind("data")) == shards, "one new signature a shard"
        assert len(hub.of_kind("probe")) == shards, "and one at first"
