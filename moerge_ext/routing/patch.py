"""Turns a model into a routed model in place: `patch` wraps its linear layers, the handle controls and removes them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..experts.bank import ExpertBank
from ..files.counting import counted
from ..methods.base import Method
from ..methods.gating import gate_notes
from ..methods.weighing import Weigher
from ..models.full_precision import without_autocast
from ..models.wrappers import unwrapped
from . import changes
from .absent import alone_note
from .affinities import affinity_rows
from .few_experts import own_top_k, own_top_k_note
from .fitting import on_model
from .fused_experts import close_door, open_door
from .generation import Doors
from .growing import GrowingTexts
from .in_place import check_in_place
from .layers import drop_hooks
from .parameter_banks import with_parameters
from .peft_layers import idle_notes
from .planning import configured, listing, plans_of
from .provenance import provenance_notes
from .ran import FirstForward
from .refusals import device_problems
from .routed_branches import against_branches
from .routed_experts import routed_experts, ways_of
from .router_kinds import ROUTERS
from .row_trace import RowTrace
from .rows import Rows
from .shared_linear import agreed, layers_at, plan_problems
from .slots import Slots, for_slots, spare_problems
from .state import Affinities, RoutingState
from .tokens import RealTokens
from .trace import Trace
from .ways import Explanation, explain
from .weighed_linear import watch_blocks

CANNOT = "cannot patch the model with method '{}'"


class Handle:
    """Controls one patched model. `names` are the experts, `modules` the patched paths, `method` the row in use.

    Also a context manager: the patch is removed on exit.
    """

    def __init__(self, model: nn.Module, method: Method, names: tuple[str, ...], state: RoutingState, options: dict):
        self.model, self.method, self.names, self.options = model, method, names, options
        self.modules: tuple[str, ...] = ()
        self.parameters: tuple[str, ...] = ()  # of fused experts, by path
        self._own_modules: tuple[str, ...] = ()
        self.router: Any = None  # what `queries` asks, see ROUTERS
        self._state = state
        self._slots: Slots | None = None  # of a patch with spare slots
        self._watch: FirstForward | None = None
        self._doors: Doors | None = None

    def _begin(self, routed: dict, branches: dict, place_own: Callable, strict: bool) -> None:
        """Puts routed layers and branches of stacked parameters in their places, and what watches the model."""
        for name, layer in routed.items():
            layer.take_place(self.model, name)
        for owner, placed in branches.items():
            open_door(self.model.get_submodule(owner), placed)
        self.modules, self._own_modules = tuple(routed), place_own(self._state)
        self.parameters = tuple(branch.name for placed in branches.values() for branch in placed.values())
        watch_blocks(self.model, routed.values())
        self._watch = FirstForward(self.model, (*routed, *branches), what="layers with experts", strict=strict)
        self._doors = None if self.method.bias is None else Doors(self.model, self.method.name, self._state)
        self.model._moerge_handle = self

    def remove(self) -> None:
        """Puts every original layer back; the model is bit-identical to before. Does nothing the second time."""
        check_in_place(self, "cannot remove the patch")
        if self._watch is not None:
            self._watch.remove()
        drop_hooks(self.model, (Rows, RealTokens, Weigher))
        for name in (*self.modules, *self._own_modules):
            self.model.get_submodule(name).give_back(self.model, name)
        for owner in dict.fromkeys(path.rpartition(".")[0] for path in self.parameters):
            close_door(self.model.get_submodule(owner))
        if self._doors is not None:
            self._doors.remove()
            self._doors = None
        self.modules = self.parameters = self._own_modules = ()
        if getattr(self.model, "_moerge_handle", None) is self:
            del self.model._moerge_handle

    def add_expert(self, expert: changes.Expert, name: str | None = None) -> str:
        """Adds one expert to the pool of a model that was patched with `spare` slots, and returns its name.

        The result is that of patching anew with it last. Tensors stay where they are; top_k and scale of a method that
        has them follow the number of experts (a CUDA graph, which holds their values, must then be captured again).

        Args:
            expert: a folder, file or hub id, or an ExpertBank of one, which is rounded to the layers' type.
            name: default: the folder's, or that in the bank.

        ValueError that lists everything wrong, as by `load_experts` and `patch`; or without a free slot, for a name
        that is taken, and for modules, a rank or an output bias that the layers have no room for. RuntimeError while a
        block of the handle is open. Nothing is changed then. A router of `queries` must be made anew. Not for use while
        another thread runs the model: its forward would see the expert in some layers alone.
        """
        name, notes = changes.add(self, expert, name)
        _say("add_expert", notes, lambda: changes.drop(self, name))
        return name

    def drop_expert(self, name: str) -> None:
        """Takes one expert out and frees its slot, under the terms of `add_expert`; those after it move up by one.

        ValueError for an unknown name, the last expert, and a top_k (given to `patch`) larger than what would be left.
        """
        changes.drop(self, name)

    def _check_alive(self) -> None:
        if not self.modules and not self.parameters:
            raise ValueError("this handle was removed: patch the model again and use the new handle")

    @contextmanager
    def record(self, *, tokens: bool = False, rows: int | None = None) -> Iterator[Trace]:
        """Collects what the router does inside the block; `tokens=True` keeps every token's weights and ids too.

        Tokens that the model's `attention_mask` leaves out (padding) do not count; see `Trace`. With `rows`, the number
        of sequences of every forward inside, it is a `RowTrace`, which keeps them apart.

        ValueError for a method that routes nothing (merged, one fixed expert), or when recording is on already.
        """
        self._check_alive()
        if not self.method.routes:
            raise ValueError(f"method '{self.method.name}' routes nothing: there is no load to record")
        if self._state.current().trace is not None:
            raise ValueError("record() is already active on this model; leave that block first")
        with ExitStack() as stack:
            trace, real = Trace(self.names, tokens), RealTokens(self.model, stack, self._state)
            if rows is not None:
                mine = lambda trace: self._state.of_forward().trace is trace  # noqa: E731
                trace = RowTrace(self.names, self.model, rows, mine, tokens)
                stack.callback(trace.remove)
            stack.enter_context(self._state.block(trace=trace, tokens=real))
            yield trace

    @contextmanager
    def affinities(self, scores: Tensor | Sequence | Mapping[str, float]) -> Iterator[None]:
        """Sets the global affinity of every sequence to every expert for the forwards inside the block.

        Args:
            scores: [N,E], or [E] for one row that serves all. N rows share the tokens of each forward evenly, in order,
                so under beam search and sampling with several sequences each row covers its own copies. Or {expert's
                name: number}, 0 for the others.
        """
        self._check_alive()
        if self.method.bias is None:
            raise ValueError(f"method '{self.method.name}' takes no affinities: 'given' takes any weights")
        rows = affinity_rows(scores, self.names)
        with self._rows(self.method.bias(rows.float(), self.options)):
            yield

    @contextmanager
    def queries(self, texts: str | Sequence[str], router: Any = None, *, tokenizer: Any = None) -> Iterator[None]:
        """Routes the sequences of the forwards inside the block by their texts.

        Args:
            texts: N queries, in the order of the batch's rows (one text serves all rows).
            router: what scores them, a `QueryRouter` or `ExampleRouter`; default `handle.router`, set once.
            tokenizer: the model's, for a method that reads the text again as `generate` makes it longer
                (`token_level`); a forward outside of `generate` is routed by the queries alone.

        ValueError for a method that reads no queries, a missing router or tokenizer, a router of another kind or of
        other experts, and a batch that does not hold the same number of rows per query.
        """
        self._check_alive()
        router = self.router if router is None else router
        if self.method.source not in ROUTERS:
            raise ValueError(
                f"method '{self.method.name}' does not read queries: leave `with handle.queries(...)` out, or patch "
                "with a method that does, such as glider, retrieval or centroid"
            )
        if router is None:
            raise ValueError(f"queries() needs a router: set handle.router = {ROUTERS[self.method.source]} first")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if "every" not in self.options:
            with self._rows(self._scores(router, texts)):
                yield
            return
        if tokenizer is None:
            raise ValueError(
                f"method '{self.method.name}' reads the text again as it grows: pass handle.queries(texts, "
                "tokenizer=tokenizer), the model's"
            )
        router = router.without_cache()  # every prefix is seen once
        grow = GrowingTexts(texts, tokenizer, self.options["every"])
        with self._rows(self._scores(router, texts)) as affinities:
            rows = weakref.proxy(affinities)  # it holds `follow`

            def follow(ids: Tensor) -> None:
                if (grown := grow(ids)) is not None:
                    rows.set(for_slots(self._scores(router, grown), self._slots))

            affinities.follow = follow
            del affinities
            yield

    def _scores(self, router: Any, texts: list[str]) -> Tensor:
        """[N,E]: what the router adds to the scores, as it does without the caller's autocast."""
        with without_autocast():
            return router.bias(texts, self.method, self.options, self.names)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model alone for the forwards inside the block; what `queries` or `affinities` set stays."""
        self._check_alive()
        with self._state.block(enabled=False):
            yield

    @contextmanager
    def _rows(self, bias: Tensor) -> Iterator[Affinities]:
        """bias [N,E] added to the scores of the forwards inside the block."""
        with self._state.block(bias=for_slots(bias, self._slots)) as request:
            affinities = request.affinities
            affinities.rows = Rows(self.model, bias.shape[0], self._applies) if bias.shape[0] > 1 else None
            try:
                yield affinities
            finally:
                if affinities.rows is not None:
                    affinities.rows.remove()
                del request, affinities  # what an exception's traceback holds would keep the rows' buffer

    def _applies(self, rows: Rows) -> bool:
        """Whether the forward that begins is of the request that has these rows, and of its experts."""
        request = self._state.of_forward()
        return request.enabled and request.affinities is not None and request.affinities.rows is rows

    def explain(self, *, grad: bool = False) -> Explanation:
        """Which way every kind of routed layer takes at present, and why not a faster one; print it.

        For tokens of the type of the layer's weights, in inference or (`grad`) with gradients.
        """
        self._check_alive()
        check_in_place(self, "cannot explain the layers")
        linears = explain((self.model.get_submodule(name) for name in self.modules), grad=grad)
        return Explanation((*linears, *ways_of(self.model, self.parameters, grad)))

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        modules = len(self.modules) + len(self.parameters)
        return f"Handle({self.method.name}, {counted(len(self.names), 'expert')}, {counted(modules, 'module')})"


def patch(
    model: nn.Module,
    experts: ExpertBank,
    method: str = "phatgoose",
    *,
    backend: str = "native",
    strict: bool = False,
    absent: str = "mask",
    missing: str = "error",
    spare: int = 0,
    **options: Any,
) -> Handle:
    """Routes a model's linear layers among experts, in place.

    Args:
        model: any torch model whose layers have the paths the experts were trained on, or paths to which a renaming
            table of transformers or another prefix leads (a warning says what was renamed); `torch.compile`,
            DistributedDataParallel and SentenceTransformer are looked through. Quantize it before the patch: quantizers
            look for nn.Linear, and a patched layer is none.
        experts: the bank, from `load_experts`. Its tensors keep their dtype and move to each layer's device.
        method: a row of `moerge_ext.METHODS` (`moerge methods` lists them) or "expert:<name>".
        backend: "native" (this package's kernels) or "reference" (plain torch: any device, slow).
        strict: RuntimeError, and not a warning, when the module that holds a layer ran first without calling it.
        absent: who competes in a module that not every expert has: "mask", those that have it (one that is alone gets
            weight 1 on every token); or "base", all of them, the others as branches that add zero.
        missing: what becomes of modules that this model does not have: "error", or "drop" with a warning.
        spare: slots kept for `handle.add_expert`, which take memory as an expert of the largest rank each; the layers
            then hold copies of the bank.
        options: the method's own parameters and those of `route`: top_k, top_p, scale, weighting, aggregation, ...
            A method's own top_k is taken, with a warning, as the number of experts where there are fewer.

    Returns:
        The handle: `handle.remove()`, `handle.record()`, `handle.affinities(...)`.

    Parameters of the base that were saved beside an adapter (heads, embeddings, biases) must equal the model's, except
    under "expert:<name>", which computes with those of its expert. PiSSA and OLoRA adapters that were not converted
    are, with the model's own weights. Warns once of layers that a config targets and its file lacks.

    Raises:
        ValueError that lists everything wrong, with names and both shapes; the model is then untouched.
    """
    if isinstance(model, ExpertBank):
        raise ValueError("model and experts are swapped: patch(model, experts)")
    model = unwrapped(model)
    row, (routing, aggregation, settings) = configured(experts, method, backend, absent, missing, options)
    fitted, base = on_model(model, experts, row.name, routing, missing, by_rank=True)
    problems = fitted.problems + spare_problems(spare, row, fitted.experts, fitted.placement.parameters)
    experts = fitted.experts if problems else base.bank()
    problems += against_branches(row, model, experts.modules)
    plans = plans_of(row, experts, settings, absent, problems)
    shared = {"factored": aggregation == "factored", "needs_bias": row.bias is not None}
    shared |= {"state": (state := RoutingState()), "backend": backend}
    planned = (row, routing, settings, absent)
    branches, reasons = routed_experts(model, experts, fitted.placement, *planned, **shared)
    if not (problems := problems + reasons):
        problems += device_problems(model, (*plans, *branches), backend) + plan_problems(model, plans, spare)
    if problems := agreed(model, problems, (method, options, experts)):
        raise ValueError(listing(CANNOT.format(method), problems, fitted.made_for))
    handle = Handle(model, row, experts.names, state, settings)
    handle._slots = Slots(spare, row, options, absent, missing) if spare else None
    routed = {
        name: make(plan=plans[name], routing=routing, name=name, spare=spare, **shared)
        for name, make in layers_at(model, plans).items()
    }
    everywhere = plans | {branch.name: branch for placed in branches.values() for branch in placed.values()}
    notes = [*fitted.notes, alone_note(everywhere, experts, routing), *gate_notes(experts, row.gate_kind)]
    notes += [*provenance_notes(model, experts, row.gate_kind), base.unweighted_note()]
    notes += [own_top_k_note(row, own_top_k(row, experts, options)), *idle_notes(model, everywhere)]
    handle._begin(routed, branches, base.place_own, strict)
    _say("patch", filter(None, notes), handle.remove)
    return handle


def _say(caller: str, notes: Iterable[str], undo: Callable[[], None]) -> None:
    """Warns the caller's caller, and undoes what was done where that makes an error of a warning."""
    try:
        for note in notes:
            warnings.warn(f"{caller}: {note}", stacklevel=3)
    except Warning:
        undo()
        raise


def check_patch(
    model: nn.Module,
    experts: ExpertBank,
    method: str = "phatgoose",
    *,
    backend: str = "native",
    absent: str = "mask",
    missing: str = "error",
    loaded: bool = True,
    **options: Any,
) -> None:
    """Raises the ValueError that `patch` would, without building what the method needs.

    loaded: False for a model on the meta device that is asked about before its weights are read.
    """
    model = unwrapped(model)
    row, (routing, _, settings) = configured(experts, method, backend, absent, missing, options)
    fitted, base = on_model(model, experts, row.name, routing, missing, by_rank=True)
    problems = fitted.problems
    if row.learned is not None and not problems:
        plans_of(row, base.bank(), settings, absent, problems)
    if row.lacks is not None and not fitted.placement.problems:
        bank, reasons = with_parameters(model, fitted.experts, fitted.placement)
        problems += reasons + row.lacks(bank)
    problems += against_branches(row, model, fitted.experts.modules)
    patched = (*fitted.experts.modules, *fitted.placement.parameters)
    if loaded and not problems:
        problems = device_problems(model, patched, backend)
    if problems:
        raise ValueError(listing(CANNOT.format(method), problems, fitted.made_for))


def get_handle(model: nn.Module) -> Handle:
    """The handle of a patched model: for a deepcopy or an unpickled copy, whose handle is its own."""
    handle = getattr(unwrapped(model), "_moerge_handle", None)
    if handle is None:
        raise ValueError("this model is not patched by moerge_ext")
    return handle
