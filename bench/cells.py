"""What is measured: one Cell is one set of shapes. The default subset, the full grid, and the tiny one of the tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POPULARITY = ("uniform", "zipf", "all-same")
SHAPES = ((2048, 2048), (2048, 5632), (4096, 4096), (5632, 2048))
TOKENS = (1, 4, 16, 64, 256, 1024)

# "apply": every candidate gets the same ids and weights; "routed": it also has to find them
MODES = ("apply", "routed")


@dataclass(frozen=True)
class Cell:
    """One linear layer D -> O with E experts of rank R, K of them per token, T tokens."""

    D: int
    O: int  # noqa: E741  (the letter the whole project uses)
    E: int
    K: int
    R: int
    T: int
    dtype: str = "float32"
    popularity: str = "uniform"
    mode: str = "routed"
    # peers that take part beside plain and ours; None: all but those that compile
    only: tuple[str, ...] | None = field(default=None, compare=False)
    # labels that take part on top: compiling takes minutes for many experts
    also: tuple[str, ...] = field(default=(), compare=False)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def weights_key(self) -> tuple:
        """Cells with the same key share their weights."""
        return (self.D, self.O, self.E, self.K, self.R, self.dtype)

    def describe(self) -> dict[str, Any]:
        """The fields that identify the cell, as they stand in a row."""
        return {key: value for key, value in asdict(self).items() if key not in ("only", "also")}

    def __str__(self) -> str:
        return (
            f"{self.dtype} D={self.D} O={self.O} E={self.E} K={self.K} R={self.R} T={self.T} "
            f"{self.popularity} {self.mode}"
        )


def wants(cell: Cell, label: str, *, compiles: bool = False) -> bool:
    """Whether the candidate `label` takes part in the cell."""
    if label in cell.also:
        return True
    return not compiles if cell.only is None else label in cell.only


# in the cells where the question is mostly "how far from plain"
OURS = ("dense",)
FEW = ("dense", "sort_loop", "grouped_mm")


def default_cells() -> list[Cell]:
    """The short subset: fills the tables of the READMEs in a few minutes on two cores."""
    tokens = (1, 16, 256, 1024)
    cells = []
    for dtype, width in product(("float32", "bfloat16"), (2048, 4096)):
        for t in tokens:
            also = ("compiled_dense",) if (width, t) == (2048, 16) else ()
            only = FEW if (width, t) == (4096, 1024) else None  # the slow peers take half a minute there
            cells.append(Cell(width, width, 36, 2, 16, t, dtype, only=only, also=also))
        if width == 2048:
            cells += [
                Cell(width, width, 36, 2, 16, t, dtype, mode="apply")
                for t in (tokens if dtype == "float32" else (16, 256))
            ]
            cells += [
                Cell(width, width, 36, 2, 16, t, dtype, pop, only=FEW)
                for pop, t in product(("zipf", "all-same"), (16, 256))
            ]
        only = FEW if width == 2048 else OURS
        cells += [Cell(width, width, 166, 2, 16, t, dtype, only=only) for t in tokens]
    cells += [Cell(2048, 2048, 8, 2, 16, t, "float32") for t in (1, 256)]
    cells.append(Cell(2048, 2048, 8, 2, 16, 16, "float32", also=("compiled_reference", "compiled_dense")))
    return _by_weights(cells)


def full_cells() -> list[Cell]:
    """The whole grid."""
    grid = product(DTYPES_FULL, SHAPES, (8, 36, 166), (1, 2, 4), (8, 16, 64), TOKENS, POPULARITY, MODES)
    return _by_weights(
        Cell(d, o, e, k, r, t, dtype, pop, mode, also=("compiled_reference", "compiled_dense") if e == 8 else ())
        for dtype, (d, o), e, k, r, t, pop, mode in grid
    )


DTYPES_FULL = ("float32", "bfloat16")


def gpu_cells() -> list[Cell]:
    """What a GPU is judged by: one width, every regime of T, three numbers of experts."""
    return _gpu(("bfloat16",), (8, 36, 166), (1, 8, 64, 512, 4096))


def gpu_wide_cells() -> list[Cell]:
    """What gpu_cells leaves out for the sake of time: float16, 512 experts, 16384 tokens, and sizes between."""
    first = set(gpu_cells())
    wide = _gpu(("bfloat16", "float16"), (8, 36, 166, 512), (1, 8, 16, 32, 64, 128, 512, 1024, 4096, 16384))
    return [cell for cell in wide if cell not in first]


def _gpu(dtypes: Iterable[str], experts: Iterable[int], tokens: Iterable[int]) -> list[Cell]:
    return _by_weights(Cell(4096, 4096, e, 2, 16, t, dtype) for dtype, e, t in product(dtypes, experts, tokens))


def tiny_cells() -> list[Cell]:
    """Seconds in total: for the tests and for a look at the output."""
    return [
        Cell(64, 48, 5, 2, 4, 3, "float32"),
        Cell(64, 48, 5, 2, 4, 3, "float32", "zipf", mode="apply"),
        Cell(64, 48, 5, 2, 4, 9, "bfloat16", "all-same"),
    ]


def op_cells(cells: Iterable[Cell], mode: str) -> list[Cell]:
    """The same shapes for the suites `route` and `lora`, each once, under their own mode."""
    unique = {Cell(c.D, c.O, c.E, c.K, c.R, c.T, c.dtype, c.popularity, mode, only=OPS[mode]) for c in cells}
    return _by_weights(sorted(unique, key=lambda c: (c.weights_key, c.T, c.popularity)))


OPS = {
    "route": ("fast_route",),
    "lora": ("gather_bmm", "dense", "sort_loop", "grouped_mm"),
}


def _by_weights(cells: Iterable[Cell]) -> list[Cell]:
    """Cells that share weights side by side, the order kept otherwise."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.weights_key, []).append(cell)
    return [cell for group in groups.values() for cell in group]
