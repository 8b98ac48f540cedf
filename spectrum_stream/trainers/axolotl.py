"""Axolotl: `unfrozen_parameters`, written like Spectrum and matched like Axolotl.

Axolotl trains the parameters whose name matches a pattern of the list and freezes the rest. A pattern is a regular
expression that must match from the start of the name, not to its end. A dot in it is literal unless a plus follows,
and `[a:b]` at its end selects rows. (axolotl 0.19.0, utils/freeze.py, freeze_layers_except and LayerNamePattern)

An entry is the name of a module, as Spectrum writes it, so Axolotl trains the bias of a module with its weight.

Axolotl freezes nothing if the list is empty (train.py, `if cfg.unfrozen_parameters`), and rejects a config with
anything but a list of texts (utils/schemas/config.py). With an adapter it freezes the model of PEFT, in which every
name begins with `base_model.model.`. Its SpectrumPlugin replaces the list when the training starts
(integrations/spectrum/__init__.py).
"""

import re
import reprlib
from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..errors import ResultError
from ..results.result import read_text
from ..selection.select import ALWAYS, Selection
from ..text import counted
from .parameters import Parameters
from .patterns import Names
from .reading import read_yaml
from .targets import Target, Targets, targets_of
from .trainer import Entry, Finding, Reason, Trainer, find_matches
from .yaml_text import is_plain

ALWAYS_PATTERNS = tuple(f"^{module}.weight$" for module in ALWAYS)

# These characters are literal both unquoted in YAML and unescaped in a pattern of Axolotl.
_LITERAL = re.compile(r"[A-Za-z0-9_.\-]*")
_ROWS = re.compile(r"^(.+)\[[0-9]*(?::[0-9]*)?\]$")
_ROW_NUMBERS = re.compile(r"\[([0-9]{0,15})(?:(:)([0-9]{0,15}))?\]$")
_DOT = re.compile(r"\.(?!\+)")

_KEY = "unfrozen_parameters"
_KEY_LINE = re.compile(rf"""^["']?{_KEY}["']?[ ]*:""", re.MULTILINE)
_PLUGIN = "axolotl.integrations.spectrum.SpectrumPlugin"
_MAX_ADVISED = 500
# Components of names below which `freeze_mm_modules` freezes everything. (utils/freeze.py, _MM_MODULE_PREFIXES)
_TOWERS = frozenset({
    "vision_tower", "vision_model", "vision_encoder", "embed_vision", "multi_modal_projector", "visual",
    "audio_tower", "audio_model", "embed_audio",
})  # fmt: skip
# Entries that YAML does not read as texts, and how to mend them.
_NOT_TEXT: tuple[tuple[type | tuple[type, ...], tuple[str, str]], ...] = (
    (dict, ("a mapping", "remove the colon, or quote the entry")),
    (list, ("a list", "write one `- ` before each entry, and quote an entry that begins with `[`")),
    (type(None), ("empty", "remove it")),
    (object, ("not a text", "quote it")),
)


