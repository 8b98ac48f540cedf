"""Files and folders that are not safetensors: one sentence that names the format, and what to do about it."""

import codecs
import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as save_bytes

from spectrum_stream.checkpoint import open_source
from spectrum_stream.checkpoint.formats import describe_bytes, explain_files
from spectrum_stream.checkpoint.tensors import read_checkpoint
from spectrum_stream.errors import BadHeader, SourceError, SpectrumStreamError

WEIGHTS = {"layers.0.weight": torch.ones(2, 3)}


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()


def torch_file(**options: bool) -> bytes:
    file = io.BytesIO()
    torch.save(WEIGHTS, file, **options)
    return file.getvalue()


def archive(mode: str) -> bytes:
    file = io.BytesIO()
    if mode == "zip":
        with zipfile.ZipFile(file, "w") as z:
            z.writestr("x.txt", "x")
    else:
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("x.txt"))
    return file.getvalue()


OID = "4d" * 32
CONTENT = {
    "lfs": (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{OID}\nsize 4976698672\n".encode(),
        "git lfs pull",
    ),
    "xet": (f"# xet version 0\nfilesize = 4976698672\nhash = '{OID}'\n".encode(), "Xet"),
    "page": (
        b"<!doctype html>\n<html><head><title>Sign in</title></head></html>\n",
        "HTML page, not the weights: Sign in",
    ),
    "page in upper case": (b"<!DOCTYPE HTML><HTML></HTML>", "HTML"),
    "page after space": (b"\n\n <!DOCTYPE html><html></html>", "HTML"),
    "page after a byte order mark": (b"\xef\xbb\xbf<html></html>", "HTML"),
    "xml": (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "XML document, such as a storage server's error: AccessDenied",
    ),
    "json": (
        b'{"error":"You must be authenticated."}',
        'JSON text, not the weights: {"error":"You must be authenticated."}',
    ),
    "long json": (b"[" + b"1, " * 100_000 + b"1]", "JSON"),
    "text": (b"Entry not found", "text, not the weights: Entry not found"),
    "text with an address": (b"see https://host/x?token=secret please", "see please"),
    "text without spaces": (b"x" * 100_000, "text, not the weights: xxx"),
    "text with a long address": (b"see https://host/" + b"x" * 2000 + b"secret please", "text, not the weights: see"),
    "empty": (b"", "empty (0 bytes)"),
    "zeros": (b"\0" * 4096, "zeros"),
    "gzip": (gzip.compress(b"weights" * 100), "gzip"),
    "tar": (archive("tar"), "tar archive"),
    "zip": (archive("zip"), "zip archive"),
    "npz": (npz(), ".npz"),
    "torch": (torch_file(), "PyTorch pickle"),
    "old torch": (torch_file(_use_new_zipfile_serialization=False), "Python pickle"),
    **{f"pickle {p}": (pickle.dumps({"a": 1}, protocol=p), "Python pickle") for p in range(6)},
    **{
        f"pickle {p} of {type(value).__name__}": (pickle.dumps(value, protocol=p), "Python pickle")
        for p in (0, 1)
        for value in ([1], {"a": np.ones(2)}, np.ones(2), (1, 2), OrderedDict(a=1))
    },
    # onnx.proto: ir_version, then producer_name, or the graph, or opset_import
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xc6\xf3\xf2\x03\n\x10" + b"\0" * 60, "ONNX"),
    "onnx without a producer": (b"\x08\x0a:\xc6\xf3\xf2\x03\n\x10" + b"\0" * 60, "ONNX"),
    "tflite": (b"\x1c\0\0\0TFL3\x14\0\x20\0" + b"\0" * 60, "TensorFlow Lite"),
    "executorch": (b"\x1c\0\0\0ET12" + b"\0" * 60, "ExecuTorch"),
    "flax": (b"\x82\xa5model\x81\xa6kernel\xc7\x10\x01" + b"\0" * 60, "Flax"),
    "flax, many": (b"\xde\x00\x20\xa5model\x81\xa6kernel\xc7\x10\x01" + b"\0" * 60, "Flax"),
    **{
        f"text in {encoding}": ("Zugriff verweigert: ung\xfcltig".encode(encoding), "text, not the weights: Zugriff")
        for encoding in ("utf-8-sig", "utf-16", "utf-32", "latin-1")
    },
    "long text in UTF-16": (("\xfcber " * 100_000).encode("utf-16"), "text, not the weights: \xfcber"),
    "page in UTF-16": ("<html><title>Sign in</title>".encode("utf-16"), "HTML page, not the weights: Sign in"),
    "page in big UTF-16": (codecs.BOM_UTF16_BE + "<html>".encode("utf-16-be"), "HTML page"),
    "page after comments": (b"<!-- saved -->\n<!-- from -->\n<!DOCTYPE html><html></html>", "HTML"),
    "comments without an end": (b"<!-- -->" * 10_000 + b"<!--", "text, not the weights"),
    "white space": (b" \n\r\n\t " * 10, "blank"),
    "byte order mark": (codecs.BOM_UTF8 + b"\n" * 20, "blank"),
    "dvc": (
        f"outs:\n- md5: {OID[:32]}\n  size: 4976698672\n  hash: md5\n  path: model.safetensors\n".encode(),
        "`dvc pull`",
    ),
    "dvc, with its own hash": (f"md5: {OID[:32]}\nfrozen: true\nouts:\n- path: model.safetensors\n".encode(), "DVC"),
    "git-annex": (f"/annex/objects/SHA256E-s4976698672--{OID}.safetensors\n".encode(), "git-annex"),
    "git-annex link": (f"../.git/annex/objects/Xk/9z/SHA256E-s1--{OID}/SHA256E-s1--{OID}".encode(), "git-annex"),
    "lz4": (b"\x04\x22\x4d\x18" + b"\x60" * 60, "LZ4"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "HDF5"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 60, "GGUF"),
    "parquet": (b"PAR1" + b"\x15" * 60, "Parquet"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 60, "image"),
}


