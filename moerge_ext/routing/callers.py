"""How a module's own code uses one of its layers: it calls the layer, or it reads the layer's weight past it.

Read from the source of the module's `forward` and of what that calls, so that it holds for models nobody has listed.
A condition that only asks the module itself (`if self.config.pretraining_tp > 1:`) is answered; other branches count.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType

from torch import nn

# what is asked of a layer, or of its weight, without computing with it
_OF_LAYER = {"bias", "in_features", "out_features", "training"}
_OF_WEIGHT = {"dtype", "device", "shape", "ndim", "dim", "size", "numel", "stride", "requires_grad", "is_cuda"}
_ASKING = {"isinstance": isinstance, "hasattr": hasattr, "getattr": getattr}
_CHANGING = {"training", "gradient_checkpointing", "weight"}  # what a condition asks and what is not so for good
_PEFT = "disable_adapters"  # what a fused kernel asks a layer before it takes `lora_A` and `lora_B` from it
_HELPERS = 2  # calls deep that functions which are no methods are followed for _PEFT


@dataclass(frozen=True)
class Use:
    """called: as self.layer(...); handed: to code that may call it or not; read: its weight is used as a tensor."""

    called: bool = False
    handed: bool = False
    read: bool = False

    def __or__(self, other: Use) -> Use:
        return Use(self.called or other.called, self.handed or other.handed, self.read or other.read)


def use_of(parent: nn.Module, attribute: str) -> Use | None:
    """How `parent.forward` uses `parent.<attribute>`; None when its source cannot be read or says nothing of it."""
    found = None
    for function in _reached(parent):
        attributes = _attributes(parent, function)
        if attributes is None:
            return None
        if attribute in attributes:
            found = (found or Use()) | attributes[attribute]
    return found


def asks_for_peft(parent: nn.Module) -> bool:
    """Whether `parent.forward` asks a layer for PEFT's adapters, as kernels do that fuse LoRA by themselves."""
    return any(_says(function, _PEFT, _HELPERS) for function in _reached(parent))


def home(parent: nn.Module) -> str:
    """The package that `parent.forward` comes from: another than the class's where a library has replaced it."""
    return (getattr(_forward(parent), "__module__", None) or "").partition(".")[0]


def _forward(parent: nn.Module) -> FunctionType | None:
    """The function behind `parent(...)`, below the wrappers of accelerate and of decorators."""
    inner = vars(parent)
    return _plain(inner.get("_old_forward") or inner.get("forward") or type(parent).forward)


def _plain(function: object) -> FunctionType | None:
    function = inspect.unwrap(function) if callable(function) else function
    function = function.__func__ if isinstance(function, MethodType) else function
    return function if isinstance(function, FunctionType) else None


def _reached(parent: nn.Module) -> Iterator[FunctionType]:
    """`forward` and the methods, or functions set as attributes, that it names as self.<name>."""
    todo, seen = [_forward(parent)], set()
    while todo:
        function = todo.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        yield function
        own = vars(parent)
        for name in _attributes(parent, function) or ():
            todo.append(_plain(own[name] if callable(own.get(name)) else _stored(type(parent), name)))


def _stored(kind: type, name: str) -> object:
    """What the class has under a name, as it is stored. (`inspect.getattr_static` takes several times as long.)"""
    return next((base.__dict__[name] for base in kind.__mro__ if name in base.__dict__), None)


def _attributes(parent: nn.Module, function: FunctionType) -> dict[str, Use] | None:
    """What the function does with every self.<attribute> that it mentions; None without its source."""
    source = _source(function)
    if source is None:
        return None
    return _uses(function, tuple(_answer(test, source.myself, parent) for test in source.tests.values()))


@dataclass(frozen=True)
class _Source:
    definition: ast.FunctionDef
    myself: str  # the first parameter
    above: dict[ast.AST, ast.AST]  # node -> the node around it
    tests: dict[ast.AST, CodeType]  # condition of an if -> its code, where it only asks `self`


