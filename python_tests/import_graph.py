"""Who imports whom, read from the sources of the package, the benchmark and the tests without running any of them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "moerge_ext"


def _name(file: Path) -> str:
    """The dotted name that others import a file by; files of the tests go by their own name."""
    relative = file.relative_to(ROOT).with_suffix("")
    parts = relative.parts[-1:] if relative.parts[0] == "python_tests" else relative.parts
    return ".".join(parts).removesuffix(".__init__")


FILES = {
    _name(file): file for folder in (PACKAGE, "bench", "python_tests") for file in sorted((ROOT / folder).rglob("*.py"))
}


def imports_of(module: str, source: str | None = None) -> set[str]:
    """Everything a module imports, also inside functions: "torch", or "moerge_ext.experts.bank" for our own."""
    file = FILES[module]
    tree = ast.parse(file.read_text() if source is None else source)
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *(node.module or "").split(".")]).strip(".")
            children = {f"{base}.{alias.name}" for alias in node.names}
            ours = children & FILES.keys()
            found |= ours
            if len(ours) < len(children):
                found.add(base)
    return found


GRAPH = {module: imports_of(module) & FILES.keys() for module in FILES}


def reach(module: str) -> set[str]:
    """Everything of ours that importing `module` brings in."""
    found, todo = set(), [module]
    while todo:
        new = GRAPH[todo.pop()] - found
        found |= new
        todo += new
    return found


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """One circle of a graph, such as [a, b, a]; empty when there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := visit(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def room_of(module: str) -> str | None:
    """The room of a module of the package; None for what lies outside of the rooms."""
    parts = module.split(".")
    inside = len(parts) > 1 and parts[0] == PACKAGE and (ROOT / PACKAGE / parts[1]).is_dir()
    return parts[1] if inside else None
