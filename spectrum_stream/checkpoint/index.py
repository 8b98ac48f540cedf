"""The files that make a checkpoint: the index, and the rules for the names in it.

An index is untrusted. The names in it are checked here, before they reach a path or an address.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import BadIndex, CheckpointError, SourceError
from ..text import si_bytes

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
# The largest published index (45,000 matrices and their scales) has about 10 MB.
MAX_JSON_NBYTES = 200_000_000
# Other formats of weights by suffix, with their names in messages.
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
class Choice:
    """The names of a checkpoint's shards, its index, and warnings."""

    names: tuple[str, ...]
    weight_map: Mapping[str, str] | None
    warnings: tuple[str, ...]


def choose_shards(files: Sequence[str], read_json: Callable[[str], Any], where: str) -> Choice:
    """Choose the shards among the files of a folder or repo.

    As in transformers, `model.safetensors` comes first. Then comes the index, which lists the shards, and then a lone
    safetensors file of any name.

    Args:
        files: paths below `where`, including those in subfolders.
        read_json: returns the content of a file by its name, or None if it is not JSON.
        where: the folder or repo, for messages.

    Raises:
        SourceError: no_safetensors, no_index.
        BadIndex: bad_index, unsafe_shard_name.
    """
    present = sorted(f for f in files if f.endswith(".safetensors") and "/" not in f)
    weight_map, warnings = None, []
    if SINGLE_FILE in present:
        names = [SINGLE_FILE]
        if INDEX_FILE in files:
            warnings.append(f"{SINGLE_FILE} and {INDEX_FILE} are both there: the single file is used")
    elif INDEX_FILE in files:
        weight_map = _index(read_json(INDEX_FILE), f"{where}/{INDEX_FILE}")
        names = sorted(set(weight_map.values()))
    elif len(present) == 1:
        names = present
    elif present:
        raise SourceError(
            f"{where} has {len(present)} safetensors files but no {INDEX_FILE} that lists the shards",
            reason="no_index",
            hint="download the index too, or give one file",
        )
    else:
        raise _no_safetensors(files, where)
    if stray := [name for name in present if name not in names]:
        warnings.append(f"not part of the checkpoint, ignored: {', '.join(stray)}")
    return Choice(tuple(names), weight_map, tuple(warnings))


def read_config(
    files: Sequence[str], read_json: Callable[[str], Any], where: str
) -> tuple[Mapping[str, Any], list[str]]:
    """Read config.json; return it, or {} without one, and warnings."""
    if CONFIG_FILE not in files:
        return {}, []
    config = read_json(CONFIG_FILE)
    if not isinstance(config, dict):
        return {}, [f"{where}/{CONFIG_FILE} is not a JSON object and was ignored: a tied head will not be recognized"]
    return config, []


def parse_json(data: bytes) -> Any:
    """Parse JSON; return None if the data is not JSON."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def check_json_size(nbytes: int, where: str) -> None:
    """Check a size before the file is read.

    Raises:
        CheckpointError: file_too_large.
    """
    if nbytes > MAX_JSON_NBYTES:
        raise CheckpointError(f"{where} is larger than {si_bytes(MAX_JSON_NBYTES)}", reason="file_too_large")


def _no_safetensors(files: Sequence[str], where: str) -> SourceError:
    suffixes = [PurePosixPath(f).suffix for f in files if "/" not in f]
    found = [f"{suffixes.count(s)} {what}" for s, what in _OTHER_FORMATS.items() if s in suffixes]
    nested = sorted(str(PurePosixPath(f).parent) for f in files if f.endswith(".safetensors"))
    return SourceError(
        f"{where} has no safetensors files; it has {', '.join(found) if found else 'no weights at all'}",
        reason="no_safetensors",
        hint=(
            f"there are some in {where}/{nested[0]}"
            if nested
            else "convert it with `save_pretrained(..., safe_serialization=True)`"
            if found
            else None
        ),
    )


def _index(index: Any, where: str) -> Mapping[str, str]:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadIndex(f"{where} has no weight_map from tensors to shards", reason="bad_index")
    if not weight_map:
        raise BadIndex(f"{where} lists no tensors", reason="bad_index")
    for name in set(weight_map.values()):
        if not is_safe_shard_name(name):
            raise BadIndex(f"{where} names a shard outside the checkpoint: {name!r}", reason="unsafe_shard_name")
    return weight_map


def is_safe_shard_name(name: str) -> bool:
    """Whether a shard's name stays below the checkpoint, on POSIX and Windows.

    An index is untrusted: `../../other/model.safetensors`, `C:\\x`, `//host/x` and `http://host/x` must not become
    a path, or an address that the user's token is sent to.
    """
    return (
        name.endswith(".safetensors")
        and name.isprintable()
        and not set(name) & set("\\:?#%*")
        and not PurePosixPath(name).is_absolute()
        and not PureWindowsPath(name).anchor
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )
