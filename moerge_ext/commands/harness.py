"""The model class of lm-evaluation-harness: `--model moerge --model_args pretrained=...,experts=...,method=...`.

Importing this file registers it. lm-eval finds it by itself, through the entry point in pyproject.toml, where it looks
for entry points at all; `moerge lm-eval` imports it for the versions that do not.
"""

from __future__ import annotations

import argparse
import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch as replaced

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models import huggingface
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError('lm-evaluation-harness is not installed: pip install "moerge_ext[lm-eval]"') from error

from .. import load_experts, patch
from ..evaluation.runs import DERIVED, Run, parse_run
from ..methods import get_method
from ..methods.base import Method
from .options import add_embedder, add_hidden_layer, add_writer, build_routers, check_writer


@register_model("moerge")
class MoergeLM(HFLM):
    """A routed model: `HFLM` with experts. Requests, chat templates, batches and all other arguments are HFLM's.

    Args:
        pretrained: folder or hub id of the base model.
        experts: folders or hub ids: a list, or a text with ":" between them, in which * and ? are expanded.
        method: a row of `moerge eval --methods`, with its options; "base" is the model without experts.
        kwargs: the options of `moerge eval` for embedder and writer (embedder, mean_pool, writer, hidden_layer, ...);
            the rest is HFLM's.

    A method that reads the query gets each request's context as it is, with its few-shot examples and chat template.
    Requests of such a method without a context, as of perplexities, are a ValueError, and so are methods that decide
    for a whole task, and `batch_size=auto`, for which lm-eval makes requests without a text.
    """

    def __init__(
        self, pretrained: str, experts: str | Sequence[str] = (), method: str = "phatgoose", **kwargs: Any
    ) -> None:
        options, kwargs = _router_options(kwargs)
        run, folders = parse_run(method) if method not in DERIVED else None, _folders(experts)
        if run is None:
            raise ValueError(f"method={method}: {DERIVED[method]}: this is made of other rows, by `moerge eval`")
        row = None if run.method is None else get_method(run.method)
        _check(row, run, folders, kwargs.get("batch_size"))
        bank = None if row is None else load_experts(folders, base=pretrained)
        routed = row is not None and row.bias is not None
        if routed:
            # one forward serves all requests with the same beginning, whatever their contexts are
            kwargs["logits_cache"] = False
        super().__init__(pretrained=pretrained, **kwargs)
        self.handle = None if row is None else patch(self.model, bank, run.method, **run.options)
        if routed:
            options.model, options.device = pretrained, str(self.device)
            self.handle.router = build_routers(options, bank, [run.method], lambda: (self.model, self.tokenizer))[
                row.router
            ]
            self.handle.router.settings(row.name, self.handle.options)

    def _loglikelihood_tokens(self, requests: Sequence[tuple], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        with self._by_context(lambda request: request[0] and request[0][0]):
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[str]:
        with self._by_context(lambda request: request[0]):
            return super().generate_until(requests, *args, **kwargs)

    def _by_context(self, context_of: Any):
        """A block in which every batch that HFLM makes is routed by the contexts of its requests."""
        handle = self.handle
        if handle is None or handle.method.bias is None:
            return nullcontext()
        tokenizer = self.tokenizer

        class Routed(huggingface.Collator):
            def get_batched(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
                for chunk in super().get_batched(*args, **kwargs):
                    with queries(handle, [context_of(request) for request in chunk], tokenizer):
                        yield chunk

        return replaced.object(huggingface, "Collator", Routed)


@contextmanager
def queries(handle: Any, contexts: Sequence[str | None], tokenizer: Any) -> Iterator[None]:
    """The batch of these contexts; ValueError for one that has none."""
    if not all(isinstance(context, str) and context.strip() for context in contexts):
        raise ValueError(
            f"method '{handle.method.name}' routes by the context of a request, and this task has requests without "
            "one: choose a method that routes by tokens, or leave the task out"
        )
    with handle.queries(contexts, tokenizer=tokenizer):
        yield


def _folders(experts: str | Sequence[str]) -> list[str]:
    """The folders and hub ids that `experts` names. ValueError for a pattern that fits nothing."""
    given = experts.split(":") if isinstance(experts, str) else [str(expert) for expert in experts]
    folders = []
    for text in filter(None, (text.strip() for text in given)):
        found = sorted(glob.glob(text)) if any(mark in text for mark in "*?") else [text]
        if not found:
            raise ValueError(f"experts={text}: there is no such folder")
        folders += found
    return folders


def _check(row: Method | None, run: Run, folders: Sequence[str], batch_size: Any) -> None:
    """ValueError for what cannot be run, before anything is read."""
    if row is None:
        return
    if not folders:
        raise ValueError(f"method={run.label} needs experts=DIR:DIR:..., the folders or hub ids of the experts")
    if row.bias is not None and (row.per_task or row.source in (None, "few-shot")):
        raise ValueError(
            f"method '{row.name}' decides for a whole task by solved or given examples, which lm-eval does not hand to "
            "a model: use `moerge eval`"
        )
    if row.bias is not None and str(batch_size).startswith("auto"):
        raise ValueError(f"method '{row.name}' routes by text, and batch_size=auto asks without: give a number")


def _router_options(kwargs: dict[str, Any]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(the options of embedder and writer among the arguments, the rest)."""
    parser = argparse.ArgumentParser(add_help=False)
    for add in (add_embedder, add_hidden_layer, add_writer):
        add(parser)
    options = parser.parse_args([])
    for name in vars(options).keys() & kwargs.keys():
        setattr(options, name, kwargs[name])
    check_writer(options)
    return options, {name: value for name, value in kwargs.items() if name not in vars(options)}
