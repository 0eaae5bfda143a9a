"""Embedded examples of an expert's training data, in a safetensors file beside its adapter, one per embedder."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..experts.fingerprint import note_of_file
from ..experts.formats import inspect_adapter
from ..experts.hub import find_adapter, output_folder
from ..files.atomic import write_atomically
from ..files.safefile import FLOATS, AdapterError, file_inside, open_tensors, read_headers, read_tensor
from .embedder import Embedder
from .vectors import unit
from .writer import Example

PREFIX, SUFFIX = "moerge_examples.", ".safetensors"
FORMAT, KEY, TEXTS, PROBED = "moerge-examples", "embeddings", "texts", "probe"
ROW = ("input", "target")
UNKNOWN = (ValueError, LookupError)  # of an embedder that does not know the words of the probe, or has its texts listed
SAMPLES = 1000  # per expert: PHATGOOSE, arXiv 2402.05859, section 4.2, baseline "Retrieval"


@dataclass(frozen=True)
class ExampleIndex:
    """vectors [M,G] float32 of unit length; embedder: the name of the model that made them; rows: the M examples
    themselves ({"input", "target"}), None when the index does not hold their texts.
    """

    vectors: Tensor
    embedder: str
    rows: tuple[Example, ...] | None = None


def index_examples(
    adapter: str | os.PathLike,
    examples: Sequence[Example],
    embedder: Embedder,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    texts: bool = False,
    output_dir: str | os.PathLike | None = None,
) -> Path:
    """Embed the inputs of up to `samples` random rows of an expert's training data and store them beside its adapter,
    or in `output_dir` (which `load_experts(gates={name: DIR})` is then told).

    texts: store the rows' inputs and targets as well, for all who get the adapter to read: a `QueryRouter` shows its
    writer the ones similar to a query (GLIDER's few-shot setting).

    The embedder's probe and `max_length` go in as well: another embedder of its name is refused by them.

    Returns the file. ValueError for a folder that is no adapter, no examples, rows without a target for `texts`, or
    what the embedder refuses; nothing is written then.
    """
    header, folder = inspect_adapter(*find_adapter(adapter)), output_folder(adapter, output_dir)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if not examples:
        raise ValueError("no examples: an index needs at least one row with an input")
    chosen = random.Random(seed).sample(list(examples), min(samples, len(examples)))
    tensors = {}
    if texts:
        if any(not isinstance(row.get(part), str) for row in chosen for part in ROW):
            raise ValueError('texts=True keeps solved examples: every row needs "input" and "target"')
        said = json.dumps([[row[part] for part in ROW] for row in chosen]).encode()
        tensors[TEXTS] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    vectors = unit(embedder([row.get("input", row.get("text", "")) for row in chosen]))
    with suppress(*UNKNOWN):
        tensors[PROBED] = embedder.probe.contiguous()
    metadata = {"format": FORMAT, "version": "1", "embedder": embedder.name, "seed": str(seed), **note_of_file(header)}
    if embedder.max_length is not None:
        metadata["max_length"] = str(embedder.max_length)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / index_file(embedder.name)
    tensors[KEY] = vectors.contiguous()
    write_atomically(path, lambda file: save_file(tensors, file, metadata))
    return path


def index_file(embedder: str) -> str:
    """The name of the file for the embedder of this name."""
    return PREFIX + re.sub(r"[^A-Za-z0-9.=-]+", "_", embedder)[:100] + SUFFIX


def read_index(folder: str | os.PathLike, embedder: Embedder | str) -> ExampleIndex:
    """The index beside an adapter that this embedder made; AdapterError (a ValueError) when none can be used.

    embedder: itself, or its name alone, which cannot tell another model of that name.
    """
    folder, name = Path(folder).resolve(), embedder if isinstance(embedder, str) else embedder.name
    path = folder / index_file(name)
    if not path.is_file():
        others = [file.name[len(PREFIX) : -len(SUFFIX)] for file in sorted(folder.glob(f"{PREFIX}*{SUFFIX}"))]
        found = f"only by {', '.join(others)}" if others else "not at all"
        layer = re.search(r"hidden state (-?\d+)$", name)  # of `Embedder.from_hidden_states`
        model = f"BASE --hidden-layer {layer[1]}" if layer else "MODEL"
        raise AdapterError(
            [
                f"its examples are indexed {found}, and the queries' embedder is '{name}': run `moerge describe "
                f"--adapter {folder} --examples ROWS.jsonl --index 1000 --embedder {model}` or "
                "moerge_ext.index_examples(adapter, rows, embedder)"
            ]
        )
    with open_tensors(file_inside(folder, path.name)) as handle:
        metadata, headers = dict(handle.metadata() or {}), read_headers(handle)
        header = headers.get(KEY)
        if metadata.get("format") != FORMAT or header is None or header.dtype not in FLOATS or len(header.shape) != 2:
            raise AdapterError([f"{path} is no index of examples"])
        if metadata.get("embedder") != name:
            raise AdapterError(
                [f"{path} was made by embedder '{metadata.get('embedder')}', the queries' is '{name}': index again"]
            )
        vectors = read_tensor(handle, KEY, header).to(torch.float32, copy=True)
        said = read_tensor(handle, TEXTS, headers[TEXTS]) if TEXTS in headers else None
        kept = read_tensor(handle, PROBED, headers[PROBED]).to(torch.float32, copy=True) if PROBED in headers else None
    if not vectors.numel() or not vectors.isfinite().all():
        raise AdapterError([f"{path} holds no vectors, or values that are not finite"])
    if not isinstance(embedder, str) and (why := _other(embedder, kept, metadata.get("max_length"))):
        raise AdapterError(
            [f"{path} was made by another embedder called '{name}', {why}: use that one, or index again"]
        )
    rows = None if said is None else _rows(said, len(vectors), path)
    return ExampleIndex(unit(vectors), name, rows)


def _other(embedder: Embedder, probe: Tensor | None, length: str | None) -> str | None:
    """How an embedder differs from the one of an index, as far as that can be known."""
    with suppress(*UNKNOWN):
        return embedder.differs(probe, length)
    return None


def _rows(said: Tensor, count: int, path: Path) -> tuple[Example, ...]:
    """The examples of an index; AdapterError when the bytes are not `count` pairs of texts."""
    try:
        pairs = json.loads(said.to(torch.uint8).numpy().tobytes()) if said.dtype == torch.uint8 else None
    except (ValueError, RecursionError):
        pairs = None
    fine = isinstance(pairs, list) and len(pairs) == count
    if not fine or not all(isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
        raise AdapterError([f"{path}: its texts are not the {count} pairs of input and target that it has vectors of"])
    return tuple(dict(zip(ROW, pair, strict=True)) for pair in pairs)
