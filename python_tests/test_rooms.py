"""Who may know whom: Python imports read with ast, C++ includes with a regular expression."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moerge_ext"
SOURCES = ROOT / "csrc"

FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


def imports_of(module: str, source: str | None = None) -> set[str]:
    """Everything a module imports, also inside functions: "torch", or "moerge_ext.experts" for our own."""
    tree = ast.parse(FILES[module].read_text() if source is None else source)
    package = ["moerge_ext", *module.split(".")]
    if source is None and FILES[module].name != "__init__.py":
        package.pop()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *(node.module or "").split(".")]).strip(".")
            children = {f"{base}.{alias.name}" for alias in node.names}
            ours = {child for child in children if child.removeprefix("moerge_ext.") in FILES}
            found |= ours
            if len(ours) < len(children):
                found.add(base)
    return found


def ours(module: str) -> set[str]:
    """The modules of this package that `module` imports, without the package's name."""
    names = {name.removeprefix("moerge_ext.") for name in imports_of(module) if name.startswith("moerge_ext.")}
    if "moerge_ext" in imports_of(module):
        names.add("(the package itself)")
    return names


def reach(module: str) -> set[str]:
    """Everything of this package that importing `module` brings in."""
    found, todo = set(), [module]
    while todo:
        for name in ours(todo.pop()):
            if name not in found:
                found.add(name)
                todo += [name] if name in FILES else []
    return found


def family(module: str) -> set[str]:
    return {name for name in FILES if name == module or name.startswith(module + ".")}


PATCH, METHODS, EXPERTS = family("routing"), family("methods"), family("experts")
REFERENCE = {"ops.reference"}
KERNELS = family("ops") - REFERENCE


def test_the_reader_of_imports():
    assert imports_of("", "import a.b\nfrom torch import nn\ndef f():\n import c") >= {"a.b", "c", "torch"}
    assert {"moerge_ext.ops", "moerge_ext.experts.bank", "moerge_ext.methods"} <= imports_of("routing.patch")
    assert "moerge_ext.experts.bank" in imports_of("methods.base")
    assert "moerge_ext.methods.base" in imports_of("methods.arrow")


@pytest.mark.parametrize(
    "lower, above",
    [
        (METHODS, PATCH | KERNELS | REFERENCE),
        (EXPERTS, PATCH | METHODS | KERNELS | REFERENCE),
        (family("files"), PATCH | METHODS | EXPERTS | KERNELS | REFERENCE),
        (KERNELS | family("native"), PATCH | METHODS | EXPERTS | family("files") | REFERENCE),
    ],
    ids=["methods", "experts", "files", "ops"],
)
def test_a_layer_knows_nothing_above_it(lower, above):
    for module in lower:
        upward = reach(module) & (above - {module})
        assert not upward, f"{module} must not reach {sorted(upward)}"
        assert "(the package itself)" not in ours(module), f"{module} imports the whole package"


def test_patch_stands_on_methods_experts_and_ops():
    assert {"ops", "methods", "experts.bank"} <= ours("routing.patch")
    assert not reach("routing.patch") & (family("training") | family("commands"))


def test_every_module_of_a_layer_is_there():
    assert {"routing.patch", "experts.bank", "files.safefile", "ops.wrappers", "native.loading", "methods.base"} | REFERENCE <= set(FILES)


def test_reference_is_torch_alone():
    outside = {name for name in imports_of("ops.reference") if name.partition(".")[0] not in ("torch", "__future__")}
    assert outside <= {"math", "typing", "collections.abc"}, outside


@pytest.mark.parametrize(
    "library", ["peft", "accelerate", "matplotlib", "sentence_transformers", "nevergrad", "scipy", "sklearn"]
)
def test_optional_libraries_are_imported_late(library):
    """`import moerge_ext` works without them."""
    for module in {name for name in FILES if "demo" not in name}:
        for node in ast.parse(FILES[module].read_text()).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == library for name in names), f"{module} imports {library} at once"


