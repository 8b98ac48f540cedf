"""Which files of a folder are read: indexes of other names, variants, copies, and what transformers loads."""

import json
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from spectrum_stream.checkpoint import open_source
from spectrum_stream.checkpoint.index import (
    QUANTIZATION_FILES,
    SMALL_FILES,
    Choice,
    choose_for,
    choose_shards,
    missing_shards,
)
from spectrum_stream.checkpoint.tensors import read_checkpoint
from spectrum_stream.errors import BadIndex, FileError, SourceError, SpectrumStreamError

from ..support.checkpoints import Save
from ..support.hub_server import REPO, HubServer, use
from ..support.untrusted import check_index

WEIGHTS = {f"layers.{i}.weight": torch.full((2, 3), float(i)) for i in range(4)}


def index(*shards: str) -> dict[str, object]:
    return {"weight_map": {f"layers.{i}.weight": shard for i, shard in enumerate(shards)}}


def split(stem: str, total: int, suffix: str = ".safetensors") -> list[str]:
    return [f"{stem}-{i:05}-of-{total:05}{suffix}" for i in range(1, total + 1)]


def choose(files: Mapping[str, object], **options: str | Mapping[str, object] | None) -> Choice | None:
    return choose_shards(list(files), files.get, "HERE", **options)  # type: ignore[arg-type]


def named(*files: str, **contents: object) -> dict[str, object]:
    return dict.fromkeys(files) | contents


