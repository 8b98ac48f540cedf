"""A selection or a result held against the parameters of a model, as its trainer will see them, before any training.

A wrong name is silent in a trainer: a pattern that matches nothing freezes what was chosen, one that matches more
trains what was not, and an empty list trains everything.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint import open_source
from ..checkpoint.tensors import read_checkpoint
from ..errors import ResultError, UsageError
from ..model import parameters as runtime
from ..model import transformers_names
from ..model.names import is_fused_experts, is_head
from ..model.parameters import Target
from ..model.quantization import is_companion, parameter_of
from ..results.result import Result
from ..selection.select import ALWAYS
from . import FORMATS, axolotl, peft, python
from .patterns import Names, alternatives

MAX_SELECTION_NBYTES = 200_000_000
_ALWAYS_NAMES = {f"{module}.weight" for module in ALWAYS}


class Mistake(StrEnum):
    """What is wrong, or odd, with an entry or with the whole."""

    NO_MATCH = "no_match"  # it matches no parameter
    TOO_MANY = "too_many"  # it matches parameters that it does not name: layers.10 for layers.1
    BAD_PATTERN = "bad_pattern"  # no regular expression of this trainer
    ALL_FROZEN = "all_frozen"  # nothing would be trained
    NOTHING_FROZEN = "nothing_frozen"  # everything would be
    TIED_HEAD = "tied_head"  # the head is the embedding, which is what is trained, or frozen
    NOT_IN_MODEL = "not_in_model"  # a line of a result is no parameter
    ROW_RANGE = "row_range"  # rows of a parameter, where the config shards it or they are not there
    FSDP = "fsdp"  # sharding that cannot freeze a part of what it flattens
    CHECKPOINTING = "checkpointing"  # gradients that end at the first frozen layer
    ADAPTER = "adapter"  # an adapter, which trains other weights

    @property
    def is_note(self) -> bool:
        """Whether training does what was meant all the same."""
        return self is Mistake.TIED_HEAD


@dataclass(frozen=True, slots=True)
class Finding:
    mistake: Mistake
    entry: str
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a trainer would make of it.

    Attributes:
        whose: where the names of the parameters come from, in words.
        parameters: how many there are.
        trained: those that would be trained; empty for a result, which chooses nothing.
        findings: what is wrong.
    """

    whose: str
    parameters: int
    trained: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def is_good(self) -> bool:
        return all(finding.mistake.is_note for finding in self.findings)


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a model by the names of its trainer.

    Attributes:
        shapes: by name, in the model's order; None for a shape that is not known.
        whose: where they come from, in words.
        tied: names that are another parameter.
    """

    shapes: Mapping[str, tuple[int, ...] | None]
    whose: str
    tied: Mapping[str, str]


def parameters_of(model: str | None, target: Target, names: Sequence[str] | None) -> Parameters:
    """The parameters of MODEL: of a list, of the model that transformers makes of config.json, or of the checkpoint.

    Args:
        names: of a trainer, which then are all that counts.

    Raises:
        UsageError: no_model; missing_extra, unknown_architecture, for a `target` that cannot be told.
        SourceError, CheckpointError: MODEL cannot be read.
    """
    if names is not None:
        if model is not None:
            raise UsageError("--model and --names-from exclude each other", reason="conflicting_options")
        return Parameters(dict.fromkeys(names), "of the list given", {})
    if model is None:
        raise UsageError("of which model?", reason="no_model", hint="--model MODEL, or --names-from FILE")
    source = open_source(model)
    if target in (Target.AUTO, Target.V5) and transformers_names.installed_version() == 5 and source.config:
        try:
            shapes, tied = transformers_names.model_parameters(source.config)
            return Parameters(shapes, "of the model that transformers makes of config.json", tied)
        except UsageError:
            if target is Target.V5:
                raise
    checkpoint = read_checkpoint(source)
    stored = [
        (parameter_of(tensor.name), tensor.shape if parameter_of(tensor.name) == tensor.name else None)
        for _, tensor in checkpoint.tensors
        if not is_companion(tensor.name)
    ]
    renaming = runtime.renaming(source.config, target)
    renamed: dict[str, tuple[int, ...] | None] = {}
    for name, shape in stored:
        there = renaming.of(name)
        # One of several parts has not the shape of the whole.
        renamed[there] = shape if there not in renamed and there == name else renamed.get(there)
    return Parameters(renamed, renaming.whose, {})


def verify(path: Path, parameters: Parameters, trainer: str = "axolotl") -> Verdict:
    """Hold a file against a model's parameters: a result or its record, or a selection in a trainer's words.

    Args:
        trainer: one of `exporters.FORMATS`, whose way of matching counts.

    Raises:
        UsageError: no_such_format.
        ResultError: the file cannot be read; not_a_selection, it is none of this trainer's.
    """
    if trainer not in FORMATS:
        raise UsageError(
            f"there is no format {trainer!r}", reason="no_such_format", hint=f"one of {', '.join(FORMATS)}"
        )
    # What this format is has the schema of a result, and is a list of patterns.
    if trainer != "axolotl-snr" and (found := _of_result(path, parameters)) is not None:
        return Verdict(parameters.whose, len(parameters.shapes) - len(parameters.tied), (), tuple(found))
    text = _text(path)
    names = [name for name in parameters.shapes if name not in parameters.tied]
    try:
        trained = FORMATS[trainer].matches(text, names)
        entries = _entries(trainer, text)
    except re.error as error:
        # As the trainer compiles it: Axolotl escapes the dots.
        pattern = str(error.pattern).replace("\\.", ".") if trainer == "axolotl" else str(error.pattern)
        bad = Finding(Mistake.BAD_PATTERN, pattern, f"is no regular expression: {error.msg}")
        return Verdict(parameters.whose, len(names), (), (bad,))
    except (yaml.YAMLError, SyntaxError, json.JSONDecodeError, RecursionError) as error:
        what = {"python": "Python", "peft": "JSON", "json": "JSON", "axolotl-snr": "JSON"}.get(trainer, "YAML")
        raise ResultError(f"{path} is no {what}, which {trainer} takes", reason="not_a_selection") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ResultError(
            f"{path} is no selection for {trainer}", reason="not_a_selection", hint="--for says whose it is"
        ) from error
    sorted_names, tied = Names(names), Names(parameters.tied)
    findings = [finding for entry in entries for finding in _of_entry(entry, sorted_names, tied, parameters)]
    if not trained:
        findings.append(Finding(Mistake.ALL_FROZEN, "", "no parameter would be trained"))
    elif len(trained) == len(names) > 1:
        findings.append(Finding(Mistake.NOTHING_FROZEN, "", f"all {len(names)} parameters would be trained"))
    findings += _of_config(trainer, text, [entry.text for entry in entries], parameters)
    return Verdict(parameters.whose, len(names), tuple(name for name in names if name in trained), tuple(findings))


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a selection, as its trainer understands it.

    Attributes:
        anchored: whether it has to match from the start of a name.
    """

    text: str
    pattern: re.Pattern[str]
    anchored: bool = True


