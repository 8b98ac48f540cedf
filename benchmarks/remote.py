"""The cost of a scan over the network: `python -m benchmarks.remote`.

    70B      a repo with the shapes of Llama-3-70B, made up by a server on loopback: `plan`, and a scan of one group,
             with the bytes and requests that the server counted and the peak memory of the scanning process
    671B     `plan` of a mixture of experts
    rate     a checkpoint behind a server of 200 Mbit/s: the scan's time over the slower of network and computing

The server is a separate process, but it shares the processors with the scan.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from spectrum_stream import plan, scan
from tests.support.hub_server import Blob, HubServer, deepseek_671b, llama3_70b

from .contenders import Task, parts, warm_up
from .worker import Worker

REPO = "org/model"
RATE_NBYTES_S = 200e6 / 8
_MAX_OVER_SLOWER = 1.15
_MAX_WASTE = 1.02


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remote", description="Scans over the network.")
    parser.add_argument("--model", type=Path, help="a local checkpoint to serve at 200 Mbit/s")
    parser.add_argument("--group", default="self_attn.k_proj", help="the group of the 70B repo to scan")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, help="save the figures as JSON")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"70B": _large(llama3_70b, arguments.group), "671B": _large(deepseek_671b, None)}
    if arguments.model is not None:
        figures["rate"] = [_at_rate(arguments.model) for _ in range(arguments.repetitions)]
    print(json.dumps(figures, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2))


def _large(repo: Callable[[], dict[str, Blob]], group: str | None) -> dict[str, Any]:
    with _served(repo, None) as (url, traffic), _worker(url) as worker:
        planned = worker.run(_plan, group).value
        requests, _ = traffic()
        figures: dict[str, Any] = {"plan_s": planned["seconds"], "plan_requests": requests, **planned["plan"]}
        if group is not None:
            before = traffic()
            watched = worker.run(_scan, group)
            after = traffic()
            figures |= {
                "scan_s": watched.value,
                "sent_nbytes": after[1] - before[1],
                "sent_over_needed": (after[1] - before[1]) / planned["plan"]["read_nbytes"],
                "scan_requests": after[0] - before[0],
                "peak_anonymous_nbytes": watched.peak_anonymous,
            }
        return figures


def _at_rate(model: Path) -> dict[str, float]:
    """Scan once in each way at the limited rate.

    Add the time of computing alone and of the network alone.
    """
    with Worker(warm_up) as worker:
        apart = worker.run(parts, Task(str(model), "cpu")).value
    figures = {"computing_s": apart.computing}
    for fetch in ("range", "download"):
        with _served(lambda: model, RATE_NBYTES_S) as (url, traffic), _worker(url) as worker:
            seconds = worker.run(_scan_by, fetch).value
            network_s = traffic()[1] / RATE_NBYTES_S
        figures |= {
            f"{fetch}_s": seconds,
            f"{fetch}_network_s": network_s,
            f"{fetch}_over_slower": seconds / max(network_s, apart.computing),
        }
    return figures


def _plan(group: str | None) -> dict[str, Any]:
    started = time.perf_counter()
    made = plan(REPO, groups=None if group is None else [group])
    seconds = time.perf_counter() - started
    kept = ("matrices", "shards", "read_nbytes", "transfers", "fetches", "peak_nbytes")
    return {"seconds": seconds, "plan": {key: value for key, value in made.to_dict().items() if key in kept}}


def _scan(group: str) -> float:
    started = time.perf_counter()
    scan(REPO, groups=[group], fresh=True)
    return time.perf_counter() - started


def _scan_by(fetch: str) -> float:
    started = time.perf_counter()
    scan(REPO, fetch=fetch, fresh=True)
    return time.perf_counter() - started


@contextmanager
def _worker(url: str) -> Iterator[Worker]:
    # The process of the worker inherits this variable.
    os.environ["HF_ENDPOINT"] = url
    with Worker(warm_up) as worker:
        worker.wait_until_ready()
        yield worker


@contextmanager
def _served(
    repo: Callable[[], Any], rate_nbytes_s: float | None
) -> Iterator[tuple[str, Callable[[], tuple[int, int]]]]:
    """Serve a repo in another process.

    Yield its address, and a function that counts requests and bytes sent.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, repo, rate_nbytes_s), daemon=True)
    process.start()

    def traffic() -> tuple[int, int]:
        ours.send(None)
        counted: tuple[int, int] = ours.recv()
        return counted

    try:
        yield ours.recv(), traffic
    finally:
        process.terminate()
        process.join()


def _serve(connection: Connection, repo: Callable[[], Any], rate_nbytes_s: float | None) -> None:
    with HubServer({REPO: repo()}, rate_nbytes_s=rate_nbytes_s) as server:
        connection.send(server.url)
        while True:
            connection.recv()
            connection.send((len(server.requests), server.sent_nbytes))


if __name__ == "__main__":
    main()