class Axolotl(Trainer):
    """Axolotl, by a list of patterns in its config."""

    name = "axolotl"
    suffix = "yaml"
    advice = "copy the list into your Axolotl config; Axolotl trains the bias of a module with its weight"
    always_by_pattern = True
    dot = "."
    loads_causal = True

    @property
    def label(self) -> str:
        """The word that Spectrum has in the name of the file."""
        return "unfrozenparameters"

    def render(self, selection: Selection, parameters: Collection[str] | None = None) -> str:
        """Write Spectrum's YAML, except for names that would also match others.

        Raises:
            ResultError: unsafe_name, a name would mean something else in YAML or as a pattern; no_such_parameter.
        """
        targets = targets_of(selection, parameters)
        by_group: dict[str, list[Target]] = {name: [] for name in selection.chosen}
        for target in targets.chosen:
            by_group[target.group].append(target)
        lines = ["unfrozen_parameters:", *(f"- {pattern}" for pattern in _always(selection))]
        for group, chosen in by_group.items():
            lines.append(f"# {group if _LITERAL.fullmatch(group) else plain(group)} layers")
            lines += [f"- {pattern}" for target in chosen for pattern in patterns_of(target, targets)]
        return "\n".join(lines) + "\n"

    def entries(self, text: str) -> list[Entry]:
        """Read the texts of the list.

        Raises:
            ResultError: not_a_selection, there is no list; chosen_by_plugin, the SpectrumPlugin will make it.
        """
        return [entry_of(pattern) for pattern in _patterns_in(_load(text)) if isinstance(pattern, str)]

    def matches(self, text: str, names: Iterable[str]) -> set[str]:
        config, entries = _load(text), self.entries(text)
        found = find_matches(entries, names) if entries else set(names)
        # Axolotl freezes the towers after it has read the list.
        return {name for name in found if not _is_in_tower(name)} if config.get("freeze_mm_modules") else found

    def loads_classifier(self, text: str) -> bool:
        config = _load(text)
        return bool(config.get("reward_model")) or config.get("model_type") == "AutoModelForSequenceClassification"

    def conflicts(self, text: str, parameters: Parameters) -> list[Finding]:
        """Find settings that frozen weights exclude, and a list that Axolotl rejects or replaces."""
        config = _load(text)
        findings = [*_list_findings(config, text), *_plugin_findings(config), *_training_findings(config)]
        is_sharded = _is_fsdp(config) or _is_zero3(config.get("deepspeed"))
        names = Names(parameters.shapes, parameters.expressions)
        entries = [entry for entry in _patterns_in(config) if isinstance(entry, str)]
        by_rows = [entry for entry in dict.fromkeys(entries) if names_rows(entry)]
        for entry, hits in zip(by_rows, names.search([entry_of(entry) for entry in by_rows]), strict=True):
            counts = {shape[0] for name in names.names_of(hits) if (shape := parameters.shapes[name])}
            if (wrong := _wrong_rows(entry, counts, is_sharded)) is not None:
                findings.append(Finding(Reason.ROW_RANGE, entry, wrong))
        if config.get("freeze_mm_modules"):
            towers = [0, *accumulate(map(_is_in_tower, names))]
            for entry, hits in zip(entries, names.search([entry_of(entry) for entry in entries]), strict=True):
                if hits.spans and all(towers[end] - towers[first] == end - first for first, end in hits.spans):
                    detail = "freeze_mm_modules freezes the tower that this entry names: remove one of the two"
                    findings.append(Finding(Reason.TOWER, entry, detail))
        return findings

    def advise(self, entry: str) -> str | None:
        if len(entry) > _MAX_ADVISED:
            return None
        mended = entry.replace("\\.", ".").replace(".*", ".+")
        mended = mended.removesuffix(".+") if mended.endswith("..+") else mended
        if (rows := re.search(r"(\[[0-9]*(?::[0-9]*)?\])\$$", entry)) is not None:
            fixed = f"{entry[: rows.start()]}${rows[1]}"
            return f"Axolotl reads a range of rows only at the end of an entry: write `{fixed}`"
        if "\\." in entry:
            return (
                r"Axolotl treats `.` literally and never matches `\.`: "
                f"write `{mended}`, or check it with --format lines, which reads escaped patterns"
            )
        return f"Axolotl reads `.*` as dots and `.+` as any characters: write `{mended}`" if ".*" in entry else None

    def advise_all(self, text: str) -> str:
        if self.entries(text):
            return "choose fewer"
        return f"{_KEY} is empty, and Axolotl then freezes nothing, so add an entry"

    def explain(self, selection: Selection, parameters: Collection[str] | None = None) -> list[str]:
        sentences = super().explain(selection, parameters)
        if whole := whole_names(selection, parameters):
            entries = counted(len(whole), "entry ends", "entries end")
            sentences.append(f"{entries} in $ to match no other parameter: {whole[0]}{' ...' if whole[1:] else ''}")
        return sentences


def names_rows(pattern: str) -> bool:
    """Whether a pattern selects rows, which need gradient hooks, not `requires_grad`."""
    return _ROWS.match(pattern) is not None


def entry_of(pattern: str) -> Entry:
    """Return a pattern as an entry, which must match from the start of a name."""
    rows = _ROWS.match(pattern) if pattern.endswith("]") else None
    text = rows[1] if rows else pattern
    return Entry(pattern, _DOT.sub(r"\\.", text) if ".+" in text else text.replace(".", r"\."))


