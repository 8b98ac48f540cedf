"""Tied weights that are stored twice: the head of a language model, the embeddings of an encoder and a decoder.

transformers ties two stored weights if config.json, or the default of the family, ties them and their values are
equal. If the values differ, it keeps both. (transformers 5.24, modeling_utils.py, tie_weights; distributed/
sharding_utils.py, _tied_params_are_equal)
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..checkpoint import LocalShard, Shard
from ..checkpoint.header import TensorInfo
from ..checkpoint.tensors import Checkpoint
from .config import ModelConfig
from .family_names import find_tie
from .matrix import FLOAT_DTYPES
from .names import is_head, is_weight, model_order, module_of, tower_of

_CHUNK_NBYTES = 1 << 23
# A remote tensor is compared by its first, middle and last bytes.
_SAMPLE_NBYTES = 1 << 14

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings?|embed_in|tok_embeddings|tokens_embed|shared|embed)$"
)
_HEAD = re.compile(
    r"(^|\.)(predictions\.decoder|lm_head\.decoder|generator_lm_head|proj_out|vocab_projector|lm_loss|pred_layer\.proj"
    r"|output_projection|decoder\.output_projection)$|^head$"
)

# These families are always tied. The setting in their config.json only means a scale.
_ALWAYS_TIED = frozenset({"longt5", "mt5", "pop2piano", "t5", "udop", "umt5"})
# Families that are not in families.json, and that transformers ties if config.json does not say.
# fmt: off
_TIED_BY_DEFAULT = frozenset({
    "big_bird", "bigbird_pegasus", "biogpt", "blenderbot", "blenderbot-small", "ctrl", "data2vec-text", "deberta",
    "ernie", "esm", "flaubert", "florence2", "fnet", "funnel", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text",
    "gpt-sw3", "gpt_neox_japanese", "led", "lfm2_vl", "longformer", "longt5", "m2m_100", "marian", "megatron-bert",
    "minicpm3", "mobilebert", "modernbert-decoder", "moonshine", "mvp", "nllb-moe", "nomic_bert", "nystromformer",
    "openai-gpt", "pegasus", "pegasus_x", "plbart", "prophetnet", "recurrent_gemma", "roberta-prelayernorm",
    "roformer", "shieldgemma2", "speech_to_text", "squeezebert", "switch_transformers", "t5gemma", "trocr",
    "vaultgemma", "whisper", "xglm", "xlm", "xlm-roberta-xl", "xlnet", "xmod", "zamba", "zamba2",
})
# fmt: on


@dataclass(frozen=True, slots=True)
class StoredTies:
    """The stored copies of tied weights.

    Attributes:
        owners: the tensor that the model has instead of each copy.
        warnings: one sentence for each assumption, and for copies that differ.
    """

    owners: Mapping[str, str]
    warnings: tuple[str, ...]


def can_be_tied(config: ModelConfig) -> bool:
    """Whether transformers ties stored weights of this model if their values are equal."""
    ties = find_tie(config)
    is_tied = config.model_type in _TIED_BY_DEFAULT if ties is None else ties
    return is_tied or config.model_type in _ALWAYS_TIED


def find_stored_ties(checkpoint: Checkpoint, config: ModelConfig) -> StoredTies:
    """Find the weights that the model ties to another stored one.

    Local values are compared completely. Values in a repo are compared in part, with a warning.
    """
    if not can_be_tied(config):
        return StoredTies({}, ())
    owners: dict[str, str] = {}
    assumed, differing = [], []
    first: dict[tuple[str, tuple[int, ...]], tuple[Shard, TensorInfo]] = {}
    found = [place for place in checkpoint.tensors if _can_be_tied(place[1])]
    # The embedding of the whole model owns the weight, then that of a part, then a head.
    for shard, tensor in sorted(found, key=lambda place: _order(place[1].name)):
        owner = first.setdefault((tensor.dtype, tensor.shape), (shard, tensor))
        is_whole = _is_embedding(tensor.name) and not _is_part(tensor.name)
        if owner[1] is tensor or is_whole or not _is_embedding(owner[1].name):
            continue
        if _is_equal(owner, (shard, tensor)):
            owners[tensor.name] = owner[1].name
            if not (isinstance(shard, LocalShard) and isinstance(owner[0], LocalShard)):
                assumed.append(f"{tensor.name} is {owner[1].name}")
        else:
            differing.append(f"{tensor.name} and {owner[1].name}")
    warnings = []
    if assumed:
        warnings.append(
            f"config.json ties weights, and only parts of their stored values were compared: {assumed[0]}"
        )
    if differing:
        warnings.append(
            f"config.json ties {differing[0]}, but their stored values differ, so both are scored: transformers 5 "
            "keeps them apart, and older versions tie them"
        )
    return StoredTies(owners, tuple(warnings))


def _can_be_tied(tensor: TensorInfo) -> bool:
    is_matrix = is_weight(tensor.name) and len(tensor.shape) == 2 and 0 not in tensor.shape
    module = module_of(tensor.name)
    return is_matrix and tensor.dtype in FLOAT_DTYPES and not tower_of(module) and (
        _is_embedding(tensor.name) or is_head(module) or _HEAD.search(module) is not None
    )  # fmt: skip


def _is_embedding(tensor: str) -> bool:
    return _EMBEDDING.search(module_of(tensor)) is not None


def _is_part(tensor: str) -> bool:
    """Whether an embedding belongs to an encoder or a decoder."""
    return any(part in ("encoder", "decoder") for part in tensor.split("."))


def _order(tensor: str) -> tuple[bool, bool, tuple[tuple[int, int, str], ...]]:
    return not _is_embedding(tensor), _is_part(tensor), model_order(tensor)


def _is_equal(a: tuple[Shard, TensorInfo], b: tuple[Shard, TensorInfo]) -> bool:
    """Compare two tensors of the same size, until the first difference."""
    (shard_a, tensor_a), (shard_b, tensor_b) = a, b
    return all(
        shard_a.read(tensor_a.start + start, tensor_a.start + stop)
        == shard_b.read(tensor_b.start + start, tensor_b.start + stop)
        for start, stop in _pieces(shard_a, shard_b, tensor_a.nbytes)
    )


def _pieces(a: Shard, b: Shard, nbytes: int) -> Iterator[tuple[int, int]]:
    if isinstance(a, LocalShard) and isinstance(b, LocalShard):
        for start in range(0, nbytes, _CHUNK_NBYTES):
            yield start, min(start + _CHUNK_NBYTES, nbytes)
    # A server without ranges would send everything before a piece.
    elif all(isinstance(shard, LocalShard) or shard.is_ranged for shard in (a, b)):
        size = min(_SAMPLE_NBYTES, nbytes)
        for start in dict.fromkeys((0, (nbytes - size) // 2, nbytes - size)):
            yield start, start + size
