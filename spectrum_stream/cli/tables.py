"""Plans and results for a terminal: rich renderables and sentences, never printed here."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..model.names import is_fused_experts, is_head, is_single_expert
from ..model.no_score import NoScore
from ..model.parameters import GIVEN, Names
from ..model.schemes import is_companion
from ..numerics.metrics import SPECTRUM, Metric
from ..results.record import Record
from ..results.result import Module, median_of
from ..selection.budget import Needs, Recipe, needs
from ..selection.compare import Comparison
from ..selection.diagnose import Diagnostics
from ..selection.select import Selection, rank
from ..streaming.plan import Plan
from ..text import counted, listed, printable, si_bytes, si_number
from ..trainers.trainer import Reason
from ..trainers.verify import Verdict

if TYPE_CHECKING:
    # At run time this would import torch, and a plan can be shown without it.
    from ..pipeline import ScanResult

_MAX_FINDINGS = 40
# A mixture of 512 experts has about 1,550 groups. A line takes about a millisecond.
MAX_ROWS = 2_000
_NAMES = {
    Names.CHECKPOINT: "as in the checkpoint, unchecked",
    Names.V4: "as in transformers 4",
    Names.V5: "as in transformers 5",
    Names.INSTALLED: "as in the installed transformers",
    GIVEN: "as in the given file",
}


def escape(text: str) -> Text:
    """Make a name safe for rich, so that brackets in it are not markup."""
    return Text(printable(text))


def names_words(plan: Plan) -> str:
    """Return the words for the names of a plan."""
    inventory = plan.inventory
    model_class = "" if inventory.model_class is None else f" ({inventory.model_class})"
    is_whole = inventory.is_established or plan.names == Names.CHECKPOINT
    return f"{_NAMES[plan.names]}{model_class}{'' if is_whole else ', except those in the warning'}"


def plan_table(plan: Plan) -> RenderableType:
    """Show a plan: its groups, the skipped tensors, the cost, and the files."""
    groups = Table(box=None, pad_edge=False)
    for column, is_number in (("group", False), ("matrices", True), ("shape", False), ("to read", True)):
        groups.add_column(column, justify="right" if is_number else "left", overflow="fold")
    every = plan.groups
    for group in every[:MAX_ROWS]:
        shapes = listed([f"{n} x {m}" for n, m in group.shapes])
        groups.add_row(
            _group(group.name), str(group.count), shapes, si_bytes(group.nbytes) if group.nbytes else "tied"
        )
    rest = [Text(_unlisted(len(every)))] if len(every) > MAX_ROWS else []
    return Lines(groups, *rest, Text(), _facts(plan, len(every)))


def _facts(plan: Plan, group_count: int) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    shards = counted(len(plan.source.shards), "shard", "shards")
    facts.add_row("model", escape(f"{plan.source} ({shards})"))
    matrices, groups = counted(len(plan.matrices), "matrix", "matrices"), counted(group_count, "group", "groups")
    facts.add_row("to score", f"{matrices} in {groups}")
    facts.add_row("to read", f"{si_bytes(plan.read_nbytes)}, {si_number(plan.flops, 'flop')}")
    chosen = list(plan.fetches.values())
    for fetch, transfer in plan.transfers.items():
        taken = chosen.count(fetch)
        mark = f"  <- {'chosen' if taken == len(chosen) else f'for {taken} of {len(chosen)} shards'}" if taken else ""
        disk = f"{si_bytes(transfer.disk_nbytes)} of disk" if transfer.disk_nbytes else "no disk"
        requests = counted(transfer.requests, "request", "requests")
        facts.add_row(f"by {fetch}", f"{si_bytes(transfer.nbytes)} in {requests}, {disk}{mark}")
    if plan.transfers:
        facts.add_row("to fetch", f"{si_bytes(plan.fetched_nbytes)}, less if a scan was interrupted")
    if plan.source.commit is not None and (here := chosen.count(None)):
        facts.add_row("in the cache", f"{here} of {counted(len(chosen), 'shard', 'shards')}, read in place")
    facts.add_row(
        "peak memory",
        f"{si_bytes(plan.peak_nbytes)} of private memory, "
        f"{si_bytes(plan.worst_nbytes)} if the largest matrix is ill-conditioned",
    )
    if plan.device_nbytes:
        facts.add_row("GPU memory", f"{si_bytes(plan.device_nbytes)} or more; more memory allows larger batches")
    if (sentence := quantized_sentence(plan)) is not None:
        facts.add_row("quantized", escape(sentence))
    unscored = unscored_sentence(plan)
    skipped: dict[NoScore, list[str]] = {}
    for entry in plan.skipped:
        # Scales belong to a scored weight. The row "not scored" has the tensors that Spectrum's rule leaves out.
        is_shown = unscored is not None and entry.no_score.is_by_rule and not entry.no_score.is_failure
        if not is_shown and not is_companion(entry.tensor):
            skipped.setdefault(entry.no_score, []).append(entry.tensor)
    for why, tensors in skipped.items():
        each = "" if len(tensors) == 1 else f"{len(tensors)} tensors, each "
        hint = f"; {why.hint}" if why.hint else ""
        title = "no score" if why.is_failure else "skipped"
        facts.add_row(title, escape(f"{listed(tensors)}: {each}{why.sentence}{hint}"))
    if unscored is not None:
        facts.add_row("not scored", escape(unscored))
    tied = [f"{w.module} is {w.tied_to}: scored once, listed twice" for w in plan.matrices if w.tied_to]
    for sentence in tied[:_MAX_FINDINGS]:
        facts.add_row("tied", escape(sentence))
    if (more := len(tied) - _MAX_FINDINGS) > 0:
        facts.add_row("tied", f"and {more} more; --json lists all")
    facts.add_row("names", names_words(plan))
    for path in (plan.outputs.results, plan.outputs.record, plan.outputs.sorted):
        facts.add_row("writes", escape(str(path)))
    return facts


def quantized_sentence(plan: Plan) -> str | None:
    """Return the formats of the quantized matrices, None if there are none."""
    schemes = Counter(w.quantization.scheme for w in plan.matrices if w.quantization is not None)
    if not schemes:
        return None
    formats = listed([scheme for scheme, _ in schemes.most_common()])
    share = f"{schemes.total()} of {counted(len(plan.matrices), 'matrix', 'matrices')}"
    are = "is" if schemes.total() == 1 else "are"
    return (
        f"{share} {are} dequantized ({formats}), and the scores include the noise of quantization; to train, select "
        "on the original weights"
    )


def unscored_sentence(plan: Plan) -> str | None:
    """Return the share of the model that Spectrum's rule leaves out, None if it is below the limit."""
    unscored = plan.inventory.unscored
    if not unscored.is_notable:
        return None
    are = "is" if len(unscored.tensors) == 1 else "are"
    count = counted(len(unscored.tensors), "tensor", "tensors")
    some = listed([s.tensor for s in unscored.tensors])
    return f"{count}, {100 * unscored.share:.3g} % of the bytes, {are} left out by Spectrum's rule: {some}"


