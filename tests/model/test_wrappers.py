"""Prefixes of wrappers, in a checkpoint and in a trainer."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.model.wrappers import Change, find_change, remove_wrappers, without_components

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{name}.weight" for i in range(3) for name in ("mlp.up_proj", "self_attn.q_proj")),
    "model.norm.weight",
    "lm_head.weight",
]


def fits(name: str) -> bool:
    return name in NAMES


@pytest.mark.parametrize(
    ("wrapped", "name"),
    [
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("model.layers._orig_mod.0._checkpoint_wrapped_module.q.weight", "model.layers.0.q.weight"),
        ("_fsdp_wrapped_module._fsdp_wrapped_module.a.weight", "a.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("my_orig_mod.a.weight", "my_orig_mod.a.weight"),
        ("a._orig_mod", "a._orig_mod"),
    ],
)
def test_components_of_wrappers_are_removed_anywhere(wrapped: str, name: str) -> None:
    assert without_components(wrapped) == name


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "base_model.model.", "pretrained_model.", "_forward_module.", "a.b.c."],
)
def test_shared_prefix_is_removed_from_a_checkpoint(prefix: str) -> None:
    wrapped = [prefix + name for name in NAMES]
    found, removed = remove_wrappers(wrapped, wrapped, fits)
    assert [found[name] for name in wrapped] == NAMES
    assert removed == (prefix,)


def test_prefix_stays_if_the_rest_does_not_fit_the_model() -> None:
    wrapped = [f"net.blocks.{i}.weight" for i in range(4)]
    assert remove_wrappers(wrapped, wrapped, fits) == ({name: name for name in wrapped}, ())


def test_prefix_of_a_few_tensors_is_not_that_of_a_wrapper() -> None:
    names = [*NAMES[:-1], "draft.lm_head.weight"]
    found, removed = remove_wrappers(names, names, fits)
    assert found["draft.lm_head.weight"] == "draft.lm_head.weight" and not removed


def test_prefix_stays_where_two_tensors_would_get_one_name() -> None:
    names = [*NAMES, *(f"_orig_mod.{name}" for name in NAMES)]
    found, removed = remove_wrappers(names, names, fits)
    assert len(set(found.values())) == len(names) and not removed


@given(st.lists(st.text(alphabet="ab._0", min_size=1, max_size=12), unique=True, max_size=12))
def test_names_without_wrappers_are_never_the_same(names: list[str]) -> None:
    names = [*names, *(f"_orig_mod.{name}" for name in names), *(f"module.{name}" for name in NAMES)]
    found, _ = remove_wrappers(names, names, fits)
    assert found.keys() == set(names) and len(set(found.values())) == len(found)


PREFIXES = st.sampled_from(["", "model.", "0.auto_model.", "pretrained_model.", "net.model.", "module.module."])


@given(PREFIXES, PREFIXES)
def test_change_is_found_for_any_two_prefixes(removed: str, added: str) -> None:
    names, targets = [removed + name for name in NAMES], [added + name for name in NAMES]
    changed = find_change(names, targets).apply_to_all(names)
    assert [changed[name] for name in names] == targets


@given(st.lists(st.text(alphabet="ab.1", min_size=1, max_size=9), unique=True, max_size=9), PREFIXES, PREFIXES)
def test_change_never_gives_two_names_the_same(names: list[str], removed: str, added: str) -> None:
    changed = Change(removed, added).apply_to_all(names)
    assert len(set(changed.values())) == len(changed)


def test_change_never_moves_a_layer() -> None:
    names = [f"model.layers.{i}.q_proj" for i in range(4)]
    assert find_change(names, ["model.layers.0.q_proj", "model.layers.99.q_proj"]) == Change()


def test_change_is_found_in_linear_time() -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(100) for e in range(100)]
    start = time.process_time()
    assert find_change(names, [f"0.auto_{name}" for name in names]).added == "0.auto_model."
    assert time.process_time() - start < 5
