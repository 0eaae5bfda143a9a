"""The Triton multi-LoRA kernels of vLLM and SGLang over our weights. An H200 has run SGLang's from here, vLLM's none.

Imported from a folder that the user names (`--triton-peers`); nothing of theirs is in this project. The calls follow
the signatures of the released packages vllm 0.33.0 (`vllm.lora.ops.triton_ops`) and sglang 0.5.23
(`sglang.kernels.ops.lora.dense`; before that `sglang.srt.lora.triton_ops`, with the same names).

These kernels apply one adapter per row. K experts per token are K shrinks and K expands over the T rows: rank values
are multiplied by the router's weights between them, and each expand adds to the base output in place. The other way,
T*K rows in one call, would copy x and the output K times. Where there is a choice, it is to their advantage:

- A [E,R,D] and B [E,O,R] are in the layout they ask for.
- With given ids, the rows are grouped by adapter before timing starts, as their engines do once per batch of requests.
  Routed, every layer has other ids and grouping is timed, but all K slots are grouped at once, on the device, without
  waiting for it (vLLM's own `prepare_tensors` waits, and could not be captured in a graph).
- Up to ROWS tokens each row is its own group and nothing is sorted.
- SGLang's groups are cut into chunks as long as an expert's mean share of the rows. Both of its pairs of kernels, the
  chunked one and the plain one, get these.

Their bfloat16 and float16 only: vLLM refuses float32, Triton rounds it in its products.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import Cell, wants
from .data import Tokens, Weights
from .fast_route import fast_route
from .timing import Candidate

DEVICE = "cuda"
ROWS = 16  # the rows of the smallest tile of a Triton product
CHUNK = 128  # the longest chunk that SGLang makes


class Groups(NamedTuple):
    """Rows by adapter for each of K slots, int32: group g of slot k is the rows order[k, starts[k,g]:starts[k,g+1]].

    adapter [K,T] of each row; order [K,T]; starts [K,G+1]; ids [K,G] the adapter of each group, which may be empty.
    """

    adapter: Tensor
    order: Tensor
    starts: Tensor
    ids: Tensor


class Grouping:
    """Makes Groups of experts [T,K]; with `chunk`, no group has more rows than that."""

    def __init__(self, cell: Cell, device: torch.device, chunk: int | None = None):
        self.T, self.E, self.chunk = cell.T, cell.E, chunk

        def numbers(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.arange(count, dtype=dtype, device=device).repeat(cell.K, 1)

        self.rows, self.experts, self.edges = numbers(cell.T + 1), numbers(cell.E), numbers(cell.E + 1)
        # at most: every expert but the empty ones has one chunk that is not full
        self.pieces = numbers(min(cell.T, cell.E + cell.T // chunk), torch.int64) if chunk else None

    def __call__(self, experts: Tensor) -> Groups:
        adapter = experts.int().T.contiguous()
        if self.T <= ROWS:
            return Groups(adapter, self.rows[:, : self.T], self.rows, adapter)
        in_order, order = adapter.sort(dim=1)
        starts = torch.searchsorted(in_order, self.edges, out_int32=True)
        if self.pieces is None:
            return Groups(adapter, order.int(), starts, self.experts)
        return Groups(adapter, order.int(), *self._cut(starts))

    def _cut(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Chunks of the experts' rows; those left over are empty, at the end."""
        counts = (starts.diff(dim=1) + (self.chunk - 1)) // self.chunk
        ends = counts.cumsum(1)
        owner = torch.searchsorted(ends, self.pieces, right=True).clamp_(max=self.E - 1)
        within = self.pieces - (ends - counts).gather(1, owner)
        begins = (starts.gather(1, owner) + within * self.chunk).clamp_(max=self.T).int()
        return torch.cat((begins, self.rows[:, -1:]), 1), owner.int()


