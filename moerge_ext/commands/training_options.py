"""What the commands that train share: their options, and how a run begins and is told of."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.counting import counted
from ..files.examples import Example
from ..files.kept import check_replaced
from ..files.meta import read_instructed_rows
from ..files.rows import read_rows
from ..models.prompt import PromptFormat
from .progress import add_progress
from .prompt_options import add_prompt, check_chat, prompt_of
from .wording import said

if TYPE_CHECKING:
    from ..training.options import TrainingResult
    from ..training.ranks import Ranks

# of every training that the command has them for; what else a command takes is its own
TRAINING = (
    "steps", "lr", "warmup_ratio", "accumulate", "weight_decay", "validation", "eval_every", "checkpoint_every", "seed",
    "resume", "overwrite",
)  # fmt: skip
# the least value of each number
LEAST = {
    "max_length": 2,
    "batch_size": 1,
    "steps": 1,
    "accumulate": 1,
    "eval_every": 1,
    "checkpoint_every": 1,
    "rank": 1,
}


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The default of every argument of a function, as the commands' texts name them."""
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def add_data(
    parser: argparse.ArgumentParser, default: dict[str, Any], *, required: bool = True, batch_size: str | None = None
) -> None:
    """Declare the options of the data and of the machine. batch_size: says its default, where that is no number."""
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=required,
        metavar="FILE",
        help='JSON lines: {"input": ..., "target": ...} (the loss is on the target), {"text": ...}, or TRL\'s '
        '{"prompt": ..., "completion": ...} and {"messages": [...]} (the loss is on the last message)',
    )
    add(
        "--batch-size",
        type=int,
        default=default["batch_size"],
        help=f"sequences per forward (default: {batch_size or '%(default)s'})",
    )
    add(
        "--max-length",
        type=int,
        default=default["max_length"],
        help="tokens per sequence; how many rows are longer is said (default: %(default)s)",
    )
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the base model")
    add("--device", help="such as cuda:0 or cpu (default: cuda when there is one)")
    add_progress(parser)
    add_prompt(parser)


def add_training(
    parser: argparse.ArgumentParser,
    default: dict[str, Any],
    *,
    kept: str,
    title: str = "training",
    accumulate: str = "",
    weight_decay: bool = True,
    overwrite: bool = True,
) -> Any:
    """Declare the options of a training, in a group that is returned; one that is not given is absent from the
    arguments, so that the function's own default holds.

    default: what the texts name; kept: what `--validation` chooses; accumulate: more about `--accumulate`;
    weight_decay, overwrite: whether the command has them.
    """
    group = parser.add_argument_group(title, argument_default=argparse.SUPPRESS)
    add = group.add_argument
    add("--steps", type=int, help=f"optimizer steps (default: {default['steps']})")
    add("--lr", type=float, help=f"AdamW's rate (default: {default['lr']})")
    add("--warmup-ratio", type=float, help=f"share of the steps (default: {default['warmup_ratio']})")
    add("--accumulate", type=int, help=f"forwards per step (default: {default['accumulate']}){accumulate}")
    if weight_decay:
        add("--weight-decay", type=float, help=f"AdamW's (default: {default['weight_decay']:g})")
    add("--validation", type=Path, metavar="FILE", help=f"as --data; the {kept} with the lowest loss are kept")
    add("--eval-every", type=int, help=f"steps between validations (default: {default['eval_every']})")
    add("--checkpoint-every", type=int, help=f"steps between saved states (default: {default['checkpoint_every']})")
    add("--seed", type=int, help=f"of the shuffle and of dropout (default: {default['seed']})")
    add("--resume", action="store_true", help="go on where a run stopped, by a kill or Ctrl-C")
    if overwrite:
        add_overwrite(group)
    return group


def add_overwrite(parser: Any) -> None:
    """Declare --overwrite."""
    parser.add_argument("--overwrite", action="store_true", help="replace a result that is there, refused without")


