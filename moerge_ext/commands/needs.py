"""What methods that route by the query's text need of arguments and experts: all that is missing, in one error."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..queries.hidden import GENERIC

if TYPE_CHECKING:
    from ..experts.bank import ExpertBank
    from ..methods.base import Method

DESCRIBE = "moerge describe --adapter DIR"
EMBEDDER = "--embedder MODEL, a sentence-transformers model, or with --mean-pool any encoder"


def check_needs(args: argparse.Namespace, experts: ExpertBank, methods: Iterable[Method]) -> None:
    """ValueError with everything that the methods lack: options, routers, descriptions, indices, gates."""
    methods = list(methods)
    kinds = {method.router for method in methods} - {None}
    problems = [*_of_options(args, kinds), *_of_experts(args, experts, kinds)]
    for method in methods if problems else ():  # alone it is said with the model's layers
        problems += method.lacks(experts)[:1] if method.lacks is not None else []
    if problems:
        names = ", ".join(dict.fromkeys(method.name for method in methods if method.router is not None))
        raise ValueError(f"{names} cannot route yet; it needs:\n- " + "\n- ".join(dict.fromkeys(problems)))


def embedder_problems(args: argparse.Namespace) -> list[str]:
    """What is missing of --embedder."""
    if not args.embedder:
        return [EMBEDDER]
    if _says_nothing(args.embedder) and args.embedder_name is None:
        return [
            f"--embedder-name NAME, such as all-MiniLM-L6-v2: --embedder {args.embedder} does not say which model it is"
        ]
    return []


def describing(args: argparse.Namespace) -> str:
    """`moerge describe` with the embedder that these arguments name, as queries and experts must have the same."""
    given = getattr(args, "embedder", None)
    words = [DESCRIBE, "--embedder", shlex.quote(given) if given else "MODEL"]
    if given and (args.embedder_name or _says_nothing(given)):
        words += ["--embedder-name", shlex.quote(args.embedder_name or "NAME")]
    if given and args.embedder_prefix:
        words += ["--embedder-prefix", shlex.quote(args.embedder_prefix)]
    return " ".join([*words, *(["--mean-pool"] if given and args.mean_pool else [])])


def _says_nothing(embedder: str) -> bool:
    """Whether it is a folder whose name tells not which model is in it."""
    return Path(embedder).is_dir() and Path(embedder).name.lower() in ("", "..", *GENERIC)


def _of_options(args: argparse.Namespace, kinds: set[str]) -> list[str]:
    from ..queries.load_text_router import CLASSES, OWN, read_stored

    trained = kinds & set(CLASSES)
    there = {read_stored(folder).kind for folder in getattr(args, "query_router", [])} if trained else set()
    problems = [f"--query-router DIR, made by `moerge train-query-router {kind}`" for kind in sorted(trained - there)]
    if kinds & {"instruction", "examples"} or trained - set(OWN):
        problems += embedder_problems(args)
    if "ask" in kinds and not args.writer:
        problems.append("--writer MODEL, the language model that picks the expert")
    return problems


def _of_experts(args: argparse.Namespace, experts: ExpertBank, kinds: set[str]) -> list[str]:
    from ..experts.kinds import INSTRUCTION
    from ..queries.index import PREFIX

    problems = []
    if "instruction" in kinds:
        described = experts.global_vectors.get(INSTRUCTION, {})
        if lost := [name for name in experts.names if name not in described]:
            ways = f"`{describing(args)} --instruction TEXT`, or with --examples FILE --writer MODEL"
            problems.append(f"a description of {', '.join(lost)}: {ways}")
    if "examples" in kinds:
        lost = [
            name for name in experts.names if not any([*place.glob(f"{PREFIX}*")] for place in experts.places(name))
        ]
        if lost:
            problems.append(f"indexed examples of {', '.join(lost)}: `{describing(args)} --examples FILE --index 1000`")
    return problems
