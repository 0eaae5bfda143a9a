"""What nvcc makes of every kernel: registers, spills, shared memory, and the instructions that matter.

`python python_tests/csrc/cuda_resources.py` compiles csrc/cuda for every architecture (minutes) and writes the table
that test_cuda_build.py holds: cuda_resources.json; with names of sources (`lora_shrink mix`) only their lines, with
`changed` those of the sources that have changed since, with architectures (`80 90`) only for those. Instructions need
cuobjdump (on PATH, beside nvcc, or $CUOBJDUMP).
A source that compiled for all of them is entered in cuda_checked.json with a digest of its text and headers, so that CI
compiles only what has changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("cuda_resources.json")
CHECKED = Path(__file__).with_name("cuda_checked.json")
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
# 16-byte accesses of global memory, asynchronous copies to shared memory, tensor cores
INSTRUCTIONS = {"load16": r"\bLDG\.E(?:\.NA)?\.128", "store16": r"\bSTG\.E\.128", "copy16": r"\bLDGSTS\.E.*\.128",
                "mma": r"\bHMMA\."}  # fmt: skip

Kernels = dict[str, dict[str, dict[str, int]]]  # kernel -> architecture -> what -> how much


def nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def cuobjdump() -> str | None:
    beside = Path(os.path.realpath(nvcc() or "")).with_name("cuobjdump")
    return os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump") or (str(beside) if beside.exists() else None)


def nvcc_version() -> str:
    out = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", out).group(1)


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def digest(source: Path) -> str:
    """Of the source and every header of ours that it includes, directly or not."""
    found, todo = {}, [source]
    while todo:
        path = todo.pop()
        if path not in found and path.is_file():
            found[path] = path.read_bytes()
            names = re.findall(rb'^#include "([^"]+)"', found[path], re.MULTILINE)
            todo += [(path.parent / name.decode()).resolve() for name in names]
    return hashlib.sha256(b"\0".join(found[path] for path in sorted(found))).hexdigest()[:16]


def checked() -> dict[str, str]:
    """Source -> its digest when it last compiled for every architecture."""
    return json.loads(CHECKED.read_text()) if CHECKED.exists() else {}


def enter(name: str, found: str) -> None:
    CHECKED.write_text(json.dumps(checked() | {name: found}, indent=1, sort_keys=True) + "\n")


def compile_source(source: Path, folder: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> tuple[Path, str]:
    """The object file for all architectures (the last with PTX), and what ptxas said. AssertionError if it fails."""
    target = folder / f"{source.stem}.o"
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    command = [nvcc(), "-std=c++20", "-O3", f"-I{source.parent}", *codes, "-Xptxas=-v", "-c", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target, done.stderr


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Mangled name of a kernel's type, or of what launches it -> e.g. "LoraShrinkMma<bf16, 16, false>"."""
    order = sorted(names)
    plain = subprocess.run(["c++filt", "-t"], input="\n".join(order), capture_output=True, text=True, check=True).stdout
    out = {}
    for name, text in zip(order, plain.splitlines(), strict=True):
        launcher = re.search(r"run<(.*)>\(", text)
        inner = (launcher.group(1).strip() if launcher else text).replace("moerge::cuda::", "")
        inner = re.sub(r"\(anonymous namespace\)::|\b[a-z]\w*::", "", inner)
        out[name] = inner.replace("__nv_bfloat16", "bf16").replace("__half", "f16").replace(" >", ">")
    return out


def read_ptxas(text: str) -> Kernels:
    found: Kernels = {}
    name = architecture = None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            name, architecture = match.groups()
            found.setdefault(name, {})[architecture] = {}
        elif (match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)) and name:
            found[name][architecture]["spills"] = int(match.group(1)) + int(match.group(2))
        elif (match := re.search(r"Used (\d+) registers", line)) and name:
            found[name][architecture]["registers"] = int(match.group(1))
            shared = re.search(r"(\d+) bytes smem", line)
            found[name][architecture]["shared"] = int(shared.group(1)) if shared else 0
    short = short_names(set(found))
    return {short[name]: per for name, per in found.items()}


def add_instructions(target: Path, kernels: Kernels) -> None:
    out = subprocess.run([cuobjdump(), "-sass", target], capture_output=True, text=True, check=True).stdout
    short = short_names(set(re.findall(r"Function : (\w+)", out)))
    architecture = counts = None
    for line in out.splitlines():
        if match := re.match(r"\s*arch = sm_(\w+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function : (\w+)", line):
            counts = kernels[short[match.group(1)]][architecture]
            counts.update(dict.fromkeys(INSTRUCTIONS, 0))
        elif counts is not None:
            for what, pattern in INSTRUCTIONS.items():
                counts[what] += bool(re.search(pattern, line))


def measure(source: Path, architectures: tuple[str, ...]) -> Kernels:
    with tempfile.TemporaryDirectory() as folder:
        target, said = compile_source(source, Path(folder), architectures)
        kernels = read_ptxas(said)
        add_instructions(target, kernels)
    return kernels


def in_source(name: str, source: Path) -> bool:
    """Or in its own header."""
    texts = [path.read_text() for path in (source, source.with_suffix(".cuh")) if path.exists()]
    return any(f"struct {name.partition('<')[0]} {{" in text for text in texts)


def write(kernels: Kernels) -> None:
    """One line per kernel and architecture, so that a change reads well."""
    lines = []
    for name in sorted(kernels):
        per = ",\n".join(f"  {json.dumps(a)}: {json.dumps(v, sort_keys=True)}" for a, v in kernels[name].items())
        lines.append(f" {json.dumps(name)}: {{\n{per}\n }}")
    head = f'{{"nvcc": {json.dumps(nvcc_version())}, "kernels": {{\n'
    TABLE.write_text(head + ",\n".join(lines) + "\n}}\n")


def main(arguments: list[str]) -> None:
    if nvcc() is None or cuobjdump() is None:
        sys.exit("the table needs nvcc (on PATH or $CUDACXX) and cuobjdump (beside it, on PATH or $CUOBJDUMP)")
    architectures = tuple(a for a in ARCHITECTURES if a in arguments) or ARCHITECTURES
    stems = [name for name in arguments if name not in (*ARCHITECTURES, "changed")]
    if "changed" in arguments:
        stems += [source.stem for source in sources() if checked().get(source.stem) != digest(source)]
    table = json.loads(TABLE.read_text())["kernels"] if TABLE.exists() else {}
    table = {name: per for name, per in table.items() if any(in_source(name, source) for source in sources())}
    for source in sources():
        if source.stem not in stems and (stems or "changed" in arguments):
            continue
        before = digest(source)
        table = {name: per for name, per in table.items() if not in_source(name, source)}
        table.update(measure(source, architectures))
        write(table)
        if architectures == ARCHITECTURES:
            enter(source.stem, before)
        print(source.name, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
