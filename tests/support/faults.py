"""Devices with wrong products or eigenvalues, like a faulty BLAS, driver or GPU."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectrum_stream.numerics.dequantize import Weights
from spectrum_stream.numerics.device import Device

# A function from K, (batch, n, n), and its right eigenvalues, (batch, n), ascending, to wrong eigenvalues.
WrongEigenvalues = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# A function from a product of any shape to a wrong one.
WrongProduct = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class FaultyDevice(Device):
    """A device on the CPU with faults.

    Attributes:
        wrong_eigenvalues, wrong_product: the faults; None for right results.
        is_apart: whether it counts as a device other than the CPU. The CPU itself has no faults then.
    """

    wrong_eigenvalues: WrongEigenvalues | None = None
    wrong_product: WrongProduct | None = None
    is_apart: bool = False

    def __str__(self) -> str:
        return "faulty" if self.is_apart else "cpu"

    @property
    def is_cpu(self) -> bool:
        return not self.is_apart

    def blocks(self, ws: Sequence[Weights], dtype: torch.dtype | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        if self.wrong_product is None:
            yield from Device.blocks(self, ws, dtype)
            return
        faulty = _make_faulty_class(self.wrong_product)
        for part, block in Device.blocks(self, ws, dtype):
            yield part, block.as_subclass(faulty)

    def eigvalsh(self, k: torch.Tensor) -> torch.Tensor:
        found = Device.eigvalsh(self, k)
        return found if self.wrong_eigenvalues is None else self.wrong_eigenvalues(k, found)


def _make_faulty_class(wrong: WrongProduct) -> type[torch.Tensor]:
    """Make a class of tensors with wrong products. Their other functions are right."""

    class Faulty(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.__name__
            if name not in ("addmm_", "baddbmm_", "bmm"):
                return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
            plain = [x.as_subclass(torch.Tensor) for x in args]
            product = wrong(torch.matmul(plain[-2], plain[-1]))
            return product if name == "bmm" else plain[0].add_(product)

    return Faulty


def off_at_random(size: float) -> WrongProduct:
    """Make each entry of a product wrong by this relative standard deviation."""
    generator = torch.Generator().manual_seed(0)

    def wrong(product: torch.Tensor) -> torch.Tensor:
        return product * (1 + size * torch.randn(product.shape, dtype=product.dtype, generator=generator))

    return wrong


def off_by_a_factor(size: float) -> WrongProduct:
    """Make all products larger by this relative size."""
    return lambda product: product * (1 + size)
