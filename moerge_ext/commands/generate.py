"""`moerge generate`: one prompt through a routed model, streamed."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from typing import Any

from ..methods.base import HIDDEN_STATES, Method
from ..methods.option_text import ALL, parse_option, top_k
from .expert_options import add_gates, gates_of, load_bank
from .options import add_embedder, add_hidden_layer, add_writer, build_routers, check_writer
from .prompt_options import add_prompt, prompt_of

NEW_TOKENS = 128  # of an answer, when nobody says how many


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    parser.usage = '%(prog)s "prompt" --model DIR --experts DIR [DIR ...] [options]'
    # optional to argparse: `run` can say what became of it
    add("prompt", nargs="?", help="the text to continue, not directly after --experts; '-' reads standard input")
    add("--model", required=True, metavar="DIR", help="folder or hub id of the base model, with its tokenizer")
    add(
        "--experts",
        required=True,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="PEFT folders or hub ids (user/repo[/sub][@rev]); can be repeated",
    )
    add_gates(parser)
    add(
        "--method",
        default="phatgoose",
        help="a row of `moerge methods`, or expert:<name> (default: %(default)s, for experts with trained gates; arrow "
        "needs none)",
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
    add("--trace", action="store_true", help="print afterwards which experts were used")
    add("--instruction", metavar="TEXT", help="what {instruction} in --template stands for; {input} is the prompt")
    add_prompt(parser)
    add_embedder(parser)
    add_hidden_layer(parser)
    add_writer(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit status; ValueError and OSError for what the user can mend."""
    # all that can be refused is refused before the model is read
    method, options = check_method(args)
    check_decoding(args)
    gates_of(args)

    from ..models.pretrained import is_seq2seq, load_config, load_model, load_tokenizer, usable_device
    from ..models.prompt import encode

    form, device = prompt_of(args), usable_device(args.device)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    row = {"input": prompt} | ({} if args.instruction is None else {"instruction": args.instruction})
    tokenizer = load_tokenizer(args.model)
    asked, config = form.prompt(row, tokenizer), load_config(args.model)
    inputs = encode(tokenizer, asked, seq2seq=is_seq2seq(config)).to(device)
    new_tokens = new_tokens_of(args.max_new_tokens, inputs["input_ids"].shape[1], config)

    from transformers import TextStreamer

    from .. import patch
    from ..experts.prompt_notes import warn_of_other_prompts

    experts = load_bank(args)
    warn_of_other_prompts(experts, [form])
    model = load_model(args.model, dtype=args.dtype, device=device)
    handle = patch(model, experts, method.name, backend=args.backend, **options)
    rows = nullcontext()
    if method.source is not None:
        routers = build_routers(args, experts, [method.name], lambda: (model, tokenizer))
        rows = handle.queries(prompt, routers[method.router], tokenizer=tokenizer)
    kwargs: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": args.sample}
    if args.temperature is not None:
        kwargs["temperature"] = args.temperature
    streamer = TextStreamer(tokenizer, skip_prompt=not is_seq2seq(model.config), skip_special_tokens=True)
    if not args.trace:
        with rows:
            model.generate(**inputs, **kwargs, streamer=streamer)
        return 0
    with rows, handle.record() as trace:
        model.generate(**inputs, **kwargs, streamer=streamer)
    print("\nshare of the routing weight:")
    for share, name in sorted(zip(trace.share().tolist(), trace.names, strict=True), reverse=True):
        print(f"  {share:6.1%}  {name}")
    return 0


def check_method(args: argparse.Namespace) -> tuple[Method, dict[str, Any]]:
    """The method and its options, or a ValueError for those that this command cannot run."""
    from ..methods import get_method

    options = dict(parse_option(text) for text in args.option)
    if args.top_k is not None:
        if "top_k" in options:
            raise ValueError("give --top-k or --option top_k=..., not both")
        options["top_k"] = None if args.top_k == ALL else args.top_k
    method = get_method(args.method)
    method.configure(**options)
    check_writer(args)
    if method.source == "few-shot":
        raise ValueError(
            f"method '{method.name}' searches its weights with solved examples of a task: use `moerge eval`, or "
            "moerge_ext.lorahub(model, experts, data) in Python"
        )
    given = args.embedder or args.writer or method.embedder == HIDDEN_STATES
    if method.bias is not None and (method.source is None or not given):
        raise ValueError(
            f"method '{method.name}' needs the affinity of the query to every expert: pass the --embedder that the "
            "experts were described or indexed with, or run it from Python inside `with handle.affinities(scores):`"
        )
    if args.trace and method.routing is None:
        raise ValueError(f"--trace: method '{method.name}' routes nothing; leave --trace out")
    return method, options


def check_decoding(args: argparse.Namespace) -> None:
    """ValueError for a missing prompt and for sampling options that do not fit."""
    if args.prompt is None:
        raise ValueError(
            "no prompt: put it first, or after another option than --experts, which takes everything up to the next "
            f"option (its last one is {args.experts[-1]!r}); "
            'such as: moerge generate "prompt" --model DIR --experts DIR DIR'
        )
    if args.temperature is not None and not args.sample:
        raise ValueError("--temperature is for --sample")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")


def new_tokens_of(wanted: int | None, length: int, config: Any) -> int:
    """Tokens to generate after a prompt of `length`; ValueError when they do not fit the model's context."""
    from ..models.pretrained import context_of, is_seq2seq

    context = context_of(config)
    if context is None:
        return wanted or NEW_TOKENS
    left = context if is_seq2seq(config) else context - length
    if length > context or left < 1:
        raise ValueError(f"the prompt has {length} tokens, and the model's context is {context}: shorten the prompt")
    if wanted is not None and wanted > left:
        raise ValueError(
            f"the prompt has {length} tokens, and {wanted} more do not fit the model's context of {context}: pass "
            f"--max-new-tokens {left} at most, or shorten the prompt"
        )
    return wanted or min(NEW_TOKENS, left)
