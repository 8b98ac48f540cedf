"""Check a contributed result, and report all findings, each with a reason code.

    the file      its name, its JSON, every entry, the groups and the order, compared with the output of a scan
    provenance    its file (see `provenance`): it exists, is complete, belongs to this result, and has no path of a
                  machine
    the record    if it exists: the scores, computed again from the singular values

Nothing is downloaded, and no weight is read. Only a scan can check that the scores are those of the model.
"""

import os
import re
import sys
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..errors import FileError, ResultError
from ..files import FileKind, parse_json, read_file
from ..model.names import MAX_SLUG_LENGTH, group_of, group_order, groups_of, model_order, slug
from ..numerics.snr import TOLERANCE, score
from .provenance import SCHEMA_VERSION, provenance_path, sha256, slug_of
from .record import FLOAT32_STEP, Record, Records, open_records, record_path
from .result import modules_of

_PROVENANCE_KEYS: dict[str, type | tuple[type, ...]] = {
    "schema_version": int,
    "model": str,
    "commit": (str, type(None)),
    "shards": dict,
    "program": str,
    "engine": int,
    "names": str,
    "precisions": dict,
    "degenerate": int,
    "result_sha256": str,
}


class Reason(StrEnum):
    """A kind of finding."""

    UNREADABLE = "unreadable"
    BAD_FILENAME = "bad_filename"  # not snr_results_{slug}.json
    NOT_JSON = "not_json"
    EMPTY = "empty"  # the result has no modules
    DUPLICATE_MODULE = "duplicate_module"  # readers silently take one of two equal keys
    BAD_ENTRY = "bad_entry"  # an entry is not {"snr": number, "type": group}
    NOT_FINITE = "not_finite"
    NEGATIVE = "negative"
    WRONG_GROUP = "wrong_group"  # the type is not a group of the module
    WRONG_ORDER = "wrong_order"  # the order decides between equal scores
    NO_PROVENANCE = "no_provenance"
    BAD_PROVENANCE = "bad_provenance"
    WRONG_SLUG = "wrong_slug"  # the file is named after another model
    OTHER_RESULT = "other_result"  # the result was changed after its provenance was written
    NO_COMMIT = "no_commit"  # there is neither a commit nor the SHA-256 of every shard
    PRIVATE_PATH = "private_path"
    BAD_RECORD = "bad_record"
    OTHER_RECORD = "other_record"  # the record and the provenance have other weights or use other names
    NOT_IN_RECORD = "not_in_record"
    MISSING_MODULE = "missing_module"  # the record has it, and its group would be ranked without it
    WRONG_SCORE = "wrong_score"  # the record's singular values give another score


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem and its place."""

    reason: Reason
    detail: str


def check(result: Path) -> list[Finding]:
    """Find all problems of a result file, of its provenance and of its record."""
    findings: list[Finding] = []
    name = slug_of(result)
    if name is None or slug(name) != name or not 0 < len(name) <= MAX_SLUG_LENGTH:
        findings.append(Finding(Reason.BAD_FILENAME, f"{result.name} is not snr_results_{{slug}}.json"))
    try:
        # A byte order mark is an error for other readers, so the bytes are decoded here.
        pairs = parse_json(read_file(result, FileKind.RESULT).decode(), object_pairs_hook=_Pairs)
    except FileNotFoundError as error:
        return [*findings, Finding(Reason.UNREADABLE, f"{error.strerror}")]
    except FileError as error:
        return [*findings, Finding(Reason.UNREADABLE, str(error))]
    except ValueError as error:
        return [*findings, Finding(Reason.NOT_JSON, str(error))]
    if not isinstance(pairs, _Pairs):
        return [*findings, Finding(Reason.BAD_ENTRY, "the file is not a JSON object of modules")]
    scores: dict[str, float] = {}
    findings += _check_entries(pairs, scores)
    provenance, more = _read_provenance(result)
    findings += more
    if os.path.lexists(record_path(result)):
        try:
            with open_records(record_path(result)) as records:
                more = list(_check_record(records, scores, {module for module, _ in pairs}, provenance))
        except ResultError as error:
            return [*findings, Finding(Reason.BAD_RECORD, str(error))]
        findings += more
    return findings


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as a list of items, since a dict would hide repeated keys."""


def _check_entries(pairs: _Pairs, scores: dict[str, float]) -> Iterator[Finding]:
    """Check the modules, and collect the finite scores in `scores`."""
    if not pairs:
        yield Finding(Reason.EMPTY, "the result has no modules")
    seen: set[str] = set()
    previous: tuple[Any, ...] | None = None
    for module, entry in pairs:
        if module in seen:
            yield Finding(Reason.DUPLICATE_MODULE, f"{module} occurs twice")
        seen.add(module)
        fields = dict(entry) if isinstance(entry, _Pairs) and len(entry) == 2 else {}
        snr, group = fields.get("snr"), fields.get("type")
        if not isinstance(snr, (int, float)) or isinstance(snr, bool) or not isinstance(group, str):
            yield Finding(Reason.BAD_ENTRY, f'{module} is not {{"snr": number, "type": group}}')
            continue
        # This is also false for a NaN and for an integer that is too large for a float.
        if not abs(snr) <= sys.float_info.max:
            yield Finding(Reason.NOT_FINITE, f"the score of {module} is {'NaN' if snr != snr else 'infinite'}")
        else:
            scores[module] = float(snr)
            if snr < 0:
                yield Finding(Reason.NEGATIVE, f"{module} has {snr}")
        is_its_own = group in groups_of(module)
        if not is_its_own:
            yield Finding(Reason.WRONG_GROUP, f"{module} is not in group {group!r}")
        # A wrong group does not count as a wrong order too.
        place = (group_order(group if is_its_own else group_of(module)), model_order(module))
        if previous is not None and place < previous:
            yield Finding(Reason.WRONG_ORDER, f"{module} is out of order")
        previous = place