class Vllm:
    """lora_shrink into float32 rank values (as vLLM's own buffer), lora_expand onto the base output."""

    def __init__(self, weights: Weights, cell: Cell):
        self.ops = import_module("vllm.lora.ops.triton_ops")
        self.A, self.B, self.R = weights.A, weights.B, cell.R
        self.group = Grouping(cell, weights.device)
        largest = max(cell.T, cell.E)
        self.metas = [self.ops.LoRAKernelMeta.make(largest, cell.T, weights.device) for _ in range(cell.K)]

    def prepare(self, experts: Tensor) -> list[tuple]:
        groups = self.group(experts)
        counts = groups.starts.diff(dim=1)
        for k, meta in enumerate(self.metas):
            meta.token_lora_mapping = groups.adapter[k]
            meta.token_indices_sorted_by_lora_ids = groups.order[k]
            meta.active_lora_ids, meta.num_tokens_per_lora = groups.ids[k], counts[k]
            meta.lora_token_start_loc = groups.starts[k]
            meta.num_active_loras_cpu.fill_(counts.shape[1])
        return [meta.meta_args(len(experts), True) for meta in self.metas]

    def add_(self, base: Tensor, x: Tensor, i: int, w: Tensor, slots: list[tuple]) -> Tensor:
        h = x.new_empty(len(slots), len(x), self.R, dtype=torch.float32)
        for k, slot in enumerate(slots):
            self.ops.lora_shrink(x, [self.A[i]], h[k : k + 1], *slot, 1.0)
        h.mul_(w.T[:, :, None])
        for k, slot in enumerate(slots):
            self.ops.lora_expand(h[k : k + 1], [self.B[i]], base, *slot, offset_start=0, add_inputs=True)
        return base


