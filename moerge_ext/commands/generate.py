"""`moerge generate`: prompts through a routed model, a single one streamed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.runs import BASE, DERIVED, MULTITASK, PELMO, WHOLE
from ..files.counting import counted
from ..files.examples import Example
from ..files.rows import read_prompts
from ..methods.base import Method
from ..methods.option_text import ALL, parse_option, top_k
from .expert_options import (
    add_experts,
    add_gates,
    add_placing,
    add_routers,
    add_selection,
    gates_of,
    load_bank,
    placing_of,
    routers_of,
)
from .fits import check_fits
from .model_options import add_model
from .needs import check_needs
from .options import add_embedder, add_hidden_layer, add_similar, add_writer, build_routers, check_writer
from .progress import add_progress
from .prompt_options import add_prompt, prompt_of

METHOD = "phatgoose"  # when nobody says which
NEW_TOKENS = 128  # of an answer, when nobody says how many


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    parser.usage = '%(prog)s "prompt" --model DIR --experts DIR [DIR ...] [options]'
    # optional to argparse: `run` can say what became of it
    add("prompt", nargs="?", help="the text to continue, not directly after --experts; '-' reads standard input")
    add(
        "--prompts",
        metavar="FILE",
        help="many of them, in batches: a prompt in every line, or JSON lines with input, prompt or messages; '-' "
        "reads standard input",
    )
    add("--json", action="store_true", help='JSON lines {"row", "prompt", "text"}, with --trace also "experts"')
    add("--batch-size", type=int, default=16, help="of --prompts (default: %(default)s)")
    add_model(parser)
    add_experts(parser, required=False)
    add_gates(parser)
    add_routers(parser)
    add(
        "--method",
        help=f"a row of `moerge methods`, expert:<name>, or {BASE} (default: {METHOD}, for experts with trained gates; "
        f"arrow needs none; without --experts {BASE}, the model alone)",
    )
    add("--top-k", type=top_k, metavar="K", help="experts per token, or 'all' (default: the method's)")
    add(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method, such as top_p=0.5"
    )
    add("--max-new-tokens", type=int, help=f"stop after this many (default: {NEW_TOKENS}, or what the context leaves)")
    add("--sample", action="store_true", help="sample instead of greedy decoding")
    add("--temperature", type=float, help="of --sample")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the base model")
    add("--device", default="cpu", help="such as cpu or cuda:0 (default: %(default)s)")
    add("--backend", choices=("native", "reference"), default="native", help="kernels or plain torch")
    add("--trace", action="store_true", help="tell afterwards which experts were used")
    add("--instruction", metavar="TEXT", help="what {instruction} in --template stands for; {input} is the prompt")
    add_prompt(parser)
    add_selection(parser)
    add_placing(parser)
    add_embedder(parser)
    add_hidden_layer(parser)
    add_writer(parser)
    add_similar(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit status; ValueError and OSError for what the user can mend."""
    # all that can be refused is refused before the model is read
    alone = check_alone(args)
    method, options = (None, {}) if alone else check_method(args)
    check_decoding(args)
    if args.sample and not alone and method.decodes:
        raise ValueError(f"--sample: method '{method.name}' decodes greedily")
    gates_of(args)

    from ..models.pretrained import load_config, load_model, load_tokenizer, usable_device

    form, device = prompt_of(args), usable_device(args.device)
    rows = rows_of(args)
    tokenizer, config = load_tokenizer(args.model), load_config(args.model)
    asked, longest = prompts_of(rows, form, tokenizer, config)
    new_tokens = new_tokens_of(args.max_new_tokens, longest, config)
    if len(rows) > 1 and new_tokens < (args.max_new_tokens or NEW_TOKENS):
        print(
            f"moerge generate: answers end after {counted(new_tokens, 'token')}, what the longest prompt leaves",
            file=sys.stderr,
        )

    from .. import patch
    from ..experts.prompt_notes import warn_of_other_prompts

    if not alone:
        experts = load_bank(args)
        check_needs(args, experts, [method])
        if not method.decodes:
            check_fits(args, experts, method.name, options)
        warn_of_other_prompts(experts, [form.seen_in(rows)])
    model = load_model(args.model, dtype=args.dtype, device=device)
    kwargs: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": args.sample}
    if args.temperature is not None:
        kwargs["temperature"] = args.temperature
    if alone:
        handle = Alone(model)
    elif method.decodes:
        answer_together(args, experts, model, tokenizer, rows, asked, kwargs, options)
        return 0
    else:
        handle = patch(model, experts, method.name, backend=args.backend, **placing_of(args), **options)
        if method.source is not None:
            handle.router = build_routers(args, experts, [method.name], lambda: (model, tokenizer))[method.router]
    if args.prompts is None and not args.json:
        stream(args, handle, tokenizer, rows[0], asked[0], kwargs)
    else:
        answer_all(args, handle, tokenizer, rows, asked, kwargs)
    return 0


@dataclass(frozen=True)
class Alone:
    """A model without experts, where a handle is expected."""

    model: Any
    router: Any = None


