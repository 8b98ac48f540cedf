"""Limits of memory, as `ulimit -v` sets them: libraries in C end the process if they get none during their import."""

import os
import warnings
from importlib import import_module

try:
    import resource
except ImportError:
    # Windows has no such limits.
    _LIMITS: tuple[int, ...] = ()
else:
    _LIMITS = tuple(getattr(resource, name) for name in ("RLIMIT_AS", "RLIMIT_DATA") if hasattr(resource, name))


def limit_threads() -> None:
    """Let OpenBLAS, which numpy loads, start no threads if memory is limited.

    It reserves memory for each, and if it cannot start one, it prints lines of its own and interrupts the process.
    The singular values come from torch, so this costs no time.
    """
    if _is_limited():
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def try_import(module: str) -> None:
    """Import a module of this package in a copy of the process first, if memory is limited.

    An abort in C then ends the copy.

    Raises:
        MemoryError: the copy ended. Errors of Python are left to the import in this process.
    """
    if not _is_limited() or not hasattr(os, "fork"):
        return
    with warnings.catch_warnings():
        # Other threads may wait for a server, and the copy does not have them.
        warnings.simplefilter("ignore")
        try:
            child = os.fork()
        except OSError:
            return
    if child:
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status):
            raise MemoryError(f"the import of {module} ended the process")
        return
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        import_module(module)
    finally:
        os._exit(0)


def _is_limited() -> bool:
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in _LIMITS)
