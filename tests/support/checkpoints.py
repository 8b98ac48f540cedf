"""Small checkpoints for tests, and the reference score by Spectrum's formula."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from spectrum_stream.numerics.device import one_thread_each

GOLDEN = Path(__file__).parents[1] / "golden"

# The type of the fixture `save`.
Save = Callable[..., Path]

# The config of a model with a head that is tied to its embedding.
TIED = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}

# One of the names of `fused_experts`.
FUSED_EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def reference_score(w: torch.Tensor) -> float:
    """Compute Spectrum's score by definition: float64 `svdvals`, then the steps of Spectrum's code."""
    w = w.detach().to(torch.float64)
    if w.ndim < 2:
        w = w.unsqueeze(0)
    with one_thread_each():
        s = torch.linalg.svdvals(w).numpy()
    n, m = w.shape
    sigma = (np.quantile(s, 0.75) - np.quantile(s, 0.25)) / 1.349
    beta = n / m if n < m else m / n
    tau = sigma * np.sqrt((1 + np.sqrt(beta)) ** 2)
    signal, noise = s[s > tau], s[s <= tau]
    ratio = (signal.sum() if len(signal) else 0.0) / (noise.sum() if len(noise) else 1.0)
    return float(ratio / s[0])


def write_checkpoint(
    path: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    """Write a checkpoint folder: shards with the same number of tensors each, in order, and their index."""
    path.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), path / "model.safetensors")
    else:
        weight_map: dict[str, str] = {}
        size = math.ceil(len(names) / shards)
        for i in range(shards):
            part = names[i * size : (i + 1) * size]
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            save_file({name: tensors[name] for name in part}, path / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def llama_tensors(layers: int = 3, hidden: int = 32, *, head: bool = True) -> dict[str, torch.Tensor]:
    """Make random bfloat16 tensors with the names and proportions of a small Llama."""
    generator = torch.Generator().manual_seed(0)

    def weight(n: int, m: int) -> torch.Tensor:
        return (torch.randn(n, m, generator=generator) * 0.02).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": weight(4 * hidden, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        tensors |= {
            f"{layer}self_attn.q_proj.weight": weight(hidden, hidden),
            f"{layer}self_attn.v_proj.weight": weight(hidden // 2, hidden),
            f"{layer}mlp.up_proj.weight": weight(3 * hidden, hidden),
            f"{layer}mlp.down_proj.weight": weight(hidden, 3 * hidden),
            f"{layer}input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        }
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    if head:
        tensors["lm_head.weight"] = weight(4 * hidden, hidden)
    return tensors


def fused_experts(experts: int = 12, layers: int = 2) -> dict[str, torch.Tensor]:
    """Make fused experts, as in gpt-oss, with a router and a convolution."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for i in range(layers):
        layer = f"model.layers.{i}.mlp"
        found |= {
            f"{layer}.experts.gate_up_proj": torch.randn(experts, 24, 40, generator=generator).bfloat16(),
            f"{layer}.experts.gate_up_proj_bias": torch.randn(experts, 40, generator=generator).bfloat16(),
            f"{layer}.experts.down_proj.weight": torch.randn(experts, 20, 24, generator=generator).bfloat16(),
            f"{layer}.router.weight": torch.randn(experts, 24, generator=generator).bfloat16(),
            f"{layer}.conv.weight": torch.randn(24, 1, 4, generator=generator).bfloat16(),
        }
    return found


def single_experts(layers: int = 4, experts: int = 4) -> dict[str, torch.Tensor]:
    """Make one tensor for each expert, as in Mixtral."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"model.layers.{i}.mlp.experts.{e}.{name}.weight": torch.randn(24, 32, generator=generator) * (1 + i % 3)
        for i in range(layers)
        for e in range(experts)
        for name in ("up_proj", "down_proj")
    }


def mxfp4(experts: int, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make experts in MXFP4, as stored: blocks of 32 numbers in 16 bytes, and a scale for each block."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, n, m // 32, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(118, 126, (experts, n, m // 32), dtype=torch.uint8, generator=generator)
