"""Scans of a repo: a fault of the server ends in correct scores or in one clear error, never in a wrong score."""

import errno
import logging
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import httpx

from spectrum_stream import scan
from spectrum_stream.checkpoint import open_source
from spectrum_stream.checkpoint.hub_errors import explaining
from spectrum_stream.cli import progress
from spectrum_stream.cli.output import LogNotes
from spectrum_stream.errors import CheckpointError, SpectrumStreamError
from spectrum_stream.files import FileKind
from spectrum_stream.model.matrix import Matrix
from spectrum_stream.results.record import Record
from spectrum_stream.streaming.bounded import Budget, Budgets, Traffic
from spectrum_stream.streaming.fetch import Fetch
from spectrum_stream.streaming.plan import plan
from spectrum_stream.streaming.prefetch import Prefetcher

from ..support import hub_server
from ..support.checkpoints import Save, llama_tensors
from ..support.cli import COMMAND, Cli, run_process
from ..support.hub_server import COMMIT, REPO, Fault, HubServer, use, values

FETCHES = ("range", "download", "cache")


@pytest.fixture
def folder(save: Save) -> Path:
    return save(llama_tensors(3), shards=2, config={"architectures": ["LlamaForCausalLM"]})


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """Serve the folder as a repo on a server that this process uses as the Hub, with an empty cache."""
    with HubServer({REPO: folder}) as server:
        use(server.url, monkeypatch, tmp_path)
        yield server


def refused(model: str = REPO, **options: object) -> SpectrumStreamError:
    with pytest.raises(SpectrumStreamError) as error:
        scan(model, **options)  # type: ignore[arg-type]
    # The message is one sentence without the address of a file, which could hold a signature.
    assert "\n" not in str(error.value)
    assert "/resolve/" not in str(error.value)
    return error.value


@pytest.mark.parametrize("fetch", FETCHES)
def test_hub_scan_equals_local_scan_bit_for_bit(
    hub: HubServer, folder: Path, working_folder: Path, fetch: str
) -> None:
    local = scan(str(folder), name="local", top_percent=50)
    remote = scan(REPO, fetch=fetch, top_percent=50)
    assert values(remote) == values(local)
    assert remote.selection is not None
    assert local.selection is not None
    assert remote.selection.chosen == local.selection.chosen
    assert remote.plan.source.commit == COMMIT
    left = [p for p in working_folder.rglob("*") if p.suffix == ".safetensors" or p.name.endswith(".shards")]
    assert not left


@pytest.mark.parametrize("fetch", FETCHES)
def test_hub_requests_use_the_commit_when_the_branch_moves(
    hub: HubServer, folder: Path, working_folder: Path, fetch: str
) -> None:
    a_plan = plan(REPO, fetch=fetch)
    hub.commits["main"] = "d" * 40
    from spectrum_stream.pipeline import ScanFinished, run

    (end,) = [e for e in run(a_plan) if isinstance(e, ScanFinished)]
    assert values(end.result) == values(scan(str(folder), name="local"))
    assert {r.path.split("/resolve/")[1][:40] for r in hub.requests if "/resolve/" in r.path} == {COMMIT}


def test_hub_moved_branch_drops_old_scores(hub: HubServer, working_folder: Path) -> None:
    scan(REPO)
    moved = "d" * 40
    hub.commits |= {"main": moved, moved: moved}
    events: list[object] = []
    result = scan(REPO, on_event=events.append)
    assert result.plan.source.commit == moved and getattr(events[0], "dropped") == len(result.records)  # noqa: B009


def test_hub_range_scan_fetches_only_the_chosen_matrices(hub: HubServer, working_folder: Path) -> None:
    result = scan(REPO, groups=["self_attn.v_proj"], fetch="range")
    fetched = sum(r.range[1] - r.range[0] for r in hub.of_kind("data") if r.range)
    assert fetched <= 1.02 * result.plan.read_nbytes
    assert not hub.of_kind("whole")[2:], "the index and the config are read whole, and nothing else"


def test_hub_requests_ask_for_no_compression(hub: HubServer, working_folder: Path) -> None:
    scan(REPO, fetch="range")
    asked = [r for r in hub.requests if r.kind in ("probe", "data", "whole")]
    assert asked
    assert {r.headers["Accept-Encoding"] for r in asked} == {"identity"}


