"""Whether a folder could be written, without making it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moerge_ext.files.atomic import check_can_write


def test_nothing_is_made(tmp_path):
    for folder in (tmp_path, tmp_path / "a" / "b"):
        check_can_write(folder)
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for folder in (tmp_path / "file", tmp_path / "file" / "a", tmp_path / "dangling"):
        with pytest.raises(OSError, match=str(folder)):
            check_can_write(folder)

    def refuse(path, *_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(PermissionError, match=str(tmp_path / "new")):
        check_can_write(tmp_path / "new")
