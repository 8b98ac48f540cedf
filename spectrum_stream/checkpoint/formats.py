"""Other formats than safetensors, as two tables: by the first bytes of a file, and by the names in a folder or repo.

Each row has a test, the format, and what to do about it. The first row that fits counts.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

from ..errors import SourceError
from ..files import parse_json
from ..text import listed, printable
from .header import MAX_HEADER_NBYTES, PREFIX_NBYTES
from .partial import find_unfinished, hint_unfinished

_QUOTE_LENGTH = 120
_READ_LENGTH = 1000
# The byte order marks of Windows; that of UTF-32 begins with the one of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Foreign(NamedTuple):
    """The content of a file that is not safetensors, as the end of a sentence, and what to do about it."""

    what: str
    hint: str | None

    @property
    def is_pointer(self) -> bool:
        """Whether it stands for a file that is stored elsewhere."""
        # The words of a text come after the comma.
        return self.what.partition(",")[0].endswith("pointer")


@dataclass(frozen=True, slots=True)
class _File:
    """The first bytes of a file, and its size."""

    head: bytes
    nbytes: int

    @property
    def text(self) -> str | None:
        """The head as text, without a byte order mark and the space around it; None if it is not text.

        Bytes that are not Unicode are read as Latin-1 if most of them are ASCII.
        """
        encoding = next((name for mark, name in _MARKS if self.head.startswith(mark)), "utf-8-sig")
        try:
            # The head may end within a character.
            text = codecs.getincrementaldecoder(encoding)().decode(self.head, final=self.is_whole)
        except UnicodeDecodeError:
            if 4 * sum(byte >= 128 for byte in self.head) > len(self.head):
                return None
            text = self.head.decode("latin-1")
        return None if any(c < " " and c not in "\t\n\r\f" for c in text) else text.strip()

    @property
    def is_whole(self) -> bool:
        return len(self.head) >= self.nbytes


class _Magic(NamedTuple):
    """A format by the first bytes of its files. `what` may hold the words of a text file as `{quote}`."""

    fits: Callable[[_File], bool]
    what: str
    hint: str | None = None
    quote: Callable[[str], str] = lambda text: text


def _starts(*beginnings: bytes) -> Callable[[_File], bool]:
    return lambda file: file.head.startswith(beginnings)


def _reads(pattern: str) -> Callable[[_File], bool]:
    compiled = re.compile(pattern, re.IGNORECASE)
    return lambda file: (text := file.text) is not None and compiled.match(text) is not None


def _find_all(pattern: str) -> Callable[[str], str]:
    """Return a function that quotes the groups of a pattern where it matches."""
    compiled = re.compile(pattern, re.IGNORECASE | re.DOTALL)
    return lambda text: ": ".join(group for match in compiled.finditer(text) for group in match.groups())


def _is_json(file: _File) -> bool:
    text = file.text
    if text is None or not text.startswith(("{", "[")):
        return False
    if not file.is_whole:
        return True
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _has_large_header(file: _File) -> bool:
    nbytes = int.from_bytes(file.head[:PREFIX_NBYTES], "little")
    begins = file.head[PREFIX_NBYTES : PREFIX_NBYTES + 1] == b"{"
    return begins and MAX_HEADER_NBYTES < nbytes <= file.nbytes - PREFIX_NBYTES


def _is_msgpack_map(file: _File) -> bool:
    """Whether a file begins as a map of MessagePack that has a short name as its first key."""
    start = {b"\xde": 3, b"\xdf": 5}.get(file.head[:1], 1 if 0x81 <= int.from_bytes(file.head[:1]) <= 0x8F else None)
    if start is None or len(file.head) <= start or not 0xA1 <= file.head[start] <= 0xBF:
        return False
    key = file.head[start + 1 : start + 1 + (file.head[start] & 0x1F)]
    return len(key) == file.head[start] & 0x1F and key.isascii() and key.decode().isprintable()


_AGAIN = "download it again"
_CONVERT = "load it with `torch.load(path, weights_only=True)` and write it with `safetensors.torch.save_file`"
_UNPACK = "unpack it"
_SAVED_PAGE = "download the file itself, with a token if the repo asks for one: `hf download`"

_ORIGINAL = "scan the model that it was made from"
# A page or a document can begin with comments. The quantifiers are possessive, so that the match is linear.
_COMMENTS = r"(?:<!--(?s:(?:(?!-->).)*+)-->\s*+)*+"
# What Python 2 and `protocol=0` or `protocol=1` write: the start of a dict, a list, a tuple or an object.
_OLD_PICKLE = re.compile(
    rb"\([dl]p\d+\n|\((I-?\d+|F[\d.e-]+|V[^\n]*\np\d+)\n|\(K.|[}\])]q.|c[\w.]+\n\w+\n[pq(]", re.DOTALL
)
# A ModelProto: ir_version, then the name of the producer, or the graph and its first node, or an operator set.
_ONNX = re.compile(rb"\x08[\x01-\x1f](\x12.[ -~]{2}|\x3a[\x80-\xff]{,5}[\x00-\x7f]\n|\x42.[\n\x10])", re.DOTALL)

# fmt: off
_BY_BYTES = (
    _Magic(lambda f: f.nbytes == 0, "is empty (0 bytes)", _AGAIN),
    _Magic(lambda f: not any(f.head), "begins with zeros only: its content was never written", _AGAIN),
    _Magic(_has_large_header, "has a header over the limit of 100 MB, which every safetensors reader rejects",
           "write the model again in several shards: `save_pretrained(..., max_shard_size=...)`"),
    _Magic(_starts(b"version https://git-lfs", b"version https://hawser"),
           "is a Git LFS pointer, in place of the weights that `git lfs pull` fetches",
           "run `git lfs pull` in the clone, or use `hf download`"),
    _Magic(_starts(b"# xet version"), "is a Xet pointer, not the weights",
           "install git-xet and run `git xet pull` in the clone, or use `hf download`"),
    _Magic(_reads(r"(?:(?!outs:)\w+:[^\n]*\n)*+outs:\s*\n"),
           "is a DVC pointer, in place of the weights that `dvc pull` fetches", "run `dvc pull` in the clone"),
    _Magic(_reads(r"[^\s:]*/annex/objects/"), "is a git-annex pointer, not the weights",
           "run `git annex get` in the clone"),
    _Magic(_reads(_COMMENTS + r"<(!doctype html|html|head|body|title|meta|script|style|div|h1)\b"),
           "is an HTML page, not the weights{quote}",
           _SAVED_PAGE, _find_all(r"<title[^<>]*>([^<]*)")),
    _Magic(_reads(_COMMENTS + r"(<\?xml|<Error>)"), "is an XML document, such as a storage server's error{quote}",
           _AGAIN, _find_all(r"<(?:code|message)>([^<]*)")),
    _Magic(_is_json, "is JSON text, not the weights{quote}", _AGAIN),
    _Magic(lambda f: f.head.startswith(b"PK\x03\x04") and b".npy" in f.head[:300],
           "is a NumPy archive (.npz)", "load it with `numpy.load` and write it with `safetensors.numpy.save_file`"),
    _Magic(lambda f: f.head.startswith(b"PK\x03\x04") and b"data.pkl" in f.head[:4096],
           "is a PyTorch pickle (zip archive)", _CONVERT),
    _Magic(_starts(b"PK\x03\x04", b"PK\x05\x06"), "is a zip archive, most likely a PyTorch pickle", _CONVERT),
    _Magic(lambda f: re.match(rb"\x80[\x02-\x05]", f.head) is not None, "is a Python pickle", _CONVERT),
    _Magic(lambda f: _OLD_PICKLE.match(f.head) is not None, "is a Python pickle (protocol 0 or 1)", _CONVERT),
    _Magic(_starts(b"\x1f\x8b"), "is a gzip archive", _UNPACK),
    _Magic(_starts(b"BZh"), "is a bzip2 archive", _UNPACK),
    _Magic(_starts(b"\xfd7zXZ\x00"), "is an xz archive", _UNPACK),
    _Magic(_starts(b"\x28\xb5\x2f\xfd"), "is a Zstandard archive", _UNPACK),
    _Magic(_starts(b"\x04\x22\x4d\x18"), "is an LZ4 archive", _UNPACK),
    _Magic(_starts(b"7z\xbc\xaf\x27\x1c"), "is a 7z archive", _UNPACK),
    _Magic(_starts(b"Rar!\x1a\x07"), "is a RAR archive", _UNPACK),
    _Magic(lambda f: f.head[257:262] == b"ustar", "is a tar archive", _UNPACK),
    _Magic(_starts(b"\x89HDF\r\n\x1a\n"), "is an HDF5 file (Keras, TensorFlow)",
           "load it with `from_tf=True` in transformers 4 and call `save_pretrained`"),
    _Magic(_starts(b"GGUF"), "is a GGUF file",
           "scan the model that it was made from, or load it with `from_pretrained(..., gguf_file=...)` and save it"),
    _Magic(_starts(b"lmgg", b"tjgg", b"fmgg"), "is a GGML file, the format before GGUF", _ORIGINAL),
    _Magic(lambda f: _ONNX.match(f.head) is not None, "is an ONNX file", _ORIGINAL),
    _Magic(lambda f: f.head[4:8] == b"TFL3", "is a TensorFlow Lite file", _ORIGINAL),
    _Magic(lambda f: f.head[4:8] == b"ET12", "is an ExecuTorch program", _ORIGINAL),
    _Magic(_is_msgpack_map, "is a Flax file (MessagePack)",
           "load it with `from_flax=True` in transformers 4 and call `save_pretrained`"),
    _Magic(_starts(b"\x93NUMPY"), "is a NumPy array (.npy)", None),
    _Magic(_starts(b"PAR1"), "is a Parquet file, which holds a data set", None),
    _Magic(_starts(b"ARROW1"), "is an Arrow file, which holds a data set", None),
    _Magic(_starts(b"SQLite format 3\0"), "is an SQLite database", None),
    _Magic(_starts(b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM"), "is an image", None),
    _Magic(lambda f: f.head.startswith(b"RIFF") and f.head[8:12] == b"WEBP", "is an image", None),
    _Magic(_starts(b"%PDF-"), "is a PDF document", None),
    _Magic(_starts(b"\x7fELF", b"MZ"), "is a program", None),
    _Magic(lambda f: f.text == "", "is blank text, not the weights", _AGAIN),
    _Magic(lambda f: f.text is not None, "is text, not the weights{quote}", _AGAIN),
)
# fmt: on


def describe_bytes(head: bytes, nbytes: int) -> Foreign | None:
    """Tell what a file is that is not safetensors; None if it could be damaged safetensors.

    Args:
        head: its first bytes; 4 kB are enough.
        nbytes: its size.
    """
    file = _File(head, nbytes)
    # The length of a header can look like a short magic number: 640 is the start of a pickle.
    length = int.from_bytes(head[:PREFIX_NBYTES], "little")
    if head[PREFIX_NBYTES : PREFIX_NBYTES + 1] == b"{" and length <= MAX_HEADER_NBYTES:
        return None
    row = next((row for row in _BY_BYTES if row.fits(file)), None)
    if row is None:
        return None
    words = _quote(row.quote(file.text or "")) if "{quote}" in row.what else ""
    return Foreign(row.what.replace("{quote}", f": {words}" if words else ""), row.hint)


def looks_like_safetensors(head: bytes, nbytes: int) -> bool:
    """Whether a file of another name begins like safetensors: a length within the file, then a JSON object."""
    length = int.from_bytes(head[:PREFIX_NBYTES], "little")
    return head[PREFIX_NBYTES : PREFIX_NBYTES + 1] == b"{" and length <= nbytes - PREFIX_NBYTES


def _quote(text: str) -> str:
    """Return the words of an untrusted text for a message.

    Addresses are left out, because they can be signed.
    """
    # The pattern takes quadratic time in a long line without a space.
    words = printable(" ".join(re.sub(r"\S*://\S*", " ", text[:_READ_LENGTH]).split()))
    return words if len(words) <= _QUOTE_LENGTH else f"{words[:_QUOTE_LENGTH]}…"


class _Layout(NamedTuple):
    """A format by the paths of its files below the folder or repo. `{where}` in a hint is the folder of the first."""

    path: re.Pattern[str]
    what: str
    hint: str
    reason: str


def _layout(pattern: str, what: str, hint: str, reason: str = "no_safetensors") -> _Layout:
    return _Layout(re.compile(pattern, re.IGNORECASE), what, hint, reason)


_FROM_ORIGINAL = "scan the model that it was exported from"
_FROM_TENSORFLOW = "load it with `from_tf=True` in transformers 4 and call `save_pretrained`"
_FROM_PICKLE = "convert it with `from_pretrained(...)` and `save_pretrained(..., safe_serialization=True)`"

# fmt: off
_BY_NAMES = (
    _layout(r"[^/]+\.safetensors\.(tar\.)?(gz|zst|xz|bz2|lz4|7z|zip|tar)", "compressed safetensors files",
            "unpack them"),
    _layout(r"(.*/)?(zero_to_fp32\.py|\w*zero_pp_rank_\d+_\w+\.pt|mp_rank_\d+_model_states\.pt|\w+_optim_states\.pt)",
            "a DeepSpeed ZeRO checkpoint",
            "convert it with `python zero_to_fp32.py . OUTPUT --safe_serialization` in the folder with the file "
            "`latest`; DeepSpeed saves the script there"),
    _layout(r"(.*/)?(mp_rank_\d+(_\d+)*/.*\.pt|latest_checkpointed_iteration\.txt|iter_\d+/.*)",
            "a Megatron-LM checkpoint",
            "convert it with the script of the training framework (Megatron-Bridge, or `mcore export` of ms-swift)"),
    _layout(r"(.*/)?[^/]+\.distcp",
            "a distributed checkpoint of PyTorch (FSDP, .distcp)",
            "convert it with `accelerate merge-weights {where} OUTPUT`, or "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {where} OUTPUT.pt`"),
    _layout(r"(.*/)?(_CHECKPOINT_METADATA|(?-i:_METADATA|_sharding)|(manifest\.)?ocdbt(\.process_\d+)?(/.*)?|\.zarray|"
            r"[^/]+\.orbax.*)",
            "a JAX checkpoint (Orbax)",
            "restore it with Orbax, and write the arrays with `safetensors.flax.save_file`"),
    _layout(r"[^/]+\.nemo", "a NeMo archive (.nemo)",
            "export it to the Hugging Face format with NeMo's export script"),
    _layout(r"[^/]+\.gguf", "GGUF files",
            "scan the model that they were made from, or load one with `from_pretrained(..., gguf_file=...)`"),
    _layout(r"[^/]+\.gg(ml|jt|mf)|ggml-[^/]+", "GGML files, the format before GGUF", _FROM_ORIGINAL),
    _layout(r"(.*/)?openvino_\w+\.(xml|bin)", "an OpenVINO model", _FROM_ORIGINAL),
    _layout(r"(onnx/)?[^/]+\.onnx(_data)?", "ONNX files", _FROM_ORIGINAL),
    _layout(r"[^/]+\.(mlmodel|mlpackage|mlmodelc)(/.*)?", "a Core ML model", _FROM_ORIGINAL),
    _layout(r"[^/]+\.tflite", "TensorFlow Lite files", _FROM_ORIGINAL),
    _layout(r"[^/]+\.(engine|plan|trt)", "TensorRT engines", _FROM_ORIGINAL),
    _layout(r"[^/]+\.pte", "an ExecuTorch program", _FROM_ORIGINAL),
    _layout(r"(.*/)?saved_model\.pb", "a TensorFlow SavedModel", _FROM_TENSORFLOW),
    _layout(r"[^/]+\.keras", "Keras models (.keras)",
            "load one with `keras.saving.load_model` and write its weights with `safetensors.numpy.save_file`"),
    _layout(r"[^/]+\.(h5|hdf5)", "Keras or TensorFlow files (.h5)", _FROM_TENSORFLOW),
    _layout(r"[^/]+\.ckpt\.(index|meta|data-[\d-]+of-\d+)|[^/]+\.data-\d+-of-\d+", "a TensorFlow 1 checkpoint",
            _FROM_TENSORFLOW),
    _layout(r"[^/]+\.msgpack(\.index\.json)?", "Flax files (.msgpack)",
            "load it with `from_flax=True` in transformers 4 and call `save_pretrained`"),
    _layout(r"[^/]+\.(pdparams|pdiparams|pdmodel)", "Paddle files (.pdparams)",
            "load one with `paddle.load` and write its arrays with `safetensors.numpy.save_file`"),
    _layout(r"[^/]+\.ot", "a model of rust-bert (.ot)", _FROM_ORIGINAL),
    _layout(r"[^/]+\.npz", "a NumPy archive (.npz), as old versions of MLX write",
            "load it with `numpy.load` and write it with `safetensors.numpy.save_file`"),
    _layout(r"[^/]+\.ckpt", "a checkpoint of PyTorch Lightning (.ckpt)",
            "take `state_dict` from `torch.load(path)` and write it with `safetensors.torch.save_file`"),
    _layout(r"consolidated\.\d+\.pth", "Meta's own files (consolidated.*.pth)",
            "convert them with `convert_llama_weights_to_hf.py` of transformers"),
    _layout(r"(adapter_model|pytorch_lora_weights)\.(bin|pt)", "an adapter as a PyTorch pickle, not a model",
            "scan its base model, or merge the adapter into it (PEFT: `merge_and_unload()`)", "adapter"),
    _layout(r"[^/]+\.sft", ".sft files, which have the same format", "give one of them by its path"),
    _layout(r"(?!training_args|optimizer|scheduler)[^/]+\.bin(\.index\.json)?", "PyTorch pickles (.bin)",
            _FROM_PICKLE),
    _layout(r"(?!training_args|optimizer|scheduler|scaler|rng_state)[^/]+\.pth?", "PyTorch pickles (.pt)", _CONVERT),
)
# fmt: on


def is_foreign(name: str) -> bool:
    """Whether a file has the name of weights in another format."""
    return any(row.path.fullmatch(name) for row in _BY_NAMES)


def explain_files(files: Sequence[str], where: str) -> SourceError:
    """Return the error for a folder or repo without safetensors files at its top.

    Args:
        files: all paths below it.
        where: the folder or repo, as it can be typed.
    """
    layouts, below = _find_layouts(files), ""
    if not layouts:
        folders: dict[str, list[str]] = {}
        for file in files:
            folder, _, name = file.rpartition("/")
            folders.setdefault(folder, []).append(name)
        inside = ((folder, _find_layouts(names)) for folder, names in sorted(folders.items()))
        below, layouts = next(((folder, found) for folder, found in inside if found), ("", []))
    found = " and ".join(row.what for row, _ in layouts[:2]) or "no weights at all"
    message, hint = f"{where} has no safetensors files; it has {found}{f' in {below}' if below else ''}", None
    if layouts:
        row, path = layouts[0]
        # A repo must be downloaded before it can be converted.
        top = "FOLDER" if "://" in where else where
        hint = row.hint.format(where="/".join(filter(None, (top, below, path.rpartition("/")[0]))))
    nested = sorted({str(PurePosixPath(f).parent) for f in files if f.lower().endswith(".safetensors") and "/" in f})
    steps = sorted((p for p in nested if re.fullmatch(r"(checkpoint|step|epoch)[-_]\d+", p)), key=_last_number)
    if unfinished := find_unfinished(files):
        message = f"{where} holds a download that was interrupted ({printable(unfinished[0].rpartition('/')[2])})"
        hint = hint_unfinished(unfinished[0])
    elif "model_index.json" in files and nested:
        message = f"{where} is a pipeline of several models: {listed(nested, 8)}"
        hint = f"give one of them, {where}/{_largest_part(nested)}"
    elif len(steps) > 1:
        message = f"{where} has no safetensors files of its own; it has {len(steps)} checkpoints: {listed(steps, 8)}"
        hint = f"give one of them, {where}/{steps[-1]}"
    elif nested:
        message = f"{where} has no safetensors files at its top; there are some in {listed(nested, 8)}"
        hint = f"give {where}/{nested[0]}" if len(nested) == 1 else f"give one of them, {where}/{nested[0]}"
    reason = layouts[0][0].reason if layouts and not nested else "no_safetensors"
    return SourceError(message, reason=reason, hint=hint)


def _find_layouts(files: Sequence[str]) -> list[tuple[_Layout, str]]:
    """Return the formats that files have by their paths, each with the first of them."""
    first = ((row, next((f for f in files if row.path.fullmatch(f)), None)) for row in _BY_NAMES)
    return [(row, path) for row, path in first if path is not None]


def _last_number(path: str) -> int:
    return int(re.findall(r"\d+", path)[-1])


def _largest_part(parts: Sequence[str]) -> str:
    """Return the denoiser of a pipeline if it has one, which is its largest part."""
    return next((part for part in parts if part in ("transformer", "unet")), parts[0])
