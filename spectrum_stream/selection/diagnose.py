"""Weak points of a ranking, by group: degenerate scores, ties at the cut, scores that are not exact."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..results.result import Module, Result
from .select import Selection, rank


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Numbers of modules in a group; fused experts are one module.

    Attributes:
        degenerate: modules with a score that does not compare signal with noise (see `ModuleDiagnostics`). Norms do
            not count, because all scores of their group are 1.0 by definition. None without a record.
        chosen_degenerate: the chosen ones among these.
        tied: modules with the score at which the group is cut, if that score is on both sides of the cut.
        inexact: modules with a score that may be wrong by more than the tolerance. None without a record.
    """

    degenerate: int | None
    chosen_degenerate: int
    tied: int
    inexact: int | None

    def to_dict(self) -> dict[str, int | None]:
        """Return the data for `--json`."""
        return {"degenerate": self.degenerate, "tied": self.tied, "inexact": self.inexact}


def diagnose(
    result: str | Path | Result | Iterable[Module], selection: Selection | None = None
) -> Mapping[str, Diagnostics]:
    """Count the weak points of every group of a result or a selection.

    Args:
        selection: the modules that were chosen of the result; None for none.

    Raises:
        ResultError: the file cannot be read.
    """
    opened = Result.of(result)
    by_module = opened.diagnostics()
    chosen = set(selection.chosen_names) if selection else set()
    tied = selection.tied if selection else {}
    diagnostics = {}
    for name, group in (selection.ranked if selection else rank(opened.modules)).items():
        found = {module.name: by_module[module.name] for module in group if module.name in by_module}
        degenerate = {module for module, flags in found.items() if flags.degenerate}
        diagnostics[name] = Diagnostics(
            degenerate=len(degenerate) if by_module else None,
            chosen_degenerate=len(degenerate & chosen),
            tied=tied.get(name, 0),
            inexact=sum(flags.inexact for flags in found.values()) if by_module else None,
        )
    return diagnostics
