"""The `moerge` command."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from .._version import __version__
from .progress import bars
from .wording import plain_warnings, said

# command: (the module with its `add_arguments` and `run`, what it does); imported when it is called
COMMANDS = {
    "doctor": (".doctor", "what was built, what this machine has, whether they fit"),
    "methods": (".methods", "the routing methods, their options and their papers"),
    "generate": (".generate", "prompts through your model and experts"),
    "train-expert": (".train_expert", "train an expert, a LoRA on your model, from a file of examples"),
    "new-expert": (".new_expert", "an untrained expert, to be trained together with its gates (train-gates --joint)"),
    "train-gates": (".train_gates", "train the routing gates of one expert"),
    "train-routers": (".train_routers", "train a method's routers over frozen experts"),
    "list": (".list", "adapters in folders: base, rank, modules, and what there is for routing beside each"),
    "merge": (".merge", "several experts as one PEFT adapter, or as a full model"),
    "mix": (".mix", "whole models as the experts of one: their FFNs routed, the rest averaged"),
    "train-mix": (".train_mix", "train the routers of such a mixture, or all of it"),
    "train-calm": (".train_calm", "compose two models: one attends to the other at chosen layers (CALM)"),
    "push": (".push", "an adapter with its gates, index and description to the Hugging Face hub"),
    "convert": (".convert", "an adapter of MLX-LM, llama.cpp (GGUF) or an older PEFT as a PEFT folder"),
    "describe": (".describe", "write down what an expert is for, for methods that route by the query's text"),
    "fetch-tasks": (
        ".fetch_tasks",
        "the papers' own sets (T0/P3, FLAN, BIG-bench, questions) from the hub as task folders",
    ),
    "eval": (".eval", "methods on tasks: a table with intervals"),
    "lm-eval": (".lm_eval", "lm-evaluation-harness, with the routed model as `--model moerge`"),
    "inspect": (".inspect", "where the tokens of tasks go: heatmaps and their distance from the oracle"),
    "explain": (".explain", "a prompt, token by token: which experts spoke, at which depth"),
    "train-query-router": (
        ".train_query_router",
        "train a router that chooses an expert by the query's text, from judged answers",
    ),
    "serve": (".serve", "your model and experts behind an OpenAI-compatible server, by vLLM or transformers"),
    "train-router": (".train_router", "train the router of a prompt ensemble on its experts' answers"),
    "ensemble": (".ensemble", "prompt experts, alone and mixed, on questions: a table with intervals"),
    "demo": (".demo", "the embedded model and experts: a table and a routing heatmap"),
}
LOST = (errno.ENOSPC, errno.EDQUOT, errno.EPIPE)
NOBODY_READS = 128 + 13  # the status of what SIGPIPE ends, as in `moerge list | head -1`
FOREIGN = ("lm-eval",)  # commands whose arguments are those of another program
ELSEWHERE = {  # options as other programs call them: as they are called here
    "--adapters --adapter --lora --loras --lora-modules": "--experts",
    "--base-model --base --model-name-or-path": "--model",
    "--dataset --dataset-name --train-file --train-data": "--data",
    "--epochs --num-epochs --num-train-epochs --max-steps --iters": "--steps",
    "--eval-steps": "--eval-every",
    "--gradient-accumulation-steps": "--accumulate",
    "--k --num-experts-per-tok": "--top-k",
    "--learning-rate": "--lr",
    "--lora-alpha": "--alpha",
    "--max-seq-length --max-seq-len": "--max-length",
    "--max-tokens": "--max-new-tokens",
    "--output-dir --out": "--output",
    "--per-device-train-batch-size": "--batch-size",
    "--r --lora-r --lora-rank": "--rank",
    "--save-steps": "--checkpoint-every",
    "--warmup-steps": "--warmup-ratio",
}
# where the value means something else here: (part of theirs, ours): what it is
OTHER_VALUES = {
    ("--prompt", "--prompts"): "a file of them; one prompt stands in its place without an option",
    ("epoch", "--steps"): "optimizer steps, not passes over the data",
    ("-steps", "--warmup-ratio"): "a share of --steps",
}
# where a command lacks them, what is spelled like them is something else
NOTHING_LIKE = ("--logging-steps", "--min-p", "--seed", "--top-p")


def _run(args: argparse.Namespace) -> int:
    with plain_warnings(vars(args)), bars(shown=not getattr(args, "no_progress", False)):
        return import_module(COMMANDS[args.command][0], __package__).run(args)


def _output_is_lost(error: Exception) -> bool:
    """Whether it was standard output that could not be written, as all errors of files name the file.

    What is left for it is dropped, lest Python report it again at its end.
    """
    if not isinstance(error, OSError) or error.filename is not None or error.errno not in LOST:
        return False
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _path(text: str) -> Path:
    """An empty word, as of a variable that the shell does not know, would be the folder one is in."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """Takes options by their whole names: what is short for one today may be short for two tomorrow. Says where a word
    stands that an option before it has taken for its own, and what an option may have been meant for."""

    words: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.register("type", Path, _path)

    def unknown(self, words: Sequence[str]) -> str:
        """What to say of options that there are none of, each with the one that is most like it."""
        hints = self.hints(words)
        return f"unrecognized arguments: {' '.join(words)}" + (f" ({'; '.join(hints)})" if hints else "")

    def hints(self, words: Sequence[str]) -> list[str]:
        """The option that each of `words` was meant for, if it is no option here and is like one."""
        hints, known = [], [option for option in self._option_string_actions if option.startswith("--")]
        for word in dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("--")):
            near = [ours for theirs, ours in ELSEWHERE.items() if word in theirs.split() and ours in known]
            near = near or [option for option in known if len(word) > 2 and option.startswith(word)]
            if not near and word not in NOTHING_LIKE:
                near = get_close_matches(word, known, n=1, cutoff=0.7)
            what = [text for (part, ours), text in OTHER_VALUES.items() if part in word and near == [ours]]
            if near and word not in known:
                hints.append(f"{word} is no option, {' or '.join(near[:3])} is{', '.join(['', *what])}")
        return hints

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = args or ()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """argparse's, with the options that take everything up to the next one where a word is missing."""
        lost = message.rpartition("arguments are required: ")[2].split(", ")
        placed = [action.metavar or action.dest for action in self._actions if not action.option_strings]
        greedy = [option for action in self._actions if action.nargs in ("+", "*") for option in action.option_strings]
        if (lost := [name for name in lost if name in placed]) and (taken := [w for w in greedy if w in self.words]):
            message += (
                f"; put {' '.join(lost)} first, or after another option than {', '.join(taken)}, which takes "
                "everything up to the next option"
            )
        own = self.words[: self.words.index("--")] if "--" in self.words else self.words
        if "arguments are required: " in message and lost != ["COMMAND"] and (hints := self.hints(own)):
            message += f" ({'; '.join(hints)})"
        bad = re.match(r"argument COMMAND: invalid choice: '([^']*)'", message)
        if (bad is not None or lost == ["COMMAND"]) and self.words and self.words[0].startswith("-"):
            message = self.unknown(self.words[:1])
            message += "" if message.endswith(")") else "; the command comes first, its options behind it"
        elif bad is not None and (near := get_close_matches(bad[1], COMMANDS, n=1)):
            message = f"there is no command {bad[1]!r}: did you mean {near[0]}?"
        super().error(message)


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The whole parser; a named `command` gets its own arguments only, so that `doctor` imports nothing."""
    root = Parser(prog="moerge", description="Route among LoRA experts, per token and per layer.")
    root.add_argument("--version", action="version", version=f"moerge_ext {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(refuse=sub.error)
        if command in (name, None):
            import_module(module, __package__).add_arguments(sub)
    return root


def _parsed(argv: list[str]) -> argparse.Namespace:
    """The arguments; argparse's exit, with the usage, for those that are none."""
    args, rest = parser(argv[0]).parse_known_args(argv)
    args.rest, args.words = rest, argv  # a command that is interrupted says how to go on
    refuse, settle = vars(args).pop("refuse"), vars(args).pop("settle", None)
    unknown = refuse.__self__.unknown
    if settle is not None:
        settle(args, refuse)
    if args.rest and args.command not in FOREIGN:
        refuse(unknown(args.rest))
    return args


@contextlib.contextmanager
def _flushed() -> Iterator[None]:
    """A block whose output is written when it ends, however it ends: later nobody would see what became of it."""
    try:
        yield
    finally:
        sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Runs one command; an error that the user can mend is one line (or a list) on standard error, status 2; output
    that nobody reads any more ends it quietly."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser("doctor").print_help(sys.stderr)
        return 2
    names: dict[str, object] = {}
    name = f"moerge {argv[0]}"
    try:
        with _flushed():
            args = _parsed(argv)
            names = vars(args)
            return _run(args)
    except (ValueError, OSError, ImportError) as error:  # ImportError: an optional library is missing
        lost = _output_is_lost(error)
        if lost and isinstance(error, BrokenPipeError):
            return NOBODY_READS
        what = "standard output cannot be written: " if lost else ""
        text = said(str(error), names).removeprefix(f"{argv[0]}: ")  # a function that is called as its command
        if names.get("names"):
            text += import_module(".expert_options", __package__).left_out_note(text, names)
        print(f"{name}: {what}{text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