def test_hub_cached_shards_are_read_in_place(
    hub: HubServer, folder: Path, working_folder: Path, tmp_path: Path
) -> None:
    scan(REPO, fetch="cache", name="first")
    cached = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(cached) == 2
    hub.requests.clear()
    result = scan(REPO, fetch="download", name="second")
    assert values(result) == values(scan(str(folder), name="local"))
    assert {r.kind for r in hub.requests} == {"api"}, "the revision only"
    assert sorted((tmp_path / "cache").rglob("*.safetensors")) == cached
    assert not result.plan.transfers


def test_hub_scan_resumes_with_another_fetch(hub: HubServer, working_folder: Path) -> None:
    scan(REPO, fetch="range")
    events: list[object] = []
    scan(REPO, fetch="cache", on_event=events.append)
    scan(REPO, fetch="download", on_event=events.append)
    assert not [e for e in events if type(e).__name__ == "MatrixScored"]


def test_hub_resumed_scan_chooses_fetches_for_the_rest(hub: HubServer, working_folder: Path) -> None:
    scan(REPO, groups=["mlp.*", "lm_head", "model.*"], fetch="range")
    hub.requests.clear()
    hub.sent_nbytes = 0
    result = scan(REPO, groups=["mlp.*", "self_attn.v_proj", "lm_head", "model.*"])
    assert set(result.plan.fetches.values()) == {Fetch.DOWNLOAD}, "which is right for the whole"
    left = sum(r.n * r.m * 2 for r in result.records if r.group == "self_attn.v_proj")
    fetched = sum(r.range[1] - r.range[0] for r in hub.of_kind("data") if r.range)
    assert left <= fetched <= 1.02 * left
    assert len(hub.of_kind("whole")) <= 2


@pytest.mark.parametrize(
    ("form", "slug"),
    [("{repo}", "org-model"), ("hf://{repo}@main", "org-model"), ("{url}/{repo}", "org-model"),
     ("{repo}@{commit}", "org-model-{commit}")],
)  # fmt: skip
def test_hub_repo_has_one_name_for_every_address(hub: HubServer, working_folder: Path, form: str, slug: str) -> None:
    words = {"repo": REPO, "commit": COMMIT, "url": hub.url}
    assert plan(form.format(**words)).outputs.stem == f"snr_results_{slug.format(**words)}"