@pytest.mark.parametrize(("content", "said"), CONTENT.values(), ids=CONTENT)
def test_read_header_says_what_another_file_is(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BadHeader) as error:
        read_checkpoint(open_source(str(tmp_path)))
    assert said in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)
    # A file of another name is recognized too.
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.dat")
    with pytest.raises(SourceError) as other:
        open_source(str(tmp_path / "weights.dat"))
    assert other.value.reason == "no_safetensors"
    assert said in str(other.value)


def test_read_header_names_a_header_over_the_limit(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((132_095_296).to_bytes(8, "little") + b"{")
        file.truncate(140_000_000)
    with pytest.raises(BadHeader) as error:
        read_checkpoint(open_source(str(tmp_path)))
    assert "100 MB" in str(error.value)


@pytest.mark.parametrize("head", [b"\xaa\xfe\x01\xff" * 20, b"\x00\x00\x01\x00\x00\x00\x00\x00\xff\xff"])
def test_read_header_says_that_an_unknown_file_is_no_safetensors(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(head)
    with pytest.raises(BadHeader) as error:
        read_checkpoint(open_source(str(tmp_path)))
    assert "is not a safetensors file" in str(error.value)


def test_read_header_says_that_a_truncated_file_is_incomplete(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((1000).to_bytes(8, "little") + b'{"layers.0')
    with pytest.raises(BadHeader) as error:
        read_checkpoint(open_source(str(tmp_path)))
    assert error.value.reason == "header_past_end"
    assert "not a safetensors file" not in str(error.value)
    assert "incomplete" in (error.value.hint or "")


@pytest.mark.parametrize("pointer", ["lfs", "xet", "dvc", "git-annex"])
def test_describe_bytes_tells_how_to_fetch_what_a_pointer_stands_for(pointer: str) -> None:
    content = CONTENT[pointer][0]
    foreign = describe_bytes(content, len(content))
    assert foreign is not None
    assert foreign.is_pointer
    assert "in the clone" in (foreign.hint or "")


def test_open_source_reads_a_file_of_another_name(tmp_path: Path) -> None:
    # The blobs of the Hugging Face cache have no suffix.
    (tmp_path / "b10b").write_bytes(save_bytes(WEIGHTS))
    (tmp_path / "MODEL.SAFETENSORS").write_bytes(save_bytes(WEIGHTS))
    for path in (tmp_path / "b10b", tmp_path):
        assert len(read_checkpoint(open_source(str(path))).tensors) == 1


@given(st.integers(0, 99_999_999), st.integers(0, 30))
def test_describe_bytes_says_nothing_of_damaged_safetensors(length: int, missing: int) -> None:
    # The length can look like a magic number: 640 begins as a pickle does.
    head = length.to_bytes(8, "little") + b'{"layers.0.weight":{"dtype":"F32"'
    assert describe_bytes(head, 8 + length - missing) is None


@given(st.binary(max_size=300))
def test_describe_bytes_has_one_printable_sentence(head: bytes) -> None:
    foreign = describe_bytes(head, len(head))
    assert foreign is None or foreign.what.isprintable()


# Files of a folder, the words of the error, and those of its hint.
LAYOUTS = {
    "gguf": (["model-Q4_K_M.gguf"], "GGUF", "gguf_file"),
    "bin": (["pytorch_model.bin", "config.json"], ".bin", "save_pretrained"),
    "bin shards": (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], ".bin", "save_pretrained"),
    "bin in a checkpoint": (
        ["checkpoint-5/pytorch_model.bin", "checkpoint-5/optimizer.pt"],
        "in checkpoint-5",
        "save_",
    ),
    "no weights": (["training_args.bin", "optimizer.pt", "rng_state_0.pth", "notes.txt"], "no weights at all", None),
    "pt": (["model.pt"], ".pt", "save_file"),
    "fsdp": (
        ["pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"],
        "FSDP",
        "accelerate merge-weights HERE/pytorch_model_fsdp_0 ",
    ),
    "dcp": (["__0_0.distcp", "__1_0.distcp", ".metadata"], "distributed checkpoint", "dcp_to_torch HERE "),
    "deepspeed": (
        ["global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest", "zero_to_fp32.py"],
        "DeepSpeed",
        "zero_to_fp32.py",
    ),
    "megatron": (
        ["latest_checkpointed_iteration.txt", "iter_0000001/mp_rank_00/model_optim_rng.pt"],
        "Megatron",
        "Megatron",
    ),
    "lightning": (["last.ckpt"], "Lightning", "state_dict"),
    "nemo": (["model.nemo"], "NeMo", "export"),
    "mlx": (["weights.npz"], ".npz", "numpy"),
    "saved model": (["saved_model.pb"], "SavedModel", "from_tf"),
    "keras": (["tf_model.h5"], ".h5", "from_tf"),
    "keras 3": (["model.keras"], ".keras", "keras.saving"),
    "paddle": (["model_state.pdparams", "config.json"], "Paddle", "paddle.load"),
    "compressed": (["model.safetensors.gz", "config.json"], "compressed safetensors", "unpack"),
    "compressed beside pickles": (["model.safetensors.zst", "pytorch_model.bin"], "compressed", "unpack"),
    **{
        f"download, {end}": ([f"model.safetensors.{end}", "config.json"], "interrupted", "continues")
        for end in ("aria2", "part", "crdownload")
    },
    "tensorflow 1": (["model.ckpt.index", "model.ckpt.data-00000-of-00001"], "TensorFlow 1", "from_tf"),
    "flax": (["flax_model.msgpack"], "Flax", "from_flax"),
    "orbax": (["_CHECKPOINT_METADATA", "manifest.ocdbt"], "Orbax", "safetensors.flax"),
    "orbax, of one step": (["0/_CHECKPOINT_METADATA", "0/default/d/a"], "Orbax", "safetensors.flax"),
    "orbax, without its metadata": (["ocdbt/d/a", "x"], "Orbax", "safetensors.flax"),
    "orbax, old": (["checkpoint", "_METADATA", "d/a"], "Orbax", "safetensors.flax"),
    "onnx": (["onnx/model.onnx"], "ONNX", "exported"),
    "openvino": (["openvino_model.xml", "openvino_model.bin"], "OpenVINO", "exported"),
    "core ml": (["model.mlpackage/Data/weight.bin"], "Core ML", "exported"),
    "rust": (["rust_model.ot"], "rust-bert", "exported"),
    "meta": (["consolidated.00.pth", "params.json"], "Meta", "convert_llama_weights_to_hf.py"),
    "sft": (["flux.sft"], ".sft", "path"),
    "interrupted": ([".cache/huggingface/download/abc.incomplete", "config.json"], "interrupted", "hf download"),
    "checkpoints": (
        ["checkpoint-100/model.safetensors", "checkpoint-50/model.safetensors", "runs/x"],
        "checkpoint-50, checkpoint-100",
        "HERE/checkpoint-100",
    ),
    "pipeline": (
        ["model_index.json", "text_encoder/model.safetensors", "unet/a.safetensors"],
        "text_encoder, unet",
        "HERE/unet",
    ),
    "nested": (["Some-7B/Some-7B/model.safetensors"], "Some-7B/Some-7B", "HERE/Some-7B/Some-7B"),
}


@pytest.mark.parametrize(("files", "said", "hint"), LAYOUTS.values(), ids=LAYOUTS)
def test_explain_files_names_the_format_and_the_next_step(files: list[str], said: str, hint: str | None) -> None:
    error = explain_files(sorted(files), "HERE")
    assert error.reason == "no_safetensors"
    assert said in str(error)
    assert (error.hint is None) if hint is None else hint in (error.hint or "")


def test_open_source_lists_a_folder_below_its_top(tmp_path: Path) -> None:
    for file in ("a/b/x.distcp", ".cache/huggingface/download/y.txt"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    with pytest.raises(SourceError) as error:
        open_source(str(tmp_path))
    assert "distributed checkpoint" in str(error.value)
    assert str(tmp_path / "a/b") in (error.value.hint or "")


COMMITS = ("0" * 40, "1" * 40)


def cache(tmp_path: Path, *commits: str, ref: str | None = None) -> Path:
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / "b10b").write_bytes(save_bytes(WEIGHTS))
    for commit in commits:
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "model.safetensors").symlink_to("../../blobs/b10b")
        (repo / "snapshots" / commit / "config.json").write_text(json.dumps({"model_type": commit}))
    if ref is not None:
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(ref)
    return repo


@pytest.mark.parametrize(("commits", "ref"), [(COMMITS[:1], None), (COMMITS, COMMITS[1]), (COMMITS[1:], COMMITS[0])])
@pytest.mark.parametrize("below", ["", "snapshots"])
def test_open_source_resolves_a_folder_of_the_cache(
    tmp_path: Path, commits: tuple[str, ...], ref: str | None, below: str
) -> None:
    repo = cache(tmp_path, *commits, ref=ref)
    source = open_source(str(repo / below))
    assert source.where == str(repo / "snapshots" / commits[-1])
    lone = open_source(str(repo / "snapshots" / commits[-1] / "model.safetensors"))
    assert lone.where == f"{source.where}/model.safetensors"
    assert lone.config == source.config == {"model_type": commits[-1]}
    assert not source.warnings


@pytest.mark.parametrize("commits", [COMMITS, ()])
def test_open_source_does_not_guess_a_snapshot(tmp_path: Path, commits: tuple[str, ...]) -> None:
    repo = cache(tmp_path, *commits)
    (repo / "snapshots").mkdir(exist_ok=True)
    with pytest.raises(SpectrumStreamError) as error:
        open_source(str(repo))
    assert error.value.reason == "no_snapshot"
    assert all(commit in str(error.value) for commit in commits)
