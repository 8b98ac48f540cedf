"""A checkpoint on this machine: a safetensors file, an index, a folder of shards, or a repo's folder in a cache."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import BadIndex, FileError, SourceError
from ..files import FileKind, read_file
from ..text import counted, listed
from .formats import describe_bytes, explain_files, looks_like_safetensors
from .index import (
    choose_for,
    choose_shards,
    find_modules,
    is_index,
    is_one_of_several,
    is_safetensors,
    kind_of,
    missing_shards,
    parse_small,
    read_adapter_config,
    read_config,
)
from .partial import check_finished
from .source import LocalShard, Source

# To explain a folder without weights, only so much of it is listed: MODEL may be `/`.
_MAX_LISTED, _MAX_DEPTH = 10_000, 4
_HEAD_NBYTES = 4096


def open_local(model: str, path: Path) -> Source:
    """Find the shards of a folder, of an index, or of a safetensors file.

    Read only index and configs.

    Raises:
        FileError: not_a_file, file_too_large, unreadable.
        SourceError: no_safetensors, no_index, slices, no_snapshot.
        BadIndex: bad_index, unsafe_shard_name, missing_shard.
        CheckpointError: unfinished.
    """
    try:
        if path.is_dir():
            return _open_folder(model, _find_snapshot(path))
        if is_index(path.name):
            return _open_folder(model, path.parent, index=path.name)
        return _open_file(model, path)
    except OSError as error:
        raise FileError(f"{error.filename or path} cannot be read: {error.strerror}", reason="unreadable") from error


def read_again(source: Source) -> Source:
    """Read the configs and the index of a local source again.

    The shards are not chosen again, because other files in the folder change nothing that was read.

    Returns:
        The source with the present configs, and without a weight map if no index has the same one.

    Raises:
        FileError: not_a_file, file_too_large, unreadable.
        OSError.
    """

    def read_json(name: str) -> Any:
        return _read_json(folder / name)

    path = Path(source.where)
    folder = path if path.is_dir() else path.parent
    files = _list_files(folder)
    config, quantization_files, _ = read_config(files, read_json, str(folder))
    return replace(
        source,
        config=config,
        quantization_files=quantization_files,
        adapter_config=read_adapter_config(files, read_json),
        weight_map=source.weight_map
        if source.weight_map and _has_index(files, read_json, source.weight_map)
        else None,
    )


def _has_index(files: list[str], read_json: Callable[[str], Any], weight_map: Mapping[str, str]) -> bool:
    """Whether an index has this weight map."""
    for name in filter(is_index, files):
        # Another index may be incomplete.
        with contextlib.suppress(FileError, OSError):
            index = read_json(name)
            if isinstance(index, dict) and index.get("weight_map") == weight_map:
                return True
    return False


def is_lone_file(path: Path) -> bool:
    """Whether a file stands for itself, and not for the checkpoint of its folder."""

    def read_json(name: str) -> Any:
        return _read_json(path.parent / name)

    choice = choose_for(path.name, _list_files(path.parent), read_json, str(path.parent))
    return choice is not None and choice.file is not None


def _open_file(model: str, path: Path) -> Source:
    def read_json(name: str) -> Any:
        return _read_json(folder / name)

    folder = path.parent
    shard = _open_shard(path.name, path)
    if not is_safetensors(path.name):
        _check_content(shard, folder)
    files = _list_files(folder)
    check_finished(files, [path.name], str(folder))
    config, quantization_files, warnings = read_config(files, read_json, str(folder))
    is_part = is_one_of_several(path.name, files, read_json)
    if is_part:
        warnings.append(f"{path.name} is one shard of a model: give the folder, {folder}, to score the whole model")
    index = f"{path.name}.index.json"
    return Source(
        model=model,
        name=model,
        # The file of a snapshot in the Hugging Face cache is a link to a blob without a name.
        where=str(folder.resolve() / path.name),
        commit=None,
        shards=(shard,),
        weight_map=None,
        config=config,
        quantization_files=quantization_files,
        is_part=is_part,
        adapter_config=read_adapter_config(files, read_json),
        ignored=tuple(sorted(name for name in files if is_safetensors(name) and name != path.name)),
        other_index=str(folder / index) if index in files else None,
        warnings=tuple(warnings),
    )


def _check_content(shard: LocalShard, folder: Path) -> None:
    """Check that a file without the suffix of safetensors is safetensors by its content.

    Raises:
        SourceError: no_safetensors.
    """
    head = shard.read(0, _HEAD_NBYTES)
    if looks_like_safetensors(head, shard.nbytes):
        return
    foreign = describe_bytes(head, shard.nbytes)
    # The name can say more than the content: .bin, .onnx.
    by_name = explain_files([shard.name], str(folder))
    raise SourceError(
        f"{shard.where} is not a .safetensors file" + (f": it {foreign.what}" if foreign is not None else ""),
        reason="no_safetensors",
        hint=(foreign.hint if foreign is not None and shard.nbytes else None) or by_name.hint,
    )


def _open_folder(model: str, folder: Path, index: str | None = None) -> Source:
    def read_json(name: str) -> Any:
        return _read_json(folder / name)

    files = _list_files(folder)
    config, quantization_files, warnings = read_config(files, read_json, str(folder))
    choice = choose_shards(files, read_json, str(folder), config=config, only=index)
    if choice is None:
        raise explain_files([*_list_below(folder)], str(folder))
    check_finished(files, choice.names, str(folder))
    missing = [name for name in choice.names if not os.path.lexists(folder / name)]
    if missing:
        raise missing_shards(str(folder), choice.index, missing, [*_list_below(folder)])
    shards = tuple(_open_shard(name, folder / name) for name in choice.names)
    return Source(
        model=model,
        name=model,
        where=str(folder.resolve() / (index or "")),
        commit=None,
        shards=shards,
        weight_map=choice.weight_map,
        config=config,
        quantization_files=quantization_files,
        adapter_config=read_adapter_config(files, read_json),
        ignored=choice.ignored,
        # These are not needed, so a broken link is not an error.
        unlisted=tuple(LocalShard.at(name, folder / name) for name in choice.unlisted if (folder / name).is_file()),
        other_index=None if choice.other_index is None else str(folder / choice.other_index),
        warnings=(
            *warnings,
            *choice.warnings,
            *find_modules(files, read_json),
            *_find_escaping_links(folder, shards),
        ),
    )


def _find_snapshot(folder: Path) -> Path:
    """Return the snapshot of a repo's folder in the Hugging Face cache, and any other folder as it is.

    The folder is `models--org--name`, or `snapshots` in it. The snapshot is that of `refs/main`, else the only one.

    Raises:
        SourceError: no_snapshot.
        OSError.
    """
    repo = folder.parent if folder.name == "snapshots" else folder
    snapshots = repo / "snapshots"
    if not snapshots.is_dir() or not ((repo / "refs").is_dir() or (repo / "blobs").is_dir()):
        return folder
    main = repo / "refs" / "main"
    found = sorted(p for p in snapshots.iterdir() if p.is_dir())
    commit = read_file(main, FileKind.NOTE).decode(errors="replace").strip() if main.is_file() else None
    if commit is not None and commit in [p.name for p in found]:
        return snapshots / commit
    if len(found) == 1:
        return found[0]
    names = listed([p.name for p in found], 4)
    raise SourceError(
        f"{folder} has {counted(len(found), 'snapshot', 'snapshots')}"
        + (f", and no refs/main that names one: {names}" if found else ", so nothing was downloaded completely"),
        reason="no_snapshot",
        hint=f"give one of them, {found[0]}" if found else "run `hf download` again",
    )


def _list_files(folder: Path) -> list[str]:
    # A folder named `x.safetensors` is listed too, so that its error says that it is not a file.
    return [p.name for p in folder.iterdir() if is_safetensors(p.name) or not p.is_dir()]


def _list_below(folder: Path) -> Iterator[str]:
    """List the files in a folder and in its subfolders, up to a limit."""
    waiting, count = [(folder, 0)], 0
    while waiting and count < _MAX_LISTED:
        here, depth = waiting.pop(0)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError:
            continue
        count += len(entries)
        for entry in entries:
            path = Path(entry.path)
            if not entry.is_dir(follow_symlinks=depth == 0):
                yield path.relative_to(folder).as_posix()
            elif depth < _MAX_DEPTH:
                waiting.append((path, depth + 1))


def _open_shard(name: str, path: Path) -> LocalShard:
    try:
        status = path.stat()
    except OSError as error:
        what = "is a broken link" if path.is_symlink() else "is not there"
        raise BadIndex(
            f"shard {name} {what}: {path}",
            reason="missing_shard",
            hint="the download may be incomplete: run it again",
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path} is not a regular file", reason="not_a_file")
    return LocalShard.at(name, path)


def _find_escaping_links(folder: Path, shards: tuple[LocalShard, ...]) -> list[str]:
    # In a snapshot of the Hugging Face cache every file is a link into ../../blobs.
    if "snapshots" in folder.resolve().parts:
        return []
    root = folder.resolve()
    outside = [s.name for s in shards if not s.path.resolve().is_relative_to(root)]
    return [f"linked from outside the folder: {', '.join(outside)}"] if outside else []


def _read_json(path: Path) -> Any:
    try:
        return parse_small(read_file(path, kind_of(path.name)), str(path))
    except FileNotFoundError as error:
        what = "is a broken link" if path.is_symlink() else "is gone"
        raise FileError(f"{path} {what}", reason="unreadable") from error