def test_hub_server_without_ranges_is_downloaded(
    folder: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with HubServer({REPO: folder}, ranges=False) as server:
        use(server.url, monkeypatch, tmp_path)
        result = scan(REPO, fetch="range")
    assert values(result) == values(scan(str(folder), name="local"))
    assert set(result.plan.fetches.values()) == {"download"}
    assert result.plan.warnings


# Passing faults, each with the number of repeated requests.
PASSING = {
    "429 with Retry-After": hub_server.status(429, retry_after="0"),
    "429 with the Hub's own headers": hub_server.status(429, ratelimit='"resolvers";r=0;t=0'),
    "500": hub_server.status(500),
    "502": hub_server.status(502),
    "503": hub_server.status(503),
    "504": hub_server.status(504),
    "reset": hub_server.reset,
    "cut at once": hub_server.cut(0),
    "cut after some bytes": hub_server.cut(5000),
    "short 206": hub_server.short_range,
    "wrong Content-Range": hub_server.lying_range,
    "no Content-Range": hub_server.no_content_range,
    "compressed": hub_server.compressed,
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
@pytest.mark.parametrize("kind", ["probe", "data"])
def test_hub_passing_fault_is_retried(
    hub: HubServer, folder: Path, working_folder: Path, kind: str, fault: Fault
) -> None:
    hub.script(kind, fault, fault)
    result = scan(REPO, fetch="range")
    assert values(result) == values(scan(str(folder), name="local"))


@pytest.mark.parametrize("code", [429, 500, 502, 503])
def test_hub_passing_fault_of_revision_or_download_is_retried(
    hub: HubServer, folder: Path, working_folder: Path, code: int
) -> None:
    hub.script("api", hub_server.status(code, retry_after="0"))
    hub.script("head", hub_server.status(code, retry_after="0"))
    assert values(scan(REPO, fetch="download")) == values(scan(str(folder), name="local"))


def test_hub_broken_body_continues_where_it_ended(hub: HubServer, folder: Path, working_folder: Path) -> None:
    hub.script("data", hub_server.cut(5000))
    scan(REPO, fetch="range")
    first, *others = hub.of_kind("data")
    assert first.range is not None
    assert (first.range[0] + 5000, first.range[1]) in [r.range for r in others]


# Lasting faults, each with its reason.
LASTING: dict[str, tuple[Fault, str]] = {
    "500": (hub_server.status(500), "server_error"),
    "401 without a token": (hub_server.status(401), "no_such_repo"),
    "403": (hub_server.status(403), "forbidden"),
    "gone": (hub_server.status(404, x_error_code="EntryNotFound"), "no_such_file"),
    "429 for an hour": (hub_server.status(429, retry_after="3600"), "rate_limited"),
    "reset": (hub_server.reset, "unreachable"),
    "wrong range": (hub_server.lying_range, "bad_response"),
    "compressed": (hub_server.compressed, "bad_response"),
    "416": (hub_server.status(416), "changed"),
    "another size": (hub_server.resized, "changed"),
    "another commit": (hub_server.other_commit, "changed"),
}


@pytest.mark.parametrize(("fault", "reason"), LASTING.values(), ids=LASTING)
def test_hub_lasting_fault_raises_one_error(hub: HubServer, working_folder: Path, fault: Fault, reason: str) -> None:
    hub.script("data", *[fault] * 100)
    error = refused(fetch="range")
    assert error.reason == reason
    assert error.exit_code == 1


def test_hub_failed_scan_resumes(hub: HubServer, folder: Path, working_folder: Path) -> None:
    hub.script("data", hub_server.honest, *[hub_server.status(500)] * 100)
    assert refused(fetch="range").reason == "server_error"
    hub.recover()
    done: list[Record] = []
    result = scan(REPO, fetch="range", on_event=lambda e: done.append(e.record) if hasattr(e, "record") else None)
    assert values(result) == values(scan(str(folder), name="local"))


def test_hub_server_that_stops_ranges_is_downloaded(hub: HubServer, folder: Path, working_folder: Path) -> None:
    sent: list[int] = []
    hub.script("data", hub_server.honest, *[hub_server.endless(sent)] * 100)
    result = scan(REPO, fetch="range")
    assert values(result) == values(scan(str(folder), name="local"))
    # Only the bytes in the buffers of the sockets were sent, and not the endless body.
    assert sent
    assert sum(sent) < 50_000_000 * len(sent)


def test_hub_single_use_addresses_are_not_kept(hub: HubServer, folder: Path, working_folder: Path) -> None:
    with HubServer(hub.repos) as elsewhere:
        used: set[str] = set()

        def once(turn: hub_server.Turn) -> None:
            query = turn.handler.path
            (hub_server.status(403) if query in used else hub_server.honest)(turn)
            used.add(query)

        elsewhere.script("probe", *[once] * 100)
        elsewhere.script("data", *[once] * 100)
        numbers = iter(range(1000))
        hub.elsewhere = lambda name: f"{elsewhere.url}/{REPO}/resolve/{COMMIT}/{name}?{next(numbers)}"
        assert values(scan(REPO, fetch="range")) == values(scan(str(folder), name="local"))


def test_hub_redirect_loop_fails(hub: HubServer, working_folder: Path) -> None:
    path = f"/{REPO}/resolve/{COMMIT}/model-00001-of-00002.safetensors"
    hub.script("probe", *[hub_server.redirect(path)] * 100)
    assert refused(fetch="range").reason == "redirect_loop"


@pytest.mark.parametrize("kind", ["probe", "api"])
def test_hub_login_page_is_recognized(hub: HubServer, working_folder: Path, kind: str) -> None:
    hub.script(kind, *[hub_server.page] * 100)
    error = refused()
    assert error.reason in ("bad_response", "header_too_large", "header_past_end")
    assert kind == "api" or "HTML" in str(error)


def test_hub_changed_shard_is_rejected(hub: HubServer, working_folder: Path) -> None:
    a_plan = plan(REPO, fetch="download")
    name = "model-00002-of-00002.safetensors"
    files = dict(hub.repos[REPO])
    other = bytearray(files[name].read(0, files[name].nbytes))
    other[20] ^= 1
    hub.repos[REPO] = files | {name: hub_server.Bytes(bytes(other))}
    from spectrum_stream.pipeline import run

    with pytest.raises(CheckpointError) as error:
        list(run(a_plan))
    assert error.value.reason == "changed"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("org/missing", "no_such_repo"),
        (f"{REPO}@v9", "no_such_revision"),
        ("missing", "no_such_repo"),
        ("hf://datasets/org/model", "bad_address"),
        ("hf://org/model/unet", "no_such_path"),
        ("https://elsewhere.example/org/model", "bad_address"),
        ("org/model/unet", "no_such_path"),
        ("./org/model", "no_such_path"),
    ],
)
def test_hub_unknown_model_fails_with_its_reason(
    hub: HubServer, working_folder: Path, model: str, reason: str
) -> None:
    assert refused(model).reason == reason