def score_table(
    ranked: Mapping[str, Sequence[Module]],
    metric: Metric,
    chosen: Mapping[str, Sequence[str]] | None = None,
    diagnostics: Mapping[str, Diagnostics] | None = None,
) -> Table:
    """Show every group: size, spread, chosen modules, and weak points.

    Args:
        ranked: the modules of each group, best first.
        metric: the metric that ranks them.
        chosen: the names of the chosen modules of each group; None without a selection.
    """
    weak = {name: {k: n for k, n in d.to_dict().items() if n is not None} for name, d in (diagnostics or {}).items()}
    totals: Counter[str] = Counter()
    for counts in weak.values():
        # `update` keeps a title with the total 0.
        totals.update(counts)
    # A column of zeros would take room from the names.
    shown = [title for title, total in totals.items() if total]
    table = Table(box=None, pad_edge=False, caption_justify="left")
    table.add_column("group", overflow="fold")
    for column in ("count", "min", "median", "max", *(["chosen"] if chosen else []), *map(_title, shown)):
        table.add_column(column, justify="right", no_wrap=True)
    for name, group in islice(ranked.items(), MAX_ROWS):
        values = [module.value for module in group if module.value is not None]
        spread = (min(values), median_of(values), max(values)) if values else ()
        table.add_row(
            _group(name),
            str(len(group)),
            *([f"{value:.4g}" for value in spread] or ["", "", ""]),
            *([str(len(chosen[name]))] if chosen else []),
            *(str(weak[name][title] or "") for title in shown),
        )
    captions = [_unlisted(len(ranked))] if len(ranked) > MAX_ROWS else []
    if metric != SPECTRUM:
        order = "largest" if metric.larger_first else "smallest"
        captions.append(f"ranked by {metric.name}, {order} first: {metric.why}")
    if totals:
        words = {"degenerate": "degenerate scores", "tied": "equal scores at the cut", "inexact": "inexact scores"}
        captions.append(", ".join(f"{words[title]}: {total}" for title, total in totals.items()))
    table.caption = "\n".join(captions) or None
    return table


def _title(counted: str) -> str:
    # In a plan, "tied" is a tensor that two modules share.
    return "equal" if counted == "tied" else counted


