"""A coverage-guided fuzzer of the answers of a server, to be run by hand.

    pip install atheris && python -m tests.checkpoint.fuzz_api -max_total_time=300

The input is the answer of the API, a config, the first bytes of a shard and the headers of these answers. Only errors
of this package may be raised, and they must not contain secrets.
"""

import json
import os
import tempfile

import atheris

from ..support.fuzzing import fuzz

with atheris.instrument_imports(include=["spectrum_stream", "huggingface_hub.utils._http"]):
    from huggingface_hub.utils import httpx

    from spectrum_stream.checkpoint import client, open_source, ranges
    from spectrum_stream.errors import SpectrumStreamError

_COMMIT = "c0ffee" + "0" * 34
_TOKEN = "hf_" + "Secret7" * 5
_SEPARATOR = b"\n--\n"
_HEADERS = ("Location", "ETag", "Content-Range", "Content-Length", "Retry-After", "Ratelimit", "X-Linked-Size",
            "X-Repo-Commit", "Content-Encoding", "X-Error-Code", "X-Error-Message", "Link")  # fmt: skip
_STATUS = (200, 206, 301, 302, 400, 401, 403, 404, 416, 429, 500, 503, 101, 204)

_answers: list[bytes] = []


def _answer(request: httpx.Request) -> httpx.Response:
    path = request.url.path
    which = 0 if path.startswith("/api/") else 1 if path.endswith(".json") else 2
    part = _answers[which] if which < len(_answers) else b""
    # The first byte is the status, and the first lines are headers, by number.
    status, rest = _STATUS[part[0] % len(_STATUS)] if part else 200, part[1:]
    headers: list[tuple[bytes, bytes]] = []
    while rest[:1] and rest[0] < len(_HEADERS):
        line, _, after = rest[1:].partition(b"\n")
        headers.append((_HEADERS[rest[0]].encode(), line))
        rest = after
    return httpx.Response(status, headers=headers, stream=httpx.ByteStream(rest))


def one(data: bytes) -> None:
    _answers[:] = data.split(_SEPARATOR, 2)
    try:
        open_source("org/model")
    except SpectrumStreamError as error:
        assert error.reason
        assert _TOKEN not in f"{error} {error.hint} {error.__cause__}"


def main() -> None:
    made = httpx.Client(transport=client._Guard(httpx.MockTransport(_answer)), follow_redirects=True)
    ranges.client = lambda: made  # type: ignore[attr-defined]
    ranges._FIRST_WAIT_S = 0.0
    ranges.MAX_WAIT_S = 0.0  # type: ignore[attr-defined]
    ranges._log.disabled = True
    shard = b'\x10\x00\x00\x00\x00\x00\x00\x00{"a":{"dtype":1}'
    ranged = b"\x01\x02bytes 0-%d/%d\n%s" % (len(shard) - 1, len(shard), shard)
    api = {"sha": _COMMIT, "siblings": [{"rfilename": "model.safetensors"}, {"rfilename": "config.json"}]}
    seeds = (
        b"\x00" + json.dumps(api).encode() + _SEPARATOR + b'\x00{"model_type": "llama"}' + _SEPARATOR + ranged,
        b"\x00" + json.dumps(api).encode() + _SEPARATOR + b"\x07\x09EntryNotFound\n" + _SEPARATOR + b"\x00" + shard,
        b"\x05\x0aInvalid credentials in Authorization header\n" + _TOKEN.encode(),
        b"\x03\x00http://elsewhere.example:99999/x?Signature=1\n",
        b'\x09\x05"api";r=0;t=5\n{"error": "slow down"}',
    )
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"HF_ENDPOINT": "http://hub.example", "HF_TOKEN": _TOKEN, "HF_HOME": home}
        fuzz(one, seeds)


if __name__ == "__main__":
    main()
