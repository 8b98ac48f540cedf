"""A checkpoint on this machine: a `.safetensors` file, or a folder of shards."""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadIndex, CheckpointError, SourceError
from .index import INDEX_FILE, SINGLE_FILE, check_json_size, choose_shards, parse_json, read_config
from .source import LocalShard, Source


def open_local(model: str, path: Path) -> Source:
    """Find the shards of a folder or a `.safetensors` file.

    Read only index and config.

    Raises:
        SourceError: no_safetensors, no_index, unreadable.
        BadIndex: bad_index, unsafe_shard_name, missing_shard.
        CheckpointError: not_a_file, file_too_large.
    """
    try:
        return _open_folder(model, path) if path.is_dir() else _open_file(model, path)
    except OSError as error:
        raise SourceError(
            f"{error.filename or path} cannot be read: {error.strerror}", reason="unreadable"
        ) from error


def _open_file(model: str, path: Path) -> Source:
    if path.suffix != ".safetensors":
        raise SourceError(
            f"{path} is not a .safetensors file",
            reason="no_safetensors",
            hint=f"give its folder, {path.parent}" if path.name == INDEX_FILE else None,
        )
    config: Mapping[str, Any] = {}
    warnings: list[str] = []
    # A single shard is a part of a model, and a config describes a whole model.
    if path.name == SINGLE_FILE:
        config, warnings = read_config(
            _list_files(path.parent), lambda name: _read_json(path.parent / name), str(path.parent)
        )
    elif path.with_name(INDEX_FILE).exists():
        warnings = [f"{path.name} is one shard of a model: give the folder, {path.parent}, to score the whole model"]
    return Source(
        model=model,
        name=model,
        where=str(path.resolve()),
        commit=None,
        shards=(_open_shard(path.name, path),),
        weight_map=None,
        config=config,
        warnings=tuple(warnings),
    )


def _open_folder(model: str, folder: Path) -> Source:
    def read_json(name: str) -> Any:
        return _read_json(folder / name)

    files = _list_files(folder)
    config, warnings = read_config(files, read_json, str(folder))
    choice = choose_shards(files, read_json, str(folder))
    shards = tuple(_open_shard(name, folder / name) for name in choice.names)
    return Source(
        model=model,
        name=model,
        where=str(folder.resolve()),
        commit=None,
        shards=shards,
        weight_map=choice.weight_map,
        config=config,
        warnings=(*warnings, *choice.warnings, *_find_escaping_links(folder, shards)),
    )


def _list_files(folder: Path) -> list[str]:
    # A folder named `x.safetensors` is listed too, so that its error says that it is not a file.
    here = [p.name for p in folder.iterdir() if not p.is_dir() or p.suffix == ".safetensors"]
    return here + [p.relative_to(folder).as_posix() for p in folder.glob("*/*.safetensors")]


def _open_shard(name: str, path: Path) -> LocalShard:
    try:
        status = path.stat()
    except OSError as error:
        what = "is a link to nothing" if path.is_symlink() else "is not there"
        raise BadIndex(
            f"shard {name} {what}: {path}",
            reason="missing_shard",
            hint="the download may be incomplete: run it again",
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file", reason="not_a_file")
    return LocalShard.at(name, path)


def _find_escaping_links(folder: Path, shards: tuple[LocalShard, ...]) -> list[str]:
    # In a snapshot of the Hugging Face cache every file is a link into ../../blobs.
    if "snapshots" in folder.resolve().parts:
        return []
    root = folder.resolve()
    outside = [s.name for s in shards if not s.path.resolve().is_relative_to(root)]
    return [f"linked from outside the folder: {', '.join(outside)}"] if outside else []


def _read_json(path: Path) -> Any:
    check_json_size(path.stat().st_size, str(path))
    return parse_json(path.read_bytes())
