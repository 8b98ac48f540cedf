"""The tensors that Spectrum's rule leaves out, and which of them are weights of a layer all the same.

Spectrum scores modules with a `.weight` of one or two dimensions. Some layers have their weights under other names:
`attn.in_proj_weight` of torch's MultiheadAttention, `text_projection` of CLIP, `weight_ih_l0` of an LSTM, `weight_v`
of a weight norm, `embeddings` of model2vec. A result without them ranks only a part of the model, so they count as
failures if they are more than `LIMIT` of the bytes of the checkpoint.

In the models of transformers 5.24 with default configs, biases, tokens, scales and tables of positions are below this
limit, or have a name that shows what they are. Projections of a single layer, such as `mm_input_projection_weight` of
Gemma 3 with 0.06 %, are below it too.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .matrix import FLOAT_DTYPES, Skipped
from .names import is_weight
from .no_score import NoScore
from .schemes import is_companion, owners_of

LIMIT = 0.01

# Large tensors that are not weights of a layer, by the last component of their names: biases, masks, positions,
# queries, decays of a state.
_OTHER = re.compile(
    r"bias|mask|(^|_)(rel_)?pos(_|ition|$)|freq|latent|(^|_)quer(y|ies)(_tokens?)?$|(cos|sin)_cached"
    r"|running_|a_log$|decay",
    re.IGNORECASE,
)
# Words that show a weight in spite of the words above: `latent_projection`, `pos_proj`.
_LAYER = re.compile(r"(^|_)(proj|projection|weight|w|kernel|mlp|linear|dense|fc)\d*(_|$)", re.IGNORECASE)
# Other tensors, by the component before the last: codebooks of audio codecs, tables of rotary positions.
_OTHER_OWNER = re.compile(r"codebooks?$|rotary|quantizer", re.IGNORECASE)
# A kernel of a convolution is at most this long in the models of transformers, except in convolutions by name.
_MAX_KERNEL = 15
_SIGN = re.compile(r"[_:]")
_MAX_SIGNS = 64
# Indexes and masks have these dtypes, packed values others.
_NOT_VALUES = ("I64", "BOOL")


@dataclass(frozen=True, slots=True)
class Unscored:
    """The tensors that Spectrum's rule leaves out.

    Attributes:
        tensors: the largest first.
        nbytes, total_nbytes: the bytes of these tensors, and of the whole checkpoint.
    """

    tensors: tuple[Skipped, ...]
    nbytes: int
    total_nbytes: int

    @property
    def share(self) -> float:
        """Their share of the bytes, in [0, 1]."""
        return self.nbytes / self.total_nbytes if self.total_nbytes else 0.0

    @property
    def is_notable(self) -> bool:
        """Whether the share is above the limit, so that users must hear of it."""
        return self.share > LIMIT

    def to_dict(self) -> dict[str, Any]:
        """Return the data for `--json`, with the names of the largest tensors."""
        largest = [s.tensor for s in self.tensors[:5]]
        return {"tensors": len(self.tensors), "nbytes": self.nbytes, "share": self.share, "largest": largest}


def find_unscored(skipped: Iterable[Skipped], total_nbytes: int) -> Unscored:
    """Find the tensors that Spectrum's rule leaves out.

    Scales and zero points belong to a weight, so they do not count, and neither do other tensors beside a weight that
    cannot be read.
    """
    skipped = list(skipped)
    unreadable = _find_unreadable(skipped)
    found = [
        s
        for s in skipped
        if s.no_score.is_by_rule
        and not is_companion(s.tensor)
        and not (unreadable and unreadable.intersection(_owners_of(s.tensor)))
    ]
    found.sort(key=lambda s: s.nbytes, reverse=True)
    return Unscored(tuple(found), sum(s.nbytes for s in found), total_nbytes)


def mark_weights(skipped: Sequence[Skipped], total_nbytes: int) -> list[Skipped]:
    """Give the weights of layers among tensors that are left out by rule a reason that is a failure.

    All of them keep their reason if together they are at most `LIMIT` of the bytes.
    """
    # The tensors beside a weight that cannot be read belong to it.
    unreadable = _find_unreadable(skipped)
    others = [s for s in skipped if not unreadable or not unreadable.intersection(_owners_of(s.tensor))]
    marked = {s.tensor: why for s in others if (why := _find_weight(s)) is not None}
    if sum(s.nbytes for s in skipped if s.tensor in marked) <= LIMIT * total_nbytes:
        return list(skipped)
    return [replace(s, no_score=marked.get(s.tensor, s.no_score)) for s in skipped]


def _find_unreadable(skipped: Iterable[Skipped]) -> set[str]:
    """Find the names of weights that cannot be read, and of their modules."""
    failures = (s for s in skipped if s.no_score.is_failure and not s.no_score.is_by_rule)
    return {owner for s in failures for owner in owners_of(s.tensor)}


def _owners_of(tensor: str) -> list[str]:
    """Return the names that `X.scale`, `X_scale` and `X:scale` can belong to."""
    last = tensor.rfind(".") + 1
    # Names of models have few words.
    signs = [match.start() for match in _SIGN.finditer(tensor, last)][:_MAX_SIGNS]
    return [tensor[: max(last - 1, 0)], *(tensor[:i] for i in signs)]


def _find_weight(s: Skipped) -> NoScore | None:
    """Return the reason for a tensor that is a weight of a layer by name, dtype and shape; None for others."""
    if not s.no_score.is_by_rule or is_companion(s.tensor):
        return None
    owner, _, name = s.tensor.rpartition(".")
    is_layer = _LAYER.search(name) and not name.endswith(("bias", "mask"))
    is_other = _OTHER.search(name) or _OTHER_OWNER.search(owner.rpartition(".")[2])
    if is_other and not is_layer:
        return None
    # A dimension of 1 is only for broadcasting.
    shape = [side for side in s.shape if side != 1]
    if len(shape) < 2 or math.prod(shape) == 0 or s.dtype in _NOT_VALUES:
        return None
    if s.dtype not in FLOAT_DTYPES:
        return None if is_weight(s.tensor) else NoScore.BARE_WEIGHT
    if len(shape) > 3 or (len(shape) == 3 and ("conv" in s.tensor or min(shape[1:]) <= _MAX_KERNEL)):
        return None
    if is_weight(s.tensor):
        return NoScore.STACKED if len(shape) == 3 else None
    return NoScore.BARE_WEIGHT