class Sglang:
    """What SGLang's two pairs of kernels share: a LoRABatchInfo per slot."""

    def __init__(self, weights: Weights, cell: Cell):
        self.info = import_module("sglang.srt.lora.utils").LoRABatchInfo
        self.A, self.B, self.O = weights.A, weights.B, cell.O
        share = -(-cell.T // cell.E)
        self.chunk = min(CHUNK, max(ROWS, 1 << (share - 1).bit_length()))
        self.group = Grouping(cell, weights.device, self.chunk)
        make = {"device": weights.device}
        self.ranks = torch.full((cell.E,), cell.R, dtype=torch.int32, **make)
        self.scalings = torch.ones(cell.E, **make)
        self.offsets = torch.tensor([0, cell.O], dtype=torch.int32, **make)

    def prepare(self, experts: Tensor) -> list[Any]:
        groups = self.group(experts)
        count, lengths = groups.ids.shape[1], groups.starts.diff(dim=1)
        return [
            self.info(
                use_cuda_graph=False, bs=count, num_segments=count, max_len=self.chunk,
                seg_indptr=groups.starts[k], seg_lens=lengths[k], weight_indices=groups.ids[k],
                permutation=groups.order[k], lora_ranks=self.ranks, scalings=self.scalings,
            )
            for k in range(experts.shape[1])
        ]  # fmt: skip

    def add_(self, base: Tensor, x: Tensor, i: int, w: Tensor, slots: list[Any]) -> Tensor:
        for k, slot in enumerate(slots):
            h = self.shrink(x, self.A[i], slot).mul_(w[:, k, None])
            self.expand(h, self.B[i], slot, base)
        return base

    def shrink(self, x: Tensor, a: Tensor, slot: Any) -> Tensor:
        raise NotImplementedError

    def expand(self, h: Tensor, b: Tensor, slot: Any, base: Tensor) -> None:
        raise NotImplementedError


class SglangChunked(Sglang):
    """chunked_sgmv_lora_shrink_forward and chunked_sgmv_lora_expand_forward, the default backend of SGLang."""

    def __init__(self, weights: Weights, cell: Cell):
        super().__init__(weights, cell)
        self._shrink = _sglang("chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward
        self._expand = _sglang("chunked_sgmv_expand").chunked_sgmv_lora_expand_forward

    def shrink(self, x: Tensor, a: Tensor, slot: Any) -> Tensor:
        return self._shrink(x=x, weights=a, batch_info=slot, num_slices=1)

    def expand(self, h: Tensor, b: Tensor, slot: Any, base: Tensor) -> None:
        self._expand(
            x=h, weights=b, batch_info=slot, slice_offsets=self.offsets, max_slice_size=self.O, base_output=base
        )


class SglangSgemm(Sglang):
    """sgemm_lora_a_fwd and sgemm_lora_b_fwd, its backend "triton"."""

    def __init__(self, weights: Weights, cell: Cell):
        super().__init__(weights, cell)
        self._shrink = _sglang("sgemm_lora_a").sgemm_lora_a_fwd
        self._expand = _sglang("sgemm_lora_b").sgemm_lora_b_fwd

    def shrink(self, x: Tensor, a: Tensor, slot: Any) -> Tensor:
        return self._shrink(x, a, slot)

    def expand(self, h: Tensor, b: Tensor, slot: Any, base: Tensor) -> None:
        self._expand(h, b, slot, base_output=base)


ENGINES = {"vllm_triton": Vllm, "sglang_csgmv": SglangChunked, "sglang_sgemm": SglangSgemm}


def _sglang(name: str) -> ModuleType:
    try:
        return import_module(f"sglang.kernels.ops.lora.dense.{name}")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("sglang.kernels"):
            raise
        return import_module(f"sglang.srt.lora.triton_ops.{name}")


def candidates(cell: Cell, weights: Weights, tokens: Tokens, folder: Path | None) -> list[Candidate]:
    """The three peers, or by name why they are not run."""
    found = []
    for label, engine in ENGINES.items():
        if wants(cell, label):
            try:
                found.append(Candidate(label, _call(cell, weights, tokens, _built(engine, cell, weights, folder))))
            except Unavailable as why:
                found.append(Candidate(label, lambda i: None, skip=str(why)))
    return found


class Unavailable(Exception):
    """Why an engine cannot be used here."""


def _built(engine: type, cell: Cell, weights: Weights, folder: Path | None) -> Vllm | Sglang:
    if weights.device.type != DEVICE:
        raise Unavailable(f"Triton kernels need --device {DEVICE}, this run is on {weights.device.type}")
    if folder is None:
        raise Unavailable("not asked for: --triton-peers DIR names the folder that its package is imported from")
    if cell.dtype == "float32":
        raise Unavailable("its kernels are for bfloat16 and float16 weights")
    if (path := str(folder.resolve())) not in sys.path:
        sys.path.append(path)  # last: what both need, torch above all, stays the one that runs already
    try:
        return engine(weights, cell)
    except Exception as error:  # importing a serving engine can fail in any way
        raise Unavailable(f"not usable from --triton-peers DIR: {_text(error)}") from error


def _text(error: Exception) -> str:
    """One line without the folders of this machine: it becomes a row of the results."""
    return re.sub(r"/[^\s'\"]*/", "", f"{type(error).__name__}: {error}".partition("\n")[0])[:200]


def _call(cell: Cell, weights: Weights, tokens: Tokens, engine: Vllm | Sglang) -> Callable[[int], Tensor]:
    x = tokens.x

    @cache
    def given() -> list[Any]:
        return engine.prepare(tokens.experts)

    def run(i: int) -> Tensor:
        base = F.linear(x, weights.W[i])
        if cell.mode == "apply":
            return engine.add_(base, x, i, tokens.weights, given())
        w, experts = fast_route(x, weights.fast_gates[i], cell.K)
        return engine.add_(base, x, i, w, engine.prepare(experts))

    def call(i: int) -> Tensor:
        try:
            return run(i)
        except Exception as error:  # an assertion or a compiler's error of theirs must not end our run
            raise RuntimeError(_text(error)) from error

    return call


def forget() -> None:
    """Empties vLLM's tables of weights by address: they keep the weights alive."""
    utils = sys.modules.get("vllm.lora.ops.triton_ops.utils")
    for name in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
        getattr(utils, name, {}).clear()