def given(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The options of `add_training`, and `more`, that were given."""
    return {name: getattr(args, name) for name in (*TRAINING, *more) if hasattr(args, name)}


def check_finished(args: argparse.Namespace, *files: Path, never: bool = False) -> None:
    """ValueError where a run would replace one of `files`, of a finished one; under --resume that is seen when it is
    known which run it is. never: the command has no --overwrite."""
    for file in () if getattr(args, "resume", False) else files:
        check_replaced(file, overwrite=None if never else getattr(args, "overwrite", False))


class Training:
    """A training that the arguments describe: its rows (this process's part of them), and what is told of it.

    training: what was given of `given`, with the rows of --validation.
    """

    def __init__(self, args: argparse.Namespace, *more: str):
        from ..training.ranks import current_ranks

        if problems := range_problems(args):
            raise ValueError("; ".join(problems))
        self.args, self.ranks, self.prompt = args, current_ranks(), prompt_of(args)
        self.training = given(args, *more)
        self.files: dict[Path, list[Example]] = {}
        self.rows = None if args.data is None else self.read(args.data)
        if "validation" in self.training:
            self.training["validation"] = self.read(self.training["validation"])

    def read(self, path: Path) -> list[Example]:
        """This process's part of the rows of one more file."""
        self.files[path] = my_rows(path, self.ranks, self.prompt)
        return self.files[path]

    def check_chat(self, tokenizer: Any) -> None:
        """ValueError for --chat, or rows of messages, and a tokenizer that has no chat template."""
        check_chat(self.prompt, tokenizer)
        if not getattr(tokenizer, "chat_template", None):
            for path, rows in self.files.items():
                refuse_rows(path, self.prompt.problems(rows, tokenizer))

    def shared(self, tokenizer: Any) -> dict[str, Any]:
        """What every function of `moerge_ext.training` takes of the arguments beside the rows."""
        args = self.args
        shared = {"tokenizer": tokenizer, "max_length": args.max_length, "prompt": self.prompt}
        return shared | {"batch_size": args.batch_size, "progress": not args.no_progress}

    def go(
        self, train: Callable[..., TrainingResult], *place: Any, default: dict[str, Any], examples: int, **options: Any
    ) -> TrainingResult:
        """The result of `train(*place, ...)`; what it is about to do and what came of it are printed.

        default: of its arguments; examples: rows of a pass over the data.
        """
        if self.ranks.first:
            about = {"batch_size": self.args.batch_size, "ranks": self.ranks.size}
            print(plan(examples, default, **about, **self.training), flush=True)
        with resumable(self.args):
            result = train(*place, **self.training, **options)
        if self.ranks.first:
            tell(result)
        return result


def range_problems(args: argparse.Namespace) -> list[str]:
    """What is out of range among the arguments."""
    from ..training.options import number_problems

    return [
        f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}"
        for name, least in LEAST.items()
        if getattr(args, name, least) < least
    ] + [re.sub(r"^\w+", lambda name: f"--{name[0].replace('_', '-')}", text) for text in number_problems(vars(args))]


def my_rows(path: Path, ranks: Ranks, prompt: PromptFormat) -> list[Example]:
    """This process's part of the rows of a file: all of them, unless torchrun has started several.

    ValueError for rows that lack what the prompt's template asks for.
    """
    # a meta.json that nothing is asked of may be anybody's
    rows = (read_instructed_rows if "instruction" in prompt.fields else read_rows)(path, text=True)
    refuse_rows(path, prompt.problems(rows))
    if len(rows) < ranks.size:
        raise ValueError(f"{path} has {counted(len(rows), 'row')} for {ranks.size} processes: each needs one at least")
    return rows[ranks.rank :: ranks.size]


def refuse_rows(path: Path, problems: list[str]) -> None:
    """ValueError with the problems of a file, if there are any."""
    if problems:
        raise ValueError(f"{path} cannot be used:\n- " + "\n- ".join(problems))


def load(what: Training, make: Callable[[], Any] | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a training; under torchrun each process takes a GPU of its own. `make` makes another
    model than that of --model, with its tokenizer. ValueError for rows that the tokenizer cannot put, before the
    weights are read."""
    import torch

    from ..models.pretrained import load_model, load_tokenizer, usable_device

    args = what.args
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = usable_device(args.device or gpu)
    tokenizer = load_tokenizer(args.model)
    what.check_chat(tokenizer)
    if make is not None:
        return make().to(device), tokenizer
    return load_model(args.model, dtype=args.dtype, device=device), tokenizer


@contextmanager
def resumable(args: argparse.Namespace) -> Iterator[None]:
    """After Ctrl-C inside: what is kept, and the line that goes on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        words = getattr(args, "words", sys.argv[1:])
        for note in getattr(interrupt, "__notes__", ()):
            print(f"\n{said(note)}", file=sys.stderr)
        more = [] if "--resume" in words else ["--resume"]
        print(f"go on with: {shlex.join(['moerge', *words, *more])}", file=sys.stderr)
        raise


def tell(result: TrainingResult) -> None:
    """Print what came of a run."""
    if result.already:
        print(f"finished before, in {counted(result.steps, 'step')}: {result.path}")
        return
    print(f"loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f} in {counted(result.steps, 'step')}")
    if result.validation:
        print(f"validation loss {result.validation[result.best_step]:.4f} at step {result.best_step}, kept")
    print(f"wrote {result.path}")


def plan(examples: int, default: dict[str, Any], *, batch_size: int, ranks: int = 1, **training: Any) -> str:
    """One line that says how much data a run will see, before it starts."""
    steps, accumulate = (training.get(name, default[name]) for name in ("steps", "accumulate"))
    passes, rest = divmod(steps * accumulate, -(-examples // batch_size))  # the last batch of a pass may be smaller
    total = passes * examples + min(examples, rest * batch_size)
    each = "" if ranks == 1 else f"{ranks} processes, each: "
    return (
        f"{each}{counted(steps, 'step')} of up to {counted(min(batch_size, examples) * accumulate, 'sequence')} (batch "
        f"size {batch_size}, accumulate {accumulate}): {counted(total, 'sequence')} in all, from "
        f"{counted(examples, 'example')}"
    )
