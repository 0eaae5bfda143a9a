"""A trained router of texts from its folder, of whatever kind it is."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..experts.bank import ExpertBank
from .benchmark import BenchmarkRouter
from .classifier import DataRouter
from .embedder import Embedder
from .retriever import RetrieverRouter, own_embedder
from .routoo import RoutooRouter
from .strong_weak import ClassifierRouter, FactorizationRouter
from .text_router import TextRouter, read_stored
from .tfidf import TfidfRouter
from .zooter import ZooterRouter

ROUTERS = (BenchmarkRouter, ZooterRouter, RoutooRouter, FactorizationRouter, ClassifierRouter, DataRouter)
CLASSES = {router.kind: router for router in (*ROUTERS, RetrieverRouter, TfidfRouter)}
OWN = (RetrieverRouter.kind, TfidfRouter.kind)  # these need no embedder


def load_text_router(
    folder: str | os.PathLike, experts: ExpertBank | Sequence[str], embedder: Embedder | None = None
) -> TextRouter:
    """The router that `moerge train-query-router` wrote, for `handle.router` or a `ModelPool`.

    experts: the bank, or the names of whole models; embedder: the one of its training, none for `OWN`. ValueError for a
    folder without a router, and for one of other experts or another embedder.
    """
    stored = read_stored(folder)
    if stored.kind not in CLASSES:
        raise ValueError(f"{folder} holds a router of kind '{stored.kind}'; expected one of {', '.join(CLASSES)}")
    if stored.kind == RetrieverRouter.kind:
        embedder = own_embedder(folder, stored.facts["instruction"])
    return CLASSES[stored.kind](experts, embedder, stored)
