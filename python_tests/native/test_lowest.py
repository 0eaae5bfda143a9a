"""The oldest releases that the project allows are those that `make test-lowest` installs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

REPO = Path(__file__).parents[2]


def test_every_lower_bound_is_installed_by_make_test_lowest():
    settings = tomllib.loads((REPO / "pyproject.toml").read_text())
    bounds = settings["project"]["dependencies"] + settings["project"]["optional-dependencies"]["train"]
    bounds += [bound for bound in settings["build-system"]["requires"] if bound.startswith("pybind11")]
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (REPO / "requirements-lowest.txt").read_text(), re.MULTILINE))
    asked = dict(bound.split(">=") for bound in bounds)
    assert {name: short(pinned[name]) for name in asked} == {name: short(bound) for name, bound in asked.items()}
    assert f"torch>={asked['torch']}" in (REPO / "README.md").read_text()
    assert f"torch>={asked['torch']}" in (REPO / "setup.py").read_text()
    assert f"torch>={asked['torch']}" in (REPO / "moerge_ext" / "native" / "health.py").read_text()


def short(version: str) -> str:
    """Without the zeros at its end: 2.10.0 as 2.10, 5.0 as 5."""
    return re.sub(r"(\.0)+$", "", version)
