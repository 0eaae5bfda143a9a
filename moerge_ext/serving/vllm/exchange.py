"""Experts of a running engine exchanged, from the process that takes requests: on all workers, or on none.

Every worker prepares the change while requests are answered. Then new requests wait, those that run end with the
experts that they began with, the engine rests with empty caches, every worker makes the change, and all goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ...files.counting import counted
from ..live import Change, change_problem
from ..settings import Settings
from .frontend import RULES
from .served import ASKED

WAIT = 60.0  # seconds that a change waits for the requests that run
STEP = 0.02  # seconds between looks at them
APART = (
    "moerge: a change of the experts has failed on some of the workers, which may have different ones since: start the "
    "server again ({})"
)


class Busy(RuntimeError):
    """Requests run for longer than a change may wait."""


class Exchange:
    """The experts of one engine (`AsyncLLM`), whose requests pass through it.

    folders: {expert: where it is}, in the order in which requests give weights
    """

    def __init__(self, engine: Any, settings: Settings, folders: dict[str, str]):
        self.engine, self.folders = engine, dict(folders)
        self._settings, self._slots = settings, len(folders) + settings.spare
        self._changing, self._open, self._entering = asyncio.Lock(), asyncio.Event(), 0
        self._open.set()
        self._apart: str | None = None
        self._add = engine.add_request
        engine.add_request = self._enter

    def listed(self) -> dict[str, Any]:
        """The experts, in their order, and how many more there is room for."""
        data = [{"name": name, "source": source} for name, source in self.folders.items()]
        return {"object": "list", "data": data, "spare": self._slots - len(data)}

    async def change(self, change: Change, wait: float = WAIT) -> dict[str, Any]:
        """`listed` after the change. ValueError for what is refused, Busy when requests still run after `wait` seconds,
        RuntimeError where nothing may be served any more; but for that, nothing is changed then."""
        async with self._changing:
            if self._apart is not None:
                raise RuntimeError(self._apart)
            if problem := change_problem(change, tuple(self.folders), self._slots):
                raise ValueError(f"moerge: {problem}")
            await asyncio.to_thread(self._check, change)
            try:
                await self._prepare(change)
                await self._make(change, wait)
            except BaseException:
                with suppress(Exception):  # of an engine that has died
                    await self._ask("abandon")
                raise
            return self.listed()

    def _check(self, change: Change) -> None:
        """Finds what is wrong with an expert's headers, and fetches it from the hub, before a worker is asked."""
        if change.source is not None:
            base = self.engine.vllm_config.model_config.model
            self._settings.expert_folders(base, {change.name: change.source})

    async def _prepare(self, change: Change) -> None:
        said = await self._ask("prepare", change.name, change.source)
        if refused := list(dict.fromkeys(one["refused"] for one in said if "refused" in one)):
            raise ValueError("\n".join(refused))
        if len({one["digest"] for one in said}) > 1:
            raise ValueError(
                f"moerge: the workers have read different experts from {change.source}: nothing is changed"
            )

    async def _make(self, change: Change, wait: float) -> None:
        end = asyncio.get_running_loop().time() + wait
        self._open.clear()
        try:
            await self._drained(end)
            try:
                await _within(end, lambda: self.engine.pause_generation(mode="wait", clear_cache=True))
                await self._commit(change)
            finally:
                await self.engine.resume_generation()
        finally:
            self._open.set()

    async def _drained(self, end: float) -> None:
        running = self.engine.output_processor.get_num_unfinished_requests
        while self._entering or running():
            if asyncio.get_running_loop().time() > end:
                left = running()
                still = f"{counted(left, 'request')} still {'runs' if left == 1 else 'run'}"
                raise Busy(f"moerge: {still}, so the experts were left as they are: try again")
            await asyncio.sleep(STEP)

    async def _commit(self, change: Change) -> None:
        try:
            names = await self._ask("commit")
        except BaseException as error:
            self._apart = APART.format(error or type(error).__name__)
            raise RuntimeError(self._apart) from error
        if change.source is None:
            del self.folders[change.name]
        else:
            self.folders[change.name] = change.source
        if any(list(one) != list(self.folders) for one in names):
            self._apart = APART.format(names)
            raise RuntimeError(self._apart)
        processor = self.engine.input_processor
        setattr(processor, RULES, replace(getattr(processor, RULES), names=tuple(self.folders)))

    async def _ask(self, what: str, *said: Any) -> list[Any]:
        return await self.engine.collective_rpc(ASKED, args=(what, *said))

    async def _enter(self, *args: Any, **kwargs: Any) -> Any:
        """`AsyncLLM.add_request`, which waits while the experts change."""
        while not self._open.is_set():  # another change may begin before this goes on
            await self._open.wait()
        if self._apart is not None:
            raise RuntimeError(self._apart)
        self._entering += 1
        try:
            return await self._add(*args, **kwargs)
        finally:
            self._entering -= 1


async def _within(end: float, what: Callable[[], Awaitable[None]]) -> None:
    left = max(1.0, end - asyncio.get_running_loop().time())
    try:
        await asyncio.wait_for(what(), left)
    except TimeoutError:
        raise Busy("moerge: the engine did not come to rest, so the experts were left as they are: try again") from None