@pytest.mark.parametrize(
    "form", ["{repo}", "{repo}@main", "{repo}@{commit}", "hf://{repo}", "hf://{repo}@main", "{url}/{repo}",
             "{url}/{repo}/tree/main", "{url}/{repo}/blob/main/config.json"],
)  # fmt: skip
def test_hub_parses_every_address_of_a_repo(hub: HubServer, working_folder: Path, form: str) -> None:
    source = plan(form.format(repo=REPO, commit=COMMIT, url=hub.url)).source
    assert (source.where, source.commit) == (f"hf://{REPO}", COMMIT)


def test_open_source_prefers_an_existing_folder(hub: HubServer, folder: Path, working_folder: Path) -> None:
    (working_folder / "org").mkdir()
    folder.rename(working_folder / REPO)
    a_plan = plan(REPO)
    assert a_plan.source.commit is None
    assert not hub.requests
    assert plan(f"hf://{REPO}").source.commit == COMMIT


def test_hub_errors_have_separate_reasons(
    hub: HubServer, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = []
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for fault in (
        hub_server.status(403, x_error_code="GatedRepo"),
        hub_server.status(401, x_error_message="Invalid credentials in Authorization header"),
        hub_server.status(401, x_error_code="RepoNotFound"),
        hub_server.status(403, x_error_message="Access to this resource is disabled."),
    ):
        hub.script("api", fault)
        reasons.append(refused().reason)
    assert reasons == ["gated_repo", "bad_token", "no_such_repo", "repo_disabled"]


def test_hub_repo_without_safetensors_lists_other_formats(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with HubServer({REPO: {"pytorch_model.bin": hub_server.Bytes(b"x")}}) as server:
        use(server.url, monkeypatch, tmp_path)
        error = refused()
    assert error.reason == "no_safetensors"
    assert ".bin" in str(error)


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/x.safetensors", "http://evil/x.safetensors"])
def test_hub_index_cannot_name_files_outside_the_repo(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    index = hub_server.Bytes(b'{"weight_map": {"a.weight": "%s"}}' % name.encode())
    with HubServer({REPO: {"model.safetensors.index.json": index, name: hub_server.Bytes(b"x")}}) as server:
        use(server.url, monkeypatch, tmp_path)
        assert refused().reason == "unsafe_shard_name"
        assert not server.of_kind("probe")


def test_hub_missing_shard_is_rejected(hub: HubServer, working_folder: Path) -> None:
    hub.repos[REPO] = {k: v for k, v in hub.repos[REPO].items() if "00002" not in k}
    assert refused().reason == "missing_shard"


def test_hub_unreachable_server_gives_one_sentence(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with HubServer({}) as server:
        use(server.url, monkeypatch, tmp_path)
    error = refused()
    assert error.reason == "unreachable"
    assert error.hint


def test_hub_disk_limit_uses_ranges_or_reports_minimum(hub: HubServer, working_folder: Path) -> None:
    smallest, largest = sorted(s.nbytes for s in plan(REPO).source.shards)
    assert set(plan(REPO, max_disk_nbytes=smallest - 1).fetches.values()) == {"range"}
    assert set(plan(REPO, max_disk_nbytes=largest).fetches.values()) == {"download"}
    with pytest.raises(SpectrumStreamError) as error:
        plan(REPO, fetch="download", max_disk_nbytes=largest - 1)
    assert error.value.reason == "too_little_disk"
    assert re.search(str(largest), str(error.value))


def test_hub_download_keeps_at_most_two_shards(
    save: Save, working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save(llama_tensors(6), shards=6)
    with HubServer({REPO: folder}) as server:
        use(server.url, monkeypatch, tmp_path)
        a_plan = plan(REPO, fetch="download")
        from spectrum_stream.pipeline import run

        most = 0
        for _ in run(a_plan):
            most = max(most, len(list(a_plan.outputs.shards.rglob("*.safetensors"))))
        # A shard has another name during its download. The budget allows two in all.
        assert 1 <= most <= 2
        assert not a_plan.outputs.shards.exists()


@pytest.mark.parametrize("ahead_nbytes", [0, 5000, 100_000])
@pytest.mark.parametrize("request_nbytes", [3000, 10_000, 10**9])
def test_hub_ranged_buffers_are_limited_without_deadlock(
    hub: HubServer,
    working_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    ahead_nbytes: int,
    request_nbytes: int,
) -> None:
    monkeypatch.setattr("spectrum_stream.streaming.fetch._REQUEST_NBYTES", request_nbytes)
    a_plan = plan(REPO, fetch="range")
    shards = {shard.name: shard for shard in a_plan.source.shards}
    most = 0
    held: list[Matrix] = []
    budgets = Budgets(ranged=Budget(ahead_nbytes))
    with Prefetcher(shards, a_plan.matrices, a_plan.fetches, Path("shards"), Traffic(), budgets) as feed:
        for item in feed:
            # An engine can hold matrices back until no more come.
            if item is None:
                time.sleep(0.01)
                most = max(most, budgets.ranged.taken)
                if held:
                    feed.release(held.pop(0))
            else:
                held.append(item[0])
    largest = max(w.nbytes for w in a_plan.matrices)
    # A request ends one matrix and begins others.
    assert most <= max(ahead_nbytes, largest) + min(request_nbytes, a_plan.read_nbytes) + largest
    assert request_nbytes > 10_000 or ahead_nbytes > 5000 or most < 0.7 * a_plan.read_nbytes


def test_hub_range_scan_of_float32_equals_local_scan(
    save: Save, working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save({f"layers.{i}.up.weight": torch.randn(67 + i, 131) for i in range(5)}, shards=2)
    with HubServer({REPO: folder}) as server:
        use(server.url, monkeypatch, tmp_path)
        assert values(scan(REPO, fetch="range")) == values(scan(str(folder), name="local"))


def test_hub_plan_of_70b_and_of_one_group(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with HubServer({REPO: hub_server.llama3_70b()}) as server:
        use(server.url, monkeypatch, tmp_path)
        a_plan = plan(REPO, groups=["self_attn.k_proj"])
        assert len(server.requests) <= 3 + 2 * 30
        assert server.sent_nbytes < 5_000_000
        ranges, shards = a_plan.transfers[Fetch.RANGE], a_plan.transfers[Fetch.DOWNLOAD]
        assert len(a_plan.matrices) == 80
        assert set(a_plan.fetches.values()) == {Fetch.RANGE}
        assert ranges.nbytes <= 1.02 * a_plan.read_nbytes
        assert 0.005 < ranges.nbytes / shards.nbytes < 0.015
        assert ranges.requests <= ranges.nbytes / 8e6 + 3 * 30
        assert a_plan.peak_nbytes < 1.5 * 2**30
        # Without a limit of disk the scan keeps two shards at most, for any size of the repo.
        assert shards.disk_nbytes < 0.1 * shards.nbytes


@pytest.mark.slow
def test_hub_plan_of_671b(working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with HubServer({REPO: hub_server.deepseek_671b()}) as server:
        use(server.url, monkeypatch, tmp_path)
        a_plan = plan(REPO, max_disk_nbytes=20_000_000_000)
        assert len(a_plan.matrices) > 45_000
        assert len(server.requests) <= 3 + 2 * 163
        assert a_plan.transfers[Fetch.DOWNLOAD].disk_nbytes < 20_000_000_000
        assert a_plan.peak_nbytes < 1.5 * 2**30


def test_hub_scan_of_one_group_of_70b_leaves_no_files(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensors = {f"model.layers.{i}.self_attn.k_proj.weight": (64, 512) for i in range(6)}
    repo = hub_server.sharded(tensors | {"lm_head.weight": (5000, 512)}, 3)
    with HubServer({REPO: repo}) as server:
        use(server.url, monkeypatch, tmp_path)
        result = scan(REPO, groups=["self_attn.k_proj"])
        assert len(result.records) == 6
        assert server.sent_nbytes < 0.5 * sum(f.nbytes for f in repo.values())
    assert max(p.stat().st_size for p in working_folder.rglob("*") if p.is_file()) < 100_000


@pytest.mark.slow
def test_hub_offline_uses_the_cache_or_fails(hub: HubServer, working_folder: Path, tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    missing = run_process("scan", REPO, HF_HOME=home, HF_HUB_OFFLINE="1")
    assert missing.returncode == 1
    assert "(offline)" in missing.stderr
    assert "hint:" in missing.stderr
    assert run_process("scan", REPO, "--fetch", "cache", "--name", "first", HF_HOME=home).returncode == 0
    hub.requests.clear()
    done = run_process("scan", REPO, "--name", "second", HF_HOME=home, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    assert COMMIT in done.stderr
    first, second = (working_folder / f"model_snr_results/snr_results_{name}.json" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_hub_command_line_prints_the_fetch(
    cli: Cli, hub: HubServer, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise a scan of a second prints no progress.
    monkeypatch.setattr(progress, "_LEAST_S", 0.0)
    planned = cli("plan", REPO)
    assert COMMIT in planned.stdout
    assert all(words in planned.stdout for words in ("by range", "by download", "by cache", "chosen"))
    hub.script("probe", hub_server.status(429, retry_after="1"))
    done = cli("scan", REPO)
    assert COMMIT in done.stderr
    assert "retrying in 1 s" in done.stderr
    assert "-bound" in done.stderr
    quiet = cli("scan", REPO, "-q", "--fresh")
    assert quiet.stdout == quiet.stderr == ""


@pytest.mark.parametrize("ranges", [True, False])
def test_hub_long_header_is_read_whole(
    save: Save, working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranges: bool
) -> None:
    folder = save({f"layers.{i}.{'x' * 90}.weight": torch.randn(2, 3) for i in range(1500)})
    with HubServer({REPO: folder}, ranges=ranges) as server:
        use(server.url, monkeypatch, tmp_path)
        assert len(plan(REPO).matrices) == 1500
        server.script("data", *[hub_server.whole] * 100)
        assert len(plan(REPO).matrices) == 1500, "though it stops to send ranges"


def no_length(turn: hub_server.Turn) -> None:
    """Answer with 200 and without the size."""
    turn.answer(200, {"X-Repo-Commit": COMMIT, "Connection": "close"}, turn.blob.read(0, turn.blob.nbytes))
    turn.handler.close_connection = True


def too_much(turn: hub_server.Turn) -> None:
    headers = turn.partial()
    del headers["Content-Length"]
    turn.answer(206, headers | {"Connection": "close"}, turn.body() + b"x")
    turn.handler.close_connection = True


def stall(turn: hub_server.Turn) -> None:
    time.sleep(1.0)
    hub_server.honest(turn)


def test_hub_unknown_size_is_requested(hub: HubServer, folder: Path, working_folder: Path) -> None:
    hub.script("probe", no_length, no_length)
    assert values(scan(REPO)) == values(scan(str(folder), name="local"))
    hub.script("probe", no_length, no_length)
    hub.script("head", *[hub_server.status(200, x_repo_commit=COMMIT, etag="a", content_length="")] * 20)
    assert refused(name="y").reason in ("bad_response", "server_error", "unreachable")


@pytest.mark.parametrize("fault", [too_much, stall])
def test_hub_bad_body_is_requested_again(
    hub: HubServer, folder: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.script("data", fault)
    assert values(scan(REPO, fetch="range")) == values(scan(str(folder), name="local"))


def test_hub_silent_server_times_out(hub: HubServer, working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.script("data", *[stall] * 100)
    assert refused(fetch="range").reason == "timeout"


def test_hub_interrupted_scan_does_not_wait_for_the_server(hub: HubServer, working_folder: Path) -> None:
    from spectrum_stream.pipeline import run

    hub.script("data", hub_server.honest, *[hub_server.status(429, retry_after="60")] * 100)
    started = time.monotonic()
    for event in run(plan(REPO, fetch="range")):
        if hasattr(event, "record"):
            break
    assert time.monotonic() - started < 10


def test_hub_empty_shard_and_odd_answers_have_reasons(hub: HubServer, working_folder: Path) -> None:
    hub.script("probe", hub_server.status(416))
    assert refused().reason == "header_too_short"
    hub.script("whole", *[hub_server.status(204)] * 100)
    assert refused().reason == "bad_response"
    hub.recover()
    hub.script("data", *[hub_server.status(207)] * 100)
    assert refused(fetch="range").reason == "bad_response"


@pytest.mark.parametrize(
    "body", [b"[]", b"{}", b'{"id": "a", "sha": "no commit", "siblings": []}', b'{"id": "a", "sha": null}']
)
def test_hub_other_api_is_bad_response(hub: HubServer, working_folder: Path, body: bytes) -> None:
    hub.script("api", hub_server.status(200, body))
    assert refused().reason == "bad_response"


def test_hub_offline_in_process_uses_the_cache_or_fails(
    hub: HubServer, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refused().reason == "offline"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    online = scan(REPO, fetch="cache", name="online")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refused(f"{REPO}@other").reason == "offline"
    assert refused("org/other").reason == "offline"
    assert values(scan(REPO, name="offline")) == values(online)
    assert values(scan(f"{REPO}@{COMMIT}", name="pinned")) == values(online)


def test_hub_disk_full_after_the_plan_fails(
    hub: HubServer, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectrum_stream.pipeline import run

    a_plan = plan(REPO, fetch="download")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(SpectrumStreamError) as error:
        list(run(a_plan))
    assert error.value.reason == "disk_full"
    assert error.value.hint


def test_hub_download_needs_room_for_one_shard(
    hub: HubServer, folder: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sorted(shard.nbytes for shard in plan(REPO).source.shards)
    used: list[int] = []

    def usage(path: object) -> object:
        here = sum(p.stat().st_size for p in Path("model_snr_results").glob(".*.shards/*/*.safetensors"))
        used.append(here)
        return shutil._ntuple_diskusage(10**12, 0, sizes[1] + 10 - here)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert values(scan(REPO, fetch="download")) == values(scan(str(folder), name="local"))
    assert max(used) <= sizes[1]


def test_hub_lost_ranges_respect_the_disk_limit(hub: HubServer, working_folder: Path) -> None:
    hub.script("data", *[hub_server.whole] * 100)
    error = refused(fetch="range", max_disk_nbytes=1000)
    assert error.reason == "too_little_disk"
    assert not list(working_folder.rglob("*.safetensors"))


@pytest.mark.slow
def test_hub_interrupted_plan_does_not_wait_for_the_server(hub: HubServer, working_folder: Path) -> None:
    hub.script("probe", *[hub_server.status(429, retry_after="60")] * 100)
    command = [*COMMAND, "plan", REPO]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "retrying" in process.stderr.readline()
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=50)
    assert process.returncode == 130
    assert time.monotonic() - started < 20
    assert "Traceback" not in stderr


@pytest.mark.parametrize("name", ["..\\\\x.safetensors", "a\0.safetensors", "C:x.safetensors", "a#b.safetensors"])
def test_hub_hostile_shard_name_is_rejected(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    with HubServer({REPO: {name: hub_server.Bytes(b"x")}}) as server:
        use(server.url, monkeypatch, tmp_path)
        assert refused().reason == "unsafe_shard_name"


@pytest.mark.parametrize("body", [b'{"sha": "%s", "siblings": [{"rfilename": null}, {"rfilename": 5}]}'])
def test_hub_file_names_of_wrong_type_are_ignored(hub: HubServer, working_folder: Path, body: bytes) -> None:
    hub.script("api", hub_server.status(200, body % COMMIT.encode()))
    assert refused().reason in ("no_safetensors", "bad_response")


def test_hub_storage_host_gets_no_token_and_is_named_in_errors(
    hub: HubServer, folder: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with HubServer(hub.repos) as elsewhere:
        address = elsewhere.url.replace("127.0.0.1", "localhost")
        hub.elsewhere = lambda name: f"{address}/{REPO}/resolve/{COMMIT}/{name}?Signature=secret"
        # There are several requests to each address, so that it is used again without a redirect.
        monkeypatch.setattr("spectrum_stream.streaming.fetch._REQUEST_NBYTES", 5000)
        assert values(scan(REPO, fetch="range")) == values(scan(str(folder), name="local"))
        assert len(elsewhere.of_kind("data")) > len(hub.of_kind("data"))
        assert not any("authorization" in {k.lower() for k in r.headers} for r in elsewhere.requests)
        assert {r.headers.get("authorization") for r in hub.requests} == {"Bearer hf_secret"}
        denied = hub_server.status(403, b"<Error><Code>AccessDenied</Code> see http://x?Signature=secret</Error>")
        elsewhere.script("data", *[denied] * 100)
        error = refused(fetch="range", fresh=True)
    assert error.reason == "forbidden"
    assert "localhost" in str(error)
    assert "AccessDenied" in str(error)
    assert "secret" not in str(error)


def test_hub_changed_cache_blob_is_scanned_again(hub: HubServer, working_folder: Path, tmp_path: Path) -> None:
    scan(REPO, fetch="cache")
    scan(REPO)
    blob = max((p.resolve() for p in (tmp_path / "cache").rglob("*.safetensors")), key=lambda p: p.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[-40:] = bytes(40)
    blob.unlink()
    blob.write_bytes(bytes(data))
    events: list[object] = []
    again = scan(REPO, on_event=events.append)
    assert getattr(events[0], "dropped") > 0  # noqa: B009
    assert values(again) == values(scan(REPO, name="fresh"))


def test_hub_retry_notes_are_printed_once_without_address() -> None:
    class Sink:
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, text: str) -> None:
            self.lines.append(text)

    sink = Sink()
    handler = LogNotes(sink)  # type: ignore[arg-type]
    for name, message in (
        ("spectrum_stream", "a: no connection; retrying in 1 s"),
        ("spectrum_stream", "a: no connection; retrying in 2 s"),
        ("spectrum_stream", "b: no connection; retrying in 1 s"),
        ("spectrum_stream", "see https://x?Signature=secret"),
        ("huggingface_hub.utils._http", "Retrying in 1s [Retry 1/5]."),
        ("huggingface_hub.utils._http", "Rate limited. Waiting 31.0s before retry [Retry 1/5]."),
    ):
        handler.emit(logging.LogRecord(name, logging.WARNING, "", 0, message, None, None))
    assert [line.split(";")[0].split(".")[0] for line in sink.lines] == [
        "a: no connection", "b: no connection", "Rate limited",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (PermissionError(errno.EACCES, "Permission denied"), "unwritable"),
        (httpx.ProxyError("no"), "unreachable"),
        (httpx.ConnectTimeout("no"), "timeout"),
        (OSError("consistency check failed"), "bad_response"),
    ],
)
def test_explaining_disk_errors_gives_a_reason(fault: Exception, reason: str) -> None:
    with pytest.raises(SpectrumStreamError) as error, explaining("https://hub", REPO, None):
        raise fault
    assert error.value.reason == reason


@pytest.mark.parametrize("model", ["model.safetensors", "org/model@", "a..b", "a b", "-x", "x" * 200, ""])
def test_hub_impossible_names_send_no_request(hub: HubServer, working_folder: Path, model: str) -> None:
    with pytest.raises(SpectrumStreamError) as error:
        open_source(model or "no such thing")
    assert error.value.reason == "no_such_path"
    assert not hub.requests


def test_hub_index_above_the_size_limit_is_rejected(
    hub: HubServer, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileKind.INDEX, "max_nbytes", 100)
    assert refused().reason == "file_too_large"
