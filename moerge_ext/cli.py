"""The `moerge` command."""

from __future__ import annotations

import argparse
import sys

from ._version import __version__


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    return doctor.run()


def _methods(args: argparse.Namespace) -> int:
    from rich.console import Console

    from .methods import table

    console = Console() if sys.stdout.isatty() else Console(width=160)
    table.render(console, verbose=args.verbose)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from . import generate

    return generate.run(args)


def _train_gates(args: argparse.Namespace) -> int:
    from .training import cli

    return cli.run(args)


def _describe(args: argparse.Namespace) -> int:
    from .query import cli

    return cli.run(args)


def _demo(args: argparse.Namespace) -> int:
    from .demo import run

    return run.run(args)


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The whole parser; a named `command` gets its own arguments only, so that `doctor` imports nothing."""
    root = argparse.ArgumentParser(prog="moerge", description="Route among LoRA experts, per token and per layer.")
    root.add_argument("--version", action="version", version=f"moerge_ext {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = {
        "doctor": (_doctor, "what was built, what this machine has, whether they fit"),
        "methods": (_methods, "the routing methods, their options and their papers"),
        "generate": (_generate, "one prompt through your model and experts"),
        "train-gates": (_train_gates, "train the routing gates of one expert"),
        "describe": (_describe, "write down what an expert is for, for methods that route by the query's text"),
        "demo": (_demo, "the embedded model and experts: a table and a routing heatmap"),
    }
    for name, (run, text) in about.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        if command not in (name, None):
            continue
        if name == "methods":
            sub.add_argument(
                "-v", "--verbose", action="store_true", help="also the survey's taxonomy, options and papers"
            )
        elif name == "generate":
            from .generate import add_arguments

            add_arguments(sub)
        elif name == "train-gates":
            from .training.cli import add_arguments

            add_arguments(sub)
        elif name == "describe":
            from .query.cli import add_arguments

            add_arguments(sub)
        elif name == "demo":
            from .demo.run import add_arguments

            add_arguments(sub)
    return root


def main(argv: list[str] | None = None) -> int:
    """Runs one command; an error that the user can mend is one line (or a list) on standard error, status 2."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(argv[0] if argv else "doctor").parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:  # ImportError: an optional library is missing
        print(f"moerge {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"moerge {args.command}: interrupted", file=sys.stderr)
        return 130
