"""The folder of temporary shards: made with a marker, emptied only with it, and never a link."""

import os
from pathlib import Path

import pytest

from spectrum_stream import plan, scan
from spectrum_stream.errors import SourceError
from spectrum_stream.streaming.downloaded import _MARKER, make_folder, remove_folder

from ..support.checkpoints import Save, llama_tensors
from ..support.hub_server import REPO, HubServer, use

posix_only = pytest.mark.skipif(os.name != "posix", reason="files that only POSIX has")


def is_refused(folder: Path) -> bool:
    try:
        make_folder(folder)
    except SourceError as error:
        return error.reason == "not_our_folder"
    return False


def test_folder_is_made_used_again_and_removed_with_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "results" / ".x.shards"
    for _ in range(2):
        make_folder(folder)
    (folder / "a.safetensors").write_text("shard")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "a.lock").touch()
    remove_folder(folder)
    assert list((tmp_path / "results").iterdir()) == []
    remove_folder(folder)


def test_folder_that_a_killed_process_left_empty_is_used(tmp_path: Path) -> None:
    folder = tmp_path / ".x.shards"
    folder.mkdir()
    make_folder(folder)
    assert (folder / _MARKER).exists()


@posix_only
@pytest.mark.parametrize(
    "kind", ["link", "dangling", "itself", "file", "fifo", "files", "false marker", "linked marker"]
)
def test_folder_that_is_not_ours_is_neither_used_nor_emptied(tmp_path: Path, kind: str) -> None:
    folder, users = tmp_path / ".x.shards", tmp_path / "users"
    make_folder(users)
    (users / "thesis.txt").write_text("precious")
    if kind in ("link", "dangling", "itself"):
        folder.symlink_to({"link": users, "dangling": tmp_path / "none", "itself": folder}[kind])
    elif kind == "file":
        folder.write_text("precious")
    elif kind == "fifo":
        os.mkfifo(folder)
    else:
        folder.mkdir()
        (folder / "thesis.txt").write_text("precious")
        if kind == "false marker":
            (folder / _MARKER).write_bytes((users / _MARKER).read_bytes().splitlines()[0])
        elif kind == "linked marker":
            (folder / _MARKER).symlink_to(users / _MARKER)
    assert is_refused(folder)
    remove_folder(folder)
    assert os.path.lexists(folder)
    assert (users / "thesis.txt").read_text() == "precious"
    assert kind not in ("files", "false marker", "linked marker") or (folder / "thesis.txt").exists()
    assert not (tmp_path / "none").exists()


@posix_only
def test_links_in_the_folder_are_removed_and_not_followed(tmp_path: Path) -> None:
    folder, users = tmp_path / ".x.shards", tmp_path / "users"
    users.mkdir()
    (users / "thesis.txt").write_text("precious")
    make_folder(folder)
    (folder / "a").symlink_to(users)
    (folder / "b").mkdir()
    (folder / "b" / "c").symlink_to(users)
    remove_folder(folder)
    assert not folder.exists()
    assert (users / "thesis.txt").read_text() == "precious"


@posix_only
def test_folder_that_was_deleted_in_part_is_still_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ".x.shards"
    make_folder(folder)
    (folder / "a.safetensors").write_text("shard")
    with monkeypatch.context() as patched:
        # As on Windows, where a mapped file cannot be deleted.
        patched.setattr(Path, "unlink", lambda self: (_ for _ in ()).throw(PermissionError))
        remove_folder(folder)
    assert (folder / _MARKER).exists()
    make_folder(folder)
    remove_folder(folder)
    assert not folder.exists()


@posix_only
def test_scan_does_not_download_through_a_link(
    save: Save, working_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    users = tmp_path / "users"
    users.mkdir()
    (users / "model.safetensors").write_text("precious")
    with HubServer({REPO: save(llama_tensors(1))}) as server:
        use(server.url, monkeypatch, tmp_path)
        folder = plan(REPO, fetch="download").outputs.shards
        folder.parent.mkdir()
        folder.symlink_to(users)
        with pytest.raises(SourceError) as error:
            scan(REPO, fetch="download")
        assert error.value.reason == "not_our_folder"
        assert folder.is_symlink()
        folder.unlink()
        assert scan(REPO, fetch="download").complete
    assert not folder.exists()
    assert [p.name for p in users.iterdir()] == ["model.safetensors"]
    assert (users / "model.safetensors").read_text() == "precious"
