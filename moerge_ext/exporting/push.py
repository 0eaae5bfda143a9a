"""`push_expert`: an adapter and what lies beside it, in one commit to the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save

from .._version import __version__
from ..experts.catalogue import SIDECARS, index_embedders
from ..experts.formats import format_of, inspect_adapter
from ..experts.formats.peft import CONFIG_FILE, WEIGHTS_FILE, AdapterHeader, into_memory
from ..experts.gate_files import stale_note
from ..experts.manifest import MANIFEST_FILE, manifest_of
from ..experts.prompt_notes import noted_prompts
from ..files.hub import unreached
from ..files.safefile import file_inside, open_tensors
from .card import card, is_untouched

README = "README.md"
PARTS = ("adapter_model-*-of-*.safetensors", f"{WEIGHTS_FILE}.index.json")
MAX_README = 1 << 20  # bytes
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)?")


@dataclass(frozen=True)
class Parcel:
    """What is sent. files: {name in the repository: file, or its content}; generated: whether README.md is ours, which
    gives way to one that the repository has; notes: what is odd about it.
    """

    repo_id: str
    revision: str | None
    name: str
    files: dict[str, Path | bytes]
    generated: bool
    notes: list[str] = field(default_factory=list)

    def size(self, name: str) -> int:
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def pack(
    folder: str | os.PathLike, repo_id: str, *, revision: str | None = None, base_model: str | None = None
) -> Parcel:
    """What `push_expert` would send, made without a network; ValueError for what cannot be sent.

    The adapter's config and weights, gates, indices of examples, README.md and moerge_manifest.json; nothing else of
    the folder, no link out of it, and nothing that could not be loaded again.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository id such as user/name: {_one_line(error)}") from None
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"there is no local folder {str(folder)!r}: push takes the folder of an adapter")
    path = path.resolve()
    header = inspect_adapter(path.name, path)
    if not format_of(path).startswith("PEFT"):
        raise ValueError(f"{folder} is an adapter of {format_of(path)}: `moerge convert` it to a PEFT folder first")
    into_memory(header)  # NaN is refused here, and not by those who load it
    base = _base(header, base_model)
    files = _files(path, header, base, base_model is not None)
    readme = _own_readme(path)
    if readme is None:
        forms = [str(form) for form in dict.fromkeys(noted_prompts(path).values())]
        text = card(header, _with_user(repo_id), base, index_embedders(path), forms, revision)
    files[README] = text.encode() if readme is None else readme
    files[MANIFEST_FILE] = manifest_of(
        {name: content for name, content in files.items() if name != README}, moerge_ext=__version__, base_model=base
    )
    note = stale_note(header, lambda: header)
    return Parcel(repo_id, revision, header.name, files, readme is None, [note] if note else [])


def push_expert(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
    api: Any = None,
) -> str:
    """Send an adapter to the hub, with gates, indices, description, a manifest of digests and a card; returns the URL.

    Args:
        folder: of a PEFT adapter. What is sent is what `pack` says.
        private: of a repository that is made; one that is there and public is refused.
        revision: a branch, made when it is not there; default main.
        base_model: the base's id on the hub, for an adapter whose config names it by a path of this machine.
        api: a huggingface_hub.HfApi, with an endpoint or token of its own.

    A README.md of the folder is sent as it is (PEFT's empty one counts as none); without one a card is written, unless
    the repository has one. ValueError, in one line, for what cannot be sent and for what the hub refuses; all files go
    in one commit, or none.
    """
    return send(pack(folder, repo_id, revision=revision, base_model=base_model), private=private, api=api)[0]


