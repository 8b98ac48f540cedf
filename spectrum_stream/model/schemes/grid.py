"""The scales of float8 and int8: one for the whole weight, one a row, or one a block."""

from ...checkpoint.header import TensorInfo
from ..no_score import NoScore
from ..quantization import Packing, Quantization, Unreadable
from .companions import EXPONENT_DTYPES, FLOAT_DTYPES, Companion, Companions


def find_scales(weight: TensorInfo, companions: Companions) -> Companion | None:
    """Find the scales of a weight by either name.

    Both are factors, in spite of `_inv`.
    """
    return companions.get(f"{weight.name}_scale_inv", f"{weight.name}_scale")


def quantize_by_grid(
    name: str,
    scales: Companion,
    shape: tuple[int, int],
    block: tuple[int, int],
    expert: tuple[int, int] | None = None,
) -> Quantization | Unreadable:
    """Describe an (n, m) weight by the grid that the shape of its scales fits.

    The last blocks of a side may be smaller.

    Args:
        name: the format of the stored values, `float8`.
        block: (rows, columns) of a block, if the scales are by block.
        expert: (index, count), if the scales are those of fused experts.
    """
    if scales.info.dtype not in (*FLOAT_DTYPES, *EXPONENT_DTYPES):
        return Unreadable(NoScore.BAD_SCALES, f"scales of dtype {scales.info.dtype}")
    (n, m), (rows, columns) = shape, block
    scales_shape = scales.info.shape if expert is None else scales.info.shape[1:]
    rows, columns = min(rows, n), min(columns, m)
    grids: dict[str, tuple[tuple[int, int], set[tuple[int, ...]]]] = {
        "tensor": ((n, m), {(), (1,), (1, 1)}),
        "row": ((1, m), {(n,), (n, 1)}),
        "block": ((rows, columns), {(-(-n // rows), -(-m // columns))}),
    }
    for unit, (sides, shapes) in grids.items():
        if scales_shape in shapes:
            grid = (-(-n // sides[0]), -(-m // sides[1]))
            return Quantization(
                scheme=f"{name} by {unit}",
                packing=Packing.NONE,
                stored_shape=shape,
                shape=shape,
                block=sides,
                parts=(scales.part("scales", grid, expert or (0, 1)),),
            )
    return scales.misfit(shape)
