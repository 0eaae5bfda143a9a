"""`moerge generate`: one prompt through a routed model, streamed."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", help="the text to continue; '-' reads standard input")
    add("--model", required=True, metavar="DIR", help="folder or hub id of the base model, with its tokenizer")
    add("--experts", required=True, nargs="+", metavar="DIR", help="PEFT folders or hub ids (user/repo[/sub][@rev])")
    add("--method", default="phatgoose", help="a row of `moerge methods`, or expert:<name> (default: %(default)s)")
    add("--top-k", type=int, help="experts per token (default: the method's)")
    add(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method, such as top_p=0.5"
    )
    add("--max-new-tokens", type=int, default=128)
    add("--sample", action="store_true", help="sample instead of greedy decoding")
    add("--temperature", type=float, help="of --sample")
    add("--chat", action="store_true", help="put the prompt through the tokenizer's chat template")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the base model")
    add("--device", help="such as cpu (default) or cuda:0")
    add("--backend", choices=("native", "reference"), default="native")
    add("--trace", action="store_true", help="print afterwards which experts were used")


def run(args: argparse.Namespace) -> int:
    """Returns the exit status; ValueError and OSError for what the user can mend."""
    import sys

    from transformers import TextStreamer

    from . import load_experts, patch

    options = dict(parse_option(text) for text in args.option)
    if args.top_k is not None:
        options["top_k"] = args.top_k
    if args.temperature is not None and not args.sample:
        raise ValueError("--temperature is for --sample")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    experts = load_experts(args.experts)
    handle = patch(model, experts, args.method, backend=args.backend, **options)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    inputs = encode(tokenizer, prompt, chat=args.chat).to(model.device)
    kwargs: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.sample}
    if args.temperature is not None:
        kwargs["temperature"] = args.temperature
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    streamer = TextStreamer(tokenizer, skip_prompt=not seq2seq, skip_special_tokens=True)
    if not args.trace:
        model.generate(**inputs, **kwargs, streamer=streamer)
        return 0
    with handle.record() as trace:
        model.generate(**inputs, **kwargs, streamer=streamer)
    print("\nshare of the routing weight:")
    for share, name in sorted(zip(trace.share().tolist(), trace.names, strict=True), reverse=True):
        print(f"  {share:6.1%}  {name}")
    return 0


def parse_option(text: str) -> tuple[str, Any]:
    """ "name=value" with value an int, a float, true/false, none, or a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--option takes NAME=VALUE, such as top_p=0.5, got {text!r}")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def load_model(path: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    """The model (causal or encoder-decoder) in eval mode and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    config = AutoConfig.from_pretrained(path)
    auto = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=dtype).eval()
    return model.to(device or "cpu"), AutoTokenizer.from_pretrained(path)


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    """Model inputs for one prompt."""
    if not chat:
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        return inputs
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("--chat: this tokenizer has no chat template; leave --chat out")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
