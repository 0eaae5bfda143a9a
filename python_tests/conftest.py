"""Fixtures for every test."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of conformance tensors and real data beside the repository; tests that need it are skipped
    without.
    """
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which is not here")
    return SHARED
