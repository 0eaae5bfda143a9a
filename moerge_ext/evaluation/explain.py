"""One prompt, token by token: which experts were applied to it, in every layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..files.listing import listed
from ..models.prompt import Prompt
from ..routing.patch import Handle, get_handle
from ..routing.routed_experts import ParameterBranch
from ..routing.routed_linear import RoutedLinear
from ..training.batches import model_device
from .answers import Answerer
from .places import place_of, stack_labels
from .token_texts import Piece, pieces
from .token_weights import Applied, applied_weights

WHOLE, ENCODER, DECODER = "text", "encoder", "decoder"


@dataclass(frozen=True)
class Depth:
    """A layer of a stack; stack: "" in a model of one. layer None: the module `stack`, outside of all layers."""

    stack: str
    layer: int | None

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.stack, self.layer) if part not in ("", None))


@dataclass(frozen=True)
class Stream:
    """The tokens of one side of the model.

    name: "text" in a decoder-only model, "encoder" or "decoder"; ids [T]; tokens [T]: as the vocabulary writes
    them; pieces: their texts; prompt: how many of the
    tokens were given, the others are generated; depths [L]; weights [T,L,E] float32: the weights applied to each token,
    averaged over the modules of a depth, zeros for a token that the model did not read.
    """

    name: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    pieces: tuple[Piece, ...]
    prompt: int
    depths: tuple[Depth, ...]
    weights: Tensor

    def shares(self, depths: slice = slice(None)) -> Tensor:
        """[T,E] float32: each expert's part of the size of the weights at some depths; zeros for an unread token."""
        size = self.weights[:, depths].mean(1).abs()
        return size / size.sum(1, keepdim=True).clamp_min(1e-30)

    @property
    def read(self) -> Tensor:
        """[T] bool: whether the model read the token; it does not read the last one that it generated for itself."""
        return (self.weights != 0).any(2).any(1)


@dataclass(frozen=True)
class TokenRouting:
    """What `explain_tokens` found. experts [E]; notes: what a reader has to know; left_out: modules that see no tokens
    of the text in order, such as the base's own experts or a vision tower."""

    method: str
    experts: tuple[str, ...]
    streams: tuple[Stream, ...]
    per_sequence: bool
    left_out: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        notes = []
        if self.per_sequence:
            notes.append(
                f"{self.method} routes by the sequence: the weights are the same for all tokens that were read together"
            )
        if self.left_out:
            notes.append(f"left out, as they do not see the tokens in order: {listed(self.left_out, 'module')}")
        if any(not stream.read.all() for stream in self.streams):
            notes.append("tokens without a colour were not read by the routed layers")
        return notes


@torch.no_grad()
def explain_tokens(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Prompt,
    *,
    max_new_tokens: int = 0,
    modules: Sequence[str] = (),
    layers: Collection[int] | None = None,
) -> TokenRouting:
    """Which experts a patched model applies to each token of a prompt, and of its greedy continuation.

    Args:
        model: after `patch`, with a method that routes; inside of `handle.queries(...)` or `handle.affinities(...)`
            where the method needs it.
        max_new_tokens: tokens to generate; 0 reads the prompt alone.
        modules: endings of module paths ("q_proj", "self_attn.q_proj") or patterns ("*.mlp.*"); default all.
        layers: numbers of layers, counted from 0; default all.

    Returns:
        `TokenRouting`, whose streams have weights [T,L,E].

    ValueError for a model that is not patched or routes nothing, modules and layers that it has not, and a text that
    does not fit its context.
    """
    handle, answerer = get_handle(model), Answerer(model, tokenizer)
    chosen = chosen_modules(handle, modules, layers)
    start = answerer.prompt_ids(prompt)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    answerer.check_length(len(start) + (0 if answerer.seq2seq else max_new_tokens))
    ids = torch.tensor([start], device=model_device(model))
    # a method that reads the text again as it grows does so inside of generate alone
    while_generating = "every" in handle.options and max_new_tokens > 0
    with applied_weights(chosen) as applied:
        applied.on = while_generating
        out = _generated(answerer, ids, max_new_tokens)
        if not while_generating:
            applied.on = True
            _read(answerer, ids, out)
    return _told(answerer, handle, start, out, applied, while_generating)


