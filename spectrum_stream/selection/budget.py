"""The cost of training a selection, in weights and in bytes, and the largest selection within a budget.

The cost counts the weights of the modules in the result. Biases, tensors without a score, activations and the memory
of the trainer itself come on top.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ..errors import ResultError, UsageError
from ..results.result import Module, Result
from ..text import si_bytes, si_number
from .select import Choices, Rule, Selection

# A percentage is raised in steps of a hundredth.
_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class Cost:
    """The memory of a weight, in bytes.

    Attributes:
        frozen: the memory of a weight that is not trained: the weight itself.
        trainable: the memory of a trained weight: itself, its gradient and the state of the optimizer.
        words: a description of these sums.
    """

    frozen: float
    trainable: float
    words: str


class Recipe(StrEnum):
    """An optimizer setup.

    Its cost is the sum of the dtypes of weights, gradients and optimizer state.
    """

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
    # bitsandbytes stores one byte a moment, and a float32 for each block of 256.
    Recipe.ADAMW_8BIT: Cost(
        2, 2 + 2 + 2 * (1 + 4 / 256), "weights and gradients in bfloat16, both moments of AdamW in 8 bits"
    ),
}


@dataclass(frozen=True, slots=True)
class Needs:
    """The cost of training a selection.

    Attributes:
        trainable, total: the number of trained weights, and of all weights in the result; a tied one counts once.
    """

    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total if self.total else 0.0

    def nbytes(self, recipe: Recipe) -> float:
        """Compute the bytes of weights, gradients and optimizer state."""
        cost = recipe.cost
        return self.trainable * cost.trainable + (self.total - self.trainable) * cost.frozen


def needs(selection: Selection, *, by_patterns: bool = False) -> Needs | None:
    """Compute the cost of a selection.

    Return None if a size is not known, as in a result without its record.

    Args:
        by_patterns: count the weights that Axolotl trains, see `Selection.trained_by_patterns`.
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
    """Find the largest selection within a budget of trained weights or bytes.

    Raises one percentage for all groups, in steps of a hundredth, until the next step would not fit. Groups in
    `rule.percents` keep their percentages. The percentage of `rule` does not matter.

    Raises:
        ResultError: unknown_sizes; partial, the result has only some groups of the checkpoint; as `choose`.
        UsageError: over_budget, no module fits in addition to those that are always trained; as `choose`.
    """
    opened = Result.of(result)
    if opened.covered is not None and opened.covered < 1:
        raise ResultError(
            f"a budget needs the whole model, but {1 - opened.covered:.2%} of its weights were not scanned",
            reason="partial",
            hint="scan it without --groups",
        )

    choices = Choices.of(opened, rule)

    def selection(step: int) -> Selection:
        return choices.at(step * 100 / _STEPS)

    names = {module.name for module in opened.modules}
    if unseen := [m for m in selection(_STEPS).always if m not in names and f"{m}.weight" in opened.parameters]:
        raise ResultError(
            f"{unseen[0]} is always trained, but this result does not have its size",
            reason="partial",
            hint="scan it without --groups, or leave it out with --no-embeddings or --no-head",
        )

    def fits(step: int) -> bool:
        return within(_find_needs(selection(step)))

    def within(need: Needs) -> bool:
        return (max_numel is None or need.trainable <= max_numel) and (
            max_nbytes is None or need.nbytes(recipe) <= max_nbytes
        )

    step = _last(fits, _STEPS)
    best = selection(step) if step else None
    if best is None or not best.chosen_names:
        # The smallest selection that has a module; if every group is at 0 percent, no selection has one.
        need = _find_needs(selection(min(_STEPS, _last(lambda step: not selection(step).chosen_names, _STEPS) + 1)))
        raise UsageError(
            f"the budget is too small: with one module it needs {si_number(need.trainable)} trained weights, "
            f"{si_bytes(need.nbytes(recipe))} with {recipe}",
            reason="over_budget",
            hint="leave out the embedding and the head with --no-embeddings and --no-head",
        )
    return best


def _find_needs(selection: Selection) -> Needs:
    need = needs(selection)
    if need is None:
        raise ResultError(
            "a budget needs the sizes of the weights, and only the record of the scan has them",
            reason="unknown_sizes",
            hint="put the record (.sqlite) next to the result, or use --top-percent",
        )
    return need


def _last(holds: Callable[[int], bool], end: int) -> int:
    """Find the last of 1 to `end` for which a condition holds.

    Return 0 for none. The condition must be monotonic.
    """
    low, high = 0, end
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _numel(modules: Iterable[Module]) -> int | None:
    owners: dict[str, int | None] = {module.owner: module.numel for module in modules}
    sizes = [numel for numel in owners.values() if numel is not None]
    return sum(sizes) if len(sizes) == len(owners) else None
