"""Makes bench/ importable, which lies beside the package in a checkout; skips where it is absent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
if not (REPO / "bench" / "run.py").exists():
    pytest.skip("needs the checkout: bench/ is not part of the package", allow_module_level=True)
sys.path.append(str(REPO))
pytest.importorskip("peft")