def patterns(selection: Selection, parameters: Collection[str] | None = None) -> tuple[str, ...]:
    """Return the patterns that `render` writes, in order."""
    targets = targets_of(selection, parameters)
    return (*_always(selection), *(pattern for target in targets.chosen for pattern in patterns_of(target, targets)))


def whole_names(selection: Selection, parameters: Collection[str] | None = None) -> tuple[str, ...]:
    """Return the patterns with a parameter's name, where Spectrum has the module's."""
    return tuple(p for p in patterns(selection, parameters) if p.endswith("$") and p not in ALWAYS_PATTERNS)


def patterns_of(target: Target, targets: Targets) -> tuple[str, ...]:
    """Return the patterns for one chosen module.

    One is enough: the name of the module, or of its parameter if other parameters start with the module's name. A
    tied head has a second one, since the pattern of Spectrum for it matches nothing.
    """
    is_literal = _LITERAL.fullmatch(target.module) and _LITERAL.fullmatch(target.parameter)
    if target.certain and is_literal and not _is_plain(target.module):
        # YAML reads the name of the module as a number, `0.1`, but not with a `$`.
        return (f"{target.parameter}$",)
    module = plain(target.module)
    if target.tied:
        # Either Spectrum's pattern for the embedding trains the shared parameter, or it needs its own pattern.
        by_pattern = target.parameter in targets.always and f"^{target.parameter}$" in ALWAYS_PATTERNS
        embedding = () if by_pattern else (f"{plain(target.parameter)}$",)
        return (f"{module}.weight$" if any(targets.starting_with(module)) else module, *embedding)
    if target.is_bare:
        # A parameter name that is only guessed can turn out to be the name of a module.
        return (f"{module}$",) if target.certain else (module,)
    end = len(module) + 1
    is_alone = all(n.startswith(f"{module}.") and "." not in n[end:] for n in targets.starting_with(module))
    return (module,) if is_alone else (f"{plain(target.parameter)}$",)


def read_patterns(path: Path) -> tuple[str, ...]:
    """Read the patterns of an Axolotl config or of Spectrum's YAML file.

    Raises:
        FileError: not_a_file, file_too_large, unreadable.
        ResultError: no_such_result, not_a_selection.
    """
    try:
        data: Any = read_yaml(read_text(path, "selection"))
    except yaml.YAMLError as error:
        raise ResultError(f"{path} is not YAML", reason="not_a_selection") from error
    found = data.get("unfrozen_parameters") if isinstance(data, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(p, str) for p in found):
        raise ResultError(f"{path} has no list of unfrozen_parameters", reason="not_a_selection")
    return tuple(found)


def plain(name: str) -> str:
    """Return a name that is literal both unquoted in YAML and as a pattern of Axolotl.

    Raises:
        ResultError: unsafe_name, the name is not literal.
    """
    if not _is_plain(name):
        raise ResultError(f"the name {name!r} cannot be written as a pattern for Axolotl", reason="unsafe_name")
    return name


def _is_plain(name: str) -> bool:
    # The group "" has no characters that need quotes.
    return not name or is_plain(name)


def _always(selection: Selection) -> list[str]:
    return [f"^{module}.weight$" for module in selection.always]


def _load(text: str) -> dict[str, Any]:
    """Read a config, which must not be changed.

    Raises:
        yaml.YAMLError: it is not YAML.
        ResultError: not_a_selection, it is not a mapping or is above a limit.
    """
    config = read_yaml(text)
    if isinstance(config, list):
        raise ResultError(
            "the file is a list without a key", reason="not_a_selection", hint=f"put the line `{_KEY}:` above it"
        )
    if not isinstance(config, dict):
        if config is None:
            raise ResultError("the file is empty", reason="not_a_selection", hint=f"add {_KEY} with a list")
        raise ResultError("the file is not a config of Axolotl", reason="not_a_selection")
    return config


