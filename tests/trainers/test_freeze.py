"""`freeze` on small torch models: the selected parameters are trainable, or the model is unchanged."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from spectrum_stream import freeze, select
from spectrum_stream.errors import FreezeError, ResultError
from spectrum_stream.results.result import Module
from spectrum_stream.trainers import axolotl


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.gate = nn.Linear(4, 4, bias=False)
        self.gate_proj = nn.Linear(4, 4, bias=False)


class Model(nn.Module):
    """Make a model with the parameter names of a small language model."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(8, 4)
        self.model.layers = nn.ModuleList([Attention() for _ in range(12)])
        self.lm_head = nn.Linear(4, 8, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def write_yaml(folder: Path, *patterns: str) -> Path:
    path = folder / "s.yaml"
    path.write_text("unfrozen_parameters:\n" + "".join(f"- {p}\n" for p in patterns))
    return path


def test_freeze_trains_the_parameters_that_a_file_names(tmp_path: Path) -> None:
    model = Model()
    report = freeze(model, write_yaml(tmp_path, "^lm_head.weight$", "model.layers.1.q_proj"))
    assert trainable(model) == {
        "model.embed_tokens.weight",
        "model.layers.1.q_proj.weight",
        "model.layers.1.q_proj.bias",
    }
    assert report.trainable_count == 32 + 16 + 4
    assert report.total_count == sum(p.numel() for p in model.parameters())
    assert 0 < report.trainable_share < 0.1


def test_freeze_accepts_a_selection_without_a_file() -> None:
    model = Model(tied=False)
    modules = [Module(f"model.layers.{i}.q_proj", "q_proj", float(i)) for i in range(12)]
    report = freeze(model, select(modules, 10))
    assert {n for n in report.trainable if "layers" in n} == {
        "model.layers.11.q_proj.weight",
        "model.layers.11.q_proj.bias",
    }
    assert {"lm_head.weight", "model.embed_tokens.weight"} < trainable(model)


def test_freeze_again_replaces_the_earlier_selection() -> None:
    model = Model()
    for layer in (1, 2):
        freeze(model, select([Module(f"model.layers.{layer}.gate_proj", "g", 1.0)], 100))
        assert {n for n in trainable(model) if "layers" in n} == {f"model.layers.{layer}.gate_proj.weight"}


def test_freeze_ignores_a_head_and_an_embedding_that_the_model_lacks() -> None:
    model = nn.Module()
    model.encoder = nn.ModuleList([nn.Linear(2, 2)])
    freeze(model, select([Module("encoder.0", "", 1.0)], 100))
    assert trainable(model) == {"encoder.0.weight", "encoder.0.bias"}


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("model.layers.99.q_proj", "no_match"),
        ("layers.1.q_proj", "no_match"),
        ("model.layers.1.q_proj[:2]", "row_range"),
        ("model.layers.(1", "bad_pattern"),
    ],
)
def test_freeze_fails_for_a_wrong_pattern_and_changes_nothing(tmp_path: Path, pattern: str, reason: str) -> None:
    model = Model()
    before = trainable(model)
    with pytest.raises(FreezeError) as error:
        freeze(model, write_yaml(tmp_path, "model.layers.0.q_proj", pattern))
    assert error.value.reason == reason
    assert trainable(model) == before


def test_freeze_fails_if_nothing_would_be_trained(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(FreezeError) as error:
        freeze(model, write_yaml(tmp_path, "^lm_head.weight$"))
    assert error.value.reason == "all_frozen"
    assert len(trainable(model)) == 2


def test_freeze_fails_for_a_missing_file() -> None:
    with pytest.raises(ResultError) as error:
        freeze(Model(), "no/such.yaml")
    assert error.value.reason == "no_such_result"


def test_freeze_fails_for_weights_without_gradients() -> None:
    model = nn.Module()
    model.packed = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(FreezeError) as error:
        freeze(model, select([Module("packed", "", 1.0, "packed")], 100))
    assert error.value.reason == "not_trainable"


def test_training_moves_only_the_chosen_weights() -> None:
    model = Model()
    freeze(model, select([Module("model.layers.3.gate_proj", "g", 1.0)], 100))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    layer = model.get_submodule("model.layers.3")
    assert isinstance(layer, Attention)
    for _ in range(2):
        hidden = layer.gate_proj(layer.q_proj(model.get_submodule("model.embed_tokens")(torch.arange(8))))
        loss = torch.Tensor(model.lm_head(hidden)).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"model.layers.3.gate_proj.weight", "model.embed_tokens.weight"}


def test_freeze_does_not_train_an_unscanned_module_with_a_chosen_prefix() -> None:
    # The result has only `gate`, a prefix of `gate_proj` in the model.
    model = Model(tied=False)
    modules = [Module(f"model.layers.{i}.gate", "gate", float(i)) for i in range(12)]
    report = freeze(model, select(modules, 10))
    assert {name for name in report.trainable if "layers" in name} == {"model.layers.11.gate.weight"}


def peft_model(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    model.prepare_inputs_for_generation = None  # type: ignore[assignment]
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
    wrapped: nn.Module = peft.get_peft_model(model, config)
    return wrapped


class Lightning(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: cast(nn.Module, torch.compile(model, backend="eager")),
    "distributed": lambda model: nn.parallel.DistributedDataParallel(model),
    "adapted": peft_model,
    "both": lambda model: cast(nn.Module, torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")),
    "lightning": Lightning,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.usefixtures("process_group")
def test_freeze_finds_the_parameters_of_a_wrapped_model(tmp_path: Path, wrapper: str, as_file: bool) -> None:
    model = Model(tied=False)
    names = [name for name, _ in model.named_parameters()]
    modules = [Module(f"model.layers.{i}.{kind}", kind, float(i)) for i in range(12) for kind in ("q_proj", "gate")]
    selection = select(modules, 10)
    chosen = {model.get_parameter(name) for name in ("model.layers.11.q_proj.weight", "model.layers.11.gate.weight")}
    wrapped = WRAPPERS[wrapper](model)
    assert not {name for name, _ in wrapped.named_parameters()} & set(names)
    path = tmp_path / "s.yaml"
    path.write_text(axolotl.Axolotl().render(selection, names))
    report = freeze(wrapped, path if as_file else selection)
    trained = {p for _, p in wrapped.named_parameters() if p.requires_grad}
    assert {p for p in trained if p.shape == (4, 4)} == chosen
    assert set(report.trainable) == {name for name, p in wrapped.named_parameters() if p.requires_grad}
    with pytest.raises(FreezeError):
        freeze(wrapped, write_yaml(tmp_path, "model.layers.99.q_proj"))
