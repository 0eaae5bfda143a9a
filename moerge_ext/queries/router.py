"""GLIDER's global router: the affinity of a query to every expert, from embedded instructions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..experts.bank import ExpertBank
from ..experts.instructions import instructions_of
from ..experts.kinds import INSTRUCTION
from ..methods.base import HIDDEN_STATES, Method
from .describe import EXAMPLES
from .embedder import SAME, Embedder
from .similar import SimilarExamples, indexed_examples
from .vectors import unit
from .writer import Example, InstructionWriter

PAPER_EMBEDDER = "nomic-embed-text-v1.5"  # the threshold of `glider`, 0.8, was chosen for it
ALIKE = 0.98  # cosine of two experts' vectors above which queries hardly tell them apart


class Router:
    """What `handle.queries` asks: `names` are its experts, `source` the kind of method that it serves."""

    source: str
    names: tuple[str, ...]
    embedder: Embedder | None = None

    def scores(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        """texts (N) -> affinities [N,E] float32 under a method's options."""
        raise NotImplementedError

    def settings(self, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The method's options, completed with what depends on the router."""
        return dict(options)

    def without_cache(self) -> Router:
        """The same router, which keeps no embedding on disk: for texts that are seen once."""
        router = copy.copy(self)
        if router.embedder is not None:
            router.embedder = copy.copy(router.embedder)
            router.embedder.cache = None
        return router

    def bias(self, texts: Sequence[str], method: Method, options: Mapping[str, Any], names: tuple[str, ...]) -> Tensor:
        """The score bias [N,E] of `texts` under `method`; ValueError when the router does not fit method or experts."""
        if self.source != method.source or tuple(self.names) != tuple(names):
            raise ValueError(
                f"method '{method.name}' takes a router by {method.source} over the experts {', '.join(names)}; "
                f"got one by {self.source} over {', '.join(self.names)}"
            )
        if method.embedder == HIDDEN_STATES and (self.embedder is None or not self.embedder.of_base):
            raise ValueError(
                f"method '{method.name}' routes by {HIDDEN_STATES}: index the experts with "
                "Embedder.from_hidden_states(model, tokenizer) and give the router that embedder"
            )
        settings = self.settings(method.name, options)
        return method.bias(self.scores(texts, settings), settings)


class QueryRouter(Router):
    """Scores queries against the experts' global vectors, GLIDER, arXiv 2410.07172, section 4.2:

        s_glob[n,e] = cos(embed(instruction(query_n)), v_e)

    Args:
        experts: the bank; every expert needs the vector that `moerge describe` (or `describe`) stores.
        embedder: the one the experts were described with; another name is an error, and so is a model that gives
            their stored instructions other vectors (`verify=False` skips that).
        writer: the language model that writes a query's instruction. None embeds the query itself, which is not the
            paper's method; see `variant`.
        similar: query -> solved examples like it, which the writer sees with the query (`similar_examples`). "indexed":
            the paper's three, of those that the experts' indices hold with their texts, if any do. Without examples
            (None) the method is the zero-shot variant, which is not the paper's.
        threshold: of method `glider` for this embedder; `calibrate_threshold` finds one.
    """

    source = "instruction"  # of the methods that it serves
    task_examples = EXAMPLES  # solved examples that say what a task is

    def __init__(
        self,
        experts: ExpertBank,
        embedder: Embedder,
        writer: InstructionWriter | None = None,
        *,
        similar: SimilarExamples | Literal["indexed"] | None = "indexed",
        threshold: float | None = None,
        verify: bool = True,
    ):
        self.names, self.embedder, self.writer, self.threshold = experts.names, embedder, writer, threshold
        if isinstance(similar, str):
            if similar != "indexed":
                raise ValueError(
                    f"similar must be a callable query -> solved examples, 'indexed' or None, got {similar!r}"
                )
            similar = None if writer is None else indexed_examples(experts, embedder)
        elif similar is not None and writer is None:
            raise ValueError("similar examples are for the writer: pass a writer, or leave `similar` out")
        self.similar = similar
        self.templates = [] if writer is None else list(writer.templates)  # a result is another with others
        self.instructions = _check_experts(experts, embedder)
        stored = experts.global_vectors[INSTRUCTION]
        self.vectors = unit(torch.stack([stored[name].cpu() for name in self.names]))  # [E,G]
        if verify:
            self._verify()
        self._warn_of_twins()

    def _warn_of_twins(self) -> None:
        """A writer that says the same of every task makes experts that no query can tell apart."""
        cosines = (self.vectors @ self.vectors.T).triu(1)
        pairs = [f"'{self.names[i]}' and '{self.names[j]}'" for i, j in (cosines > ALIKE).nonzero().tolist()]
        if pairs:
            more = f" and {len(pairs) - 5} more pairs" if len(pairs) > 5 else ""
            warnings.warn(
                f"the instructions of {', '.join(pairs[:5])}{more} mean nearly the same to embedder "
                f"'{self.embedder.name}' (cosine above {ALIKE}): queries will hardly tell these experts apart. Look at "
                "the instructions, and describe the experts again by a larger --writer or with --instruction",
                stacklevel=3,
            )

    @property
    def similar(self) -> SimilarExamples | None:
        """The solved examples that the writer sees with a query."""
        return self._similar

    @similar.setter
    def similar(self, similar: SimilarExamples | None) -> None:
        self._similar, self.shown = similar, getattr(similar, "digest", "")  # what tells results apart

    @property
    def variant(self) -> str:
        """How results made with this router are to be labelled."""
        if self.writer is None:
            return "no writer"
        return "zero-shot" if self.similar is None else "few-shot"

    def describe(self, texts: Sequence[str]) -> list[str]:
        """What stands for every query: its instruction, or the query itself without a writer."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if self.writer is None:
            return texts
        written = {
            text: self.writer.query(text, self.similar(text) if self.similar else ()) for text in dict.fromkeys(texts)
        }
        return [written[text] for text in texts]

    def scores(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        """As `affinities`; no option changes them."""
        return self.affinities(texts)

    def affinities(self, texts: Sequence[str]) -> Tensor:
        """texts (N) -> cosines [N,E] float32."""
        return unit(self.embedder(self.describe(texts))) @ self.vectors.T

    def task_affinities(self, examples: Sequence[Example], handle: Any = None) -> Tensor:
        """Solved examples of one task -> [1,E]: one vector per task, as `glider_code` was run.

        handle: of the patched model; this router does not need it.
        """
        text = [example["input"] for example in examples] if self.writer is None else [self.writer.task(examples)]
        return unit(unit(self.embedder(text)).mean(0, keepdim=True)) @ self.vectors.T

    def settings(self, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """`options` of a method with the threshold that is right for this embedder.

        The caller's, or this router's, or the paper's for the paper's embedder; else ValueError.
        """
        options = dict(options)
        if options.get("threshold", 0.0) is not None:
            return options
        if self.threshold is not None:
            options["threshold"] = self.threshold
        elif not self.embedder.name.startswith(PAPER_EMBEDDER):
            raise ValueError(
                f"method '{method}': its threshold of 0.8 belongs to {PAPER_EMBEDDER}, and the embedder here is "
                f"{self.embedder.name}: call calibrate_threshold(router, held_in_queries), or pass threshold=..."
            )
        return options

    def _verify(self) -> None:
        known = {name: text for name, text in self.instructions.items() if text}
        if not known:
            return
        vectors = unit(self.embedder(list(known.values())))
        rows = self.vectors[[self.names.index(name) for name in known]]
        if vectors.shape != rows.shape:
            raise ValueError(
                f"embedder '{self.embedder.name}' gives vectors of {vectors.shape[1]} numbers, the experts' have "
                f"{rows.shape[1]}: it is not the model they were described with"
            )
        cosines = (vectors * rows).sum(1)
        if cosines.min() < SAME:
            worst = list(known)[int(cosines.argmin())]
            raise ValueError(
                f"embedder '{self.embedder.name}' is not the model that the experts were described with: the "
                f"instruction of '{worst}' has cosine {cosines.min():.3f} to its stored one, expected at least {SAME}"
            )


def _check_experts(experts: ExpertBank, embedder: Embedder) -> dict[str, str]:
    """{expert: its instruction, "" when the file has none}; ValueError listing every expert that cannot be used."""
    vectors = experts.global_vectors.get(INSTRUCTION, {})
    facts = experts.global_metadata.get(INSTRUCTION, {})
    problems = []
    missing = [name for name in experts.names if name not in vectors]
    if missing:
        problems.append(
            f"no global vector for {', '.join(missing)}: make it with `moerge describe --adapter DIR --embedder MODEL` "
            "with --instruction TEXT, or --examples FILE --writer MODEL"
        )
    sizes = {name: len(vector) for name, vector in vectors.items()}
    if len(set(sizes.values())) > 1:
        problems.append(f"the global vectors differ in length: {sizes}")
    for name in vectors:
        theirs = facts.get(name, {}).get("embedder")
        if theirs is not None and theirs != embedder.name:
            problems.append(
                f"'{name}' was described with embedder '{theirs}', the queries' is '{embedder.name}': use that one, or "
                "describe the expert again"
            )
    if problems:
        raise ValueError("the experts cannot be routed by their instructions:\n- " + "\n- ".join(problems))
    return {name: facts.get(name, {}).get("instruction", "") for name in experts.names}


class AskRouter(Router):
    """A language model picks the expert from the list of their instructions (Airoboros, LlamaIndex).

    writer: the model; experts: each needs the instruction that `moerge describe` stores; template: what the model is
    asked, with {input}, {instructions} and perhaps {count}.
    """

    source = "ask"

    def __init__(self, experts: ExpertBank, writer: InstructionWriter, *, template: str | None = None):
        self.instructions = list(instructions_of(experts).values())
        self.names, self.writer, self.template = experts.names, writer, template

    def scores(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        """texts (N) -> [N,E] float32: 1 for the expert that was picked."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        picked = {text: self.writer.choose(text, self.instructions, self.template) for text in dict.fromkeys(texts)}
        return torch.nn.functional.one_hot(
            torch.tensor([picked[t] for t in texts], device="cpu"), len(self.names)
        ).float()
