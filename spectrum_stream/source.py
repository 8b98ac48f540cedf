"""Where bytes come from: a local `.safetensors` file, or a folder of shards.

A source knows files, sizes and the index; it does not know what is inside a shard. What an index says
about files is checked here, before a name from it touches a path.
"""

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .errors import BadIndex, CheckpointError, SourceError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

# The largest published index (45,000 matrices and their scales) is some 10 MB.
MAX_JSON_NBYTES = 200_000_000

# What a folder without safetensors may hold instead, and what to say about it.
_OTHER_FORMATS = {
    ".bin": "PyTorch pickles (.bin)",
    ".pt": "PyTorch pickles (.pt)",
    ".pth": "PyTorch pickles (.pth)",
    ".gguf": "GGUF files",
    ".h5": "TensorFlow files (.h5)",
    ".msgpack": "Flax files (.msgpack)",
    ".onnx": "ONNX files",
}


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file. Size and mtime identify its content for as long as a scan lasts."""

    name: str
    path: Path
    nbytes: int
    mtime_ns: int

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file; fewer at its end.

        Raises:
            SourceError: unreadable.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}", reason="unreadable") from error


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A checkpoint on this machine.

    Attributes:
        model: MODEL as it was typed.
        path: the file or folder, resolved; the true identity behind a slug.
        shards: the files to read, in the order of their names.
        weight_map: tensor name to shard name, from the index; None without one.
        config: config.json, or {}.
        warnings: what was ignored or odd, a sentence each.
    """

    model: str
    path: Path
    shards: tuple[Shard, ...]
    weight_map: Mapping[str, str] | None
    config: Mapping[str, Any]
    warnings: tuple[str, ...]


def open_source(model: str) -> LocalSource:
    """Find the shards of MODEL, a folder or a `.safetensors` file. Reads the index and the config only.

    In a folder `model.safetensors` comes first, as in transformers; then the index, which alone decides
    which shards count; then a lone safetensors file of any name.

    Raises:
        SourceError: no_such_path, no_safetensors, no_index, unreadable.
        BadIndex: bad_index, unsafe_shard_name, missing_shard.
        CheckpointError: not_a_file.
    """
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return _open_folder(model, path)
        if path.exists():
            return _open_file(model, path)
    except OSError as error:
        raise SourceError(
            f"{error.filename or path} cannot be read: {error.strerror}", reason="unreadable"
        ) from error
    raise SourceError(
        f"{model} is neither a folder nor a file",
        reason="no_such_path",
        hint="repos on the Hugging Face Hub cannot be scanned yet: `hf download` one and give its folder",
    )


def _open_file(model: str, path: Path) -> LocalSource:
    if path.suffix != ".safetensors":
        raise SourceError(
            f"{path} is not a .safetensors file",
            reason="no_safetensors",
            hint=f"give its folder, {path.parent}" if path.name == INDEX_FILE else None,
        )
    # A shard on its own is a part of a model, and only a whole model's config says what is tied in it.
    config, warnings = _config(path.parent) if path.name == SINGLE_FILE else ({}, [])
    if path.name != SINGLE_FILE and path.with_name(INDEX_FILE).exists():
        warnings.append(f"{path.name} is one shard of a model: give its folder, {path.parent}, to score all of it")
    return LocalSource(model, path.resolve(), (_shard(path.name, path),), None, config, tuple(warnings))


def _open_folder(model: str, folder: Path) -> LocalSource:
    config, warnings = _config(folder)
    present = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors")
    weight_map = None
    if SINGLE_FILE in present:
        names = [SINGLE_FILE]
        if (folder / INDEX_FILE).exists():
            warnings.append(f"both {SINGLE_FILE} and {INDEX_FILE} are there: the single file is taken")
    elif (folder / INDEX_FILE).exists():
        weight_map = _index(folder / INDEX_FILE)
        names = sorted(set(weight_map.values()))
    elif len(present) == 1:
        names = present
    elif present:
        raise SourceError(
            f"{folder} has {len(present)} safetensors files and no {INDEX_FILE} to say which belong together",
            reason="no_index",
            hint="download the index too, or give one file",
        )
    else:
        raise _no_safetensors(folder)
    shards = tuple(_shard(name, folder / name) for name in names)
    if stray := [name for name in present if name not in names]:
        warnings.append(f"not part of the checkpoint, ignored: {', '.join(stray)}")
    warnings += _escaping_links(folder, shards)
    return LocalSource(model, folder.resolve(), shards, weight_map, config, tuple(warnings))


def _no_safetensors(folder: Path) -> SourceError:
    suffixes = [p.suffix for p in folder.iterdir() if p.is_file()]
    found = [f"{suffixes.count(s)} {what}" for s, what in _OTHER_FORMATS.items() if s in suffixes]
    nested = sorted(p.parent.relative_to(folder) for p in folder.glob("*/*.safetensors"))
    return SourceError(
        f"{folder} has no safetensors files; there are {', '.join(found) if found else 'no weights at all'}",
        reason="no_safetensors",
        hint=(
            f"there are some in {folder / nested[0]}"
            if nested
            else "only safetensors is read: convert with `save_pretrained(..., safe_serialization=True)`"
            if found
            else None
        ),
    )


def _shard(name: str, path: Path) -> Shard:
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
    return Shard(name, path, status.st_size, status.st_mtime_ns)


def _config(folder: Path) -> tuple[Mapping[str, Any], list[str]]:
    path = folder / CONFIG_FILE
    if not path.exists():
        return {}, []
    config = _read_json(path)
    if not isinstance(config, dict):
        return {}, [f"{path} is not a JSON object and was ignored: a tied head will not be recognised"]
    return config, []


def _index(path: Path) -> Mapping[str, str]:
    index = _read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadIndex(f"{path} has no weight_map from tensors to shards", reason="bad_index")
    if not weight_map:
        raise BadIndex(f"{path} lists no tensors", reason="bad_index")
    for name in set(weight_map.values()):
        if not is_safe_shard_name(name):
            raise BadIndex(f"{path} names a shard outside the checkpoint: {name!r}", reason="unsafe_shard_name")
    return weight_map


def is_safe_shard_name(name: str) -> bool:
    """Whether a shard's name from an index stays below the checkpoint under POSIX and Windows rules alike.

    An index is a stranger's: `../../other/model.safetensors`, `C:\\x`, `//host/x` and `http://host/x` must
    reach neither a path nor, with the reader's token, an address.
    """
    return (
        name.endswith(".safetensors")
        and name.isprintable()
        and not set(name) & set("\\:?#%*")
        and not PurePosixPath(name).is_absolute()
        and not PureWindowsPath(name).anchor
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def _escaping_links(folder: Path, shards: tuple[Shard, ...]) -> list[str]:
    # A snapshot in the Hugging Face cache is all links into ../../blobs: that is its normal state.
    if "snapshots" in folder.resolve().parts:
        return []
    root = folder.resolve()
    outside = [s.name for s in shards if not s.path.resolve().is_relative_to(root)]
    return [f"linked from outside the folder: {', '.join(outside)}"] if outside else []


def _read_json(path: Path) -> Any:
    """A JSON file of bounded size, or None when it is no JSON."""
    if path.stat().st_size > MAX_JSON_NBYTES:
        raise CheckpointError(f"{path} is implausibly large", reason="file_too_large")
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        return None