def _entries(trainer: str, text: str) -> list[Entry]:
    """The entries of a selection; of a list of what is frozen, what it leaves out."""
    if trainer == "axolotl-snr":
        return [Entry(entry, axolotl.Pattern(entry).compiled) for entry in json.loads(text)]
    if trainer in ("json", "python"):
        lists = python.lists_of(text).values() if trainer == "python" else [json.loads(text)["parameters"]]
        return [Entry(name, re.compile(rf"{re.escape(name)}\Z")) for names in lists for name in names]
    if trainer == "lines":
        lines = [line.split("- ")[1] for line in text.splitlines() if line.startswith("- ")]
        return [Entry(entry, re.compile(entry)) for entry in lines]
    if trainer == "peft":
        options = json.loads(text)
        modules, banks = options.get("target_modules") or [], options.get("target_parameters") or []
        if isinstance(modules, str) and modules.lower() == peft.ALL_LINEAR:
            wholes = []
        elif isinstance(modules, str):
            wholes = [Entry(part, re.compile(rf"(?:{part})\.weight\Z")) for part in alternatives(modules)]
        else:
            wholes = [Entry(end, re.compile(rf"(?:.*\.)?{re.escape(end)}\.weight\Z")) for end in modules]
        return [*wholes, *(Entry(end, re.compile(rf"(?:.*\.)?{re.escape(end)}\Z")) for end in banks)]
    config = yaml.safe_load(text)
    if trainer == "axolotl":
        return [Entry(entry, axolotl.Pattern(entry).compiled) for entry in _listed(config["unfrozen_parameters"])]
    if trainer == "soup":
        entries = _listed(config["training"]["unfrozen_parameters"])
        return [Entry(entry, re.compile(entry), False) for entry in entries]
    if trainer == "ms-swift":
        return [Entry(start, re.compile(re.escape(start))) for start in _listed(config["trainable_parameters"])]
    if trainer == "ms-swift-regex":
        whole = config["trainable_parameters_regex"]
        return [Entry(part, re.compile(part), False) for part in alternatives(whole)]
    if trainer == "llama-factory":
        kinds = config["freeze_trainable_modules"].split(",")
        extra = [kind for kind in config.get("freeze_extra_modules", "").split(",") if kind]
        return [
            *(Entry(kind, re.compile(rf"\.[0-9]+\.{re.escape(kind)}"), False) for kind in kinds if kind != "all"),
            *(Entry(kind, re.compile(re.escape(kind)), False) for kind in extra),
        ]
    spared = [re.fullmatch(r"\^\(\?!(\(\?:.*\)\$)\)", entry) for entry in config["frozen_res"]]
    return [Entry(part, re.compile(part)) for found in spared if found for part in alternatives(found[1])]


