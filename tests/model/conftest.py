"""Fixtures for the tests of names."""

import json
from typing import Any

import pytest

from spectrum_stream.model import transformers_names


class Here:
    """Runs the work of `InstalledModel`'s process in this process.

    The import of transformers in another process takes longer than most tests.
    """

    def __init__(self, module: str) -> None:
        assert module == transformers_names.__name__
        self._server = transformers_names._Server()

    def ask(self, request: Any, seconds: float) -> Any:
        return json.loads(json.dumps(self._server.answer(json.loads(json.dumps(request)))))

    def close(self) -> None:
        del self._server


@pytest.fixture
def transformers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_names, "LimitedProcess", Here)
