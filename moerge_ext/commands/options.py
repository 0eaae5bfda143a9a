"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..evaluation.checks import check_fields, check_prompts
from ..evaluation.tasks import Task, check_distinct, load_task
from ..files.atomic import check_can_write
from ..files.rows import read_rows, read_text
from ..methods.base import HIDDEN_STATES
from ..methods.option_text import top_k
from ..queries.embedder import Embedder, load_embedder
from ..queries.hidden import base_name
from ..queries.writer import InstructionWriter
from .expert_options import add_experts, add_gates, add_placing, add_routers, add_selection
from .model_options import add_model
from .needs import check_needs, embedder_problems
from .progress import add_progress
from .prompt_options import add_prompt, check_chat, prompt_of
from .query_router_options import add_query_routers, trained_routers

HIDDEN_LAYER = -2  # DAM: the penultimate one
KEY = "OPENAI_API_KEY"  # the environment variable that clients of such servers read


def add_embedder(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the embedder."""
    add = parser.add_argument_group("embedder").add_argument
    add("--embedder", metavar="MODEL", help="a sentence-transformers model: hub id or folder")
    add(
        "--mean-pool",
        action="store_true",
        help="take --embedder as a transformers encoder and average its last hidden states",
    )
    add("--embedder-name", metavar="NAME", help="what to call it (default: the last part of --embedder)")
    add("--embedder-prefix", metavar="TEXT", default="", help='put before every text, such as "search_query: "')


def add_writer(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the language model that writes instructions."""
    add = parser.add_argument_group("language model that writes instructions").add_argument
    add("--writer", metavar="MODEL", help="a transformers model (hub id or folder), or a model of --writer-url")
    add(
        "--writer-url",
        metavar="URL",
        help=f"an OpenAI-compatible server, such as http://localhost:8000/v1 (its key is read from ${KEY})",
    )
    add("--writer-timeout", type=float, default=60.0, metavar="S", help="seconds per request (default: %(default)s)")
    add(
        "--writer-template",
        type=Path,
        metavar="FILE",
        help="what it is asked: a text with {examples}, perhaps {count} (default: the one of GLIDER's appendix A.1)",
    )


def add_similar(parser: argparse.ArgumentParser, *, of_task: str = "") -> None:
    """Declare which solved examples the writer sees with a query; of_task: what is so of a command that has tasks."""
    add = parser.add_argument
    add(
        "--solved",
        type=Path,
        metavar="FILE",
        help="solved examples, JSON lines, of which --writer sees the most similar ones with a query",
    )
    add(
        "--similar",
        type=int,
        metavar="N",
        help="how many it sees: 3 is GLIDER, 0 its zero-shot variant (default: 3 with --solved, or where the experts' "
        f"indices hold texts, else 0{of_task})",
    )


def build_embedder(args: argparse.Namespace, device: str = "cpu") -> Embedder:
    """The embedder of the arguments; ValueError without one."""
    if problems := embedder_problems(args):
        raise ValueError(f"this needs {problems[0]}")
    options = {"name": args.embedder_name, "prefix": args.embedder_prefix, "device": device}
    return load_embedder(args.embedder, mean_pool=args.mean_pool, **options)


def check_writer(args: argparse.Namespace) -> None:
    """ValueError for options of the writer that do not go together."""
    if args.writer_template and not args.writer:
        raise ValueError("--writer-template is what --writer MODEL is asked: pass that as well")
    similar, solved = getattr(args, "similar", None), getattr(args, "solved", None)
    if similar is not None and similar < 0:
        raise ValueError(f"--similar must be at least 0, got {similar}")
    if (similar or solved) and not args.writer:
        raise ValueError("--similar and --solved are for --writer MODEL, which sees the examples: pass that as well")
    if solved and similar == 0:
        raise ValueError("--similar 0 shows the writer nothing: leave --solved out")
    if args.writer_url and not args.writer:
        raise ValueError("--writer-url needs --writer MODEL, the name of the model on that server")
    if not 0 < args.writer_timeout < float("inf"):
        raise ValueError(f"--writer-timeout must be positive and finite, got {args.writer_timeout:g}")


def build_writer(args: argparse.Namespace, device: str = "cpu") -> InstructionWriter | None:
    """The writer of the arguments, or None when they name none."""
    check_writer(args)
    if not args.writer:
        return None
    templates = {}
    if args.writer_template:
        text = read_text(args.writer_template)
        templates = {"template": text, "query_template": text}
    if args.writer_url:
        return InstructionWriter.from_endpoint(
            args.writer_url, args.writer, api_key=os.environ.get(KEY), timeout=args.writer_timeout, **templates
        )
    return InstructionWriter.from_transformers(args.writer, device=device, **templates)


def add_hidden_layer(parser: argparse.ArgumentParser) -> None:
    """Declare the options of methods that embed by the base model, and of those whose router was trained."""
    parser.add_argument(
        "--hidden-layer",
        type=int,
        default=HIDDEN_LAYER,
        metavar="N",
        help="of the base model that method dam reads; -2: the last but one (default: %(default)s)",
    )
    parser.add_argument("--base-name", metavar="NAME", help="what dam's index calls the base (default: from --model)")
    add_query_routers(parser)


def build_routers(
    args: argparse.Namespace, experts: Any, methods: list[str | None], load: Callable[[], tuple[Any, Any]]
) -> dict[str, Any]:
    """The routers that the methods ask for, {`Method.router`: router}.

    load() -> (model, tokenizer), called only for a method that needs them.
    """
    from ..methods import get_method
    from ..queries.example_router import ExampleRouter
    from ..queries.router import AskRouter, QueryRouter

    rows = [get_method(name) for name in methods if name is not None]
    check_needs(args, experts, rows)
    kinds = {row.router for row in rows} - {None}
    routers: dict[str, Any] = {}
    writer = build_writer(args, args.device) if kinds & {"instruction", "ask"} else None
    if "ask" in kinds:
        routers["ask"] = AskRouter(experts, writer)
    embedder = build_embedder(args, args.device) if kinds & {"instruction", "examples"} else None
    if "instruction" in kinds:
        routers["instruction"] = QueryRouter(experts, embedder, writer, similar=build_similar(args, experts, embedder))
    if "examples" in kinds:
        routers["examples"] = ExampleRouter(experts, embedder)
    routers |= trained_routers(args, experts, kinds, lambda: embedder or build_embedder(args, args.device))
    if HIDDEN_STATES in kinds:
        base = Embedder.from_hidden_states(
            *load(), layer=args.hidden_layer, name=args.base_name or base_name(args.model)
        )
        routers[HIDDEN_STATES] = ExampleRouter(experts, base)
    if "likelihood" in kinds:
        from ..queries.likelihood import LikelihoodRouter

        routers["likelihood"] = LikelihoodRouter(*load(), experts.names)
    if "few-shot" in kinds:
        from ..training.lorahub import LoraHubRouter

        form = prompt_of(args)
        routers["few-shot"] = LoraHubRouter(load()[1], form.template, chat=form.chat)
    return routers


def build_similar(args: argparse.Namespace, experts: Any, embedder: Embedder) -> Any:
    """What `QueryRouter(similar=)` gets from the arguments: --solved, or the experts' indices, or nothing."""
    from ..queries.similar import SHOWN, indexed_examples, similar_examples

    # a command without `add_similar` takes what the experts' indices hold
    similar, solved = getattr(args, "similar", None), getattr(args, "solved", None)
    if similar == 0 or not args.writer:
        return None
    count = similar or SHOWN
    if solved:
        return similar_examples(embedder, read_rows(solved), count)
    found = indexed_examples(experts, embedder, count)
    if found is None and similar and not hasattr(args, "tasks"):
        raise ValueError(
            f"--similar {similar}: there are no solved examples; pass --solved FILE, or experts that were indexed "
            "with `moerge describe --index N --index-texts`"
        )
    return found


def similar_of_task(args: argparse.Namespace, routers: dict[str, Any]) -> int:
    """`Settings.similar`: how many examples of a task's own train.jsonl the writer sees, when it sees no others."""
    router = routers.get("instruction")
    return (args.similar or 0) if router is not None and router.writer is not None and router.similar is None else 0


def add_tasks_and_model(parser: argparse.ArgumentParser, *, experts: bool = True) -> None:
    """Declare what `eval` and `inspect` share: model, experts (whether they are required), tasks."""
    add = parser.add_argument
    add_model(parser)
    add_experts(parser, required=experts)
    add_gates(parser)
    add_routers(parser)
    add("--tasks", required=True, nargs="+", action="extend", metavar="DIR", help="folders with test.jsonl, meta.json")
    add("--split", default="test", help="which <split>.jsonl of the tasks (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="the first N rows of every task (default: all)")
    add(
        "--top-k",
        type=top_k,
        metavar="K",
        help="experts per token, or 'all', of every method that sets none itself",
    )
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the base model")
    add("--device", default="cpu", help="such as cpu or cuda:0 (default: %(default)s)")
    add_progress(parser)
    add_prompt(parser)
    add_selection(parser)
    add_placing(parser)
    add_embedder(parser)
    add_hidden_layer(parser)
    add_writer(parser)
    add_similar(parser, of_task="; a number without either takes them from the task's train.jsonl")


def check_file(path: Path) -> None:
    """ValueError or OSError, before any work, for a file that could not be written."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass the name of a file")
    check_can_write(path.parent)


def read_tasks(args: argparse.Namespace, metric: str | None = None) -> list[Task]:
    """The tasks of the arguments; one ValueError with what is wrong with each."""
    tasks, problems = [], []
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    for folder in args.tasks:
        try:
            tasks.append(load_task(folder, split=args.split, limit=args.limit, metric=metric))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    check_distinct(tasks)
    check_fields(tasks, prompt_of(args))
    return tasks


def check_asked(args: argparse.Namespace, tasks: list[Task], *, given: bool = False) -> None:
    """ValueError for tasks whose prompts cannot be made or do not fit the model's context, before its weights are read.

    given: as in `check_prompts`.
    """
    import transformers

    from ..evaluation.answers import Answerer
    from ..models.pretrained import load_config, load_tokenizer, location

    tokenizer, config = load_tokenizer(args.model), load_config(args.model)
    check_chat(prompt_of(args), tokenizer)
    where, options = location(args.model)
    try:
        generation = transformers.GenerationConfig.from_pretrained(where, **options)
    except OSError:  # for want of its own, the model has one that is made of its config
        generation = transformers.GenerationConfig.from_model_config(config)
    unread = SimpleNamespace(config=config, generation_config=generation)
    limit = None if given else args.max_new_tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is warned of is warned of again, of the model
        check_prompts(Answerer(unread, tokenizer), tasks, prompt_of(args), limit, given=given)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer; ValueError, before the model is read, for a tokenizer that --chat cannot use."""
    from ..models.pretrained import load_model, load_tokenizer, usable_device

    device, tokenizer = usable_device(args.device), load_tokenizer(args.model)
    check_chat(prompt_of(args), tokenizer)
    return load_model(args.model, dtype=args.dtype, device=device), tokenizer
