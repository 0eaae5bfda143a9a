"""`moerge doctor`: what was built, whether it fits this machine, what to do if not."""

from __future__ import annotations

import argparse

from ..native.health import examine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0 when all fits, 1 otherwise."""
    report = examine()
    width = max(len(name) for name, _ in report.lines)
    for name, value in report.lines:
        print(f"{name:<{width}}  {value}")
    print()
    if report.ok:
        print("All fits.")
        return 0
    for problem, mend in report.problems:
        print(f"PROBLEM: {problem}\n{mend}\n")
    return 1
