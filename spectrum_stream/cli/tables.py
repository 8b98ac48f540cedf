"""Plans and results for a terminal: rich renderables, never printed here."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..model.names import is_head, is_single_expert
from ..results.record import Record
from ..results.result import Module
from ..selection.budget import Needs, Recipe
from ..selection.compare import Comparison
from ..selection.diagnose import Diagnostics, diagnose
from ..selection.select import Selection, rank
from ..streaming.plan import Plan
from ..text import counted, printable, si_bytes, si_number
from ..trainers.verify import Verdict

if TYPE_CHECKING:
    # At run time this would import torch, and a plan is shown without it.
    from ..pipeline import ScanResult


_MAX_FINDINGS = 40


def foreign(text: str) -> Text:
    """The same as a rich Text, so that brackets in a name are not taken for markup."""
    return Text(printable(text))


def plan_table(plan: Plan) -> RenderableType:
    """A plan: its groups, what is skipped, the cost, and the files."""
    groups = Table(box=None, pad_edge=False)
    for column, right in (("group", False), ("matrices", True), ("shape", False), ("to read", True)):
        groups.add_column(column, justify="right" if right else "left", overflow="fold")
    for group in plan.groups:
        shapes = ", ".join(f"{n} x {m}" for n, m in group.shapes[:3])
        more = f" and {len(group.shapes) - 3} more" if len(group.shapes) > 3 else ""
        read = si_bytes(group.nbytes) if group.nbytes else "tied"
        groups.add_row(foreign(group.name or "(no name)"), str(group.count), shapes + more, read)
    return Lines(groups, Text(), _facts(plan))


def _facts(plan: Plan) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    shards = counted(len(plan.source.shards), "download", "shards")
    facts.add_row("model", foreign(f"{plan.source} ({shards})"))
    facts.add_row(
        "to score",
        f"{counted(len(plan.matrices), 'matrix', 'matrices')} in {counted(len(plan.groups), 'group', 'groups')}",
    )
    facts.add_row("to read", f"{si_bytes(plan.read_nbytes)}, {si_number(plan.flops, 'flop')}")
    chosen = list(plan.fetches.values())
    for way, transfer in plan.transfers.items():
        taken = chosen.count(way)
        mark = f"  <- {'chosen' if taken == len(chosen) else f'for {taken} of {len(chosen)} shards'}" if taken else ""
        disk = f", {si_bytes(transfer.disk_nbytes)} of disk" if transfer.disk_nbytes else ", no disk"
        facts.add_row(
            f"by {way}",
            f"{si_bytes(transfer.nbytes)} in {counted(transfer.requests, 'request', 'requests')}{disk}{mark}",
        )
    if plan.transfers:
        facts.add_row("to fetch", f"{si_bytes(plan.fetched_nbytes(plan.matrices))}, if nothing is scanned yet")
    if plan.source.commit is not None and (here := chosen.count(None)):
        facts.add_row("in the cache", f"{here} of {counted(len(chosen), 'shard', 'shards')}, read in place")
    facts.add_row(
        "peak memory",
        f"{si_bytes(plan.peak_nbytes)} of its own, mapped files not counted; "
        f"{si_bytes(plan.worst_nbytes)} if the largest matrix is ill-conditioned",
    )
    skipped: dict[str, list[str]] = {}
    for entry in plan.skipped:
        skipped.setdefault(str(entry.why), []).append(entry.tensor)
    for why, tensors in skipped.items():
        facts.add_row("skipped", foreign(f"{len(tensors)} {why}: {_some(tensors)}"))
    for matrix in plan.matrices:
        if matrix.tied_to:
            facts.add_row("tied", foreign(f"{matrix.module} is {matrix.tied_to}: scored once, listed twice"))
    facts.add_row("names", whose(plan))
    outputs = [plan.outputs.results, plan.outputs.record, plan.outputs.sorted]
    if plan.top_percent is not None:
        outputs.append(plan.outputs.unfrozen(plan.top_percent))
    for path in outputs:
        facts.add_row("writes", foreign(str(path)))
    return facts


def whose(plan: Plan) -> str:
    """Whose names these are, in words."""
    names = {"checkpoint": "of the checkpoint", "given": "of the list given"}
    return names.get(plan.target, f"of the parameters of {plan.target.replace('-v', ' ')}")


def _some(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "")


_IN_FULL = {"tied": "tied at the cut"}


def score_table(
    scored: Sequence[Module], selection: Selection | None, doubts: Mapping[str, Diagnostics] | None = None
) -> Table:
    """Per group: how many, the spread of their scores, how many were chosen, and how many are doubtful."""
    found = {
        name: {title: n for title, n in d.to_dict().items() if n is not None} for name, d in (doubts or {}).items()
    }
    totals = {title: sum(d[title] for d in found.values()) for d in found.values() for title in d}
    # A column of zeros would only narrow the names.
    doubtful = [title for title, total in totals.items() if total]
    table = Table(box=None, pad_edge=False, caption_justify="left")
    table.add_column("group", overflow="fold")
    for column in ("count", "min", "median", "max", *(["chosen"] if selection else []), *doubtful):
        table.add_column(column, justify="right", no_wrap=True)
    for name, group in rank(scored).items():
        values = [line.value for line in group if line.value is not None]
        numbers = (min(values), statistics.median(values), max(values)) if values else ()
        chosen = [str(len(selection.chosen[name]))] if selection else []
        table.add_row(
            foreign(name or "(no name)"),
            str(len(group)),
            *([f"{x:.4g}" for x in numbers] or [""] * 3),
            *chosen,
            *(str(found[name][title] or "") for title in doubtful),
        )
    if totals:
        table.caption = ", ".join(f"{_IN_FULL.get(title, title)}: {total}" for title, total in totals.items())
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Per group: how alike two rankings are, and what their selections have in common."""
    table = Table(box=None, pad_edge=False)
    table.add_column("group", overflow="fold")
    for column in ("count", "spearman", "kendall", "chosen", "kept", "in", "out"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, g in comparison.groups.items():
        correlations = ("" if x is None else f"{x:.2f}" for x in (g.spearman, g.kendall))
        numbers = (g.chosen_b, g.kept, len(g.entered), len(g.left))
        table.add_row(foreign(name or "(no name)"), str(g.count), *correlations, *map(str, numbers))
    return table


def needs_table(need: Needs) -> Table:
    """What a selection takes to train: weights, and bytes by each recipe."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(
        "trains",
        f"{si_number(need.trainable)} of {si_number(need.total)} scored weights, {need.share:.1%}",
    )
    for recipe in Recipe:
        table.add_row(f"by {recipe}", f"{si_bytes(need.nbytes(recipe))}: {recipe.cost.words}")
    return table


def remarks(result: "ScanResult") -> list[str]:
    """What a reader of the scores should know, a sentence each."""
    lines = []
    degenerate = [r for r in result.records if r.score and r.score.is_degenerate]
    if degenerate:
        lines.append(
            f"degenerate, no measure of signal against noise ({_kinds(degenerate)}), are the scores of "
            f"{counted(len(degenerate), 'matrix', 'matrices')}: {_some([r.module for r in degenerate])}"
        )
    if inexact := result.inexact:
        lines.append(
            f"{counted(len(inexact), 'score', 'scores')} may be wrong by up to "
            f"{max(r.score.error for r in inexact if r.score):.1g} of the value: {_some([r.module for r in inexact])}"
        )
    for record in result.failed[:10]:
        lines.append(f"{record.module} has no score: {record.detail}")
    if len(result.failed) > 10:
        lines.append(f"{len(result.failed) - 10} more have no score")
    if failures := result.plan.failures:
        lines.append(
            f"not scored, {', '.join(dict.fromkeys(str(s.why) for s in failures))}: "
            f"{counted(len(failures), 'weight', 'weights')}, "
            f"{_some([f'{s.tensor} ({s.detail or s.dtype})' for s in failures])}"
        )
    return lines


def selection_remarks(selection: Selection, doubts: Mapping[str, Diagnostics] | None = None) -> list[str]:
    """What a reader of a selection should know, a sentence each."""
    lines = list(selection.result.notes)
    if selection.rule.head != selection.rule.embeddings and (
        heads := [line for line in selection.result.modules if line.shares and is_head(line.name)]
    ):
        lines.append(f"{heads[0].name} and {heads[0].shares} are one parameter, so neither is trained")
    if not selection.chosen_names:
        lines.append(f"no group is large enough for {selection.top_percent:g} percent of it to be one module")
    doubts = doubts or {}
    if tied := {name: d.tied for name, d in doubts.items() if d.tied}:
        groups = [f"{name} ({count} tied)" for name, count in tied.items()]
        lines.append(
            f"equal scores at the cut, chosen by their place in the model, in "
            f"{counted(len(groups), 'group', 'groups')}: {_some(groups)}"
        )
    if hanging := {name: d for name, d in doubts.items() if d.chosen_degenerate}:
        groups = [
            f"{name} ({d.chosen_degenerate} of {len(selection.chosen[name])} chosen)" for name, d in hanging.items()
        ]
        lines.append(
            f"chosen by a degenerate score, no measure of signal against noise, in "
            f"{counted(len(groups), 'group', 'groups')}: {_some(groups)}"
        )
    owners = {line.name: line.shares for line in selection.result.modules if line.shares}
    if (owner := next((o for m in selection.always if (o := owners.get(m))), None)) and owner not in (
        *selection.always,
        *selection.chosen_names,
    ):
        lines.append(
            f"the head is {owner}, which no pattern of Spectrum's matches: Axolotl leaves it frozen unless it is "
            "chosen, freeze() and the other formats train it"
        )
    if experts := [module for module in selection.chosen_names if is_single_expert(module)]:
        lines.append(
            f"{len(experts)} chosen modules are single experts, by the checkpoint's names; transformers 5 fuses the "
            f"experts of a layer into one parameter, where these match nothing: {_some(experts)}"
        )
    infinite = [line.name for group in selection.ranked.values() for line in group if math.isinf(line.rank_key)]
    if infinite:
        lines.append(f"{len(infinite)} scores are infinite or missing (NaN, not defined): {_some(infinite)}")
    return lines


def verdict_table(verdict: Verdict) -> RenderableType:
    """What a trainer would make of a file: findings, and how much it would train."""
    findings = Table(box=None, pad_edge=False)
    for column in ("", "entry", "what is wrong"):
        findings.add_column(column, overflow="fold")
    for finding in verdict.findings[:_MAX_FINDINGS]:
        kind = f"note: {finding.mistake}" if finding.mistake.is_note else str(finding.mistake)
        findings.add_row(kind, foreign(finding.entry), foreign(finding.detail))
    parts: list[RenderableType] = [findings, Text()] if verdict.findings else []
    if (more := len(verdict.findings) - _MAX_FINDINGS) > 0:
        parts.append(Text(f"and {more} more; --json has them all"))
    count = counted(verdict.parameters, "parameter", "parameters")
    whose = f"{count}, {verdict.whose}"
    if verdict.trained:
        parts.append(Text(f"trains {len(verdict.trained)} of {whose}"))
    else:
        parts.append(Text(f"held against {whose}"))
    parts.append(Text("as meant" if verdict.is_good else "not as meant"))
    return Lines(*parts)


def _kinds(records: Sequence[Record]) -> str:
    return ", ".join(dict.fromkeys(str(r.score.degeneracy) for r in records if r.score))


def result_data(result: "ScanResult", need: Needs | None) -> dict[str, object]:
    """A scan's outcome as JSON data, with what its selection takes to train."""
    doubts = diagnose(result.result, result.selection)
    return {
        "schema_version": 1,
        "model": result.plan.source.model,
        "complete": result.complete,
        "target": result.plan.target,
        "trainable_weights": None if need is None else need.trainable,
        "trainable_share": None if need is None else need.share,
        "matrices": len(result.modules),
        "failed": [{"module": r.module, "reason": str(r.no_score), "detail": r.detail} for r in result.failed],
        "unsupported": [{"tensor": s.tensor, "dtype": s.dtype} for s in result.plan.failures],
        "degenerate": {
            r.module: str(r.score.degeneracy) for r in result.records if r.score and r.score.is_degenerate
        },
        "inexact": {r.module: r.score.error for r in result.inexact if r.score},
        "methods": {
            precision: sum(r.precision == precision for r in result.records)
            for precision in dict.fromkeys(r.precision for r in result.records if r.precision)
        },
        "groups": {
            name: {
                "count": len(group),
                "chosen": len(result.selection.chosen[name]) if result.selection else None,
                **doubts[name].to_dict(),
            }
            for name, group in rank(result.modules).items()
        },
        "files": [str(path) for path in result.written],
        "record": str(result.plan.outputs.record) if result.records else None,
    }
