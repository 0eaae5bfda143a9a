"""Starts transformers' server with a routed model, and stops it without waiting for answers that run."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import nn

from ...experts.bank import ExpertBank
from ...files.counting import counted
from ...models.pretrained import load_tokenizer
from ...routing.patch import Handle, patch
from ..queries import Queries
from ..settings import Settings
from .cache import bounded
from .texts import scores_of

INSTALL = (
    "transformers' server needs {}: pip install 'moerge_ext[serve]', or install vLLM (see docs/serving.md) for "
    "`--engine vllm`"
)
GRACE = 3  # seconds that a server which stops gives to answers under way
PORTS = 65535


def options_of(name: str, words: list[str]) -> Any:
    """transformers' own reading of the options `words` of `transformers serve`; ValueError for what it refuses."""
    require()
    import typer
    from transformers.cli.serve import Serve

    app = typer.Typer()
    app.command()(Serve)
    command = typer.main.get_command(app)
    try:
        context = command.make_context("moerge serve ... --", [name, "--non-blocking", *words])
        if not 0 <= (port := context.params["port"]) <= PORTS:
            raise ValueError(f"--port must be 0 to {PORTS}, got {port}")
        return context
    except typer.Exit:  # --help
        raise SystemExit(0) from None
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        raise ValueError(f"transformers serve: {error.format_message()}") from error


def require() -> None:
    """ImportError for a package that transformers' server needs and that is not there."""
    needed = ("transformers.cli.serving.model_manager", "fastapi", "uvicorn", "openai", "pydantic", "accelerate")
    lost = [name for name in needed if not _is_there(name)]
    if lost:
        raise ImportError(INSTALL.format(", ".join(lost)))


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def start(
    settings: Settings, name: str, experts: ExpertBank, config: Any, queries: Queries | None, context: Any
) -> Any:
    """transformers' `Serve`, listening in a thread once the model is there.

    experts, config, queries: what `checked` found
    """
    options = context.params
    options |= bounded(options, config)
    check_address(options["host"], options["port"])
    warn_of_chats(name)
    scores = None if queries is None else scores_of(queries, settings.method, load_tokenizer(name))
    with _managed(partial(_manager(), name, partial(route, settings, experts), scores)):
        served = context.command.invoke(context)
    served._model_manager.generation = served._generation_state
    return served


def warn_of_chats(name: str) -> None:
    """Warns where the model's tokenizer cannot put a chat: the server answers each with HTTP 400."""
    if load_tokenizer(name).chat_template is None:
        warnings.warn(
            f"{name}: its tokenizer has no chat template, so that /v1/chat/completions and /v1/responses fail "
            "(HTTP 400); /v1/completions answers",
            stacklevel=2,
        )


def route(settings: Settings, experts: ExpertBank, model: nn.Module) -> Handle:
    """The experts on the model that the server has loaded."""
    kept = {"absent": settings.absent, "missing": settings.missing}
    handle = patch(model, experts, settings.method, **kept, **settings.options)
    modules = len(handle.modules) + len(handle.parameters)
    print(
        f"moerge: {settings.method} over {counted(len(experts), 'expert')} in {counted(modules, 'module')}",
        file=sys.stderr,
        flush=True,
    )
    return handle


def wait(served: Any) -> int:
    """The exit status of a server that has ended: 1 if it could not start. Ctrl-C and SIGTERM end it."""
    ended, received = threading.Event(), []

    def note(number: int, _: Any) -> None:
        received.append(number)
        ended.set()

    def watch() -> None:
        served._thread.join()
        ended.set()

    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    threading.Thread(target=watch, daemon=True).start()  # Python 3.11 takes a thread for dead whose join is interrupted
    ended.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    stop(served)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    return 128 + received[0] if received else int(not served.server.started)


def stop(served: Any) -> None:
    """Ends the answers that run at their next token, then the server."""
    for timed in served._model_manager.loaded_models.values():
        timed.model.forward = _stopped
    served.server.config.timeout_graceful_shutdown = GRACE
    served.kill_server()
    served._thread.join()
    _leave(served.server)


def _leave(server: Any) -> None:
    """Waits for the answers that a server has cancelled, which closes their connections: uvicorn 0.54 ends its loop
    before that, and their clients would wait as long as this process lives.
    """
    for loop in {listener.get_loop() for listener in getattr(server, "servers", ())}:  # none where it did not start
        if left := asyncio.all_tasks(loop):
            loop.run_until_complete(asyncio.wait(left, timeout=GRACE))
        loop.run_until_complete(asyncio.sleep(0))  # in which the connections close


def check_address(host: str, port: int) -> None:
    """OSError where nothing can listen there, said before the model is read."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} ({error}): pass another --port or --host after --") from error


def _stopped(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("the server is stopping")


def _manager() -> type:
    from .manager import RoutedManager

    return RoutedManager


@contextmanager
def _managed(manager: Any) -> Iterator[None]:
    """transformers' `Serve` makes its manager of models by this inside of the block, and its app notices who leaves."""
    from transformers.cli.serving import model_manager, server

    from .leaving import watching

    theirs, build = model_manager.ModelManager, server.build_server
    model_manager.ModelManager, server.build_server = manager, watching(build)
    try:
        yield
    finally:
        model_manager.ModelManager, server.build_server = theirs, build
