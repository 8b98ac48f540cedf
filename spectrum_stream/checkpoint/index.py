"""The files that make a checkpoint: single files, indexes and numbered shards, and the rules for their names.

A folder can hold several copies of the weights. One is chosen by the rules of transformers and diffusers; where they
have none, the choice is left to the user. An index is untrusted. The names in it are checked here, before they reach
a path or an address.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import BadIndex, SourceError
from ..files import FileKind, JsonTooLarge, above_limit, parse_json
from ..text import counted, listed, printable
from .formats import is_foreign
from .partial import find_slices, find_unfinished, hint_unfinished

SUFFIX = ".safetensors"
CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
# The quantization of GPTQ, AWQ and modelopt. The first that is there counts if config.json does not have it.
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
# The parts of a model of sentence-transformers, each with its folder.
MODULES_FILE = "modules.json"
_MODULES_WITH_WEIGHTS = ("Dense", "CNN", "LSTM", "LayerNorm", "WeightedLayerPooling", "SparseStaticEmbedding")
SMALL_FILES = (CONFIG_FILE, ADAPTER_CONFIG_FILE, MODULES_FILE, *QUANTIZATION_FILES)
# A path in a file system can have 4096 bytes, and a name on the Hub has fewer.
_MAX_PATH_LENGTH = 1000
# A lone file is looked up in at most this many indexes beside it.
_MAX_INDEXES = 20
_SHOWN_LENGTH = 200

_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json", re.IGNORECASE)
_SHARD = re.compile(
    r"(?P<stem>.+?)(?P<before>[-_.])(?P<number>\d{1,6})(?P<of>[-_]of[-_])(?P<total>\d{1,6})"
    r"(?:\.(?P<variant>[^.]+))?\.safetensors",
    re.IGNORECASE,
)
# The names of transformers and of diffusers. Their files can have a variant of any name: model.fp16.safetensors.
_LIBRARY_STEMS = ("model", "diffusion_pytorch_model")
_VARIANT = re.compile(r"(fp|bf|f|int|nf|q)\d+\w*|(non_)?ema|[48]bit", re.IGNORECASE)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The shards of a checkpoint.

    Attributes:
        names: their paths below the folder or repo.
        index: the name of the index that lists them; None without one.
        weight_map: the content of the index; None without one.
        ignored: other safetensors files at the top, which hold other weights or a copy.
        unlisted: the ignored files that belong to the shards by their numbers.
        other_index: the index of a copy that is not read; None without one.
        file: the index or file that the user named, if the folder alone would give another one; else None.
        warnings: one sentence for each choice that was made, and each oddity.
    """

    names: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] | None = None
    ignored: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()
    other_index: str | None = None
    file: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class _Copy:
    """The files of one name: a single file, an index, and sets of numbered shards by the form of their names."""

    stem: str
    variant: str
    single: str | None = None
    index: str | None = None
    splits: dict[str, dict[int, str]] = field(default_factory=dict)

    @property
    def prefers_index(self) -> bool:
        """Whether the index comes before the single file: in diffusers, not in transformers."""
        return self.index is not None and (self.single is None or self.stem != "model")

    @property
    def labels(self) -> list[str]:
        """A name for each set of weights."""
        if self.index is not None:
            return [self.index, *([self.single] if self.single else [])]
        return [*([self.single] if self.single else []), *self.splits]