def _patterns_in(config: Mapping[str, Any]) -> list[Any]:
    """Return the entries of the list, of any type; a text is one entry.

    Raises:
        ResultError: not_a_selection, there is no list; chosen_by_plugin, the SpectrumPlugin will make it.
    """
    if _KEY not in config:
        if _has_plugin(config):
            # With a wrong fraction there is something to correct first.
            return [] if _plugin_findings(config) else _raise_chosen_by_plugin(config)
        outer = next((key for key, part in config.items() if isinstance(part, dict) and _KEY in part), None)
        where = "" if outer is None else f" at the top level, only inside {_show(outer)}"
        raise ResultError(
            f"the config has no {_KEY}{where}, so Axolotl trains all parameters",
            reason="not_a_selection",
            hint=_hint_of(config) if outer is None else f"move {_KEY} to the top level",
        )
    value = config[_KEY]
    if value is None or isinstance(value, list):
        return value or []
    if isinstance(value, (str, dict)):
        # A text can have several names, and a mapping has those that end in a colon.
        # The hint shows only the first entries.
        is_text = isinstance(value, str)
        names = re.split(r"[\s,]+", value[:500].strip()) if is_text else [_show(name) for name in islice(value, 20)]
        hint = f"write a list: `{_KEY}: [{', '.join(names)[:200]}]`"
    else:
        hint = "begin each entry with `- `"
    raise ResultError(f"{_KEY} is not a list, and Axolotl accepts only a list", reason="not_a_selection", hint=hint)


def _hint_of(config: Mapping[str, Any]) -> str | None:
    if "spectrum_top_fraction" in config:
        return f"add {_PLUGIN} to plugins, because spectrum_top_fraction has no effect without it"
    # With these keys it is a config of Axolotl, and not a file of another trainer.
    return f"add {_KEY} with a list" if config.keys() & {"base_model", "adapter", "datasets"} else None


def _list_findings(config: Mapping[str, Any], text: str) -> list[Finding]:
    """Find a list that Axolotl rejects, or reads only in part."""
    findings = []
    if len(_KEY_LINE.findall(text)) > 1:
        detail = "is in the file more than once, and Axolotl reads only the last one: merge the lists"
        findings.append(Finding(Reason.DUPLICATE, _KEY, detail))
    for entry in config.get(_KEY) or ():
        if not isinstance(entry, str):
            kind, mend = next(words for types, words in _NOT_TEXT if isinstance(entry, types))
            detail = f"is {kind}, and Axolotl accepts only texts: {mend}"
            findings.append(Finding(Reason.REJECTED, _show(entry), detail))
    return findings


def _plugin_findings(config: Mapping[str, Any]) -> list[Finding]:
    """Find settings with which the SpectrumPlugin trains something else than the config states."""
    if not _has_plugin(config):
        return []
    fraction = config.get("spectrum_top_fraction", 0.5)
    findings = []
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        detail = "is not a number, and Axolotl rejects it: write a fraction such as 0.5"
        findings.append(Finding(Reason.FRACTION, f"spectrum_top_fraction: {_show(fraction)}", detail))
    elif not 0 < fraction <= 1:
        does = "trains every module of the result" if fraction > 1 else "does not choose the best modules"
        mend = f"write {fraction / 100:g}" if 1 < fraction <= 100 else "write a number such as 0.5"
        detail = f"is not a fraction, so the plugin {does}: {mend}"
        findings.append(Finding(Reason.FRACTION, f"spectrum_top_fraction: {fraction}", detail))
    if config.get(_KEY):
        detail = f"is replaced by the SpectrumPlugin if it finds {_result_of(config)}: remove the list or the plugin"
        findings.append(Finding(Reason.PLUGIN, _KEY, detail))
    return findings


