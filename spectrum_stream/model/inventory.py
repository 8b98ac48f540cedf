"""Tensors to the matrices that are scored, or to a reason why one is not; and the groups that they are ranked in."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ..checkpoint.header import TensorInfo
from ..checkpoint.tensors import Checkpoint
from .config import ModelConfig
from .matrix import FLOAT_DTYPES, Matrix, NoScore, Skipped
from .names import (
    find_tied_head,
    fused_name_of,
    group_of,
    is_extra_layer,
    is_fused_experts,
    is_stacked_experts,
    is_weight,
    model_order,
    module_of,
    tower_of,
)
from .quantization import Quantization, Unreadable, is_companion, parameter_of
from .schemes import QuantizationIndex


def classify(checkpoint: Checkpoint, config: ModelConfig) -> tuple[list[Matrix], list[Skipped]]:
    """What is scored, in file order, and everything else, in model order."""
    matrices: list[Matrix] = []
    skipped: list[Skipped] = []
    index = QuantizationIndex(checkpoint, config.quantization)
    tied = find_tied_head((tensor.name for _, tensor in checkpoint.tensors), config)
    for shard, tensor in checkpoint.tensors:
        found = index.find(tensor)
        if isinstance(found, Unreadable):
            skipped.append(Skipped(tensor.name, tensor.dtype, tensor.shape, NoScore(found.why), found.detail))
        elif found is not None:
            matrices += _quantized(tensor, shard.name, found)
        elif _is_bank(tensor):
            matrices += _experts(tensor, shard.name, tensor.shape[0])
        elif (count := _flat_experts(tensor, config)) is not None:
            matrices += _experts(tensor, shard.name, count)
        elif (why := _skip_reason(tensor)) is not None:
            skipped.append(Skipped(tensor.name, tensor.dtype, tensor.shape, why))
        else:
            matrices.append(_matrix(tensor, shard.name))
        if tied is not None and tied[1] == tensor.name and matrices and matrices[-1].tensor == tensor.name:
            # Right behind its tensor, so that the scan has its singular values at hand.
            embedding, head = matrices[-1], tied[0]
            matrices.append(
                replace(
                    embedding,
                    module=head,
                    parameter=f"{head}.weight",
                    group=group_of(head),
                    tied_to=embedding.module,
                )
            )
    matrices, twice = _stored_once(matrices)
    matrices = _kept_apart(matrices, config.layer_count)
    missing = _missing_experts(matrices, skipped, config.expert_count)
    # A tensor that is no whole bank is not what the config says, whichever of its experts it has.
    short = {s.tensor for s in missing}
    matrices = [w for w in matrices if w.expert is None or _bank(w) not in short]
    skipped += twice + missing
    skipped.sort(key=lambda s: model_order(s.tensor))
    return matrices, skipped


def _stored_once(matrices: list[Matrix]) -> tuple[list[Matrix], list[Skipped]]:
    """Without weights that two tensors hold, packed and plain: nothing says which of them counts."""
    tensors: dict[str, set[str]] = {}
    for w in matrices:
        tensors.setdefault(w.module, set()).add(w.tensor)
    twice = {module for module, found in tensors.items() if len(found) > 1}
    dropped = {w.tensor: w for w in matrices if w.module in twice}
    skipped = [Skipped(name, w.dtype, (w.n, w.m), NoScore.STORED_TWICE) for name, w in dropped.items()]
    return [w for w in matrices if w.tensor not in dropped], skipped


def _kept_apart(matrices: list[Matrix], layers: int | None) -> list[Matrix]:
    """With the groups of another tower, and of layers behind the model's own, under a name of their own.

    Spectrum ranks a layer of a vision tower among those of the language model, where both call it the same.
    """
    towers = {tower_of(w.module) for w in matrices if group_of(w.module) != w.module}
    apart = []
    for w in matrices:
        tower = tower_of(w.module) if len(towers) > 1 and group_of(w.module) != w.module else ""
        prefix = "mtp" if is_extra_layer(w.module, layers) else tower
        apart.append(replace(w, group=f"{prefix}.{w.group}") if prefix else w)
    return apart


def _missing_experts(matrices: Sequence[Matrix], skipped: Sequence[Skipped], count: int | None) -> list[Skipped]:
    """The banks of experts that are not whole: some of the experts, or all of one projection, are not there."""
    # Those that are there and cannot be read have a reason of their own.
    failed = {module_of(parameter_of(s.tensor)) for s in skipped if s.why.is_failure}
    present = Counter(bank for w in matrices if (bank := _bank(w)) is not None)
    present.update(bank for name in failed if (bank := fused_name_of(name)) is not None)
    most: dict[str, int] = {}
    for bank, found in present.items():
        most[group_of(bank)] = max(most.get(group_of(bank), count or 0), found)
    short = {bank: found for bank, found in present.items() if found < most[group_of(bank)]}
    # What the experts of any layer have, those of each must have.
    owners: dict[str, dict[str, None]] = {}
    for bank in present:
        owner, _, projection = bank.rpartition(".")
        owners.setdefault(owner, {})[projection] = None
    every: dict[str, dict[str, None]] = {}
    for owner, projections in owners.items():
        every.setdefault(group_of(owner), {}).update(projections)
    for owner, projections in owners.items():
        for projection in every[group_of(owner)].keys() - projections.keys():
            if (bank := f"{owner}.{projection}") not in failed:
                short[bank] = 0
    return [
        Skipped(bank, "", (), NoScore.MISSING_EXPERTS, f"{found} of {most[group_of(bank)]} experts")
        for bank, found in short.items()
    ]


def _bank(w: Matrix) -> str | None:
    """The bank that an expert is in, however that is stored."""
    return fused_name_of(w.module) if w.expert is None else w.module.rpartition(".")[0]


def _is_bank(tensor: TensorInfo) -> bool:
    """Whether it is the matrices of all experts of a layer, stacked: (experts, n, m), as models with fused experts
    store them. A trainer freezes such a bank as one."""
    return (
        len(tensor.shape) == 3
        and 0 not in tensor.shape
        and tensor.dtype in FLOAT_DTYPES
        and not is_companion(tensor.name)
        and is_fused_experts(module_of(tensor.name))
    )


def _flat_experts(tensor: TensorInfo, config: ModelConfig) -> int | None:
    """How many experts lie one above the other in a tensor of two dimensions; None where it is no such bank."""
    if len(tensor.shape) != 2 or tensor.dtype not in FLOAT_DTYPES or not is_stacked_experts(tensor.name):
        return None
    count = config.expert_count
    return count if count is not None and 0 not in tensor.shape and tensor.shape[0] % count == 0 else None


def _experts(tensor: TensorInfo, shard: str, count: int) -> list[Matrix]:
    n, m = tensor.shape[1:] if len(tensor.shape) == 3 else (tensor.shape[0] // count, tensor.shape[1])
    return [_expert(tensor, shard, e, count, (n, m), None) for e in range(count)]


def _quantized(tensor: TensorInfo, shard: str, found: Quantization | list[Quantization]) -> list[Matrix]:
    if isinstance(found, list):
        return [_expert(tensor, shard, e, len(found), how.shape, how) for e, how in enumerate(found)]
    parameter, (n, m) = parameter_of(tensor.name), found.shape
    module = module_of(parameter)
    return [
        Matrix(
            module, parameter, group_of(module), tensor.name, shard, tensor.start, tensor.dtype, n, m, tensor.nbytes,
            quantization=found,
        )
    ]  # fmt: skip


def _expert(
    tensor: TensorInfo, shard: str, e: int, count: int, shape: tuple[int, int], how: Quantization | None
) -> Matrix:
    parameter, nbytes = parameter_of(tensor.name), tensor.nbytes // count
    bank = module_of(parameter)
    return Matrix(
        f"{bank}.{e}", parameter, group_of(bank), tensor.name, shard, tensor.start + e * nbytes, tensor.dtype, *shape,
        nbytes, expert=e, quantization=how,
    )  # fmt: skip


def _skip_reason(tensor: TensorInfo) -> NoScore | None:
    if not is_weight(tensor.name):
        return NoScore.NOT_A_WEIGHT
    if len(tensor.shape) not in (1, 2):
        return NoScore.NOT_A_MATRIX
    if 0 in tensor.shape:
        return NoScore.EMPTY
    return None if tensor.dtype in FLOAT_DTYPES else NoScore.UNSUPPORTED_DTYPE


def _matrix(tensor: TensorInfo, shard: str) -> Matrix:
    module = module_of(tensor.name)
    n, m = tensor.shape if len(tensor.shape) == 2 else (1, *tensor.shape)
    return Matrix(
        module, tensor.name, group_of(module), tensor.name, shard, tensor.start, tensor.dtype, n, m, tensor.nbytes
    )


def pooled(matrices: Sequence[Matrix], skipped: Sequence[Skipped]) -> list[Matrix]:
    """With the experts of a layer, where they are parameters of their own, in one group for all numbers.

    Experts of a layer of which some have no score cannot be ranked as one; they stay as they are.
    """
    failed = {module_of(parameter_of(s.tensor)) for s in skipped if s.why.is_failure}
    broken = failed | {bank for name in failed if (bank := fused_name_of(name)) is not None}
    return [
        replace(w, group=w.group.removesuffix(group_of(w.result_name)) + group_of(bank))
        if (bank := fused_name_of(w.result_name)) is not None and fused_name_of(w.module) not in broken
        else w
        for w in matrices
    ]
