"""Replacing a file in one step."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Replace `path` by what `write(temporary)` writes, so that a reader, or a kill, sees the old file or the
    new one and nothing between.

    `write` gets an empty file beside `path`, whose content it sets; the file is synced to the disk before it
    takes the name, with the permissions of any new file (the umask's). Whatever `write` raises is raised on,
    and the temporary file is gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors puts a private file in its place
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
