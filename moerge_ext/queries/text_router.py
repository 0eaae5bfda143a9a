"""What the routers that were trained on texts share: their file, and whether it is of these experts and this embedder.

A router is a folder with `moerge_text_router.safetensors`: its tensors, and in the header its kind, its experts with
marks of each, its embedder and the numbers that it depends on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..experts.bank import ExpertBank
from ..experts.selection import alone
from ..files.atomic import write_atomically
from ..files.safefile import file_inside, open_tensors, read_headers, read_tensor
from .embedder import Embedder
from .router import Router
from .vectors import unit

FILE, FORMAT = "moerge_text_router.safetensors", "moerge-text-router"
BASE = "base"  # the name of the model without experts among those that a router chooses from
ENDS = 64  # values at either end of a factor that an expert's marks are of
FORMS = 8
CLOSE = 0.01  # of the norm: a change of type moves a mark by less, another training by more


@dataclass(frozen=True)
class Stored:
    """A trained router. names: experts or models, perhaps BASE; tensors and facts depend on the kind.

    marks: {expert: of its LoRA}, empty for whole models; embedder: its name, "" for a router without one;
    max_length: the embedder's.
    """

    kind: str
    names: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    marks: Mapping[str, Sequence[float]]
    embedder: str = ""
    max_length: int | str | None = None

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the file into `folder`, whole or not at all; returns it."""
        said = {"kind": self.kind, "names": self.names, "facts": self.facts, "marks": self.marks}
        metadata = {"format": FORMAT, "version": "1", "embedder": self.embedder, "router": json.dumps(said)}
        if self.max_length is not None:
            metadata["max_length"] = str(self.max_length)
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        write_atomically(path, lambda file: save_file(tensors, file, metadata))
        return path


def read_stored(folder: str | os.PathLike) -> Stored:
    """The router of a folder; ValueError, naming it, when there is none or it is damaged."""
    folder = Path(folder).resolve()
    mend = "train one with `moerge train-query-router`"
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder} holds no router ({FILE} is missing): {mend}")
    with open_tensors(file_inside(folder, FILE)) as handle:
        metadata, headers = dict(handle.metadata() or {}), read_headers(handle)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{folder / FILE} is no router of texts: {mend}")
        tensors = {name: read_tensor(handle, name, header).clone() for name, header in headers.items()}
    try:
        said = json.loads(metadata["router"])
        names, kind, facts, marks = (said[key] for key in ("names", "kind", "facts", "marks"))
        if not all(isinstance(name, str) for name in [*names, kind]) or not isinstance(facts, dict):
            raise TypeError("not the types of a router")
        marks = {name: [float(number) for number in numbers] for name, numbers in marks.items()}
        if any(len(numbers) != 2 + FORMS for numbers in marks.values()):
            raise ValueError(f"expected {2 + FORMS} marks of an expert")
        made_by = metadata.get("embedder", ""), metadata.get("max_length")
        stored = Stored(kind, tuple(names), tensors, facts, marks, *made_by)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / FILE} is damaged ({error}): {mend}") from error
    if not all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point()):
        raise ValueError(f"{folder / FILE} holds values that are not finite: {mend}")
    return stored


def marks_of(experts: ExpertBank) -> dict[str, list[float]]:
    """{expert: its number of modules, then the norm of the ends of all its factors and `FORMS` linear forms of them}.

    Numbers and not a digest: a bank that is held in another type has nearly the same ones.
    """
    found = {}
    for e, name in enumerate(experts.names):
        ends, count = [torch.zeros(0, dtype=torch.float64, device="cpu")], 0
        for _, module in sorted(experts.modules.items()):
            if not module.present[e]:
                continue
            count += 1
            for factor in (module.lora_A[e, : module.ranks[e]], module.lora_B[e, :, : module.ranks[e]]):
                flat = factor.detach().reshape(-1)
                ends += [flat[:ENDS].to("cpu", torch.float64), flat[-ENDS:].to("cpu", torch.float64)]
        whole = torch.cat(ends)
        waves = torch.cos(
            torch.arange(1.0, len(whole) + 1, dtype=torch.float32, device="cpu").double()
            * (1 + 0.3 * torch.arange(FORMS, device="cpu")[:, None].double())
        )
        found[name] = [float(count), *(float(f"{x:.6g}") for x in [whole.norm(), *(waves @ whole)])]
    return found