def comparison_table(comparison: Comparison) -> Table:
    """Show every group: the correlation and the differences of two rankings."""
    table = Table(box=None, pad_edge=False, caption_justify="left")
    table.add_column("group", overflow="fold")
    for column in ("count", "spearman", "kendall", "chosen", "kept", "in", "out"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, g in islice(comparison.groups.items(), MAX_ROWS):
        correlations = ("" if x is None else f"{x:.2f}" for x in (g.spearman, g.kendall))
        numbers = (g.chosen_b, g.kept, len(g.entered), len(g.left))
        table.add_row(_group(name), str(g.count), *correlations, *map(str, numbers))
    if len(comparison.groups) > MAX_ROWS:
        table.caption = _unlisted(len(comparison.groups))
    return table


def _unlisted(groups: int) -> str:
    return f"and {groups - MAX_ROWS:,} more groups; --json lists all"


def needs_table(need: Needs) -> Table:
    """Show the cost of training a selection: weights, and bytes by each recipe."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(
        "trains", f"{si_number(need.trainable)} of {si_number(need.total)} scored weights, {need.share:.1%}"
    )
    for recipe in Recipe:
        table.add_row(f"with {recipe}", f"{si_bytes(need.nbytes(recipe))}: {recipe.cost.words}")
    return table


def verdict_table(verdict: Verdict) -> RenderableType:
    """Show the findings of `verify`, and the number of trained parameters."""
    findings = Table(box=None, pad_edge=False)
    for column in ("", "entry", "finding"):
        findings.add_column(column, overflow="fold")
    for finding in verdict.findings[:_MAX_FINDINGS]:
        kind = f"note: {finding.reason}" if finding.reason.is_note else str(finding.reason)
        findings.add_row(kind, escape(finding.entry), escape(finding.detail))
    parts: list[RenderableType] = [findings, Text()] if verdict.findings else []
    if (more := len(verdict.findings) + verdict.more_findings - _MAX_FINDINGS) > 0:
        listed = "all" if not verdict.more_findings else f"the first {len(verdict.findings)}"
        parts.append(Text(f"and {more} more; --json lists {listed}"))
    count = counted(verdict.parameters, "parameter", "parameters")
    # The names of an adapter are not known, so the number would not be that of the training.
    if verdict.trained and all(finding.reason is not Reason.ADAPTER for finding in verdict.findings):
        parts.append(Text(f"trains {len(verdict.trained)} of {count}"))
    parts.append(Text(f"checked against {count} of {verdict.origin}: {'OK' if verdict.is_good else 'mismatch'}"))
    return Lines(*parts)


def scan_warnings(result: "ScanResult") -> list[str]:
    """Return the warnings about the scores, a sentence each."""
    warnings = []
    kinds: dict[str, list[str]] = {}
    for record in result.records:
        if record.score is not None and record.score.is_degenerate and record.score.degeneracy is not None:
            kinds.setdefault(record.score.degeneracy.sentence, []).append(_name_of(record))
    for sentence, modules in kinds.items():
        each = "the matrix" if len(modules) == 1 else "each matrix"
        warnings.append(
            f"{counted(len(modules), 'score is', 'scores are')} degenerate and not meaningful, because "
            f"{each} {sentence}: {listed(modules)}"
        )
    if inexact := result.inexact:
        worst = max(r.score.error for r in inexact if r.score)
        warnings.append(
            f"{counted(len(inexact), 'score has', 'scores have')} an estimated relative error of up to {worst:.1g}: "
            f"{listed([_name_of(r) for r in inexact])}"
        )
    if again := [record for record in result.records if record.score is not None and record.detail]:
        warnings.append(
            f"{counted(len(again), 'matrix was', 'matrices were')} computed again: "
            f"{listed([f'{_name_of(record)} ({record.detail})' for record in again])}"
        )
    failed: dict[NoScore, list[str]] = {}
    for record in result.failed:
        if record.no_score is not None:
            detail = "" if record.detail == record.no_score.sentence else f" ({record.detail})"
            failed.setdefault(record.no_score, []).append(f"{_name_of(record)}{detail}")
    for why, modules in failed.items():
        each = "it" if len(modules) == 1 else "each"
        warnings.append(
            f"{counted(len(modules), 'matrix has', 'matrices have')} no score, because {each} {why.sentence}: "
            f"{listed(modules)}"
        )
    warnings += filter(None, (unscored_sentence(result.plan), quantized_sentence(result.plan)))
    reasons: dict[NoScore, list[str]] = {}
    for skipped in result.plan.failures:
        detail = skipped.detail or f"{skipped.dtype}{list(skipped.shape)}"
        reasons.setdefault(skipped.no_score, []).append(f"{skipped.tensor} ({detail})")
    for why, tensors in reasons.items():
        each = "it" if len(tensors) == 1 else "each"
        hint = f"; {why.hint}" if why.hint else ""
        warnings.append(
            f"{counted(len(tensors), 'weight was', 'weights were')} not scored, because {each} {why.sentence}: "
            f"{listed(tensors)}{hint}"
        )
    return warnings


def selection_warnings(selection: Selection, diagnostics: Mapping[str, Diagnostics] | None = None) -> list[str]:
    """Return the warnings about a selection, a sentence each."""
    modules = selection.result.modules
    shares = {module.name: module.shares for module in modules if module.shares}
    warnings = list(selection.result.notes)
    heads = [name for name in shares if is_head(name)]
    if selection.rule.head != selection.rule.embeddings and heads:
        warnings.append(f"{heads[0]} and {shares[heads[0]]} are one parameter, so neither is trained")
    if not selection.chosen_names:
        warnings.append(
            f"{selection.top_percent:g} percent of every group is less than one module, so none is selected"
        )
    need = needs(selection)
    if need is not None and need.trainable == need.total:
        warnings.append("every weight would be trained; select a smaller share to freeze some")
    diagnostics = diagnostics or {}
    if tied := [f"{name} ({d.tied} tied)" for name, d in diagnostics.items() if d.tied]:
        warnings.append(
            f"equal scores at the cut, chosen by their order in the model, in "
            f"{counted(len(tied), 'group', 'groups')}: {listed(tied)}"
        )
    if degenerate := [
        f"{name} ({d.chosen_degenerate} of {len(selection.chosen[name])} chosen)"
        for name, d in diagnostics.items()
        if d.chosen_degenerate
    ]:
        warnings.append(
            f"modules were chosen by a degenerate score, which does not compare signal with noise, in "
            f"{counted(len(degenerate), 'group', 'groups')}: {listed(degenerate)}"
        )
    owner = next((shares[module] for module in selection.always if module in shares), None)
    if owner is not None and owner not in (*selection.always, *selection.chosen_names):
        warnings.append(
            f"the head is tied to {owner}, and no pattern of Spectrum matches that name: Axolotl leaves it frozen "
            "unless it is chosen, while freeze() and the other formats train it"
        )
    if experts := [module for module in selection.chosen_names if is_single_expert(module)]:
        warnings.append(
            f"{counted(len(experts), 'chosen module is a single expert', 'chosen modules are single experts')} by "
            "the names of the checkpoint; transformers 5 fuses the experts of a layer into one parameter, and these "
            f"names match nothing there: {listed(experts)}"
        )
    missing = [m.name for group in selection.ranked.values() for m in group if math.isinf(m.rank_key)]
    if missing:
        warnings.append(f"{counted(len(missing), 'score is', 'scores are')} infinite or missing: {listed(missing)}")
    return warnings


def scan_data(result: "ScanResult", need: Needs | None, diagnostics: Mapping[str, Diagnostics]) -> dict[str, object]:
    """Return the outcome of a scan for --json, with the cost of its selection."""
    return {
        "schema_version": 1,
        "model": result.plan.source.model,
        "complete": result.complete,
        "names": result.plan.names,
        "names_are_established": result.plan.inventory.is_established,
        "trainable_weights": None if need is None else need.trainable,
        "trainable_share": None if need is None else need.share,
        "matrices": len(result.modules),
        "failed": [{"module": _name_of(r), "reason": str(r.no_score), "detail": r.detail} for r in result.failed],
        "unsupported": [
            {"tensor": s.tensor, "dtype": s.dtype, "reason": str(s.no_score)} for s in result.plan.failures
        ],
        "unscored": result.plan.inventory.unscored.to_dict(),
        "degenerate": {
            _name_of(r): str(r.score.degeneracy) for r in result.records if r.score and r.score.is_degenerate
        },
        "inexact": {_name_of(r): r.score.error for r in result.inexact if r.score},
        "precisions": {
            str(precision): sum(r.precision == precision for r in result.records)
            for precision in dict.fromkeys(r.precision for r in result.records if r.precision)
        },
        "refined": sum(r.refined > 0 for r in result.records),
        "groups": {
            name: {
                "count": len(group),
                "chosen": len(result.selection.chosen[name]) if result.selection else None,
                **diagnostics[name].to_dict(),
            }
            for name, group in rank(result.modules).items()
        },
        "files": [str(path) for path in result.written],
        "record": str(result.plan.outputs.record) if result.records else None,
    }


def _name_of(record: Record) -> str:
    """Return the name of a matrix in results; for one of fused experts, the name with its number."""
    return record.module if is_fused_experts(record.result_name) else record.result_name


def _group(name: str) -> Text:
    return escape(name or "(no name)")
