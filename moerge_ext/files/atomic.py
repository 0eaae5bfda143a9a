"""Replacing a file in one step."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def write_atomically(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Replace `path` by what `write(temporary)` writes, so that a reader, or a kill, sees the old file or the
    new one and nothing between.

    `write` gets an empty file beside `path`, whose content it sets; the file is synced to the disk before it
    takes the name, with the permissions of any new file (the umask's). Whatever `write` raises is raised on,
    and the temporary file is gone. What the disk refuses is an OSError that names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors puts a private file in its place
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        _remove(temporary)
        if (refused := disk_error(error, path)) is not None:
            raise refused from error
        raise


def check_new_folder(folder: str | os.PathLike) -> Path:
    """The path of a folder to be written as a whole; ValueError when there is something, OSError when it cannot be."""
    target = Path(folder)
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already: name a folder that is empty or not there yet")
    check_can_write(target)
    if target.exists():  # it is exchanged as a whole
        check_can_write(target.absolute().parent)
    return target


def write_folder_atomically(folder: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Makes `folder` (not there yet, or empty) of what `write(temporary)` puts into an empty folder beside it, so that
    it is seen whole or not at all. Errors are those of `write_atomically`.
    """
    folder = Path(folder).absolute()
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        write(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                permit_as_new(file)
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())
        if folder.is_dir():
            folder.rmdir()
        os.replace(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (refused := disk_error(error, folder)) is not None:
            raise refused from error
        raise


def permit_as_new(file: Path) -> None:
    """Gives a file the permissions of any new file (the umask's): safetensors writes private ones."""
    probe = file.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        file.chmod(probe.stat().st_mode)
    finally:
        _remove(probe)


def write_figure(path: str | os.PathLike, figure: Any, dpi: int = 110) -> None:
    """A figure of matplotlib as PNG, in one step."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def disk_error(error: BaseException, path: str | os.PathLike) -> OSError | None:
    """The OSError that says which `path` could not be written, and why; None when it was not the disk that refused.

    safetensors has an exception of its own for that.
    """
    if isinstance(error, OSError):
        return type(error)(error.errno, error.strerror or str(error), os.fspath(path))
    if not isinstance(error, SafetensorError) or "os error" not in str(error):
        return None
    full = f"os error {errno.ENOSPC})" in str(error)
    return OSError(errno.ENOSPC if full else errno.EIO, str(error), os.fspath(path))


def check_writable(folder: str | os.PathLike) -> None:
    """OSError, naming `folder`, when nothing can be written there; folders that are missing are made."""
    folder = Path(folder)
    _check_no_file(folder)
    probe = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise disk_error(error, folder) from error
    finally:
        _remove(probe)


def check_can_write(folder: str | os.PathLike) -> None:
    """OSError, naming `folder`, when nothing could be written there or it could not be made; nothing is made."""
    _check_no_file(folder)
    there = Path(folder).absolute()
    while not (there.exists() or there.is_symlink()):
        there = there.parent
    probe = there / f".{secrets.token_hex(8)}.tmp"
    try:
        probe.touch()
    except OSError as error:
        raise disk_error(error, folder) from error
    finally:
        _remove(probe)


def _check_no_file(folder: str | os.PathLike) -> None:
    """OSError where a file lies in the place of `folder`, or of one that it would lie in."""
    for there in (Path(folder), *Path(folder).parents):
        if there.is_file():
            within = "" if there == Path(folder) else f", in which {folder} cannot lie"
            raise NotADirectoryError(f"{str(there)!r} is a file{within}: name a folder")


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):  # of a folder that is not one; what went wrong before is what counts
        file.unlink(missing_ok=True)