def choose_shards(
    files: Sequence[str],
    read_json: Callable[[str], Any],
    where: str,
    *,
    config: Mapping[str, Any] | None = None,
    only: str | None = None,
) -> Choice | None:
    """Choose the shards among the files of a folder or repo.

    As in transformers, the file that config.json names as `transformers_weights` comes first, then
    `model.safetensors`, then the shards of its index. Then come the names of diffusers, then the only index, and then
    a lone file or a complete set of numbered shards. A file without a variant comes before `x.fp16.safetensors`.

    Args:
        files: paths below `where`; those in subfolders do not matter.
        read_json: returns the content of a file by its name, or None if it is not JSON.
        where: the folder or repo, for messages.
        config: config.json.
        only: the name of the index to use.

    Returns:
        None without safetensors files.

    Raises:
        SourceError: no_index, there are several copies and no rule to choose one; slices, the files hold slices.
        BadIndex: bad_index, unsafe_shard_name; missing_shard, of numbered shards without an index.
    """
    tops = sorted(f for f in files if "/" not in f)
    present = [f for f in tops if is_safetensors(f)]
    warnings: list[str] = []
    named = (config or {}).get("transformers_weights")
    if only is None and isinstance(named, str) and named in tops:
        if is_safetensors(named):
            return _finish((named,), present, warnings, f"{named}, which {CONFIG_FILE} names, is read")
        only = named if is_index(named) else None
    copies = _group(tops)
    while True:
        try:
            copy = _choose_copy(copies, where, only, adapters_first=ADAPTER_CONFIG_FILE in tops)
        except SourceError as error:
            # The hint of the other error, to give one file, would lead to scores of half matrices.
            raise find_slices(present, where, config) or error from None
        if copy is None:
            return None
        if copy.index is None or not (copy.prefers_index or only is not None):
            break
        weight_map = _parse_index(read_json(copy.index), f"{where}/{copy.index}")
        pickle = next(iter(weight_map.values()))
        if not all(name.endswith(_PICKLES) for name in weight_map.values()):
            _check_names(weight_map, f"{where}/{copy.index}")
            names = tuple(sorted(set(weight_map.values())))
            read = f"{_shards(names)} of {copy.index} {'is' if len(names) == 1 else 'are'} read"
            choice = _finish(names, present, warnings, read)
            sets = {_label(match) for name in names if (match := _SHARD.fullmatch(name)) is not None}
            unlisted = tuple(
                name
                for name in choice.ignored
                if (match := _SHARD.fullmatch(name)) is not None and _label(match) in sets
            )
            return replace(choice, index=copy.index, weight_map=weight_map, unlisted=unlisted)
        if only is not None:
            raise BadIndex(f"{where}/{copy.index} lists PyTorch files: {_short(pickle)}", reason="bad_index")
        warnings.append(f"{copy.index} lists PyTorch files ({_short(pickle)}) and was ignored")
        copy.index = None
    if copy.single is not None:
        if copy.index is None:
            return _finish((copy.single,), present, warnings, f"{copy.single} is read")
        if _lists_only(read_json(copy.index), copy.single):
            return _finish((copy.single,), present, warnings, f"{copy.single} is read")
        both = f"{copy.single} and {copy.index} are both there"
        read = f"{both}: the single file is read, as in transformers (for the shards, give the path of the index)"
        return replace(_finish((copy.single,), present, [], read, warns=True), other_index=copy.index)
    ((label, split),) = copy.splits.items()
    _check_numbers(label, split, where)
    names = tuple(split[number] for number in sorted(split))
    if len(names) > 1:
        warnings.append(f"{label} is read without an index: the numbers of its {len(names)} shards are complete")
    return _finish(names, present, warnings, f"{label} is read")


def choose_for(
    file: str | None,
    files: Sequence[str],
    read_json: Callable[[str], Any],
    where: str,
    config: Mapping[str, Any] | None = None,
) -> Choice | None:
    """Choose the shards for a folder or repo, or for the page of a file in it.

    A file that belongs to the checkpoint of its folder stands for that, such as config.json or one of the shards. An
    index stands for its shards, and another safetensors file for itself.

    Args:
        file: a name at the top; None for the folder itself.

    Raises:
        As `choose_shards`.
    """
    if file is not None and is_index(file):
        return replace(
            choose_shards(files, read_json, where, config=config, only=file) or Choice(names=()), file=file
        )
    if file is None or not is_safetensors(file):
        has_weights = file is not None and is_foreign(file)
        return None if has_weights else choose_shards(files, read_json, where, config=config)
    try:
        choice = choose_shards(files, read_json, where, config=config)
    except (SourceError, BadIndex):
        choice = None
    return choice if choice is not None and file in choice.names else Choice(names=(file,), file=file)


