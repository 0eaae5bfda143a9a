"""cmake and ninja as they were installed for the tests: an older cmake of the system does not know a newer nvcc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def has(name: str) -> bool:
    return shutil.which(name, path=PATH) is not None


def cmake(source: Path, folder: Path, options: list[str], targets: list[str], **env: str) -> None:
    """Configures and builds; later only what has changed. AssertionError with what was said if it fails."""
    generator = ["-G", "Ninja"] if has("ninja") else []
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    for command in (
        ["cmake", "-S", source, "-B", folder, *generator, *options],
        ["cmake", "--build", folder, "--parallel", jobs, "--target", *targets],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": PATH} | env)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
