"""The suites: the matrices of each checkpoint, and the measurements on it.

Shapes and counts are those of published models, as stored: (out features, in features).
"""

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum

from .spectra import Kind


class Suite(StrEnum):
    CI = "ci"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Weight:
    """One matrix of a synthetic checkpoint; `module` also seeds its numbers."""

    module: str
    n: int
    m: int
    kind: Kind = Kind.BULK_AND_SPIKES


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the tables.

    Attributes:
        timed_dtype: the dtype of the timed checkpoint, `bfloat16` or `float32`.
        error_limit: the largest acceptable relative error of a score, unless its own estimate is larger.
        numpy_turns: the number of turns of numpy, which is slow; None for every repetition.
        only_ours: measure only our scan's memory and speed.
    """

    name: str
    weights: tuple[Weight, ...]
    _: KW_ONLY
    timed_dtype: str = "bfloat16"
    error_limit: float = 1e-5
    numpy_turns: int | None = None
    only_ours: bool = False


def workloads(suite: Suite) -> tuple[Workload, ...]:
    if suite is Suite.CI:
        return (
            Workload("smollm2-6-layers", tuple(_smollm2(6))),
            Workload("kv-1024x4096", tuple(_key_values(4, "k"))),
            Workload("experts-768x2048", tuple(_experts(32))),
            Workload("hard-spectra", tuple(_hard(512, 1536, 4)), timed_dtype="float32", error_limit=1e-4),
        )
    return (
        Workload("smollm2-135m", (*_smollm2(30), Weight("model.embed_tokens", 49152, 576))),
        Workload("llama3-8b-layer", tuple(_llama3_8b_layer()), numpy_turns=1),
        Workload("kv-1024x4096", tuple(_key_values(8, "kv"))),
        Workload("llama3-70b-mlp", (Weight("model.layers.0.mlp.down_proj", 8192, 28672),), numpy_turns=0),
        Workload("experts-768x2048", tuple(_experts(128))),
        Workload(
            "hard-spectra",
            (*_hard(1024, 4096, 4), *_hard(4096, 4096, 1)),
            timed_dtype="float32",
            error_limit=1e-4,
            numpy_turns=1,
        ),
        Workload(
            "llama3-70b-memory",
            (Weight("model.layers.0.mlp.down_proj", 8192, 28672), Weight("lm_head", 128256, 8192)),
            only_ours=True,
        ),
    )


def _smollm2(layers: int) -> Iterable[Weight]:
    for i in range(layers):
        layer = f"model.layers.{i}"
        yield Weight(f"{layer}.self_attn.q_proj", 576, 576)
        yield Weight(f"{layer}.self_attn.k_proj", 192, 576)
        yield Weight(f"{layer}.self_attn.v_proj", 192, 576)
        yield Weight(f"{layer}.self_attn.o_proj", 576, 576)
        yield Weight(f"{layer}.mlp.gate_proj", 1536, 576)
        yield Weight(f"{layer}.mlp.up_proj", 1536, 576)
        yield Weight(f"{layer}.mlp.down_proj", 576, 1536)


def _llama3_8b_layer() -> Iterable[Weight]:
    yield Weight("model.layers.0.self_attn.q_proj", 4096, 4096)
    yield Weight("model.layers.0.self_attn.k_proj", 1024, 4096)
    yield Weight("model.layers.0.self_attn.v_proj", 1024, 4096)
    yield Weight("model.layers.0.self_attn.o_proj", 4096, 4096)
    yield Weight("model.layers.0.mlp.gate_proj", 14336, 4096)
    yield Weight("model.layers.0.mlp.up_proj", 14336, 4096)
    yield Weight("model.layers.0.mlp.down_proj", 4096, 14336)


def _key_values(layers: int, projections: str) -> Iterable[Weight]:
    for i in range(layers):
        for projection in projections:
            yield Weight(f"model.layers.{i}.self_attn.{projection}_proj", 1024, 4096)


def _experts(count: int) -> Iterable[Weight]:
    for i in range(count):
        # Modules that differ only in their first number are ranked together, so this makes one group.
        yield Weight(f"model.layers.{i}.mlp.experts.0.gate_proj", 768, 2048)


def _hard(n: int, m: int, layers: int) -> Iterable[Weight]:
    for kind in Kind:
        if kind is not Kind.BULK_AND_SPIKES:
            for i in range(layers):
                yield Weight(f"model.layers.{i}.{kind}.{n}x{m}", n, m, kind)