def read_config(
    files: Sequence[str], read_json: Callable[[str], Any], where: str
) -> tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]], list[str]]:
    """Read config.json and the files about the quantization.

    Returns:
        (config, quantization files, warnings): config.json, or {} without one, and each of `QUANTIZATION_FILES` that
        is there, by its name. If config.json does not state the quantization, the first file is added as
        `quantization_config`.
    """
    config: Mapping[str, Any] = {}
    warnings = []
    if CONFIG_FILE in files:
        found = read_json(CONFIG_FILE)
        if isinstance(found, dict):
            config = found
        else:
            warnings.append(
                f"{where}/{CONFIG_FILE} is not a JSON object and was ignored: a tied head will not be recognized"
            )
    stated: dict[str, Mapping[str, Any]] = {}
    for name in QUANTIZATION_FILES:
        if name in files:
            if isinstance(quantization := read_json(name), dict):
                stated[name] = quantization
            else:
                warnings.append(f"{where}/{name} is not a JSON object and was ignored")
    parts = (config, config.get("text_config"))
    if any(isinstance(part, dict) and part.keys() & {"quantization_config", "compression_config"} for part in parts):
        return config, stated, warnings
    if stated:
        config = {**config, "quantization_config": next(iter(stated.values()))}
    if len(stated) > 1:
        warnings.append(f"several files state the quantization, and must agree: {', '.join(stated)}")
    return config, stated, warnings


def read_adapter_config(files: Sequence[str], read_json: Callable[[str], Any]) -> Mapping[str, Any] | None:
    """Read adapter_config.json; return None without one."""
    if ADAPTER_CONFIG_FILE not in files:
        return None
    config = read_json(ADAPTER_CONFIG_FILE)
    return config if isinstance(config, dict) else {}


def find_modules(files: Sequence[str], read_json: Callable[[str], Any]) -> list[str]:
    """Return a warning about weights of sentence-transformers in other folders, as `modules.json` lists them."""
    listed_modules = read_json(MODULES_FILE) if MODULES_FILE in files else None
    entries = listed_modules if isinstance(listed_modules, list) else []
    found = [
        _short(entry["path"])
        for entry in entries
        if isinstance(entry, dict)
        and isinstance(entry.get("path"), str)
        and entry["path"]
        and str(entry.get("type")).rpartition(".")[2] in _MODULES_WITH_WEIGHTS
    ]
    if not found:
        return []
    return [
        f"{MODULES_FILE} of sentence-transformers names more weights in other folders, and they are not scored: "
        f"{listed(found)}"
    ]


def missing_shards(where: str, index: str | None, missing: Sequence[str], files: Sequence[str]) -> BadIndex:
    """Return the error for shards that an index lists and that are not there.

    Args:
        files: paths below `where`.
    """
    tops = [f for f in files if "/" not in f and is_safetensors(f)]
    others = [label for copy in _group(tops).values() for label in _complete(copy)]
    there = f"; {listed(tops, 4)} {'is' if len(tops) == 1 else 'are'} there" if tops else ""
    hint = "the download may be incomplete: run it again"
    if unfinished := find_unfinished(files):
        hint = f"the download was interrupted: {hint_unfinished(unfinished[0])}"
    elif others:
        hint = f"{others[0]} is complete: to read it, move the index away, which belongs to another upload"
    return BadIndex(
        f"{index or 'the index'} of {where} lists {printable(missing[0])}, which is not there "
        f"({len(missing)} missing in all){there}",
        reason="missing_shard",
        hint=hint,
    )


def is_safetensors(name: str) -> bool:
    """Whether a file is safetensors by its name, which may be in upper case."""
    return name.lower().endswith(SUFFIX)


def is_index(name: str) -> bool:
    """Whether a file is an index of safetensors shards by its name."""
    return _INDEX.fullmatch(name) is not None