M2, M4 = split("model", 2), split("model", 4)
D2, C2 = split("diffusion_pytorch_model", 2), split("consolidated", 2)
# Texts that resemble an index, and any other texts.
SHARDS = st.text("model-of01.safetnr/:\\", max_size=40) | st.sampled_from([*M2, *M4, "model.safetensors", "x.bin"])
SCALARS = st.none() | st.integers() | SHARDS
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(SHARDS, inner))
INDEXES = st.fixed_dictionaries({"weight_map": st.dictionaries(SHARDS, SHARDS) | ANYTHING}) | ANYTHING
INDEX, D_INDEX = "model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json"
# The files of a folder, those that are read, and those that are ignored and named in a warning.
CHOICES: dict[str, tuple[dict[str, object], list[str], list[str]]] = {
    "diffusers, sharded": (named(*D2) | {D_INDEX: index(*D2)}, D2, []),
    "diffusers, variant": (
        named("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        ["diffusion_pytorch_model.safetensors"],
        ["diffusion_pytorch_model.fp16.safetensors"],
    ),
    "diffusers, sharded variant": (
        named(*D2, *split("diffusion_pytorch_model.fp16", 2))
        | {D_INDEX: index(*D2), "diffusion_pytorch_model.safetensors.index.fp16.json": None},
        D2,
        split("diffusion_pytorch_model.fp16", 2),
    ),
    # diffusers reads the index before the single file, transformers after it.
    "diffusers, both": (
        named(*D2, "diffusion_pytorch_model.safetensors") | {D_INDEX: index(*D2)},
        D2,
        ["diffusion_pytorch_model.safetensors"],
    ),
    "transformers, both": (
        named(*M2, "model.safetensors") | {INDEX: index(*M2)},
        ["model.safetensors"],
        M2,
    ),
    "transformers, variant alone": (
        named(*split("model", 2, ".fp16.safetensors"))
        | {"model.safetensors.index.fp16.json": index(*split("model", 2, ".fp16.safetensors"))},
        split("model", 2, ".fp16.safetensors"),
        [],
    ),
    "Mistral": (named(*C2, "params.json") | {"consolidated.safetensors.index.json": index(*C2)}, C2, []),
    "Mistral beside transformers": (
        named(*M2, "consolidated.safetensors") | {INDEX: index(*M2)},
        M2,
        ["consolidated.safetensors"],
    ),
    "another index": (named(*split("x", 2)) | {"x.safetensors.index.json": index(*split("x", 2))}, split("x", 2), []),
    "left-over split": (named(*M2, *M4) | {INDEX: index(*M2)}, M2, M4),
    "overlay": (
        named(*M2, "model-overlay-00001.safetensors")
        | {INDEX: index(M2[0], M2[1], "model-overlay-00001.safetensors")},
        [*M2, "model-overlay-00001.safetensors"],
        [],
    ),
    "no index": (named(*M2), M2, []),
    "no index, from zero": (
        named("model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"),
        ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"],
        [],
    ),
    "index of PyTorch files": (named(*M2) | {INDEX: index(*split("pytorch_model", 2, ".bin"))}, M2, []),
    "lone file": (named("anything.safetensors", "config.json"), ["anything.safetensors"], []),
    "upper case": (named("MODEL.SAFETENSORS"), ["MODEL.SAFETENSORS"], []),
    "adapter beside the model": (
        named("model.safetensors", "adapter_model.safetensors"),
        ["model.safetensors"],
        ["adapter_model.safetensors"],
    ),
}


@pytest.mark.parametrize(("files", "read", "ignored"), CHOICES.values(), ids=CHOICES)
def test_choose_shards_chooses_as_the_library_of_the_files(
    files: dict[str, object], read: list[str], ignored: list[str]
) -> None:
    choice = choose(files)
    assert choice is not None
    assert list(choice.names) == read
    assert sorted(choice.ignored) == sorted(ignored)
    # One sentence names the copy that is read and the one that is not.
    assert sum("ignored:" in w for w in choice.warnings) == bool(ignored)


AMBIGUOUS = {
    "two files": ["a.safetensors", "b.safetensors"],
    "two variants": ["model.fp16.safetensors", "model.bf16.safetensors"],
    "two splits": [*M2, *M4],
    "a split and a file": [*M2, "consolidated.safetensors"],
    "two indexes": ["a.safetensors.index.json", "b.safetensors.index.json"],
}


@pytest.mark.parametrize("files", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_choose_shards_rejects_copies_without_a_rule(files: list[str]) -> None:
    with pytest.raises(SourceError) as error:
        choose(named(*files))
    assert error.value.reason == "no_index"
    assert all(file in str(error.value) for file in files if "-of-" not in file)


@pytest.mark.parametrize("missing", [1, 2, 4])
def test_choose_shards_names_a_missing_number(missing: int) -> None:
    files = [name for name in M4 if f"-0000{missing}-" not in name]
    with pytest.raises(BadIndex) as error:
        choose(named(*files))
    assert error.value.reason == "missing_shard"
    assert f"model-0000{missing}-of-00004.safetensors" in str(error.value)


def test_choose_shards_reads_the_file_that_config_names() -> None:
    files = named("model.safetensors", "other.safetensors")
    choice = choose(files, config={"transformers_weights": "other.safetensors"})
    assert choice is not None and choice.names == ("other.safetensors",)
    for hostile in ("../x.safetensors", 5, "no.safetensors"):
        choice = choose(files, config={"transformers_weights": hostile})
        assert choice is not None and choice.names == ("model.safetensors",)


def test_choose_for_a_page_of_a_file() -> None:
    both = named("a.safetensors", "b.safetensors", *M2, "model.gguf", "config.json") | {INDEX: index(*M2)}

    def choose_page(file: str) -> tuple[str, ...] | None:
        choice = choose_for(file, list(both), both.get, "HERE")
        return None if choice is None else choice.names

    assert choose_page("b.safetensors") == ("b.safetensors",)
    assert choose_page(M2[0]) == choose_page("config.json") == choose_page(INDEX) == tuple(M2)
    assert choose_page("model.gguf") is None


@given(st.lists(st.text("model-of0123.safetensorsfp/", max_size=40)))
def test_choose_shards_ends_for_any_names(names: list[str]) -> None:
    files = [f"{name}.safetensors" for name in names]
    try:
        choice = choose(named(*files))
    except SpectrumStreamError:
        return
    assert choice is None or set(choice.names) | set(choice.ignored) == {f for f in files if "/" not in f}


@given(st.builds(json.dumps, INDEXES) | st.text(), st.lists(st.text("model-of012.safetensors|/", max_size=40)))
def test_index_of_any_text_gives_safe_shards_or_one_sentence(text: str, others: list[str]) -> None:
    check_index(text.encode(), tuple(others))


@pytest.mark.parametrize(
    "text",
    ['{"a": [' + "[]," * 2_000_000 + "[]]}", '{"a": ' * 200 + "1" + "}" * 200, "[" + "9" * 5000 + "]"],
    ids=["values", "levels", "digits"],
)
@pytest.mark.parametrize("name", [INDEX, *SMALL_FILES[:4]])
def test_json_above_a_limit_in_small_files_is_rejected_before_it_is_parsed(save: Save, name: str, text: str) -> None:
    folder = save(WEIGHTS, shards=2)
    (folder / name).write_text(text)
    tracemalloc.start()
    with pytest.raises(FileError) as error:
        open_source(str(folder))
    assert error.value.reason == "file_too_large"
    assert tracemalloc.get_traced_memory()[1] < 8 * len(text) + 1_000_000
    tracemalloc.stop()


def test_sets_that_claim_a_million_shards_take_no_time_for_each() -> None:
    files = [f"m{i}-000001-of-999999.safetensors" for i in range(2000)]
    began = time.monotonic()
    # A list of all claimed names would take half an hour.
    with pytest.raises(BadIndex) as error:
        choose(named(*files) | {INDEX: index("x.safetensors")}, only=INDEX)
        raise missing_shards("HERE", INDEX, ["x.safetensors"], files)
    assert error.value.reason == "missing_shard"
    assert time.monotonic() - began < 20


def test_messages_about_an_index_do_not_repeat_a_text_of_any_length() -> None:
    for shard in ("a" * 10_000_000 + ".safetensors", "../" * 1_000_000, "a" * 10_000_000 + ".bin"):
        with pytest.raises(BadIndex) as error:
            choose(named(*M2) | {INDEX: index(shard)}, only=INDEX)
        assert len(str(error.value)) < 1000


def test_missing_shard_names_the_complete_copy_that_is_there(save: Save) -> None:
    folder = save(WEIGHTS, shards=2)
    (folder / INDEX).write_text(json.dumps(index(*M4)))
    with pytest.raises(BadIndex) as error:
        open_source(str(folder))
    assert error.value.reason == "missing_shard"
    assert all(name in str(error.value) for name in (M4[0], *M2))
    assert "model-*-of-00002.safetensors is complete" in (error.value.hint or "")


def test_read_checkpoint_counts_the_tensors_of_a_shard_that_the_index_leaves_out(
    save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save(WEIGHTS, shards=2)
    (folder / INDEX).write_text(json.dumps(index(*[M2[0]] * 4)))
    with HubServer({REPO: folder}) as server:
        use(server.url, monkeypatch, tmp_path)
        for model in (str(folder), REPO):
            checkpoint = read_checkpoint(open_source(model))
            assert len(checkpoint.tensors) == 2
            (left_out,) = [w for w in checkpoint.warnings if "left out" in w]
            assert M2[1] in left_out
            assert "2 tensors" in left_out
    (folder / M2[1]).write_bytes(b"damaged")
    assert any("cannot be read" in w for w in read_checkpoint(open_source(str(folder))).warnings)
    (folder / M2[1]).unlink()
    (folder / M2[1]).symlink_to("nothing")
    assert len(read_checkpoint(open_source(str(folder))).tensors) == 2


def test_missing_shard_of_an_interrupted_download_says_so(save: Save) -> None:
    folder = save(WEIGHTS, shards=2)
    (folder / M2[1]).unlink()
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / f".cache/huggingface/download/{M2[1]}.incomplete").touch()
    with pytest.raises(BadIndex) as error:
        open_source(str(folder))
    assert "interrupted" in (error.value.hint or "")


GPTQ = {"bits": 4, "group_size": 32, "desc_act": True, "sym": False}


@pytest.mark.parametrize("file", QUANTIZATION_FILES)
@pytest.mark.parametrize("config", [None, {"model_type": "llama"}])
def test_open_source_adds_the_quantization_that_lies_beside_config(
    save: Save, file: str, config: dict[str, object] | None
) -> None:
    folder = save(WEIGHTS, config=config)
    (folder / file).write_text(json.dumps(GPTQ))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    for path in (folder, folder / "gptq_model-4bit-32g.safetensors"):
        source = open_source(str(path))
        assert source.config == {**(config or {}), "quantization_config": GPTQ}
        assert not source.warnings


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"bits": 8}},
        {"compression_config": {"bits": 8}},
        {"text_config": {"quantization_config": {"bits": 8}}},
    ],
)
def test_open_source_prefers_the_quantization_of_config(save: Save, config: dict[str, object]) -> None:
    folder = save(WEIGHTS, config=config)
    (folder / "quantize_config.json").write_text(json.dumps(GPTQ))
    assert open_source(str(folder)).config == config


