"""Where an expert's folder is: a local path, or an id on the Hugging Face hub (or in its local cache).

user/repo                       the adapter at the top of a repository
user/repo/some/subfolder        an adapter in a folder of it
user/repo/some/adapter.gguf     a GGUF file of it
...@revision                    a branch, tag or commit, always last: user/repo/subfolder@v2
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..files.hub import beside, not_there, only_cached
from ..files.safefile import file_inside, in_hub_cache
from .formats import mlx
from .formats.foreign import what_model
from .formats.peft import CONFIG_FILE, WEIGHTS_FILE
from .manifest import MANIFEST_FILE

ALLOWED_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    "adapter_model-*-of-*.safetensors",
    mlx.WEIGHTS_FILE,
    "moerge_gates*.safetensors",
    "moerge_examples*.safetensors",
    MANIFEST_FILE,
)
GGUF = ".gguf"
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*"
_HUB_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?P<sub>(/{_PART})*)(@(?P<revision>[A-Za-z0-9_][\w.\-/]*))?", re.A)


def find_adapter(source: str | os.PathLike) -> tuple[str, Path]:
    """(default name, folder or GGUF file) of a local path or a hub id; a path that exists locally wins.

    Only the adapter's own files are fetched. Without a network the local cache is used. The default name is
    the last part of the path or id, without the revision. Raises ValueError when nothing is found, with the
    reason.
    """
    name, folder = _found(source)
    no_adapter = folder.is_dir() and not (folder / CONFIG_FILE).exists()
    if no_adapter and (hub := _hub_id(source)) is not None and (model := _model_there(*hub)) is not None:
        raise ValueError(f"hub repository {source}: {model}")
    return name, folder


def find_files(source: str | os.PathLike) -> Path:
    """The same of what lies beside adapters (gates, indexed examples): a folder or file."""
    return _found(source)[1]


def output_folder(source: str | os.PathLike, output: str | os.PathLike | None) -> Path:
    """Where to write what is made for an adapter: `output`, or the adapter's own folder.

    ValueError for an adapter of the hub, or one that is a file without a folder of its own, and no `output`.
    """
    if output is not None:
        return Path(output)
    folder = None if _hub_id(source) is not None else _found(source)[1]
    if folder is None or in_hub_cache(folder):
        raise ValueError(
            f"{os.fspath(source)} is an adapter of the hub, whose cache is not written to: say where to write "
            "(output_dir, --output DIR), and name it to load_experts(..., gates={name: DIR}) or --gates NAME=DIR"
        )
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file without a folder of its own: say where to write (output_dir, --output DIR), or "
            "`moerge convert` it first"
        )
    return folder


def _found(source: str | os.PathLike) -> tuple[str, Path]:
    try:
        text = os.fspath(source)
        if isinstance(text, bytes):
            raise TypeError
        local = Path(text).expanduser()
        if text and local.exists():
            return default_name(text), local
    except TypeError:
        hint = " (a PeftModel is given alone, not in a list)" if hasattr(source, "named_modules") else ""
        raise ValueError(f"an expert must be a path or a hub id, got {type(source).__name__}{hint}") from None
    except (OSError, ValueError, RuntimeError):  # too long a name, a null byte, no home folder
        raise ValueError(f"{str(source)[:200]!r} is not a usable path") from None
    if (hub := _hub_id(source)) is None:
        raise ValueError(
            f"there is no local folder {text!r}{beside(text)}, and it is no hub id (user/repo, user/repo/subfolder, "
            "each with @revision or without): check the path"
        )
    return default_name(text), _snapshot(*hub)


def default_name(source: str) -> str:
    """What an expert is called that is given no name: the last part of its path or hub id."""
    if (hub := _hub_id(source)) is not None:
        return f"{hub[0]}/{hub[1]}".rstrip("/").rsplit("/", 1)[-1].removesuffix(GGUF)
    local = Path(source).expanduser()
    return (local.resolve().name if local.name in ("", "..") else local.name).removesuffix(GGUF)


def _hub_id(source: object) -> tuple[str, str, str | None] | None:
    """(repository, subfolder, revision) of a hub id; None for a path that is there, and for anything else."""
    match = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
    if match is None or ".." in source or Path(source).expanduser().exists():
        return None
    return match["repo"], match["sub"].strip("/"), match["revision"]


def _snapshot(repo: str, subfolder: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and most experts are local

    where = f"{repo}{'/' + subfolder if subfolder else ''}{'@' + revision if revision else ''}"
    one_file = subfolder.endswith(GGUF)
    patterns = [f"{subfolder}/{name}" if subfolder else name for name in ALLOWED_FILES]
    patterns = [subfolder] if one_file else patterns
    try:
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, **only_cached()))
    except Exception as error:  # the hub client has a dozen unrelated error types, and more in its transports
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"there is no local folder {where!r}{beside(where)}, and {not_there('adapter', reason)}"
        ) from error
    if one_file:
        return file_inside(root.resolve(), subfolder)
    folder = root / subfolder
    if not folder.is_dir():
        raise ValueError(f"hub repository {repo} has no adapter in folder {subfolder!r} (revision {root.name})")
    return folder


def _model_there(repo: str, subfolder: str, revision: str | None) -> str | None:
    """What to say of a model's repository, where an adapter was looked for and not found."""
    from huggingface_hub import hf_hub_download

    try:
        config = hf_hub_download(repo, "config.json", subfolder=subfolder or None, revision=revision, **only_cached())
    except Exception:  # as in `_snapshot`; there is none, and the adapter's reader says what is missing
        return None
    return what_model(Path(config).parent)