def is_one_of_several(name: str, files: Iterable[str], read_json: Callable[[str], Any]) -> bool:
    """Whether a file is a shard of several, by its number or by an index beside it."""
    match = _SHARD.fullmatch(name)
    if match is not None and int(match["total"]) > 1:
        return True
    for index in islice(filter(is_index, files), _MAX_INDEXES):
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if name in shards and any(shard != name for shard in shards):
            return True
    return False


def kind_of(name: str) -> FileKind:
    """Return the kind of a small file of a checkpoint, by its name."""
    return FileKind.INDEX if is_index(name) else FileKind.CONFIG


def parse_small(data: bytes, where: str) -> Any:
    """Parse an index or a config; return None if it is not JSON.

    Args:
        where: the name of the file in messages.

    Raises:
        FileError: file_too_large, above the limits of JSON.
    """
    try:
        return parse_json(data)
    except JsonTooLarge as error:
        raise above_limit(where, error) from error
    except ValueError:
        return None


def is_safe_shard_name(name: str) -> bool:
    """Whether a shard's name stays below the checkpoint, on POSIX and Windows.

    An index is untrusted: `../../other/model.safetensors`, `C:\\x`, `//host/x` and `http://host/x` must not become
    a path, or an address that the user's token is sent to.
    """
    return is_safetensors(name) and is_safe_path(name)


