"""Programs that some tests need and that pip does not install."""

import shutil

import pytest


def executable(*places: str) -> str:
    """Return the first of these that exists, or skip the test."""
    found = next((path for place in places if (path := shutil.which(place))), None)
    if found is None:
        pytest.skip(f"needs {places[0]}")
    return found
