"""Functions of the libraries that write quantized weights, for libraries that cannot be imported as a whole."""

import importlib
import sys
import warnings
from importlib.metadata import distribution
from types import ModuleType
from typing import Any

import torch


def import_auto_round(module: str) -> Any:
    """Import one module of auto-round without the package around it, which needs its dependencies.

    Its files import a function of the package that chooses a device.
    """
    root = str(distribution("auto-round").locate_file(""))
    if "auto_round" not in sys.modules:
        for name in ("auto_round", "auto_round.utils", "auto_round.export", "auto_round.export.export_to_awq"):
            package = ModuleType(name)
            package.__path__ = [f"{root}/{name.replace('.', '/')}"]
            sys.modules[name] = package
        sys.modules["auto_round.utils"].get_packing_device = lambda device: torch.device("cpu")  # type: ignore[attr-defined]
    return importlib.import_module(module)


def auto_round_linear(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, size: int, less_one: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Pack a weight with auto-round.

    Args:
        weight: (n, m).
        scales, zeros: (n, m / size).
        less_one: whether zero points are stored less one.

    Returns:
        the tensors of the module, and the weight (m, n) by which the module multiplies.
    """
    name = "qlinear_torch_zp" if less_one else "qlinear_torch"
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    module = import_auto_round(f"auto_round_extension.torch.{name}").QuantLinear(bits, size, *weight.T.shape, False)
    module.device = "cpu"
    with warnings.catch_warnings():
        # It copies a tensor with torch.tensor().
        warnings.simplefilter("ignore", UserWarning)
        module.pack(linear, scales, zeros)
    state = dict(module.state_dict())
    # In half precision its product would be rounded.
    module.scales = module.scales.float()
    return state, module(torch.eye(weight.shape[1]))
