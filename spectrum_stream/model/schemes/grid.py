"""The scales of float8 and int8: one for the whole weight, one a row, a column, a group of a row, or a block."""

from collections.abc import Sequence

from ..matrix import FLOAT_DTYPES
from ..no_score import NoScore
from ..quantization import Packing, Quantization, Unreadable
from .companions import EXPONENT_DTYPES, Companion

# The columns that share a power of two in the MX formats.
_MX_COLUMNS = 32


def quantize_by_grid(
    name: str,
    scales: Companion,
    shape: tuple[int, int],
    blocks: Sequence[tuple[int, int]],
    expert: tuple[int, int] | None = None,
    *,
    flat_is_by_row: bool = False,
) -> Quantization | Unreadable:
    """Describe an (n, m) weight by the grid that the shape of its scales fits.

    The last blocks of a side may be smaller. Powers of two, one for 32 columns of a row, are those of MXFP8.

    Args:
        name: the format of the stored values, `float8`.
        blocks: the (rows, columns) of a block that are possible, if the scales are by block.
        expert: (index, count), if the scales are those of fused experts.
        flat_is_by_row: whether scales (n,) of a square weight are known to be those of its rows.
    """
    if scales.info.dtype not in (*FLOAT_DTYPES, *EXPONENT_DTYPES):
        return Unreadable(NoScore.BAD_SCALES, f"scales of dtype {scales.info.dtype}")
    n, m = shape
    scales_shape = scales.info.shape if expert is None else scales.info.shape[1:]
    if scales_shape == (n,) == (m,) and n > 1 and not flat_is_by_row:
        return Unreadable(NoScore.BAD_SCALES, f"one scale for each of {n} rows, or for each of {n} columns")
    if scales_shape in ((), (1,), (1, 1)):
        return describe_grid(name, "tensor", scales, shape, (n, m), expert)
    if scales_shape in ((n,), (n, 1)):
        return describe_grid(name, "row", scales, shape, (1, m), expert)
    sides = [(min(rows, n), min(columns, m)) for rows, columns in blocks]
    if scales.info.dtype in EXPONENT_DTYPES:
        sides.append((1, min(_MX_COLUMNS, m)))
    fitting = {(rows, columns) for rows, columns in sides if scales_shape == (-(-n // rows), -(-m // columns))}
    # The scales of a small weight may fit several blocks of the config.
    if len(fitting) != 1:
        return scales.misfit(shape)
    (block,) = fitting
    return describe_grid(name, "group" if block[0] == 1 else "block", scales, shape, block, expert)


def describe_grid(
    name: str,
    unit: str,
    scales: Companion,
    shape: tuple[int, int],
    sides: tuple[int, int],
    expert: tuple[int, int] | None = None,
) -> Quantization:
    """Describe an (n, m) weight with one scale for each block of these sides.

    Args:
        unit: the word for such a block.
    """
    grid = (-(-shape[0] // sides[0]), -(-shape[1] // sides[1]))
    return Quantization(
        scheme=f"{name} by {unit}",
        packing=Packing.NONE,
        stored_shape=shape,
        shape=shape,
        block=sides,
        parts=(scales.part("scales", grid, expert or (0, 1)),),
    )
