"""Affinities of a request to the experts from a text: the query that it brings, or its own prompt.

The routers are those behind `handle.queries` of a patched model, without a writer: a served answer is its answer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..experts.bank import ExpertBank
from ..methods import get_method
from ..methods.base import HIDDEN_STATES, Method
from ..queries.embedder import Embedder, load_embedder
from ..queries.example_router import ExampleRouter
from ..queries.router import QueryRouter, Router

ROUTERS = {"instruction": QueryRouter, "examples": ExampleRouter}  # by the source of a method
PARTS = {"model": str, "name": str, "prefix": str, "mean_pool": bool}  # of an embedder that is more than its model
# why an embedder is not enough for methods with other routers
MORE = {
    HIDDEN_STATES: "embeds by the base model, which the engine has",
    "ask": "asks a language model about every text",
    "likelihood": "reads every text with the model and its experts first",
    "few-shot": "searches its weights with solved examples of a task",
}
TRAINED = "has a router that was trained, which a server does not read"


def readers(methods: Iterable[str]) -> list[str]:
    """Those of the methods whose affinities an embedder finds for a text."""
    return [name for name in methods if get_method(name).router in ROUTERS]


def embedder_problems(embedder: Any, methods: Iterable[Method], spare: Any) -> list[str]:
    """What is wrong with an embedder, by itself and beside the methods and spare slots of a server."""
    methods = list(methods)
    problems = []
    if not _is_embedder(embedder):
        problems.append(
            f'embedder must be a sentence-transformers model, folder or hub id, or {{"model": "encoder/", "name": '
            f'"e5", "prefix": "query: ", "mean_pool": true}}, got {embedder!r}'
        )
    for row in methods:
        if row.bias is not None and row.source is not None and row.router not in ROUTERS:
            problems.append(
                f"embedder: method '{row.name}' {MORE.get(row.router, TRAINED)}: leave the method out, or the "
                'embedder, and let requests bring {"affinities": ...}'
            )
    if methods and not any(row.router in ROUTERS for row in methods):
        names = ", ".join(row.name for row in methods)
        problems.append(f"embedder: {names} reads no text of a request: leave it out, or add a method such as glider")
    if spare:
        problems.append(f"spare={spare!r}: the embedder would not know what an expert that joins is for")
    return problems


def _is_embedder(said: Any) -> bool:
    if isinstance(said, Mapping):
        parts = all(key in PARTS and isinstance(value, PARTS[key]) for key, value in said.items())
        return parts and bool(said.get("model"))
    return isinstance(said, str) and bool(said)


class Queries:
    """What texts say of the experts, for the methods that ask a text.

    embedder: the setting, free of `embedder_problems`; methods: {name: its options}; experts: their weights may be
    missing. ValueError that lists every method and expert that cannot be routed so; OSError and ImportError as of
    `Embedder`.
    """

    def __init__(
        self, embedder: str | Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]], experts: ExpertBank
    ):
        self._asked: dict[str, tuple[Router, dict[str, Any]]] = {}  # {method: its router, its options}
        self._lock = threading.Lock()  # fast tokenizers refuse two threads
        found: dict[str, Router] = {}
        problems: list[str] = []
        with _one_thread():
            made = _embedder(embedder)
            rows = [get_method(name) for name in readers(methods)]
            for source in dict.fromkeys(row.router for row in rows):
                try:
                    found[source] = ROUTERS[source](experts, made).without_cache()  # most texts are seen once
                except ValueError as error:
                    problems.append(str(error))
        for row in rows:
            try:
                options = row.configure(**methods[row.name])[2]
                if row.router in found:
                    router = found[row.router]
                    self._asked[row.name] = router, router.settings(row.name, options)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))

    def affinities(self, method: str, text: str) -> tuple[float, ...]:
        """[E] of one text, what `handle.queries` has its method weigh. ValueError for what cannot be embedded."""
        router, options = self._asked[method]
        try:
            with self._lock:
                scores = router.scores([text], options)
        except ValueError as error:
            raise ValueError(f"moerge: the text cannot be embedded: {error}") from None
        return tuple(scores[0].float().tolist())


def _embedder(said: str | Mapping[str, Any]) -> Embedder:
    """As --embedder with its options is read."""
    said = {"model": said} if isinstance(said, str) else said
    options = {"name": said.get("name"), "prefix": said.get("prefix", "")}
    return load_embedder(said["model"], mean_pool=bool(said.get("mean_pool")), **options)


@contextmanager
def _one_thread() -> Iterator[None]:
    """In which torch starts no threads: an engine that is forked from a process with such threads would wait for them
    for ever.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Prompts:
    """The texts of prompts, without special tokens.

    tokenizer: of the model, None where there is none; instead: what to do where a prompt has no text
    """

    def __init__(self, tokenizer: Any, instead: str = 'send {"query": "..."}'):
        self._tokenizer, self._instead = tokenizer, instead
        named = getattr(tokenizer, "all_special_tokens", ())
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()  # those that only a chat template uses, too
        self._special = {*named, *(str(token) for token in added if getattr(token, "special", False))} - {""}

    def text(self, given: str | None, ids: Sequence[int] | None) -> str:
        """As it was given, where that holds no special token; or else its tokens, decoded. ValueError for no text."""
        if given is None or any(token in given for token in self._special):
            if ids is None or self._tokenizer is None:
                raise ValueError(NO_TEXT.format("came without one that could be read", self._instead))
            given = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        if not given.strip():
            raise ValueError(NO_TEXT.format("has none but special tokens", self._instead))
        return given


NO_TEXT = "moerge: a request is routed by the text of its prompt, and this one {}: {}"
