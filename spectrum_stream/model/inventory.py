"""The inventory of a checkpoint: its matrices with names and groups, and the reason for every skipped tensor."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..checkpoint.header import TensorInfo
from ..checkpoint.tensors import Checkpoint
from ..errors import CheckpointError
from ..text import counted, listed
from .config import ModelConfig
from .families import compile_rules
from .matrix import FLOAT_DTYPES, Experts, Matrix, Skipped
from .names import (
    find_tied_head,
    fused_name_of,
    group_of,
    is_extra_layer,
    is_fused_experts,
    is_head,
    is_norm,
    is_stacked_experts,
    is_weight,
    model_order,
    module_of,
    tower_of,
)
from .no_score import NoScore
from .parameters import Names, name_parameters
from .quantization import MAX_EXPERTS, Quantization, Unreadable
from .schemes import Reader, is_companion, parameter_of
from .ties import find_stored_ties
from .unscored import Unscored, find_unscored, mark_weights

# The largest published models have about 70,000 matrices.
MAX_MATRICES = 400_000
# A plan has an entry for each projection that a layer of experts lacks. Each layer can lack those of all others.
MAX_MISSING = 100_000
# The reasons of quantized weights that cannot be read.
_STORAGE = (NoScore.UNSUPPORTED_DTYPE, NoScore.NOT_UNDERSTOOD, NoScore.MISSING_SCALES, NoScore.BAD_SCALES)
# A part of the weights that is worth a word if the model of config.json lacks it.
_LARGE_PART = 0.35
# The first number in a name is that of the layer: `model.layers.3.mlp.experts.7.up_proj.weight`.
_LAYER = re.compile(r"(.*?)(?:^|\.)([0-9]{1,6})\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All matrices of a checkpoint, whether the plan includes them or not.

    Attributes:
        matrices: in file order.
        skipped: every other tensor, with the reason.
        names: the names that were established, one of `Names` or "given"; "checkpoint" if none were.
        model_class: the class of transformers that has the names; None if it is not known.
        is_established: whether all names are those that were asked for.
        names_sha256: a hash of a given list, or of the answer of the installed transformers; None for the others.
        unscored: the tensors that Spectrum's rule leaves out.
        warnings: one sentence for each oddity of the checkpoint and of the names.
    """

    matrices: tuple[Matrix, ...]
    skipped: tuple[Skipped, ...]
    names: str
    names_sha256: str | None
    unscored: Unscored
    model_class: str | None
    is_established: bool
    warnings: tuple[str, ...]

    @property
    def members(self) -> Mapping[str, frozenset[str]]:
        """All modules of each group."""
        members: dict[str, set[str]] = {}
        for matrix in self.matrices:
            members.setdefault(matrix.group, set()).add(matrix.module)
        return {group: frozenset(modules) for group, modules in members.items()}

    @property
    def parameters(self) -> Mapping[str, str]:
        """The parameter that each module is, or is a part of."""
        return {w.module: w.parameter for w in self.matrices}

    @property
    def weights_numel(self) -> int:
        """The number of weights; those that two modules share count once."""
        return sum({w.key: w.n * w.m for w in self.matrices}.values())


def take_inventory(
    checkpoint: Checkpoint,
    config: ModelConfig,
    names: Names | Sequence[str] = Names.V5,
    experts: Experts = Experts.SEPARATE,
) -> Inventory:
    """Find the matrices of a checkpoint, and why other tensors are skipped.

    Matrices have the names and groups that results use.

    Args:
        names: a member of `Names`, or the names of all parameters in the trainer.
        experts: how to rank experts that are separate parameters.

    Raises:
        UsageError: no_such_name, missing_extra, unknown_architecture, as `name_parameters`.
        CheckpointError: too_many_matrices, too_many_missing.
    """
    ties = find_stored_ties(checkpoint, config)
    matrices, skipped = _find_matrices(checkpoint, config, ties.owners, keeps_old_names=names is Names.CHECKPOINT)
    total_nbytes = sum(tensor.nbytes for _, tensor in checkpoint.tensors)
    skipped = mark_weights(skipped, total_nbytes)
    named = name_parameters(matrices, skipped, config, names)
    matrices = list(named.matrices)
    # Scales have no parameter, so they are not copied.
    skipped = [
        s if (parameter := named.find_parameter(s)) is None else replace(s, parameter=parameter) for s in skipped
    ]
    skipped += [w.skip(NoScore.NOT_LOADED) for w in named.not_loaded]
    if experts is Experts.POOLED:
        matrices = _pool_experts(matrices, skipped)
    return Inventory(
        matrices=tuple(matrices),
        skipped=tuple(skipped),
        names=named.naming.names,
        names_sha256=named.names_sha256,
        unscored=find_unscored(skipped, total_nbytes),
        model_class=named.naming.model_class,
        is_established=named.naming.is_established,
        warnings=(
            *checkpoint.warnings,
            *_find_missing_layers(checkpoint, config),
            *_find_left_out(named.not_loaded, total_nbytes),
            *ties.warnings,
            *named.warnings,
        ),
    )