def _read_provenance(result: Path) -> tuple[dict[str, Any] | None, list[Finding]]:
    path = provenance_path(result)
    try:
        data = parse_json(read_file(path, FileKind.PROVENANCE))
    except FileNotFoundError:
        return None, [Finding(Reason.NO_PROVENANCE, f"{path.name} is missing; --write-provenance writes it")]
    except (FileError, ValueError) as error:
        return None, [Finding(Reason.BAD_PROVENANCE, f"{path.name} cannot be read: {error}")]
    findings = list(_check_provenance(result, data))
    return None if any(f.reason is Reason.BAD_PROVENANCE for f in findings) else data, findings


def _check_provenance(result: Path, data: Any) -> Iterator[Finding]:
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
        yield Finding(Reason.BAD_PROVENANCE, f"its schema_version is not {SCHEMA_VERSION}")
        return
    wrong = [key for key, kind in _PROVENANCE_KEYS.items() if not isinstance(data.get(key, ...), kind)]
    for key in [*wrong, *(data.keys() - _PROVENANCE_KEYS.keys())]:
        yield Finding(Reason.BAD_PROVENANCE, f"{key!r} is missing, unknown or of the wrong type")
    if private := [text for text in _texts(data) if _is_path(text)]:
        yield Finding(Reason.PRIVATE_PATH, f"{private[0]!r} is a path")
    if wrong:
        return
    if slug(data["model"]) != slug_of(result):
        yield Finding(Reason.WRONG_SLUG, f"{result.name} is not named after {data['model']}")
    if data["result_sha256"] != sha256(result):
        yield Finding(Reason.OTHER_RESULT, "the result was changed after its provenance was written")
    shards = [shard if isinstance(shard, dict) else {} for shard in data["shards"].values()]
    is_hashed = bool(shards) and all(_is_hex(shard.get("sha256"), 64) for shard in shards)
    if not is_hashed and not _is_hex(data["commit"], 40):
        yield Finding(Reason.NO_COMMIT, "the provenance has neither a commit nor the SHA-256 of every shard")


def _check_record(
    opened: Records, scores: dict[str, float], listed: Set[str], provenance: dict[str, Any] | None
) -> Iterator[Finding]:
    if provenance is not None:
        theirs = {name: s.get("nbytes") for name, s in provenance["shards"].items() if isinstance(s, dict)}
        if opened.identity["commit"] != provenance["commit"] or opened.identity["shards"] != theirs:
            yield Finding(Reason.OTHER_RECORD, "the record and the provenance have another commit or other shards")
        if opened.identity["names"] != provenance["names"]:
            yield Finding(Reason.OTHER_RECORD, "the record and the provenance use other names")
    # The largest relative difference for each score: a value near tau can change sides when it is rounded to float32.
    tolerances: dict[str, float] = {}
    records = []
    for record in map(_score_again, opened.rows):
        records.append(record)
        if record.score is not None:
            name = record.result_name
            tolerances[name] = max(tolerances.get(name, 0.0), TOLERANCE + record.score.error)
    modules = modules_of(records)
    found = {module.name: module.value for module in modules if module.value is not None}
    groups = {module.group for module in modules if module.name in listed}
    for module in modules:
        if module.group in groups and module.name not in listed:
            yield Finding(Reason.MISSING_MODULE, f"{module.name} is missing from its group {module.group!r}")
    for name, snr in scores.items():
        if name not in found:
            yield Finding(Reason.NOT_IN_RECORD, f"{name} is not in the record, or has no score there")
        elif not abs(snr - found[name]) <= tolerances[name] * abs(found[name]):
            yield Finding(Reason.WRONG_SCORE, f"{name} has {snr}, but its singular values give {found[name]}")


def _score_again(record: Record) -> Record:
    """Compute the score again, and drop the singular values to save memory."""
    s = record.singular_values.astype("float64")
    again = None if record.score is None else score(s, record.n, record.m, errors=s * FLOAT32_STEP)
    return replace(record, score=again, singular_values=record.singular_values[:0].copy())


def _texts(data: Any) -> Iterator[str]:
    """Yield every string in a JSON value, keys included."""
    # A recursion could end too early, since the parser accepts a deeper nesting.
    rest = [data]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            rest += [*value, *value.values()]
        elif isinstance(value, list):
            rest += value


def _is_path(text: str) -> bool:
    """Whether a string is a path: from the root, a home or a drive, or upward."""
    return re.search(r"^(/|~|\.{1,2}/|[A-Za-z]:[\\/]|file:)|\\|/\.\./", text) is not None


def _is_hex(value: Any, length: int) -> bool:
    return isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{length}}}", value) is not None