def _training_findings(config: Mapping[str, Any]) -> list[Finding]:
    """Find settings of the training that frozen weights exclude: sharding, checkpointing, adapters, integers."""
    given = config.get("fsdp_config")
    fsdp: dict[str, Any] = given if isinstance(given, dict) else {}
    original = fsdp.get("use_orig_params", fsdp.get("fsdp_use_orig_params"))
    version = config.get("fsdp_version", fsdp.get("fsdp_version", fsdp.get("version", 1)))
    findings = []
    if _is_fsdp(config) and version != 2 and original is False:
        detail = "FSDP 1 flattens frozen and trained weights into one parameter; set use_orig_params: true"
        findings.append(Finding(Reason.FSDP, "fsdp_config.use_orig_params", detail))
    kwargs = config.get("gradient_checkpointing_kwargs")
    if config.get("gradient_checkpointing") and isinstance(kwargs, dict) and kwargs.get("use_reentrant") is True:
        detail = "gradients stop at a frozen layer that is recomputed; set use_reentrant: false"
        findings.append(Finding(Reason.CHECKPOINTING, "gradient_checkpointing_kwargs.use_reentrant", detail))
    if config.get("adapter") and not config.get(_KEY):
        detail = "trains the adapter, and none of the weights: remove adapter"
        findings.append(Finding(Reason.ADAPTER, f"adapter: {_show(config['adapter'])}", detail))
    elif config.get("adapter"):
        detail = (
            "gives every name the prefix base_model.model., so that entries for the model match nothing and Axolotl "
            f"freezes the adapter too: remove adapter to train weights, or {_KEY} to train the adapter"
        )
        findings.append(Finding(Reason.ADAPTER, f"adapter: {_show(config['adapter'])}", detail))
    else:
        for setting in ("load_in_4bit", "load_in_8bit"):
            if config.get(setting):
                detail = "Axolotl rejects it without an adapter, because integers have no gradients: remove it"
                findings.append(Finding(Reason.REJECTED, setting, detail))
    return findings


def _has_plugin(config: Mapping[str, Any]) -> bool:
    plugins = config.get("plugins")
    names = plugins if isinstance(plugins, list) else ()
    return any(isinstance(name, str) and "SpectrumPlugin" in name for name in names)


def _result_of(config: Mapping[str, Any]) -> str:
    """Return the path of the result that the plugin reads."""
    model = _show(config.get("spectrum_model_name") or config.get("base_model") or "MODEL")
    return f"./model_snr_results/snr_results_{model.replace('/', '-').replace('_', '-')}.json"


def _raise_chosen_by_plugin(config: Mapping[str, Any]) -> NoReturn:
    result = _result_of(config)
    raise ResultError(
        f"the config has no list to check: when the training starts, the SpectrumPlugin chooses the best "
        f"{config.get('spectrum_top_fraction', 0.5)} of each group of {result}, or of the file of this name in "
        "Spectrum's repository, and without either it freezes nothing",
        reason="chosen_by_plugin",
        hint=f"check the names in that file: spectrum-stream verify {result} --model MODEL",
    )


def _show(value: Any) -> str:
    """Return a value of YAML as a short text; a part that is repeated by name would make it endless."""
    return value[:200] if isinstance(value, str) else reprlib.repr(value)[:200]


def _is_in_tower(name: str) -> bool:
    return any(part in _TOWERS for part in name.split("."))


def _wrong_rows(entry: str, counts: Collection[int], is_sharded: bool) -> str | None:
    """Return the problem with the rows that an entry selects, or None.

    Args:
        counts: the numbers of rows of the parameters that it matches.
    """
    if is_sharded:
        return "selects rows of a parameter, but a sharded parameter has no rows: train the whole parameter"
    rows = _ROW_NUMBERS.search(entry)
    if rows is None:
        return "the number of a row has more than 15 digits"
    first = int(rows[1] or 0)
    last = int(rows[3]) if rows[3] else None if rows[2] else first + 1
    wrong = [count for count in counts if not first < (count if last is None else last) <= count]
    return f"the parameter has {min(wrong)} rows: write a range within [0:{min(wrong)}]" if wrong else None


def _is_fsdp(config: Mapping[str, Any]) -> bool:
    return bool(config.get("fsdp") or config.get("fsdp_config"))


def _is_zero3(deepspeed: Any) -> bool:
    """Whether parameters are sharded, by DeepSpeed's config or its file name."""
    if isinstance(deepspeed, dict):
        zero = deepspeed.get("zero_optimization")
        return isinstance(zero, dict) and zero.get("stage") == 3
    return isinstance(deepspeed, str) and "zero3" in deepspeed.lower()