def test_only_ops_touch_the_registered_ops():
    for module, file in FILES.items():
        if module in KERNELS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            used = isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.ops.moerge")
            assert not used, f"{module} uses torch.ops.moerge (line {node.lineno}); moerge_ext/ops is its only user"
        if module != "native.loading":
            assert not imports_of(module) & {"moerge_ext._C", "moerge_ext._kernels"}, f"{module} imports the extension"


def test_init_holds_names_only():
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert not any(isinstance(node, ast.ClassDef | ast.For | ast.With) for node in body)


# ---- C++ -------------------------------------------------------------------------------------------------------------

CPP = [file for file in sorted(SOURCES.rglob("*")) if file.suffix in (".cpp", ".h", ".cu", ".cuh")]


# The C functions of single ops that compiled models are linked to, kept compatible as the rest of the stable ABI is.
C_SHIM = "torch/csrc/inductor/aoti_torch/generated/c_shim_"
KERNEL_INCLUDES = {"launch.h", "crossovers.h"} | {file.name for file in CPP if file.suffix == ".cuh"}


def includes_of(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, flags=re.MULTILINE)


def resolved(file: Path, include: str) -> Path | None:
    """The file of csrc that is meant, or None for a header from elsewhere."""
    for folder in (file.parent, SOURCES):
        path = (folder / include).resolve()
        if path.is_file() and path.is_relative_to(SOURCES):
            return path
    return None


def test_the_reader_of_includes():
    text = '#include <a/b.h>\n  # include "../c.h"  // why\n// #include "no.h"\n'
    assert includes_of(text) == ["a/b.h", "../c.h"]
    assert {file.name for file in CPP} >= {"ops.cpp", "module.cpp", "check.h", "route.cpp", "lora.cpp"}


def test_kernels_do_not_know_the_emulator():
    """No `#if` in a kernel, no CUDA beside the vocabulary: the same text runs on a GPU and on the host."""
    for file in SOURCES.glob("cuda/*.cu*"):
        text = file.read_text()
        if file.name != "device.cuh":
            foreign = re.findall(
                r"^\s*#\s*if|<<<|\basm\b|__\w+__|threadIdx|blockIdx|\bcuda[A-Z]\w*", text, re.MULTILINE
            )
            assert not foreign, f"{file.name}: {foreign}"


@pytest.mark.parametrize("file", CPP, ids=lambda file: str(file.relative_to(SOURCES)))
def test_includes(file):
    room = file.relative_to(SOURCES).parts[0]
    for include in includes_of(file.read_text()):
        path = resolved(file, include)
        other = path.relative_to(SOURCES).parts[0] if path else None
        assert (room, other) not in (("cpu", "cuda"), ("cuda", "cpu")), f"{file.name} includes {include}"
        from_torch = re.match(r"(torch|ATen|c10)/", include)
        if file.suffix == ".cu":
            assert include in KERNEL_INCLUDES, f"{file.name} includes {include}: kernels speak the vocabulary alone"
        if room in ("cuda", "simt") and not file.name.startswith("bind"):
            sees_torch = from_torch or re.search(r"check\w*\.h|tensors\.h", include)
            assert not sees_torch, f"{file.name} includes {include}"
            assert not include.startswith("bind"), f"{file.name} includes {include}"
        assert room == "simt" or other != "simt", f"{file.name} includes {include}: the emulator is for tests"
        # the stable ABI: seconds to build, one build across torch versions
        assert (
            not from_torch
            or include.startswith(("torch/csrc/stable/", "torch/headeronly/"))
            or include.startswith(("torch/csrc/inductor/aoti_torch/c/", C_SHIM))
        ), f"{file.name} includes {include}, which is not part of torch's stable ABI"
        assert not include.startswith("pybind11/") or file.name == "module.cpp", f"{file.name} includes {include}"
