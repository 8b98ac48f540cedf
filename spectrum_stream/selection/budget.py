"""What a selection takes to train, in weights and in bytes, and the largest one that a budget allows.

Counted are the weights that the result lists. Biases, tensors that were not scored, activations and what the
trainer itself needs come on top.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from ..errors import ResultError, UsageError
from ..results.result import Module, Result
from .select import Rule, Selection, choose, result_of

# A percentage is raised in steps of a hundredth.
_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes a weight takes in memory.

    Attributes:
        frozen: of one that is not trained: itself.
        trainable: of one that is: itself, its gradient, and the optimizer's state.
        words: of what these are made up.
    """

    frozen: float
    trainable: float
    words: str


class Recipe(StrEnum):
    """How the weights are trained: sums of the dtypes, with the state that the optimizers' code allocates."""

    ADAMW = "adamw"
    ADAMW_MIXED = "adamw-mixed"
    ADAMW_BF16 = "adamw-bf16"
    ADAMW_8BIT = "adamw-8bit"

    @property
    def cost(self) -> Cost:
        return _COSTS[self]


_COSTS = {
    Recipe.ADAMW: Cost(4, 4 + 4 + 8, "all weights, gradients and both moments of AdamW in float32"),
    Recipe.ADAMW_MIXED: Cost(
        2, 4 + 4 + 8, "frozen weights in bfloat16; trained ones, gradients and both moments of AdamW in float32"
    ),
    # torch.optim.AdamW keeps its state in the dtype of the parameter.
    Recipe.ADAMW_BF16: Cost(2, 2 + 2 + 4, "all weights, gradients and both moments of AdamW in bfloat16"),
    # bitsandbytes: a byte a moment, and a float32 for each block of 256.
    Recipe.ADAMW_8BIT: Cost(
        2, 2 + 2 + 2 * (1 + 4 / 256), "weights and gradients in bfloat16, both moments of AdamW in 8 bits"
    ),
}


@dataclass(frozen=True, slots=True)
class Needs:
    """What a selection takes.

    Attributes:
        trainable, total: numbers of weights, of what is trained and of all in the result; a tied one counts once.
    """

    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total

    def nbytes(self, recipe: Recipe) -> float:
        """Bytes of weights, gradients and optimizer state."""
        cost = recipe.cost
        return self.trainable * cost.trainable + (self.total - self.trainable) * cost.frozen


def needs(selection: Selection, *, by_patterns: bool = False) -> Needs | None:
    """What a selection takes; None where a size is not known, as of a result without its record.

    Args:
        by_patterns: as Axolotl trains it, see `Selection.trained_by_patterns`.
    """
    trained = selection.trained_by_patterns if by_patterns else selection.trained
    trainable, total = _numel(trained), _numel(selection.result.modules)
    return None if trainable is None or total is None else Needs(trainable, total)


def fit(
    result: str | Path | Result | Iterable[Module],
    rule: Rule,
    *,
    max_numel: int | None = None,
    max_nbytes: int | None = None,
    recipe: Recipe = Recipe.ADAMW,
) -> Selection:
    """The largest selection within a budget of trained weights, of bytes, or of both.

    One percentage for all groups is raised, in steps of a hundredth, until the next step would not fit; groups that
    have percentages of their own keep them. The percentage of `rule` does not count.

    Raises:
        ResultError: unknown_sizes; partial, the result is of some of the checkpoint's groups; as `choose`.
        UsageError: over_budget, not one module fits beside what is always trained; as `choose`.
    """
    read = result_of(result)
    if read.covered is not None and read.covered < 1:
        raise ResultError(
            f"a budget needs the whole model, and {1 - read.covered:.2%} of its weights were not scanned",
            reason="partial",
            hint="scan it without --modules",
        )

    def selection(step: int) -> Selection:
        return choose(read, replace(rule, percent=step * 100 / _STEPS))

    lines = {line.name for line in read.modules}
    if unseen := [m for m in selection(_STEPS).always if m not in lines and f"{m}.weight" in read.parameters]:
        raise ResultError(
            f"{unseen[0]} is always trained, and this result does not have its size",
            reason="partial",
            hint="scan it without --modules, or leave it out with --no-embeddings or --no-head",
        )

    def fits(step: int) -> bool:
        return within(_known(selection(step)))

    def within(need: Needs) -> bool:
        return (max_numel is None or need.trainable <= max_numel) and (
            max_nbytes is None or need.nbytes(recipe) <= max_nbytes
        )

    step = _last(fits, _STEPS)
    best = selection(step) if step else None
    if best is None or not best.chosen_names:
        # The least that has a module; where every group is at 0 percent, there is none.
        need = _known(selection(min(_STEPS, _last(lambda step: not selection(step).chosen_names, _STEPS) + 1)))
        raise UsageError(
            f"the budget is too small: the first module to choose makes {need.trainable} weights to train, "
            f"{need.nbytes(recipe):.4g} bytes by {recipe}",
            reason="over_budget",
            hint="--no-embeddings and --no-head leave out what is always trained",
        )
    return best


def _known(selection: Selection) -> Needs:
    need = needs(selection)
    if need is None:
        raise ResultError(
            "a budget needs the sizes of the weights, and this result does not have them",
            reason="unknown_sizes",
            hint="keep the record of the scan (.sqlite) beside it, or use --top-percent",
        )
    return need


def _last(holds: Callable[[int], bool], end: int) -> int:
    """The last of 1 to `end` for which a condition holds that, once it fails, fails for good; 0 for none."""
    low, high = 0, end
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _numel(lines: Iterable[Module]) -> int | None:
    owners: dict[str, int | None] = {line.owner: line.numel for line in lines}
    sizes = [numel for numel in owners.values() if numel is not None]
    return sum(sizes) if len(sizes) == len(owners) else None