def send(parcel: Parcel, *, private: bool = False, api: Any = None) -> tuple[str, list[str]]:
    """(the commit's URL, the names of the files that went there)."""
    from huggingface_hub import CommitOperationAdd, HfApi

    if api is None and (why := unreached()) is not None:
        raise ValueError(
            f"{parcel.repo_id} could not be pushed, as the hub cannot be reached ({why}): check the network and "
            "HF_ENDPOINT; --dry-run shows what would be sent"
        )
    api = HfApi() if api is None else api
    repo_id, revision = parcel.repo_id, parcel.revision
    try:
        repo_id = getattr(api.create_repo(repo_id, private=private or None, exist_ok=True), "repo_id", repo_id)
        if private and not api.repo_info(repo_id).private:
            raise ValueError(f"repository {repo_id} is there already and public: leave --private out, or name another")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = dict(parcel.files)
        if parcel.generated and api.file_exists(repo_id, README, revision=revision):
            del files[README]
        elif parcel.generated:
            files[README] = files[README].replace(_with_user(parcel.repo_id).encode(), repo_id.encode())
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else os.fspath(content))
            for name, content in files.items()
        ]
        message = f"Expert {parcel.name} (moerge_ext {__version__})"
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except Exception as error:  # the hub client has a dozen unrelated error types, and more in its transports
        raise ValueError(_refusal(error, repo_id)) from error
    return str(getattr(commit, "commit_url", commit)), list(files)


def _with_user(repo_id: str) -> str:
    """The id as a card says it: the hub puts the user before a name alone when it makes the repository."""
    return repo_id if "/" in repo_id else f"USER/{repo_id}"


def _refusal(error: Exception, repo_id: str) -> str:
    """What the hub, or the way to it, said, in one line, and what to do."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    if type(error) is ValueError:
        return str(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        mend = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    elif status == 403:
        mend = f"your token may not write to {repo_id}: check its rights and the name of the user or organization"
    elif status is None and isinstance(error, OSError) or "Connect" in type(error).__name__:
        mend = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    else:
        mend = "check the id, the revision and your access"
    return f"{repo_id} could not be pushed ({type(error).__name__}: {_one_line(error)}): {mend}"


def _one_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _base(header: AdapterHeader, given: str | None) -> str | None:
    """The base's id on the hub; ValueError for one that nobody else could find."""
    base = header.base_model if given is None else given
    if base is None or (_ID.fullmatch(base) and (given is not None or not Path(base).exists())):
        return base
    if given is not None:
        raise ValueError(f"--base-model must be an id on the hub such as user/name, got {given!r}")
    raise ValueError(
        f"{CONFIG_FILE} names the base by a path of this machine, {base!r}, which nobody else has: pass its id on the "
        "hub (base_model=ID, --base-model ID)"
    )


def _files(folder: Path, header: AdapterHeader, base: str | None, changed: bool) -> dict[str, Path | bytes]:
    """The adapter's files and those beside it; under `changed` with `base` where they name it."""
    names = [CONFIG_FILE, WEIGHTS_FILE] if (folder / WEIGHTS_FILE).exists() else [CONFIG_FILE]
    for pattern in (*(PARTS if WEIGHTS_FILE not in names else ()), *SIDECARS):
        names += sorted(file.name for file in folder.glob(pattern))
    files: dict[str, Path | bytes] = {name: file_inside(folder, name) for name in names}
    if changed:
        config = json.dumps(header.config | {"base_model_name_or_path": base}, indent=2)
        files[CONFIG_FILE] = config.encode() + b"\n"
        for name in names:
            if name.startswith("moerge_gates"):
                files[name] = _with_base(files[name], base)
    return files


def _with_base(file: Path, base: str) -> bytes:
    """A sidecar whose header names this base."""
    with open_tensors(file) as opened:
        metadata = dict(opened.metadata() or {})
        return save({key: opened.read(key) for key in opened.headers}, metadata | {"base_model": base})


def _own_readme(folder: Path) -> bytes | None:
    """The README.md of the folder, unless there is none or only PEFT's empty card."""
    if not (folder / README).exists():
        return None
    file = file_inside(folder, README)
    if file.stat().st_size > MAX_README:
        raise ValueError(f"{README} has {file.stat().st_size} bytes; expected at most {MAX_README}")
    content = file.read_bytes()
    return None if is_untouched(content.decode("utf-8", errors="replace")) else content