def check_alone(args: argparse.Namespace) -> bool:
    """Whether the model answers without experts; ValueError for a method that is for something else."""
    method = (BASE if not args.experts else METHOD) if args.method is None else args.method
    if method.startswith(WHOLE):
        raise ValueError(
            f"--method {method} is a row of `moerge eval`: here another model is --model "
            f"{method.removeprefix(WHOLE) or 'DIR'}, without --experts"
        )
    if method.startswith(PELMO) or method in (*DERIVED, MULTITASK):
        raise ValueError(f"--method {method} is a row of `moerge eval`: expected a row of `moerge methods`, or {BASE}")
    if method != BASE:
        if not args.experts:
            raise ValueError(
                f"method '{method}' needs --experts DIR ...; without them only {BASE} answers, the model alone"
            )
        args.method = method
        return False
    routing = ("gates", "routers", "top_k", "option", "trace", "query_router")
    if given := [f"--{name.replace('_', '-')}" for name in routing if getattr(args, name)]:
        raise ValueError(f"method '{BASE}', the model alone, routes nothing: leave {', '.join(given)} out")
    return True


def rows_of(args: argparse.Namespace) -> list[Example]:
    """What is to be answered."""
    if args.prompts is not None:
        rows = read_prompts(None if args.prompts == "-" else Path(args.prompts))
    else:
        rows = [Example(input=sys.stdin.read() if args.prompt == "-" else args.prompt)]
    if args.instruction is not None:
        if "instruction" not in prompt_of(args).fields:
            raise ValueError("--instruction is what {instruction} in --template stands for: pass such a --template too")
        for row in rows:
            row.setdefault("instruction", args.instruction)
    return rows


def prompts_of(rows: Sequence[Example], form: Any, tokenizer: Any, config: Any) -> tuple[list[Any], int]:
    """(the prompt of every row, tokens of the longest). One ValueError for all rows that cannot be asked or do not fit
    the model's context."""
    from ..models.pretrained import context_of, is_seq2seq

    asked, longest, problems, context = [], 0, [], context_of(config)
    for number, row in enumerate(rows):
        where = f"prompt {number} (from 0): " if len(rows) > 1 else ""
        try:
            asked.append(form.prompt(row, tokenizer))
            length = len(asked[-1].some_ids(tokenizer, (), seq2seq=is_seq2seq(config)))
        except ValueError as error:
            problems.append(f"{where}{error}")
            continue
        if context is not None and (length > context or (length == context and not is_seq2seq(config))):
            problems.append(
                f"{where}the prompt has {counted(length, 'token')}, and the model's context is {context}: shorten the "
                "prompt"
            )
        longest = max(longest, length)
    if problems:
        raise ValueError("\n- ".join(["the prompts cannot be asked:", *problems] if len(rows) > 1 else problems))
    return asked, longest


def stream(args: argparse.Namespace, handle: Any, tokenizer: Any, row: Example, asked: Any, kwargs: Any) -> None:
    """One answer, printed as it comes."""
    from transformers import TextStreamer

    from ..models.pretrained import is_seq2seq
    from ..models.prompt import encode

    model, seq2seq = handle.model, is_seq2seq(handle.model.config)
    inputs = encode(tokenizer, asked, seq2seq=seq2seq).to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=not seq2seq, skip_special_tokens=True)
    queries = nullcontext() if handle.router is None else handle.queries(row["input"], tokenizer=tokenizer)
    with queries, handle.record() if args.trace else nullcontext() as trace:
        model.generate(**inputs, **kwargs, streamer=streamer)
    if trace is not None:
        tell_shares(dict(zip(trace.names, trace.share().tolist(), strict=True)))


def answer_all(
    args: argparse.Namespace, handle: Any, tokenizer: Any, rows: Sequence[Example], asked: Sequence[Any], kwargs: Any
) -> None:
    """Every answer, a batch at a time."""
    from ..evaluation.answers import Answerer

    answerer, texts = Answerer(handle.model, tokenizer), [row["input"] for row in rows]
    size = 1 if answerer.alone else args.batch_size
    # where one choice is made for a whole task, all prompts are its
    whole = handle.router is not None and handle.method.per_task
    with handle.queries(texts) if whole else nullcontext():
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            count = len(asked[part])
            each = handle.router is not None and not whole
            queries = handle.queries(texts[part], tokenizer=tokenizer) if each else nullcontext()
            with queries, handle.record(rows=count) if args.trace else nullcontext() as answerer.trace:
                answers = answerer.texts(asked[part], **kwargs)
            shares = [{}] * count if answerer.trace is None else named_shares(answerer.trace)
            for number, prompt, answer, share in zip(
                range(start, len(rows)), texts[part], answers, shares, strict=False
            ):
                tell(args, {"row": number, "prompt": prompt, "text": answer}, share)


