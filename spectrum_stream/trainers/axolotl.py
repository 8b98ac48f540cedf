"""Axolotl: `unfrozen_parameters`, written like Spectrum and matched like Axolotl.

Axolotl trains the parameters whose name matches a pattern of the list and freezes the rest. A pattern is a regular
expression that must match from the start of the name, not to its end. A dot in it is literal unless a plus follows,
and `[a:b]` at its end selects rows. (axolotl 0.19.0, utils/freeze.py, freeze_layers_except and LayerNamePattern)

An entry is the name of a module, as Spectrum writes it, so Axolotl trains the bias of a module with its weight.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ResultError
from ..results.result import read_text
from ..selection.select import ALWAYS, Selection
from ..text import counted
from .parameters import Parameters
from .targets import Target, Targets, targets_of
from .trainer import Entry, Finding, Reason, Trainer, find_matches, strings

ALWAYS_PATTERNS = tuple(f"^{module}.weight$" for module in ALWAYS)

# These characters are literal both unquoted in YAML and unescaped in a pattern of Axolotl.
_LITERAL = re.compile(r"[A-Za-z0-9_.\-]*")
_ROWS = re.compile(r"^(.+)\[[0-9]*(?::[0-9]*)?\]$")
_ROW_NUMBERS = re.compile(r"\[([0-9]{0,15})(?:(:)([0-9]{0,15}))?\]$")
_DOT = re.compile(r"\.(?!\+)")


class Axolotl(Trainer):
    """Axolotl, by a list of patterns in its config."""

    name = "axolotl"
    suffix = "yaml"
    advice = "copy the list into your Axolotl config; Axolotl trains the bias of a module with its weight"
    always_by_pattern = True
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
            lines.append(f"# {plain(group)} layers")
            lines += [f"- {pattern}" for target in chosen for pattern in patterns_of(target, targets)]
        return "\n".join(lines) + "\n"

    def entries(self, text: str) -> list[Entry]:
        return [entry_of(pattern) for pattern in strings(yaml.safe_load(text)["unfrozen_parameters"])]

    def matches(self, text: str, names: Iterable[str]) -> set[str]:
        # Axolotl reads an empty list as no list, and trains everything. (train.py, `if cfg.unfrozen_parameters`)
        entries = self.entries(text)
        return find_matches(entries, names) if entries else set(names)

    def conflicts(self, text: str, parameters: Parameters) -> list[Finding]:
        """Find settings that frozen weights exclude: sharding, checkpointing, adapters."""
        config = yaml.safe_load(text)
        given = config.get("fsdp_config")
        fsdp: dict[str, Any] = given if isinstance(given, dict) else {}
        is_fsdp = bool(config.get("fsdp") or given)
        original = fsdp.get("use_orig_params", fsdp.get("fsdp_use_orig_params"))
        version = config.get("fsdp_version", fsdp.get("fsdp_version", fsdp.get("version", 1)))
        findings = []
        if is_fsdp and version != 2 and original is False:
            detail = "FSDP 1 flattens frozen and trained weights into one parameter; set use_orig_params: true"
            findings.append(Finding(Reason.FSDP, "fsdp_config.use_orig_params", detail))
        is_sharded = is_fsdp or _is_zero3(config.get("deepspeed"))
        for entry in strings(config["unfrozen_parameters"]):
            if (wrong := _wrong_rows(entry, parameters.shapes, is_sharded)) is not None:
                findings.append(Finding(Reason.ROW_RANGE, entry, wrong))
        kwargs = config.get("gradient_checkpointing_kwargs")
        if config.get("gradient_checkpointing") and isinstance(kwargs, dict) and kwargs.get("use_reentrant") is True:
            detail = "gradients stop at a frozen layer that is recomputed; set use_reentrant: false"
            findings.append(Finding(Reason.CHECKPOINTING, "gradient_checkpointing_kwargs.use_reentrant", detail))
        if config.get("adapter"):
            detail = "trains an adapter instead of the weights; Axolotl rejects it with peft_layers_to_transform"
            findings.append(Finding(Reason.ADAPTER, "adapter", detail))
        return findings

    def advise(self, entry: str) -> str | None:
        if "\\." in entry:
            return r"Axolotl treats `.` literally and never matches `\.`; --format lines reads escaped patterns"
        return "Axolotl reads `.+` as any characters, and `.*` as dots" if ".*" in entry else None

    def explain(self, selection: Selection, parameters: Collection[str] | None = None) -> list[str]:
        sentences = super().explain(selection, parameters)
        if whole := whole_names(selection, parameters):
            entries = counted(len(whole), "entry ends", "entries end")
            sentences.append(f"{entries} in $ to match no other parameter: {whole[0]}{' ...' if whole[1:] else ''}")
        return sentences


@dataclass(frozen=True, slots=True)
class Pattern:
    """One entry of `unfrozen_parameters`, as Axolotl reads it."""

    text: str

    @property
    def names_rows(self) -> bool:
        """Whether it selects rows, which need gradient hooks, not `requires_grad`."""
        return _ROWS.match(self.text) is not None

    @property
    def compiled(self) -> re.Pattern[str]:
        """The expression that must match from the start of a name.

        Raises:
            re.error, OverflowError, RecursionError: it is not a regular expression.
        """
        rows = _ROWS.match(self.text)
        try:
            return re.compile(_DOT.sub(r"\\.", rows[1] if rows else self.text))
        except re.error as error:
            # The user knows the entry, but not the expression that Axolotl makes from it.
            raise re.error(error.msg, self.text) from error

    def matches(self, parameter: str) -> bool:
        return self.compiled.match(parameter) is not None


def entry_of(pattern: str) -> Entry:
    """Return a pattern as an entry."""
    return Entry(pattern, Pattern(pattern).compiled)


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
    module = plain(target.module)
    if target.tied:
        # Either Spectrum's pattern for the embedding trains the shared parameter, or it needs its own pattern.
        by_pattern = target.parameter in targets.always and f"^{target.parameter}$" in ALWAYS_PATTERNS
        embedding = () if by_pattern else (f"{plain(target.parameter)}$",)
        return (module if not targets.starting_with(module) else f"{module}.weight$", *embedding)
    if target.is_bare:
        # A parameter name that is only guessed can turn out to be the name of a module.
        return (f"{module}$",) if target.certain else (module,)
    own = {name for name in targets.starting_with(f"{module}.") if "." not in name[len(module) + 1 :]}
    return (module,) if own.issuperset(targets.starting_with(module)) else (f"{plain(target.parameter)}$",)


def read_patterns(path: Path) -> tuple[str, ...]:
    """Read the patterns of an Axolotl config or of Spectrum's YAML file.

    Raises:
        ResultError: no_such_result, unreadable, too_large, not_a_selection.
    """
    try:
        data: Any = yaml.safe_load(read_text(path, "selection"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
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
    # YAML reads `2`, `null` and `no`, which have harmless characters only, as other types than strings.
    if not _LITERAL.fullmatch(name) or (name and yaml.safe_load(name) != name):
        raise ResultError(f"the name {name!r} cannot be written as a pattern for Axolotl", reason="unsafe_name")
    return name


def _always(selection: Selection) -> list[str]:
    return [f"^{module}.weight$" for module in selection.always]


def _wrong_rows(entry: str, shapes: Mapping[str, tuple[int, ...] | None], is_sharded: bool) -> str | None:
    """Return the problem with the rows that an entry selects, or None."""
    rows = _ROW_NUMBERS.search(entry)
    if rows is None:
        return None
    if is_sharded:
        return "selects rows of a parameter, but a sharded parameter has no rows"
    pattern = Pattern(entry)
    counts = [shape[0] for name, shape in shapes.items() if shape and pattern.matches(name)]
    first = int(rows[1] or 0)
    last = int(rows[3]) if rows[3] else None if rows[2] else first + 1
    wrong = [count for count in counts if not first < (count if last is None else last) <= count]
    return f"the parameter has {wrong[0]} rows" if wrong else None


def _is_zero3(deepspeed: Any) -> bool:
    """Whether parameters are sharded, by DeepSpeed's config or its file name."""
    if isinstance(deepspeed, dict):
        zero = deepspeed.get("zero_optimization")
        return isinstance(zero, dict) and zero.get("stage") == 3
    return "zero3" in str(deepspeed).lower()