@functools.lru_cache(maxsize=1024)
def _source(function: FunctionType) -> _Source | None:
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return None
    definition.decorator_list = []  # what they name is not used by the function
    myself = definition.args.args[0].arg
    nodes = list(ast.walk(definition))
    above = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
    tests = {}
    for node in nodes:
        if isinstance(node, (ast.If, ast.IfExp)) and _only_asks(node.test, myself):
            tests[node] = compile(ast.Expression(node.test), "<condition>", "eval")
    return _Source(definition, myself, above, tests)


def _only_asks(test: ast.expr, myself: str) -> bool:
    """Whether a condition depends on nothing but the attributes of `self`, those that change with its mode left out."""
    names, calls = set(), set()
    for node in ast.walk(test):
        if isinstance(node, ast.Call):
            calls.add(node.func.id if isinstance(node.func, ast.Name) else None)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        changes = isinstance(node, ast.Attribute) and node.attr in _CHANGING
        if changes or isinstance(node, (ast.NamedExpr, ast.Await, ast.Yield, ast.Lambda)):
            return False
    return myself in names and names <= {myself, *_ASKING} and calls <= set(_ASKING)


def _answer(test: CodeType, myself: str, parent: nn.Module) -> bool | None:
    """None where the condition cannot be answered."""
    try:
        return bool(eval(test, {"__builtins__": {}}, {myself: parent, **_ASKING}))
    except Exception:
        return None


@functools.lru_cache(maxsize=4096)
def _uses(function: FunctionType, answers: tuple[bool | None, ...]) -> dict[str, Use]:
    source = _source(function)
    dead: set[ast.AST] = set()
    for node, answer in zip(source.tests, answers, strict=True):
        if answer is not None:
            for part in _never_run(node, answer, source.above[node]):
                dead.update(ast.walk(part))
    uses: dict[str, Use] = {}
    for node in ast.walk(source.definition):
        if node in dead:
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == source.myself:
            uses[node.attr] = uses.get(node.attr, Use()) | _use(node, source.above)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not _asked(node, source.above[node]):
            uses[node.value] = uses.get(node.value, Use()) | Use(handed=True)  # getattr(self, "q_proj")
    return uses


def _never_run(node: ast.If | ast.IfExp, answer: bool, around: ast.AST) -> list[ast.AST]:
    """The code that a condition with this answer keeps from running, what follows a branch that returns included."""
    if isinstance(node, ast.IfExp):
        return [node.orelse if answer else node.body]
    taken, other = (node.body, node.orelse) if answer else (node.orelse, node.body)
    after: list[ast.AST] = []
    if taken and isinstance(taken[-1], (ast.Return, ast.Raise)):
        blocks = (block for _, block in ast.iter_fields(around) if isinstance(block, list) and node in block)
        after = [part for block in blocks for part in block[block.index(node) + 1 :]]
    return [*other, *after]


def _use(node: ast.Attribute, above: dict[ast.AST, ast.AST]) -> Use:
    """What the code around `self.<attribute>` does with it."""
    outer = above[node]
    if _asked(node, outer):
        return Use()
    if not isinstance(outer, ast.Attribute):
        called = isinstance(outer, ast.Call) and outer.func is node
        return Use(called=called, handed=not called)
    if outer.attr != "weight":
        return Use(handed=outer.attr not in _OF_LAYER)
    around = above[outer]
    asked = isinstance(around, ast.Attribute) and around.attr in _OF_WEIGHT
    return Use(read=not asked and not isinstance(around, ast.Compare) and not _asked(outer, around))


def _asked(node: ast.AST, outer: ast.AST) -> bool:
    """Whether `outer` is isinstance(node, ...) or the like."""
    return (
        isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name) and outer.func.id in ("isinstance", "hasattr")
    )


@functools.lru_cache(maxsize=1024)
def _says(function: FunctionType, word: str, depth: int) -> bool:
    """Whether the code of a function, or of a function of its own package that it names, contains a word."""
    code = function.__code__
    if word in code.co_names or word in code.co_consts:
        return True
    package = function.__module__.partition(".")[0]
    named = (function.__globals__.get(name) for name in code.co_names) if depth else ()
    return any(
        _says(other, word, depth - 1)
        for other in map(_plain, named)
        if other is not None and other.__module__.partition(".")[0] == package
    )
