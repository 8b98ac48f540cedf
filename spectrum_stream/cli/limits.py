"""Import libraries under a memory limit, such as `ulimit -v`.

Libraries in C end the process if they get no memory during their import.
"""

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

    OpenBLAS reserves memory for each thread. If it cannot start one, it prints messages and interrupts the process.
    torch computes the singular values, so fewer threads of numpy cost no time.
    """
    if _is_limited():
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def try_import(module: str) -> None:
    """Try the import of a module in a copy of the process, if memory is limited.

    If a library aborts in C, only the copy ends.

    Raises:
        MemoryError: the copy ended. Python's own errors appear when this process imports the module.
    """
    if not _is_limited() or not hasattr(os, "fork"):
        return
    with warnings.catch_warnings():
        # Other threads may be waiting for a server. The copy does not have them.
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