def _listed(entries: Any) -> list[str]:
    """Raises TypeError for a text, whose letters would be taken for entries, and for what are no texts."""
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise TypeError
    return entries


def _of_entry(entry: Entry, names: Names, tied: Names, parameters: Parameters) -> list[Finding]:
    matches = list(names.found(entry.pattern, anchored=entry.anchored))
    if not matches:
        if (other := next(tied.found(entry.pattern, anchored=entry.anchored), None)) is not None:
            detail = f"{other.string} is {parameters.tied[other.string]}, and trained with it or not at all"
            return [Finding(Mistake.TIED_HEAD, entry.text, detail)]
        if entry.text in axolotl.ALWAYS or _plain(entry.text) in _ALWAYS_NAMES:
            # Spectrum writes these two for every model, and a trainer passes over them.
            return []
        detail = f"matches no parameter{_advice(entry.text, parameters.shapes)}"
        return [Finding(Mistake.NO_MATCH, entry.text, detail)]
    if more := sorted(match.string for match in matches if not _is_whole(match)):
        some = ", ".join(more[:3]) + (f" and {len(more) - 3} more" if len(more) > 3 else "")
        return [Finding(Mistake.TOO_MANY, entry.text, f"also matches {some}")]
    return []


def _is_whole(match: re.Match[str]) -> bool:
    """Whether what matched is whole parts of a name: `layers.1` of `layers.1.mlp` and not of `layers.10.mlp`."""
    name, start, end = match.string, match.start(), match.end()
    begins = start == 0 or "." in (name[start - 1], name[start : start + 1])
    return begins and (end == len(name) or "." in (name[end], name[end - 1 : end]))


def _plain(entry: str) -> str | None:
    """The name that an entry spells, or None for a pattern that means several."""
    name = re.sub(r"\[[0-9:]*\]$", "", entry).removeprefix("^").removesuffix("$")
    name = re.sub(r"^\(\?:(.*)\)$", r"\1", name).replace("\\.", ".").replace("\\-", "-").replace("\\_", "_")
    return name if re.fullmatch(r"[A-Za-z0-9_.\-]+", name) else None


def _advice(entry: str, names: Collection[str]) -> str:
    if "\\." in entry:
        return "; for Axolotl a dot is a dot, and an escaped one none (--for lines reads those)"
    if ".*" in entry:
        return "; for Axolotl .+ is any characters, and .* is not"
    plain = _plain(entry)
    if plain is not None:
        tail = plain.split(".", 1)[-1]
        ends = (plain, f"{plain}.weight", f"{tail}.weight", tail)
        if near := next((name for name in names if name.endswith(ends)), None):
            return f"; the model has {near}"
    return ""


def _of_result(path: Path, parameters: Parameters) -> list[Finding] | None:
    """What is wrong with a result, or None if it is none."""
    if path.suffix not in (".json", ".sqlite"):
        return None
    try:
        result = Result.open(path)
    except ResultError as error:
        if path.suffix == ".json" and error.reason == "not_a_result":
            return None
        raise
    findings = []
    for line in result.modules:
        name = line.parameter_name
        if (
            name in parameters.tied
            or line.shares is not None
            or (is_head(line.name) and name not in parameters.shapes)
        ):
            other = parameters.tied.get(name) or line.shares or "the embedding"
            findings.append(Finding(Mistake.TIED_HEAD, line.name, f"is {other}, and trained with it or not at all"))
        elif name not in parameters.shapes and line.name not in parameters.shapes:
            advice = _advice(line.name, parameters.shapes)
            findings.append(Finding(Mistake.NOT_IN_MODEL, line.name, f"is no parameter of the model{advice}"))
    return findings


