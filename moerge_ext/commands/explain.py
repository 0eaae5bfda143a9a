"""`moerge explain`: a prompt, token by token, in the colours of the experts that spoke."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..files.counting import counted
from ..methods.option_text import top_k
from ..models.prompt import Prompt
from ..models.stored import MODEL_CONFIG
from .expert_options import (
    add_experts,
    add_gates,
    add_placing,
    add_routers,
    add_selection,
    gates_of,
    load_bank,
    placing_of,
)
from .fits import check_fits
from .generate import check_method
from .model_options import add_placed_model
from .needs import check_needs
from .options import add_embedder, add_hidden_layer, add_similar, add_writer, build_routers, check_file
from .progress import add_progress
from .prompt_options import add_prompt, prompt_of
from .terminal import console

TABLE = 40  # tokens, up to which each is listed where there are no colours


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    add_placed_model(parser, "prompt")
    add("prompt", metavar="PROMPT", help="the text; '-' reads standard input")
    add_experts(parser)
    add_gates(parser)
    add_routers(parser)
    add("--method", default="phatgoose", help="a row of `moerge methods` that routes (default: %(default)s)")
    add("--top-k", type=top_k, metavar="K", help="experts per token, or 'all' (default: the method's)")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method")
    add("--max-new-tokens", type=int, default=0, metavar="N", help="generate as many, and explain them as well")
    add("--module", action="append", default=[], metavar="NAME", help='only these: "q_proj", "*.mlp.*"; repeatable')
    add("--layers", type=numbers, metavar="A-B,C", help="only these layers, such as 0-9,29")
    add(
        "--bands",
        type=int,
        default=3,
        metavar="N",
        help="parts of the depth, a text for each (default: %(default)s)",
    )
    add("--table", action="store_true", help="list every token with its experts and their weights")
    add("--json", action="store_true", help="print every weight as JSON, and nothing else")
    add("--html", type=Path, metavar="FILE", help="write a page that shows each token's experts by layer")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the base model")
    add("--device", default="cpu", help="such as cpu or cuda:0 (default: %(default)s)")
    add("--backend", choices=("native", "reference"), default="native", help="kernels or plain torch")
    add("--instruction", metavar="TEXT", help="what {instruction} in --template stands for; {input} is the prompt")
    add_progress(parser)
    add_prompt(parser)
    add_selection(parser)
    add_placing(parser)
    add_embedder(parser)
    add_hidden_layer(parser)
    add_writer(parser)
    add_similar(parser)
    parser.set_defaults(trace=False)


def run(args: argparse.Namespace) -> int:
    """Returns the exit status; ValueError and OSError for what the user can mend."""
    check_order(args)
    method, options = check_method(args)
    gates_of(args)
    if method.routing is None:
        raise ValueError(f"method '{method.name}' routes nothing by the ops: there is no choice to explain")
    for name, least in (("bands", 1), ("max_new_tokens", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if args.html is not None:
        check_file(args.html)

    from .. import patch
    from ..evaluation.explain import explain_tokens
    from ..experts.prompt_notes import warn_of_other_prompts
    from ..models.pretrained import load_config, load_model, load_tokenizer, usable_device

    form, device = prompt_of(args), usable_device(args.device)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    row = {"input": prompt} | ({} if args.instruction is None else {"instruction": args.instruction})
    tokenizer = load_tokenizer(args.model)
    asked = form.prompt(row, tokenizer)
    check_length(asked, tokenizer, load_config(args.model), args.max_new_tokens)
    experts = load_bank(args)
    check_needs(args, experts, [method])
    check_fits(args, experts, method.name, options)
    warn_of_other_prompts(experts, [form])
    model = load_model(args.model, dtype=args.dtype, device=device)
    handle = patch(model, experts, method.name, backend=args.backend, **placing_of(args), **options)
    rows = nullcontext()
    if method.source is not None:
        routers = build_routers(args, experts, [method.name], lambda: (model, tokenizer))
        rows = handle.queries(prompt, routers[method.router], tokenizer=tokenizer)
    with rows:
        found = explain_tokens(
            model, tokenizer, asked, max_new_tokens=args.max_new_tokens, modules=args.module, layers=args.layers
        )
    _show(args, found)
    return 0


def check_order(args: argparse.Namespace) -> None:
    """ValueError for MODEL and PROMPT in the order of `moerge generate`, whose prompt comes first."""
    if is_model(args.prompt) and not is_model(args.model):
        raise ValueError(
            f"PROMPT is the folder of a model, {args.prompt!r}, and MODEL is none, {args.model!r}: swapped? It is "
            f"`moerge explain MODEL PROMPT`, or `moerge explain PROMPT --model MODEL`"
        )


def is_model(text: str) -> bool:
    """Whether a folder of this name holds a model."""
    try:
        return (Path(text) / MODEL_CONFIG).is_file()
    except OSError:  # a text too long for a name
        return False


def check_length(asked: Prompt, tokenizer: Any, config: Any, max_new_tokens: int) -> None:
    """ValueError for a prompt without a token, or one that does not fit the context with what is to be generated."""
    from ..models.pretrained import context_of, is_seq2seq

    seq2seq, context = is_seq2seq(config), context_of(config)
    length = len(asked.some_ids(tokenizer, (), seq2seq=seq2seq))
    if context is not None and length + (0 if seq2seq else max_new_tokens) > context:
        raise ValueError(
            f"the prompt has {counted(length, 'token')}, and with {max_new_tokens} to generate they do not fit the "
            f"model's context of {context}: shorten the prompt or lower --max-new-tokens"
        )


def _show(args: argparse.Namespace, found) -> None:
    from rich.text import Text

    from ..evaluation.explain_page import write_explanation
    from ..evaluation.explain_text import as_json, as_text

    if args.json:
        print(json.dumps(as_json(found)))
    else:
        screen = console()
        short = sum(len(stream.ids) for stream in found.streams) <= TABLE
        colourless = screen.color_system is None or screen.no_color
        screen.print(as_text(found, parts=args.bands, table=args.table or (colourless and short)))
        if colourless and not short and not args.table:
            screen.print("no colours here: --table lists every token")
    if args.html is not None:
        size = write_explanation(found, args.html, parts=args.bands)
        line = Text(f"wrote {args.html} ({size / 1e6:.2f} MB)")
        console(stderr=args.json).print(line, soft_wrap=True)


def numbers(text: str) -> set[int]:
    """ "0-3,7" -> {0, 1, 2, 3, 7}; argparse's error for anything else."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isdecimal() and len(end) < 6 for end in ends) or int(ends[0]) > int(ends[1]):
            raise argparse.ArgumentTypeError(f"expected layers such as 0-9,29, got {text!r}")
        found |= set(range(int(ends[0]), int(ends[1]) + 1))
    return found
