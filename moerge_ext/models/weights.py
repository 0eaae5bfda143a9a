"""The stored weights of whole models, read tensor by tensor: no model is built, and none is whole in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.safefile import FLOATS, TensorHeader
from ..files.shards import OpenShards, has_weights, open_weights
from .pretrained import MODEL_CONFIG, load_config, load_tokenizer, location

WEIGHTS = "model.safetensors"
MIX_FILE = "moerge_mix.json"  # beside the weights of a mixture: which models its experts are
FETCHED = (MODEL_CONFIG, "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*token*", "*.model",
           "vocab*", "merges.txt", "chat_template*")  # fmt: skip
DIGESTED = 512  # values at each end of every tensor


def model_folder(path: str) -> Path:
    """The folder of a local path or hub id (fetched, or from the cache) with a config and safetensors.

    ValueError for an adapter, for what is not there, and for weights in another format.
    """
    location(path)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _snapshot(path)
    folder = folder.resolve()
    if not (folder / MODEL_CONFIG).is_file():
        raise ValueError(f"folder {path!r} is no model: it has no {MODEL_CONFIG}")
    if not has_weights(folder, WEIGHTS):
        raise ValueError(
            f"model {path!r} has no {WEIGHTS}: load it with transformers and save it again (model.save_pretrained), "
            "which writes safetensors"
        )
    return folder


def _snapshot(path: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(FETCHED)))
    except Exception as error:  # the hub client has a dozen unrelated error types, and more in its transports
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"there is no local folder {path!r}, and the hub has no such model for you ({reason}): check the path, or "
            "the id, the network and your access"
        ) from error


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
        return self.shards.holders[key].get_slice(key)[start:stop]

    def read(self, key: str) -> Tensor:
        """A whole tensor, which may alias the file."""
        return self.shards.read(key)


@contextmanager
def open_model(name: str, path: str) -> Iterator[StoredModel]:
    """Opens a model's files. ValueError, with the model's name, for what is missing, broken or quantized."""
    with ExitStack() as stack:
        try:
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
            return f"the tokenizers of {first} and {name} differ in {len(tokens)} tokens, such as {shown}"
    return None


def digest_of(path: str) -> str:
    """What a stored model is known by: SHA-256 over the names, types, shapes and the first and last 512 values of its
    tensors, whatever files they are in. Errors as in `open_model`."""
    digest = hashlib.sha256()
    with open_model(Path(path).name, path) as model:
        for key, header in sorted(model.headers.items()):
            digest.update(f"{key} {header.dtype} {list(header.shape)}\n".encode())
            if not header.shape:
                continue
            count, width = header.shape[0], max(1, torch.Size(header.shape[1:]).numel())
            rows = min(count, -(-DIGESTED // width))
            first, last = (model.rows(key, *part).reshape(-1) for part in ((0, rows), (count - rows, count)))
            for part in (first[:DIGESTED], last[-DIGESTED:]):
                digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
