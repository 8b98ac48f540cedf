"""Training with TRL after `freeze`: the chosen weights move, and no others."""

from pathlib import Path
from typing import Any

import pytest
import torch

from spectrum_stream import freeze, scan, select

pytestmark = pytest.mark.slow

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "the", "cat", "sat", "on", "a", "mat"]


def make_tokenizer() -> Any:
    transformers: Any = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Whether it has types depends on what else was checked.
    make: Any = transformers.PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.filterwarnings("default")
def test_sft_moves_only_the_chosen_weights(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # These are not at the top of the file, because they take seconds to import.
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), num_hidden_layers=4, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained("model")
    scan("model", name="x")

    chosen = freeze(model, select("model_snr_results/snr_results_x.json", 50))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir="out", max_steps=3, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True
        ),
        train_dataset=datasets.Dataset.from_dict({"text": ["the cat sat on a mat"] * 32}),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    # `freeze` reports the tied head under both of its names.
    assert moved == set(chosen.trainable) - {"lm_head.weight"}
    assert 0 < len(moved) < len(before) and "model.embed_tokens.weight" in moved
