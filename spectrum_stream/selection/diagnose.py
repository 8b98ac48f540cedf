"""What a ranking hangs on: degenerate scores, ties at the cut, scores that are not exact; by group."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..numerics.snr import TOLERANCE, Degeneracy
from ..results.record import Record
from ..results.result import Module
from .select import Selection, rank


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Numbers of a group's modules; a bank of experts is one.

    Attributes:
        degenerate: those whose score is no measure of signal against noise (of a bank: of half its experts at
            least). A norm's, 1.0 by definition, is not counted: its group has no other. None without a record.
        chosen_degenerate: of these, the chosen ones.
        tied: those with the score at which the group is cut, if that score is on both sides of the cut.
        inexact: those whose score may be wrong by more than the tolerance. None without a record.
    """

    degenerate: int | None
    chosen_degenerate: int
    tied: int
    inexact: int | None

    def to_dict(self) -> dict[str, int | None]:
        """For `--json`."""
        return {"degenerate": self.degenerate, "tied": self.tied, "inexact": self.inexact}


def diagnose(
    scored: Iterable[Module], selection: Selection | None, records: Sequence[Record]
) -> Mapping[str, Diagnostics]:
    """The doubts of every group of a result.

    Args:
        scored: the lines of the result.
        selection: what was chosen of them; None for nothing.
        records: the record of their scan; empty where there is none, or where `scored` is by another measure.
    """
    members: dict[str, list[Record]] = {}
    for record in records:
        members.setdefault(record.result_name, []).append(record)
    chosen = set(selection.chosen_names) if selection else set()
    tied = selection.tied if selection else {}
    doubts = {}
    for name, group in rank(scored).items():
        degenerate = {line.name for line in group if _is_degenerate(members.get(line.name, []))}
        inexact = [line for line in group if any(map(_is_inexact, members.get(line.name, [])))]
        doubts[name] = Diagnostics(
            len(degenerate) if members else None,
            len(degenerate & chosen),
            tied.get(name, 0),
            len(inexact) if members else None,
        )
    return doubts


def _is_degenerate(records: Sequence[Record]) -> bool:
    count = sum(r.score is not None and r.score.degeneracy not in (None, Degeneracy.VECTOR) for r in records)
    return count > 0 and 2 * count >= len(records)


def _is_inexact(record: Record) -> bool:
    return record.score is not None and record.score.error > TOLERANCE