def _find_matrices(
    checkpoint: Checkpoint, config: ModelConfig, owners: Mapping[str, str], *, keeps_old_names: bool
) -> tuple[list[Matrix], list[Skipped]]:
    """Find the matrices in file order, and all other tensors in model order.

    Both have the names of the checkpoint.

    Args:
        owners: the tensor that the model has instead of each stored copy of a tied weight.
        keeps_old_names: whether `LayerNorm.gamma` keeps its name, which is not that of a weight.
    """
    reader = Reader(checkpoint, config.quantization)
    rename = str if keeps_old_names else compile_rules(())
    # The head and the experts that one shard lacks can be in the others.
    is_part = checkpoint.source.is_part
    has_head = config.is_causal or config.is_multimodal
    tied: dict[str, list[str]] = {}
    for copy, owner in owners.items():
        # Spectrum's results have the tied head of a language model, and no other copies.
        if has_head and is_head(module_of(copy)):
            tied.setdefault(owner, []).append(module_of(copy))
    head = None if is_part else find_tied_head((tensor.name for _, tensor in checkpoint.tensors), config)
    if head is not None:
        tied.setdefault(head[1], []).append(head[0])
    matrices: list[Matrix] = []
    skipped: list[Skipped] = []
    for shard, tensor in checkpoint.tensors:
        if tensor.name in owners:
            if module_of(tensor.name) not in tied.get(owners[tensor.name], ()):
                skipped.append(_skip_tensor(tensor, NoScore.NOT_LOADED))
            continue
        renamed = rename(tensor.name)
        # Most names stay as they are, and a copy of each tensor and matrix takes time.
        is_same = renamed == tensor.name
        found = _read_tensor(tensor if is_same else replace(tensor, name=renamed), shard.name, reader, config)
        if isinstance(found, Skipped):
            skipped.append(found if is_same else replace(found, tensor=tensor.name))
            continue
        found = found if is_same else [replace(w, tensor=tensor.name) for w in found]
        matrices += found
        # The modules that share a tensor come right after it, so that it is read once.
        matrices += [_share_tensor(found[-1], module) for module in tied.get(tensor.name, ())]
        if len(matrices) > MAX_MATRICES:
            raise CheckpointError(
                f"{checkpoint.source.where} has more than {MAX_MATRICES:,} matrices, the limit for a checkpoint",
                reason="too_many_matrices",
            )
    matrices, beside = _drop_beside_unreadable(matrices, skipped)
    skipped += beside
    matrices, stored_twice = _drop_stored_twice(matrices)
    if any(s.no_score is NoScore.EMPTY for s in skipped):
        matrices, flattened = _drop_flattened(matrices, checkpoint)
        skipped += flattened
    matrices = _prefix_groups(matrices, config.layer_count)
    missing = [] if is_part else _find_missing_experts(matrices, skipped, config.expert_count)
    # If the number of fused experts differs from the config, they are not its experts, and none has a score.
    incomplete = {s.tensor for s in missing}
    matrices = [w for w in matrices if w.expert is None or _fused_name_of(w) not in incomplete]
    return matrices, sorted([*skipped, *stored_twice, *missing], key=lambda s: model_order(s.tensor))


