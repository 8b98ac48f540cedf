"""A program for `LimitedProcess`: it does what a request says, good or bad."""

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from spectrum_stream.model.limited_process import answer_requests

NBYTES = 200_000_000


def serve() -> None:
    answer_requests(_answer, NBYTES)


def _answer(request: Any) -> Any:
    match request:
        case {"print": text}:
            sys.stdout.write(text)
            sys.stdout.flush()
            os.write(1, text.encode())
        case {"exit": code}:
            os._exit(code)
        case {"signal": number}:
            os.kill(os.getpid(), number)
        case {"sleep": seconds}:
            time.sleep(seconds)
        case {"allocate": nbytes}:
            try:
                return len(bytearray(nbytes))
            except MemoryError:
                return "MemoryError"
        case {"connect": port}:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1)
            except OSError as error:
                return type(error).__name__
        case {"long": nbytes}:
            return "x" * nbytes
        case "state":
            return {"environment": dict(os.environ), "path": sys.path, "pid": os.getpid(), "folder": str(Path.cwd())}
    return request