def is_safe_path(name: str) -> bool:
    """Whether a path stays below the folder that it is relative to, on POSIX and Windows."""
    return (
        len(name) <= _MAX_PATH_LENGTH
        and name.isprintable()
        and not set(name) & set("\\:?#%*")
        and not PurePosixPath(name).is_absolute()
        and not PureWindowsPath(name).anchor
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def _group(tops: Iterable[str]) -> dict[tuple[str, str], _Copy]:
    """Group the files at the top by their name without a number and a variant."""
    copies: dict[tuple[str, str], _Copy] = {}

    def copy_of(stem: str, variant: str | None) -> _Copy:
        start, dot, end = stem.rpartition(".")
        is_variant = _VARIANT.fullmatch(end) or (start in _LIBRARY_STEMS and end[:1].isalpha())
        if variant is None and dot and is_variant:
            stem, variant = start, end
        return copies.setdefault((stem, variant or ""), _Copy(stem, variant or ""))

    for name in tops:
        if (match := _INDEX.fullmatch(name)) is not None:
            copy_of(match["stem"], match["variant"]).index = name
        elif (match := _SHARD.fullmatch(name)) is not None:
            copy_of(match["stem"], match["variant"]).splits.setdefault(_label(match), {})[int(match["number"])] = name
        elif is_safetensors(name):
            copy_of(name[: -len(SUFFIX)], None).single = name
    return copies


def _label(match: re.Match[str]) -> str:
    """Return a name for a set of numbered shards: `model-*-of-00002.safetensors`."""
    name = match.string
    return f"{name[: match.start('number')]}*{name[match.end('number') :]}"


def _choose_copy(
    copies: Mapping[tuple[str, str], _Copy], where: str, only: str | None, *, adapters_first: bool
) -> _Copy | None:
    """Choose a copy with one set of weights, or a single file beside an index.

    Raises:
        SourceError: no_index.
    """
    usable = [copy for copy in copies.values() if copy.labels]
    if only is not None:
        return next(copy for copy in usable if copy.index == only)
    for stem in _LIBRARY_STEMS:
        copy = copies.get((stem, ""))
        if copy is not None and (copy.single or copy.index):
            return copy
    # As in diffusers, a file without a variant comes before those with one.
    plain = [copy for copy in usable if not (copy.variant and (copy.stem, "") in copies)]
    indexed = [copy for copy in plain if copy.index is not None]
    if len(indexed) == 1:
        return indexed[0]
    if len(plain) == 1 and len(plain[0].labels) == 1:
        return plain[0]
    if not plain:
        return None
    if adapters_first and (adapter := next((c for c in plain if c.stem.startswith("adapter") and c.single), None)):
        return adapter
    labels = sorted(label for copy in plain for label in copy.labels)
    if labels and all(is_safetensors(label) for label in labels):
        kind = f"{len(labels)} safetensors files or sets of shards, and no index that lists the shards of one model"
    else:
        kind = f"{len(labels)} copies or models, and no rule to choose one"
    first = next((label for label in labels if "*" not in label), None)
    raise SourceError(
        f"{where} has {kind}: {listed(labels, 4)}",
        reason="no_index",
        hint="give the folder of one set of shards" if first is None else f"give one by its path: {where}/{first}",
    )


def _complete(copy: _Copy) -> list[str]:
    """Return the sets of numbered shards that are complete, and the single file."""
    complete = [label for label, split in copy.splits.items() if _is_complete(split)]
    return [*complete, *([copy.single] if copy.single else [])]


def _numbers(split: Mapping[int, str]) -> tuple[range, re.Match[str]]:
    """Return the numbers of a set of shards, and the parts of one of its names.

    A set counts from 1 or from 0.
    """
    match = _SHARD.fullmatch(next(iter(split.values())))
    assert match is not None
    total = int(match["total"])
    return range(total) if 0 in split else range(1, total + 1), match


def _is_complete(split: Mapping[int, str]) -> bool:
    numbers, _ = _numbers(split)
    # The names can claim a million shards, so the shards that exist are counted first.
    return len(split) >= len(numbers) and all(number in split for number in numbers)


def _missing_numbers(split: Mapping[int, str]) -> list[str]:
    """Return the names that are missing in a set of numbered shards."""
    numbers, match = _numbers(split)
    name, width = match.string, len(match["number"])
    return [
        f"{name[: match.start('number')]}{number:0{width}}{name[match.end('number') :]}"
        for number in numbers
        if number not in split
    ]


def _check_numbers(label: str, split: Mapping[int, str], where: str) -> None:
    if missing := _missing_numbers(split):
        raise BadIndex(
            f"{where} has {len(split)} of {len(split) + len(missing)} shards {label} and no index; "
            f"{listed(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            reason="missing_shard",
            hint="the download may be incomplete: run it again",
        )


def _finish(
    names: tuple[str, ...], present: Sequence[str], warnings: list[str], read: str, *, warns: bool = False
) -> Choice:
    """Make the choice, with one sentence for the files that are ignored; `warns` for a sentence in any case."""
    ignored = tuple(name for name in present if name not in names)
    if ignored:
        labels = [label for copy in _group(ignored).values() for label in copy.labels]
        count = Counter(_label(match) for name in ignored if (match := _SHARD.fullmatch(name)) is not None)
        words = [
            f"{label} ({counted(count[label], 'file', 'files')})" if "*" in label else label
            for label in sorted(labels)
        ]
        warnings = [*warnings, f"{read}; ignored: {listed(words, 5)}"]
    elif warns:
        warnings = [*warnings, read]
    return Choice(names=names, ignored=ignored, warnings=tuple(warnings))


def _short(text: str) -> str:
    """Return the beginning of an untrusted text for a message."""
    return printable(text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}…")


def _shards(names: Sequence[str]) -> str:
    return f"the {len(names)} shards" if len(names) > 1 else names[0]


def _parse_index(index: Any, where: str) -> Mapping[str, str]:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadIndex(f"{where} has no weight_map from tensors to shards", reason="bad_index")
    if not weight_map:
        raise BadIndex(f"{where} lists no tensors", reason="bad_index")
    return weight_map


def _lists_only(index: Any, shard: str) -> bool:
    """Whether an index lists one shard only, which is this one, so that both are the same copy."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    return isinstance(weight_map, dict) and {f"{name}".removeprefix("./") for name in weight_map.values()} == {shard}


def _check_names(weight_map: Mapping[str, str], where: str) -> None:
    for name in set(weight_map.values()):
        if not is_safe_shard_name(name):
            plain = name.removeprefix("./")
            raise BadIndex(
                f"{where} names a shard by an unsafe path, or by one that is not below the checkpoint: "
                f"'{_short(name)}'",
                reason="unsafe_shard_name",
                hint=f"write {plain} in the index" if is_safe_shard_name(plain) else None,
            )