def _read_tensor(tensor: TensorInfo, shard: str, reader: Reader, config: ModelConfig) -> list[Matrix] | Skipped:
    """Read a tensor as a matrix, as one matrix for each of its experts, or as skipped."""
    found = reader.find_quantization(tensor)
    if isinstance(found, Unreadable):
        return _skip_tensor(tensor, found.no_score, found.detail)
    if isinstance(found, Quantization):
        return [_make_matrix(tensor, shard, found.shape, found)]
    if found is not None:
        return [_make_expert(tensor, shard, one.shape, e, len(found), one) for e, one in enumerate(found)]
    if (count := _count_experts(tensor, config)) is not None:
        if count > MAX_EXPERTS:
            return _skip_tensor(tensor, NoScore.TOO_MANY_EXPERTS)
        n, m = tensor.shape[-2:]
        shape = (n, m) if len(tensor.shape) == 3 else (n // count, m)
        return [_make_expert(tensor, shard, shape, e, count) for e in range(count)]
    if (no_score := _find_reason(tensor)) is not None:
        return _skip_tensor(tensor, no_score)
    n, m = tensor.shape if len(tensor.shape) == 2 else (1, *tensor.shape)
    return [_make_matrix(tensor, shard, (n, m))]


def _count_experts(tensor: TensorInfo, config: ModelConfig) -> int | None:
    """Count the experts in a plain tensor.

    Return None if it does not hold fused experts.

    A tensor (experts, n, m) holds one matrix for each expert. DBRX stacks them in a tensor (experts * n, m). A
    trainer trains or freezes such a parameter as one.
    """
    if tensor.dtype not in FLOAT_DTYPES or len(tensor.shape) not in (2, 3):
        return None
    if 0 in tensor.shape or is_companion(tensor.name):
        return None
    if len(tensor.shape) == 3 and is_fused_experts(module_of(tensor.name)):
        return tensor.shape[0]
    if len(tensor.shape) == 2 and is_stacked_experts(tensor.name):
        count = config.expert_count
        return count if count is not None and tensor.shape[0] % count == 0 else None
    return None


def _find_reason(tensor: TensorInfo) -> NoScore | None:
    """Find the reason why a plain tensor has no score; return None if it has one."""
    is_empty = 0 in tensor.shape
    if not is_weight(tensor.name):
        if not is_empty:
            return NoScore.NOT_A_WEIGHT
        # Packed values and fused experts are weights too.
        module = parameter_of(tensor.name)
        is_hidden = module != tensor.name or is_fused_experts(module) or is_stacked_experts(module)
        is_other = is_companion(tensor.name) or tensor.name.endswith("bias")
        return NoScore.EMPTY if is_hidden and not is_other else NoScore.NOT_A_WEIGHT
    if is_empty:
        return NoScore.EMPTY
    if len(tensor.shape) not in (1, 2):
        return NoScore.NOT_A_MATRIX
    return None if tensor.dtype in FLOAT_DTYPES else NoScore.UNSUPPORTED_DTYPE


def _skip_tensor(tensor: TensorInfo, no_score: NoScore, detail: str = "") -> Skipped:
    return Skipped(
        tensor=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        no_score=no_score,
        nbytes=tensor.nbytes,
        detail=detail,
    )


def _make_matrix(
    tensor: TensorInfo, shard: str, shape: tuple[int, int], quantization: Quantization | None = None
) -> Matrix:
    parameter, (n, m) = parameter_of(tensor.name), shape
    module = module_of(parameter)
    return Matrix(
        module=module,
        parameter=parameter,
        group=group_of(module),
        tensor=tensor.name,
        shard=shard,
        start=tensor.start,
        dtype=tensor.dtype,
        n=n,
        m=m,
        nbytes=tensor.nbytes,
        quantization=quantization,
    )


def _make_expert(
    tensor: TensorInfo,
    shard: str,
    shape: tuple[int, int],
    expert: int,
    count: int,
    quantization: Quantization | None = None,
) -> Matrix:
    whole, nbytes = _make_matrix(tensor, shard, shape, quantization), tensor.nbytes // count
    start = tensor.start + expert * nbytes
    return replace(whole, module=f"{whole.module}.{expert}", start=start, nbytes=nbytes, expert=expert)


def _share_tensor(matrix: Matrix, module: str) -> Matrix:
    """Return a module that shares the tensor of an embedding, such as a tied head."""
    return replace(matrix, module=module, parameter=f"{module}.weight", group=group_of(module), tied_to=matrix.module)


def _drop_stored_twice(matrices: Sequence[Matrix]) -> tuple[list[Matrix], list[Skipped]]:
    """Drop weights that two tensors store, packed and plain.

    The checkpoint does not say which of the two counts.
    """
    tensors: dict[str, set[str]] = {}
    for w in matrices:
        tensors.setdefault(w.module, set()).add(w.tensor)
    dropped = {w.tensor: w for w in matrices if len(tensors[w.module]) > 1}
    skipped = [replace(w.skip(NoScore.STORED_TWICE), tensor=tensor) for tensor, w in dropped.items()]
    return [w for w in matrices if w.tensor not in dropped], skipped


def _drop_beside_unreadable(
    matrices: Sequence[Matrix], skipped: Sequence[Skipped]
) -> tuple[list[Matrix], list[Skipped]]:
    """Drop the weights inside the module of a quantized weight that cannot be read: they are codebooks or rotations.

    An example is the `X.v_input.weight` of a transform beside `X.weight_packed`, as in compressed-tensors.
    """
    unreadable = {
        module_of(parameter_of(s.tensor)): s
        for s in skipped
        if s.no_score in _STORAGE and is_weight(parameter_of(s.tensor))
    }
    kept: list[Matrix] = []
    dropped: dict[str, Skipped] = {}
    for w in matrices:
        owner = unreadable.get(module_of(w.tensor).rpartition(".")[0])
        if owner is None:
            kept.append(w)
        else:
            dropped[w.tensor] = replace(w.skip(owner.no_score), tensor=w.tensor, detail=owner.detail)
    return kept, list(dropped.values())


def _drop_flattened(matrices: Sequence[Matrix], checkpoint: Checkpoint) -> tuple[list[Matrix], list[Skipped]]:
    """Drop vectors that are not norms from a checkpoint with empty weights.

    FSDP flattens weights before it shards them, so a process has some of them whole, one in part, and others empty.
    """
    vectors = {tensor.name for _, tensor in checkpoint.tensors if len(tensor.shape) == 1}
    flat = {w.tensor: w for w in matrices if w.tensor in vectors and not is_norm(module_of(w.tensor))}
    return [w for w in matrices if w.tensor not in flat], [w.skip(NoScore.FLATTENED) for w in flat.values()]


def _find_missing_layers(checkpoint: Checkpoint, config: ModelConfig) -> list[str]:
    """Return a warning if config.json has more layers than the checkpoint."""
    if checkpoint.source.is_part or config.layer_count is None:
        return []
    stacks: dict[str, set[str]] = {}
    for _, tensor in checkpoint.tensors:
        if (match := _LAYER.match(tensor.name)) is not None:
            stacks.setdefault(match[1], set()).add(match[2])
    found = max(map(len, stacks.values()), default=0)
    # ALBERT shares the weights of all layers, and LongCat counts each layer twice.
    if not 0 < found < config.layer_count or found in config.other_counts:
        return []
    return [
        f"the checkpoint has {counted(found, 'layer', 'layers')}, and config.json has {config.layer_count}: the "
        "scores cover only a part of the model"
    ]


def _find_left_out(not_loaded: Sequence[Matrix], total_nbytes: int) -> list[str]:
    """Return a warning if the model of config.json lacks a large part of the weights."""
    nbytes = sum(w.nbytes for w in not_loaded)
    # The layers for multi-token prediction, a pooler or another head are less, also in small models.
    if nbytes <= _LARGE_PART * total_nbytes:
        return []
    some = listed([w.module for w in not_loaded], 3)
    return [
        f"{len(not_loaded)} weights, {100 * nbytes / total_nbytes:.3g} % of the bytes, are not in the model that "
        f"config.json describes, and have no score: {some}"
    ]


def _prefix_groups(matrices: Sequence[Matrix], layers: int | None) -> list[Matrix]:
    """Prefix the groups of towers and of extra layers.

    The prefix keeps them apart from the language model. Spectrum ranks a layer of a vision tower with the language
    model if both have the same name for it.
    """
    # Up to here, a module without a number is its own group.
    towers = {tower_of(w.module) for w in matrices if w.group != w.module}
    prefixed = []
    for w in matrices:
        tower = tower_of(w.module) if len(towers) > 1 and w.group != w.module else ""
        prefix = "mtp" if is_extra_layer(w.module, layers) else tower
        prefixed.append(replace(w, group=f"{prefix}.{w.group}") if prefix else w)
    return prefixed


class _Projection(NamedTuple):
    """The experts of a layer, `layers.0.mlp.experts`, and a projection, `up_proj`."""

    owner: str
    name: str

    @property
    def fused_name(self) -> str:
        return f"{self.owner}.{self.name}" if self.owner else self.name

    @property
    def kind(self) -> tuple[str, str]:
        """The same for all layers."""
        return group_of(self.owner), self.name


def _find_missing_experts(matrices: Sequence[Matrix], skipped: Sequence[Skipped], count: int | None) -> list[Skipped]:
    """Find the layers that lack experts, or a projection of their experts.

    A layer must have the projections that the experts of other layers have.

    Args:
        count: the number of experts of a layer by config.json, or None. A layer with more sets the number for all.

    Raises:
        CheckpointError: too_many_missing.
    """
    # Unreadable experts already have a reason, so they count as found.
    unreadable = _find_unreadable(skipped)
    fused_names = [*map(_fused_name_of, matrices), *map(fused_name_of, unreadable)]
    found = Counter(_split_projection(name) for name in fused_names if name is not None)
    expected: dict[tuple[str, str], int] = {}
    for projection, n in found.items():
        expected[projection.kind] = max(n, expected.get(projection.kind, count or 0))
    names_by_group: dict[str, set[str]] = {}
    for projection in found:
        names_by_group.setdefault(group_of(projection.owner), set()).add(projection.name)
    names = {owner: names_by_group[group_of(owner)] for owner in {p.owner for p in found}}
    if sum(map(len, names.values())) - len(found) > MAX_MISSING:
        raise CheckpointError(
            f"layers of experts lack more than {MAX_MISSING:,} projections of other layers", reason="too_many_missing"
        )
    every = {_Projection(owner, name) for owner, of_group in names.items() for name in of_group}
    return [
        Skipped(
            tensor=projection.fused_name,
            dtype="",
            shape=(),
            no_score=NoScore.MISSING_EXPERTS,
            detail=f"{found[projection]} of {expected[projection.kind]} experts",
        )
        for projection in sorted(every)
        if found[projection] < expected[projection.kind]
        and (found[projection] or projection.fused_name not in unreadable)
    ]


def _split_projection(fused_name: str) -> _Projection:
    owner, _, name = fused_name.rpartition(".")
    return _Projection(owner, name)


def _fused_name_of(w: Matrix) -> str | None:
    """Return the fused name of an expert, stored alone or with others."""
    return fused_name_of(w.module) if w.expert is None else w.module.rpartition(".")[0]


def _find_unreadable(skipped: Iterable[Skipped]) -> set[str]:
    return {module_of(parameter_of(s.tensor)) for s in skipped if s.no_score.is_failure}


def _pool_experts(matrices: Sequence[Matrix], skipped: Sequence[Skipped]) -> list[Matrix]:
    """Move experts that are separate parameters into one group.

    The group of `mlp.experts.7.up_proj` becomes `mlp.experts.up_proj`. If some experts of a layer have no score,
    the layer cannot be ranked as one, so its experts stay in their groups.
    """
    unreadable = _find_unreadable(skipped)
    incomplete = unreadable | {fused_name_of(name) for name in unreadable}
    pooled = []
    for w in matrices:
        fused_name = fused_name_of(w.result_name)
        if fused_name is not None and fused_name_of(w.module) not in incomplete:
            w = replace(w, group=w.group.removesuffix(group_of(w.result_name)) + group_of(fused_name))
        pooled.append(w)
    return pooled
