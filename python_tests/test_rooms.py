"""Who may know whom: rooms.toml against the imports of every Python file, and rules of csrc against its includes."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from import_graph import FILES, GRAPH, PACKAGE, ROOT, circle, imports_of, reach, room_of

SOURCES = ROOT / "csrc"
ROOMS = tomllib.loads(Path(__file__).with_name("rooms.toml").read_text())
OURS = {module for module in FILES if module.split(".")[0] == PACKAGE}


def test_the_reader_of_imports():
    assert imports_of(PACKAGE, "import a.b\nfrom torch import nn\ndef f():\n import c") >= {"a.b", "c", "torch"}
    assert {"moerge_ext.experts.bank", "moerge_ext.methods"} <= imports_of("moerge_ext.routing.planning")
    assert "moerge_ext.ops" in imports_of("moerge_ext.routing.refusals")
    assert "moerge_ext.methods.base" in imports_of("moerge_ext.methods.arrow")
    assert "moerge_ext.files.safefile" in reach("moerge_ext.methods.arrow")
    assert (room_of("moerge_ext.experts.formats.peft"), room_of("moerge_ext._version"), room_of("bench.run")) == (
        "experts",
        None,
        None,
    )


def test_the_finder_of_circles():
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert circle({"a": ["b", "c"], "b": ["c"]}) == []


def test_no_circle_anywhere():
    found = circle(GRAPH)
    assert not found, " -> ".join(found)


def test_every_folder_is_a_room_and_every_room_a_folder():
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").exists()}
    assert folders == ROOMS.keys()
    for room, facts in ROOMS.items():
        assert (ROOT / PACKAGE / room / facts["start"]).is_file(), f"{room}: no {facts['start']} to start with"
        assert set(facts["may_import"]) <= ROOMS.keys() - {room}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_may(room):
    allowed = {room, *ROOMS[room]["may_import"]}
    for module in OURS:
        if room_of(module) == room:
            foreign = {other for other in reach(module) if room_of(other) not in {None, *allowed}}
            assert not foreign, f"{module} must not reach {sorted(foreign)}: see python_tests/rooms.toml"
            assert room == "commands" or PACKAGE not in GRAPH[module], f"{module} imports the whole package"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is(room):
    said = " ".join(ast.get_docstring(ast.parse((ROOT / PACKAGE / room / "__init__.py").read_text())).split())
    may = ", ".join(ROOMS[room]["may_import"]) or "nothing of this package"
    assert said.endswith(f"May import: {may}."), said
    assert f"`{ROOMS[room]['start']}`" in said, f"it does not say where to start: {ROOMS[room]['start']}"


def test_contributing_lists_the_rooms():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for room, facts in ROOMS.items():
        assert f"| `moerge_ext/{room}/` | {facts['holds']} | `{facts['start']}` |" in text, (
            f"the row of {room} is missing or differs"
        )


def test_tests_lie_in_the_rooms_that_they_guard():
    """python_tests/<room>/ for every room; csrc/ and bench/ beside them; what is about all of it on top."""
    folders = {path.name for path in (ROOT / "python_tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders <= {*ROOMS, "csrc", "bench"} and ROOMS.keys() - folders <= {"files"}, folders


def test_reference_is_torch_alone():
    """And the options', which are torch alone too."""
    assert GRAPH["moerge_ext.ops.reference"] == {"moerge_ext.ops.options"} and not GRAPH["moerge_ext.ops.options"]
    for module in ("moerge_ext.ops.reference", "moerge_ext.ops.options"):
        outside = {name.partition(".")[0] for name in imports_of(module)} - {"torch", PACKAGE, *sys.stdlib_module_names}
        assert not outside, outside


@pytest.mark.parametrize(
    "library",
    ["peft", "accelerate", "matplotlib", "plotly", "sentence_transformers", "nevergrad", "scipy", "sklearn", "vllm"],
)
def test_optional_libraries_are_imported_late(library):
    """`import moerge_ext` works without them."""
    for module in {name for name in OURS if "demo" not in name}:
        for node in ast.parse(FILES[module].read_text()).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == library for name in names), f"{module} imports {library} at once"


def test_only_ops_touch_the_registered_ops():
    for module in OURS:
        if room_of(module) in ("ops", "native"):
            continue
        for node in ast.walk(ast.parse(FILES[module].read_text())):
            used = isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.ops.moerge")
            assert not used, f"{module} uses torch.ops.moerge (line {node.lineno}); moerge_ext/ops is its only user"
        assert not imports_of(module) & {"moerge_ext._C", "moerge_ext._kernels"}, f"{module} imports the extension"


LINES, BODY = 400, 60


@pytest.mark.parametrize("file", sorted(FILES.values()), ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_short(file):
    text = file.read_text()
    assert text.count("\n") <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.body[0].lineno < BODY, f"{node.name} (line {node.lineno}) is long"


def test_init_holds_names_only():
    body = ast.parse((ROOT / PACKAGE / "__init__.py").read_text()).body
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


def test_names_of_test_files_are_unique():
    """pytest imports them by name alone, and refuses to collect a second one."""
    names = sorted(
        path.name for path in (ROOT / "python_tests").rglob("*.py") if path.name not in ("conftest.py", "__init__.py")
    )
    assert not [name for name, next_name in zip(names, names[1:], strict=False) if name == next_name]
