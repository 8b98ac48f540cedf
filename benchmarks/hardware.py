"""The processor in words.

This module uses only the standard library, because a machine with a GPU may have little else.
"""

import platform
from pathlib import Path


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def matrix_units(cpuinfo: Path) -> str:
    """Describe the matrix units of the processor for bfloat16, by its flags in Linux."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except FileNotFoundError:
        return "matrix units unknown"
    # All cores have the same flags. Arm calls them features.
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    if "Features" in flags:
        return "BF16" if "bf16" in flags else "no BF16"
    amx = "AMX" if "amx_bf16" in flags else "no AMX"
    return f"{amx}, AVX512-BF16" if "avx512_bf16" in flags else amx
