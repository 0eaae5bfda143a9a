"""The stored weights of whole models, read tensor by tensor: no model is built, and none is whole in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files.counting import counted
from ..files.safefile import FLOATS, TensorHeader
from ..files.shards import OpenShards, open_weights
from .pretrained import load_config, load_tokenizer, location
from .stored import WEIGHTS, model_folder


@dataclass(frozen=True)
class StoredModel:
    """One model as it is stored. `config` is transformers'; `tokenizer` None where the folder has none."""

    name: str
    folder: Path
    config: Any
    tokenizer: Any
    shards: OpenShards

    @property
    def headers(self) -> dict[str, TensorHeader]:
        """{key: shape and dtype}."""
        return self.shards.headers

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a tensor."""
        return self.shards.rows(key, start, stop)

    def read(self, key: str) -> Tensor:
        """A whole tensor, which may alias the file."""
        return self.shards.read(key)


@contextmanager
def open_model(name: str, path: str) -> Iterator[StoredModel]:
    """Opens a model's files. ValueError, with the model's name, for what is missing, broken or quantized."""
    with ExitStack() as stack:
        try:
            location(path)
            folder = model_folder(path)
            config, tokenizer = load_config(str(folder)), _tokenizer(folder)
            shards = stack.enter_context(open_weights(folder, WEIGHTS))
            if foreign := [key for key, header in shards.headers.items() if header.dtype not in FLOATS]:
                kind = shards.headers[foreign[0]].dtype
                raise ValueError(f"{foreign[0]} is stored as {kind}: quantized weights cannot be read here")
        except ValueError as error:
            raise ValueError(f"model '{name}': {error}") from error
        yield StoredModel(name, folder, config, tokenizer, shards)


def _tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder)) if any(folder.glob("*token*")) else None


def tokens_differ(models: list[tuple[str, Any]]) -> str | None:
    """Why the tokenizers of (name, tokenizer) are not one, None when they are (or none is there)."""
    if without := [name for name, tokenizer in models if tokenizer is None]:
        if len(without) == len(models):
            return None
        return f"{', '.join(without)} has no tokenizer, {', '.join(n for n, t in models if t is not None)} has one"
    first, vocabulary = models[0][0], models[0][1].get_vocab()
    for name, tokenizer in models[1:]:
        other = tokenizer.get_vocab()
        if other != vocabulary:
            tokens = sorted(t for t in vocabulary.keys() | other.keys() if vocabulary.get(t) != other.get(t))
            shown = ", ".join(f"{t!r} ({vocabulary.get(t)} and {other.get(t)})" for t in tokens[:3])
            return f"the tokenizers of {first} and {name} differ in {counted(len(tokens), 'token')}, such as {shown}"
    return None
