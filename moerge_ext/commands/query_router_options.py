"""--query-router: trained routers of texts, the same in every command that routes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..queries.embedder import Embedder


def add_query_routers(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument(
        "--query-router",
        action="append",
        default=[],
        metavar="DIR",
        help="what `moerge train-query-router` wrote, for the methods of its kind; repeatable, one of each kind",
    )


def trained_routers(
    args: argparse.Namespace, experts: Any, kinds: set[str], embedder: Callable[[], Embedder]
) -> dict[str, Any]:
    """{kind: router} for those of `kinds` that are trained, all of which --query-router brings."""
    from ..queries.load_text_router import CLASSES, OWN, load_text_router, read_stored

    wanted = kinds & set(CLASSES)
    if not wanted:
        return {}
    folders: dict[str, str] = {}
    for folder in getattr(args, "query_router", []):
        stored = read_stored(folder)
        if stored.kind in folders:
            raise ValueError(f"--query-router: both {folders[stored.kind]} and {folder} are of kind {stored.kind}")
        folders[stored.kind] = folder
    shared = embedder() if wanted - set(OWN) else None
    return {kind: load_text_router(folders[kind], experts, shared) for kind in sorted(wanted)}
