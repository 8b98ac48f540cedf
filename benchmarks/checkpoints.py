"""A workload as a checkpoint, and the exact scores of its weights.

The checkpoint is a folder of safetensors shards with an index.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from spectrum_stream.numerics.snr import score

from .matrices import matrix
from .spectra import draw
from .workloads import Weight, Workload

# Raise it with any change of the content, so that kept folders are made again.
_VERSION = 1
# The limit of a shard, and of memory. A larger tensor has its own shard.
_SHARD_NBYTES = 1_000_000_000
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def known_spectrum(weight: Weight) -> np.ndarray:
    """Return the singular values of `weight`: float64, (min(n, m),), descending."""
    return draw(weight.kind, min(weight.n, weight.m), max(weight.n, weight.m), _rng(weight, 0))


def known_scores(workload: Workload) -> dict[str, float]:
    """Return the score of every module, in float64, from the known singular values."""
    return {w.module: score(known_spectrum(w), w.n, w.m).snr for w in workload.weights}


def make_checkpoint(workload: Workload, dtype: str, parent: Path) -> Path:
    """Make the checkpoint in a folder under `parent`, unless an earlier run made it.

    Return the folder.

    Args:
        dtype: the dtype that weights are rounded to, `bfloat16` or `float32`.
    """
    folder = parent / f"{workload.name}-{dtype}"
    manifest = folder / "made_from.json"
    made_from = json.dumps([_VERSION, dtype, [[w.module, w.n, w.m, w.kind] for w in workload.weights]])
    if manifest.exists() and manifest.read_text("utf-8") == made_from:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for old in (manifest, *folder.glob("*.safetensors")):
        old.unlink(missing_ok=True)
    shards = _split(workload.weights, _DTYPES[dtype].itemsize)
    weight_map: dict[str, str] = {}
    for i, weights in enumerate(shards, 1):
        shard = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {
            f"{w.module}.weight": matrix(known_spectrum(w), w.n, w.m, _DTYPES[dtype], _rng(w, 1)) for w in weights
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    # This comes last, so that a half-made folder does not count as complete.
    manifest.write_text(made_from, "utf-8")
    return folder


def _rng(weight: Weight, stream: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(weight.module.encode()), weight.n, weight.m, stream])


def _split(weights: tuple[Weight, ...], itemsize: int) -> list[list[Weight]]:
    shards: list[list[Weight]] = [[]]
    nbytes = 0
    for weight in weights:
        size = weight.n * weight.m * itemsize
        if shards[-1] and nbytes + size > _SHARD_NBYTES:
            shards.append([])
            nbytes = 0
        shards[-1].append(weight)
        nbytes += size
    return shards