def answer_together(
    args: argparse.Namespace,
    experts: Any,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    asked: Sequence[Any],
    kwargs: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Every answer of a method that decodes; a single one is printed as it comes."""
    from transformers import TextStreamer

    from ..ensemble.co_llm import CoLLM
    from ..ensemble.mixture import FirstRow

    answerer = CoLLM(model, tokenizer, experts, backend=args.backend, **options)
    one = args.prompts is None and not args.json
    if one:
        streamer = TextStreamer(tokenizer, skip_prompt=not answerer.seq2seq, skip_special_tokens=True)
        kwargs["streamer"] = FirstRow(streamer)
    size = 1 if answerer.alone else args.batch_size
    with answerer.ready():
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            answers = answerer.texts(asked[part], **kwargs)
            shares = (answerer.written / answerer.written.sum(1, keepdim=True)).tolist()
            for number, row, answer, share in zip(range(start, len(rows)), rows[part], answers, shares, strict=False):
                named = dict(zip(answerer.names, share, strict=True)) if args.trace else {}
                if not one:
                    tell(args, {"row": number, "prompt": row["input"], "text": answer}, named)
                elif named:
                    tell_shares(named, "tokens written by")


def named_shares(trace: Any) -> list[dict[str, float]]:
    """{expert: its part of the routing weight} of every row."""
    return [dict(zip(trace.names, row, strict=True)) for row in trace.row_share().tolist()]


def tell(args: argparse.Namespace, said: dict[str, Any], shares: dict[str, float]) -> None:
    """One answer on standard output."""
    if args.json:
        more = {"experts": {name: round(share, 4) for name, share in shares.items()}} if shares else {}
        print(json.dumps({**said, **more}), flush=True)
        return
    print(f"[{said['row']}] {said['prompt']}\n{said['text']}", flush=True)
    if shares:
        tell_shares(shares)


def tell_shares(shares: dict[str, float], what: str = "share of the routing weight") -> None:
    """Which experts were used."""
    print(f"\n{what}:")
    for share, name in sorted(((share, name) for name, share in shares.items()), reverse=True):
        print(f"  {share:6.1%}  {name}")


def check_method(args: argparse.Namespace) -> tuple[Method, dict[str, Any]]:
    """The method and its options, or a ValueError for those that this command cannot run."""
    from ..methods import get_method

    options = dict(parse_option(text) for text in args.option)
    if args.top_k is not None:
        if "top_k" in options:
            raise ValueError("give --top-k or --option top_k=..., not both")
        options["top_k"] = None if args.top_k == ALL else args.top_k
    method = get_method(args.method)
    if method.learned is not None or args.routers:
        found = routers_of(args)
        if method.learned is None:
            raise ValueError(f"--routers: method '{method.name}' has no routers that are trained: leave it out")
        if list(found) != [method.name]:
            has = f", got one of {', '.join(found)}" if found else ""
            raise ValueError(
                f"method '{method.name}' needs --routers FILE, which `moerge train-routers --method {method.name}` "
                f"writes{has}"
            )
        options["routers"] = found[method.name]
    method.configure(**options)
    check_writer(args)
    if method.source == "few-shot":
        raise ValueError(
            f"method '{method.name}' searches its weights with solved examples of a task: use `moerge eval`, or "
            "moerge_ext.lorahub(model, experts, data) in Python"
        )
    if method.bias is not None and method.source is None:
        raise ValueError(
            f"method '{method.name}' takes weights from you: run it from Python inside `with "
            "handle.affinities(weights):`"
        )
    if args.trace and not (method.routes or method.decodes):
        raise ValueError(f"--trace: method '{method.name}' routes nothing; leave --trace out")
    return method, options


def check_decoding(args: argparse.Namespace) -> None:
    """ValueError for a missing prompt and for options that do not fit."""
    if args.prompt is not None and args.prompts is not None:
        raise ValueError(f"give one prompt or --prompts FILE, not both; got {args.prompt!r} and {args.prompts!r}")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.prompt is None and args.prompts is None:
        raise ValueError(
            "no prompt: put it first, or after another option than --experts, which takes everything up to the next "
            f"option{f' (its last one is {args.experts[-1]!r})' if args.experts else ''}; "
            'such as: moerge generate "prompt" --model DIR --experts DIR DIR; many prompts: --prompts FILE'
        )
    if args.temperature is not None and not args.sample:
        raise ValueError("--temperature is for --sample")
    if args.temperature is not None and not 0 < args.temperature < float("inf"):
        raise ValueError(
            f"--temperature must be positive and finite, got {args.temperature:g} (without --sample: greedy)"
        )
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")


def new_tokens_of(wanted: int | None, length: int, config: Any) -> int:
    """Tokens to generate after prompts of up to `length`; ValueError when they do not fit the model's context."""
    from ..models.pretrained import context_of, is_seq2seq

    context = context_of(config)
    if context is None:
        return wanted or NEW_TOKENS
    left = context if is_seq2seq(config) else context - length
    if wanted is not None and wanted > left:
        raise ValueError(
            f"the prompt has {counted(length, 'token')}, and {wanted} more do not fit the model's context of "
            f"{context}: pass --max-new-tokens {left} at most, or shorten the prompt"
        )
    return wanted or min(NEW_TOKENS, left)