def _alike(one: Sequence[float], other: Sequence[float]) -> bool:
    near = CLOSE * max(one[1], other[1])
    return one[0] == other[0] and all(abs(a - b) <= near for a, b in zip(one[1:], other[1:], strict=True))


def described_experts(experts: ExpertBank | Sequence[str], names: Sequence[str]) -> dict[str, list[float]]:
    """The marks of the bank's experts among `names`, none for names of whole models.

    ValueError when `names` (of judged answers, of data) and the bank are not the same, but for BASE.
    """
    known = tuple(experts.names) if isinstance(experts, ExpertBank) else tuple(experts)
    _same_names(known, names, "the answers, or the data, are of")
    return marks_of(experts) if isinstance(experts, ExpertBank) else {}


def _same_names(known: Sequence[str], names: Sequence[str], what: str) -> None:
    missing = [name for name in known if name not in names]
    unknown = [name for name in names if name not in known and name != BASE]
    if missing or unknown:
        said = [f"{', '.join(part)} {how}" for part, how in ((missing, "missing"), (unknown, "unknown here")) if part]
        rest = [name for name in known if name in names]
        hint = f": {alone(rest)} loads the others without {', '.join(missing)}" if rest and not unknown else ""
        raise ValueError(f"{what} {', '.join(names)}; the experts are {', '.join(known)}: {'; '.join(said)}{hint}")


class TextRouter(Router):
    """Chooses an expert, or the base alone, for a text; `handle.queries` gets its weights, a row of zeros for the base.

    Args:
        experts: the bank, or the names of whole models.
        embedder: the one it was trained with; None for a kind that has none.
        stored: from `read_stored`.

    Subclasses say in `values(texts, options)` [N,E'] how good each of `self.choices` (the experts, perhaps with BASE
    behind) is for a text. ValueError for a router of another kind, of other experts (by name, and by the content of
    each), or of another embedder.
    """

    kind = ""

    def __init__(self, experts: ExpertBank | Sequence[str], embedder: Embedder | None, stored: Stored):
        if stored.kind != self.kind:
            raise ValueError(f"expected a router of kind '{self.kind}', got one of kind '{stored.kind}'")
        self.names = tuple(experts.names) if isinstance(experts, ExpertBank) else tuple(experts)
        _same_names(self.names, stored.names, "the router was trained for")
        if isinstance(experts, ExpertBank) and stored.marks:
            found = marks_of(experts)
            other = [n for n in self.names if n not in stored.marks or not _alike(stored.marks[n], found[n])]
            if other:
                raise ValueError(
                    f"the router was trained with other experts called {', '.join(other)}: their LoRAs are not those "
                    "of its training; train it again with these"
                )
        base = (BASE,) if BASE in stored.names and BASE not in self.names else ()
        self.choices = self.names + base
        self.stored, self.embedder = stored, embedder
        self.order = [stored.names.index(name) for name in self.choices]
        self._check_embedder()
        # what tells results apart
        self.facts = dict(stored.facts)
        self.tensors = [tensor for _, tensor in sorted(stored.tensors.items())]

    @property
    def source(self) -> str:  # type: ignore[override]
        return self.kind

    def _check_embedder(self) -> None:
        if not self.stored.embedder:
            return
        if self.embedder is None or self.embedder.name != self.stored.embedder:
            got = "none" if self.embedder is None else f"'{self.embedder.name}'"
            raise ValueError(f"the router was trained with embedder '{self.stored.embedder}', got {got}")
        if why := self.embedder.differs(self.stored.tensors["probe"], self.stored.max_length):
            raise ValueError(
                f"embedder '{self.embedder.name}' is not the model that the router was trained with, {why}: use that "
                "one, or train again"
            )

    def embed(self, texts: Sequence[str]) -> Tensor:
        """texts (N) -> [N,G] float32 of unit length."""
        return unit(self.embedder(texts))

    def values(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        """texts (N) -> [N,E'] float32 (or [1,E'] for all of them), the larger the better."""
        raise NotImplementedError

    def chosen(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        """The index into `choices` for each text [N]; ties go to the first."""
        return self.values([texts] if isinstance(texts, str) else list(texts), options).argmax(1)

    def scores(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        """texts (N) -> weights [N,E]: 1 for the expert that is chosen, zeros where the base alone is."""
        chosen = self.chosen(texts, options)
        return torch.nn.functional.one_hot(chosen, len(self.choices)).float()[:, : len(self.names)]


def embedded(embedder: Embedder, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(vectors [M,G] of unit length, the probe's vector [G]) for training."""
    return unit(embedder(texts)), embedder.probe