def _of_config(trainer: str, text: str, entries: Sequence[str], parameters: Parameters) -> list[Finding]:
    """What the rest of a config says that does not go with frozen parameters."""
    if trainer == "peft":
        is_mixture = any(is_fused_experts(name) and not name.endswith(".weight") for name in parameters.shapes)
        modules = json.loads(text).get("target_modules")
        if not is_mixture or not isinstance(modules, str) or modules.lower() == peft.ALL_LINEAR:
            return []
        detail = (
            "for mixtures of experts PEFT takes a text apart to last parts of names, of all layers; give it a list"
        )
        return [Finding(Mistake.TOO_MANY, "target_modules", detail)]
    if trainer == "axolotl":
        return _of_axolotl(yaml.safe_load(text), entries, parameters)
    keys = {"ms-swift": "tuner_type", "ms-swift-regex": "tuner_type", "llama-factory": "finetuning_type"}
    if (key := keys.get(trainer)) is None:
        return []
    config = yaml.safe_load(text)
    kind = config.get(key, config.get("train_type", "full"))
    if kind in ("full", "freeze"):
        return []
    return [Finding(Mistake.ADAPTER, f"{key}: {kind}", "an adapter is trained, and the weights are not")]


def _of_axolotl(config: Mapping[str, Any], entries: Sequence[str], parameters: Parameters) -> list[Finding]:
    findings = []
    given = config.get("fsdp_config")
    fsdp: dict[str, Any] = given if isinstance(given, dict) else {}
    is_fsdp = bool(config.get("fsdp") or config.get("fsdp_config"))
    original = fsdp.get("use_orig_params", fsdp.get("fsdp_use_orig_params"))
    version = config.get("fsdp_version", fsdp.get("fsdp_version", fsdp.get("version", 1)))
    if is_fsdp and version != 2 and original is False:
        detail = "frozen and trained weights cannot be flattened into one without use_orig_params: true"
        findings.append(Finding(Mistake.FSDP, "fsdp_config.use_orig_params", detail))
    for entry in entries:
        rows = re.search(r"\[([0-9]{0,15})(?:(:)([0-9]{0,15}))?\]$", entry)
        if rows is None:
            continue
        if is_fsdp or _is_zero3(config.get("deepspeed")):
            findings.append(
                Finding(Mistake.ROW_RANGE, entry, "rows of a parameter are not there where it is sharded")
            )
            continue
        pattern = axolotl.Pattern(entry)
        counts = [s[0] for name, s in parameters.shapes.items() if s and pattern.matches(name)]
        first = int(rows[1] or 0)
        last = int(rows[3]) if rows[3] else None if rows[2] else first + 1
        if wrong := [count for count in counts if not first < (count if last is None else last) <= count]:
            findings.append(Finding(Mistake.ROW_RANGE, entry, f"the parameter has {wrong[0]} rows"))
    kwargs = config.get("gradient_checkpointing_kwargs")
    if config.get("gradient_checkpointing") and isinstance(kwargs, dict) and kwargs.get("use_reentrant") is True:
        detail = "no gradient comes through a frozen layer that is computed again; use_reentrant: false"
        findings.append(Finding(Mistake.CHECKPOINTING, "gradient_checkpointing_kwargs.use_reentrant", detail))
    if config.get("adapter"):
        detail = "an adapter is trained and the weights are not; Axolotl refuses it with peft_layers_to_transform"
        findings.append(Finding(Mistake.ADAPTER, "adapter", detail))
    return findings


def _is_zero3(deepspeed: Any) -> bool:
    """Whether a config of DeepSpeed, or the name of its file, says that parameters are sharded."""
    if isinstance(deepspeed, dict):
        zero = deepspeed.get("zero_optimization")
        return isinstance(zero, dict) and zero.get("stage") == 3
    return "zero3" in str(deepspeed).lower()


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_SELECTION_NBYTES:
            raise ResultError(f"{path} is too large for a selection", reason="too_large")
        return path.read_text("utf-8")
    except FileNotFoundError as error:
        raise ResultError(f"there is no selection at {path}", reason="no_such_result") from error
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}", reason="unreadable") from error
    except ValueError as error:
        raise ResultError(f"{path} is not text", reason="not_a_selection") from error
