"""`moerge lm-eval`: EleutherAI's lm-evaluation-harness, which then knows `--model moerge`."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing of our own: what follows the command is lm-eval's, see `moerge lm-eval run --help`."""
    parser.usage = "%(prog)s [run] --model moerge --model_args pretrained=DIR,experts=DIR:DIR,method=NAME --tasks ..."
    parser.epilog = (
        "model_args beside those of lm-eval's own --model hf: experts (folders or hub ids, separated by ':'; * and ? "
        "are expanded), method (as in `moerge eval --methods`, such as glider_code/alpha=10), and the options of the "
        "embedder and the writer of `moerge eval` with _ for -, such as embedder=MODEL."
    )


def run(args: argparse.Namespace) -> int:
    """lm-eval's own command with `args.rest`; returns the exit status. ImportError without lm-eval."""
    from .harness import MoergeLM  # noqa: F401 (registers itself)

    from lm_eval.__main__ import cli_evaluate  # isort: skip

    before, sys.argv = sys.argv, ["lm-eval", *args.rest]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