def chosen_modules(
    handle: Handle, modules: Sequence[str] = (), layers: Collection[int] | None = None
) -> dict[str, RoutedLinear | ParameterBranch]:
    """{path: routed layer} of the choice; ValueError when a part of it is nowhere."""
    kinds = (RoutedLinear, ParameterBranch)
    routed = {m.name: m for m in handle.model.modules() if isinstance(m, kinds) and m.route_options is not None}
    if not routed:
        raise ValueError(f"method '{handle.method.name}' routes nothing by the ops: there is no choice to explain")
    missing = [name for name in modules if not any(_fits(path, name) for path in routed)]
    there = {place_of(path).layer for path in routed} - {None}
    problems = [f"no routed module is called {listed(missing)}; there are {_kinds(routed)}"] if missing else []
    if layers is not None and (unknown := sorted(set(layers) - there)):
        has = f"{min(there)} to {max(there)}" if there else "none"
        problems.append(f"there is no layer {listed([str(n) for n in unknown])}; layers with experts: {has}")
    chosen = {path: m for path, m in routed.items() if not modules or any(_fits(path, name) for name in modules)}
    chosen = {path: m for path, m in chosen.items() if layers is None or place_of(path).layer in layers}
    if problems or not chosen:
        raise ValueError("; ".join(problems) or "no module is both of the chosen kind and in the chosen layers")
    return chosen


def _fits(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name) or fnmatchcase(path, name)


def _kinds(paths: Collection[str]) -> str:
    return listed(list(dict.fromkeys(place_of(path).kind for path in paths)))


def _generated(answerer: Answerer, ids: Tensor, max_new_tokens: int) -> list[int]:
    """What generate returns: the prompt and more, or of an encoder-decoder what the decoder reads and writes."""
    if not max_new_tokens:
        start = getattr(answerer.model.generation_config, "decoder_start_token_id", None)
        config = answerer.model.config
        start = config.decoder_start_token_id if answerer.seq2seq and start is None else start
        return [answerer.pad if start is None else start] if answerer.seq2seq else ids[0].tolist()
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": answerer.pad}
    return answerer.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()


def _read(answerer: Answerer, ids: Tensor, out: list[int]) -> None:
    """One forward over all tokens."""
    device = ids.device
    if not answerer.seq2seq:
        answerer.model(input_ids=torch.tensor([out], device=device))
        return
    # of another length than the encoder's, by which it is known whose tokens a layer sees; nothing before reads it
    more = [answerer.pad] if len(out) == ids.shape[1] else []
    decoder = torch.tensor([out + more], device=device)
    answerer.model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=decoder)


class _Side(NamedTuple):
    """Of a stream: its ids, how many of them are the prompt, and the rows by which its layers are known."""

    name: str
    ids: list[int]
    prompt: int
    read: int
    rows: tuple[int, int]


def _sides(answerer: Answerer, start: list[int], out: list[int], while_generating: bool) -> list[_Side]:
    read = len(out) - 1 if while_generating else len(out)
    if not answerer.seq2seq:
        return [_Side(WHOLE, out, len(start), read, (len(start), read) if while_generating else (read, read))]
    rows = (1, read) if while_generating else (read, read)
    if not while_generating and read == len(start):
        rows = (read + 1, read + 1)  # the token more of `_read`
    encoder = _Side(ENCODER, start, len(start), len(start), (len(start), len(start)))
    return [encoder, _Side(DECODER, out, 1, read, rows)]


def _told(
    answerer: Answerer, handle: Handle, start: list[int], out: list[int], applied: Applied, while_generating: bool
) -> TokenRouting:
    streams, left_out = [], list(applied.layers)
    for side in _sides(answerer, start, out, while_generating):
        mine = [path for path in left_out if applied.rows(path) == side.rows]
        left_out = [path for path in left_out if path not in mine]
        if mine:
            streams.append(_stream(side, mine, applied, handle, answerer.tokenizer))
    if not streams:
        raise ValueError(
            f"no routed layer has seen the tokens in order: {listed(left_out, 'module')}. Leave `with "
            "handle.disabled():`, and choose layers that compute on every token"
        )
    per_sequence = all(not layer.gates.any() for layer in applied.layers.values())
    return TokenRouting(handle.method.name, handle.names, tuple(streams), per_sequence, tuple(left_out))


def _stream(side: _Side, modules: list[str], applied: Applied, handle: Handle, tokenizer: Any) -> Stream:
    labels = stack_labels(applied.layers)
    depths: dict[Depth, list[str]] = {}
    for path in modules:
        place = place_of(path)
        depth = Depth(path, None) if place.layer is None else Depth(labels[place.stack], place.layer)
        depths.setdefault(depth, []).append(path)
    stacks = list(labels.values())

    def rank(depth: Depth) -> tuple[int, int]:
        return (len(stacks), 0) if depth.layer is None else (stacks.index(depth.stack), depth.layer)

    ordered = sorted(depths, key=rank)
    weights = torch.zeros(len(side.ids), len(ordered), len(handle.names), dtype=torch.float32, device="cpu")
    for at, depth in enumerate(ordered):
        dense = [applied.dense(path, len(handle.names)) for path in depths[depth]]
        weights[: side.read, at] = (sum(dense) / len(dense))[: side.read]
    tokens = tuple(map(str, tokenizer.convert_ids_to_tokens(side.ids)))
    cut = tuple(pieces(side.ids, tokenizer))
    return Stream(side.name, tuple(side.ids), tokens, cut, side.prompt, tuple(ordered), weights)
