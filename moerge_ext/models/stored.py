"""Where the stored weights of a whole model are, and what it is known by; no model is built."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ..files.hub import beside, model_options, not_there
from ..files.shards import has_weights, open_weights

MODEL_CONFIG = "config.json"
COMPOSITION = "moerge_calm"  # the model type of `calm.py`
WEIGHTS = "model.safetensors"
MIX_FILE = "moerge_mix.json"  # beside the weights of a mixture: which models its experts are
FETCHED = (MODEL_CONFIG, "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*token*", "*.model",
           "vocab*", "merges.txt", "chat_template*")  # fmt: skip
DIGESTED = 512  # values at each end of every tensor


def model_folder(path: str) -> Path:
    """The folder of a local path or hub id (fetched, or from the cache) with a config and safetensors.

    ValueError for what is not there, and for weights in another format.
    """
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

    options = model_options(path)
    try:
        return Path(snapshot_download(path, allow_patterns=list(FETCHED), **options))
    except Exception as error:  # the hub client has a dozen unrelated error types, and more in its transports
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"there is no local folder {path!r}{beside(path)}, and {not_there('model', reason)}"
        ) from error


def digest_of(path: str) -> str:
    """What a stored model is known by: SHA-256 over the names, types, shapes and the first and last 512 values of its
    tensors, whatever files they are in. Errors as in `model_folder`, and ValueError for broken files."""
    digest = hashlib.sha256()
    with open_weights(model_folder(path), WEIGHTS) as shards:
        for key, header in sorted(shards.headers.items()):
            digest.update(f"{key} {header.dtype} {list(header.shape)}\n".encode())
            if not header.shape:
                continue
            count, width = header.shape[0], max(1, torch.Size(header.shape[1:]).numel())
            rows = min(count, -(-DIGESTED // width))
            first, last = (shards.rows(key, *part).reshape(-1) for part in ((0, rows), (count - rows, count)))
            for part in (first[:DIGESTED], last[-DIGESTED:]):
                digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