def test_open_source_warns_about_odd_quantization_files(save: Save) -> None:
    folder = save(WEIGHTS)
    (folder / "quantize_config.json").write_text("[]")
    source = open_source(str(folder))
    assert source.config == {}
    assert any("quantize_config.json" in w for w in source.warnings)
    (folder / "quantize_config.json").write_text(json.dumps(GPTQ))
    (folder / "quant_config.json").write_text("{}")
    source = open_source(str(folder))
    assert source.config == {"quantization_config": GPTQ}
    assert any("quant_config.json" in w for w in source.warnings)


# The judge is transformers: what `from_pretrained` has in memory must be what is read here.


@pytest.fixture(scope="module")
def llama() -> tuple[transformers.LlamaConfig, dict[str, torch.Tensor]]:
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=2, vocab_size=16,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return config, dict(transformers.LlamaForCausalLM(config).state_dict())


CHANGES = [
    "as it is",
    "lists missing",
    "omits present",
    "wrong shard",
    "twice",
    "single too",
    "overlay",
    "config names it",
]


@pytest.mark.parametrize("change", CHANGES)
def test_read_checkpoint_reads_what_transformers_loads(
    tmp_path: Path, llama: tuple[transformers.LlamaConfig, dict[str, torch.Tensor]], change: str
) -> None:
    config, state = llama
    names = list(state)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    half = len(names) // 2
    weight_map = {name: M2[i >= half] for i, name in enumerate(names)}
    parts = {shard: {n: state[n].clone() for n in names if weight_map[n] == shard} for shard in M2}
    other = {n: t + 1 for n, t in state.items()}
    if change == "lists missing":
        weight_map["mtp.fc.weight"] = M2[1]
    elif change == "omits present":
        weight_map = {n: s for n, s in weight_map.items() if "layers.1." not in n}
    elif change == "wrong shard":
        weight_map[q_proj] = M2[1] if weight_map[q_proj] == M2[0] else M2[0]
    elif change == "twice":
        parts[M2[1]][q_proj] = other[q_proj]
        parts[M2[0]][q_proj] = state[q_proj]
        weight_map[q_proj] = M2[0]
    elif change == "single too":
        parts["model.safetensors"] = other
    elif change == "overlay":
        parts["model-overlay-00001.safetensors"] = {q_proj: other[q_proj]}
        weight_map[q_proj] = "model-overlay-00001.safetensors"
    for shard, tensors in parts.items():
        save_file(tensors, tmp_path / shard, metadata={"format": "pt"})
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(tmp_path)
    if change == "config names it":
        save_file(other, tmp_path / "other.safetensors", metadata={"format": "pt"})
        data = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(data | {"transformers_weights": "other.safetensors"}))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    checkpoint = read_checkpoint(open_source(str(tmp_path)))
    read = {
        tensor.name: torch.frombuffer(bytearray(shard.read(tensor.start, tensor.stop)), dtype=torch.float32)
        for shard, tensor in checkpoint.tensors
    }
    assert read.keys() == loaded.keys()
    assert all(torch.equal(read[name], loaded[name].flatten()) for name in read)
    assert bool(checkpoint.warnings) == (change != "as it is")
