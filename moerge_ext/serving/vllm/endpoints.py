"""What vLLM's server answers besides: its experts and their exchange, traces, and the metrics of the routing.

vLLM asks for a plugin of routes by name (`VLLM_PLUGINS`); `moerge serve` names it where its arguments ask for any.

    GET    /v1/moerge/experts            {"data": [{"name", "source"}, ...], "spare": slots left}
    POST   /v1/moerge/experts            {"name": ..., "source": ...}: joins, or takes the place of that of its name
    DELETE /v1/moerge/experts/{name}     leaves
    GET    /v1/moerge/traces/{request}   {"data": [trace of one sequence, ...]}
"""

from __future__ import annotations

import asyncio
from typing import Any

from ..live import Change
from ..settings import KEY, Settings
from .exchange import WAIT, Busy, Exchange
from .metrics import Refreshing, RoutingMetrics
from .served import ASKED
from .worker import settings_of

EXPERTS, TRACES = "/v1/moerge/experts", "/v1/moerge/traces"


class MoergeEndpoints:
    """The entry point of `vllm.endpoint_plugins`."""

    name = "moerge"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        held = getattr(app.state.args, "additional_config", None)
        said = held.get(KEY) if isinstance(held, dict) else None
        if said is None:
            return
        settings = Settings.parse(said)
        if settings.spare:
            app.add_route(EXPERTS, self._list, methods=["GET"])
            app.add_route(EXPERTS, self._put, methods=["POST"])
            app.add_route(EXPERTS + "/{name:path}", self._drop, methods=["DELETE"])
        if settings.traces:
            app.add_route(TRACES + "/{request_id}", self._trace, methods=["GET"])
        if settings.metrics:
            app.add_middleware(Refreshing, held=app.state)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        settings = None if engine_client is None else settings_of(engine_client.vllm_config)
        if settings is None:
            return
        self._engine = engine_client
        if settings.spare:
            folders = settings.expert_folders(engine_client.vllm_config.model_config.model)
            self._exchange = Exchange(engine_client, settings, folders)
        if settings.metrics:
            from vllm.v1.metrics.prometheus import get_prometheus_registry

            state.moerge_metrics = RoutingMetrics(engine_client)
            await state.moerge_metrics.refresh()
            get_prometheus_registry().register(state.moerge_metrics)

    async def _list(self, request: Any) -> Any:
        return answered(self._exchange.listed())

    async def _put(self, request: Any) -> Any:
        try:
            said = await request.json()
        except ValueError as error:
            return refusal(400, f"moerge: the body is no JSON ({error})")
        return await self._changed(request, lambda: Change.read(said))

    async def _drop(self, request: Any) -> Any:
        return await self._changed(request, lambda: Change(request.path_params["name"]))

    async def _changed(self, request: Any, read: Any) -> Any:
        try:
            change, wait = read(), seconds(request.query_params.get("wait"))
            # a client that leaves does not end it halfway
            return answered(await asyncio.shield(self._exchange.change(change, wait)))
        except ValueError as error:
            return refusal(400, str(error))
        except Busy as error:
            return refusal(503, str(error))
        except RuntimeError as error:
            return refusal(500, str(error))

    async def _trace(self, request: Any) -> Any:
        name = request.path_params["request_id"]
        said = await self._engine.collective_rpc(ASKED, args=("trace", name))
        found = traces([one for one in said if one is not None])
        if not found:
            said = 'no request with {"trace": true}, or too many after it'
            return refusal(404, f"moerge: no trace of {name!r}: {said}")
        return answered({"object": "list", "data": found})


def traces(said: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The traces of a request, of which every stage of a pipeline has its own modules.

    tokens: every expert's weight, the mean over modules, for the tokens from position `start` on; modules: the mean
    over the tokens that were computed.
    """
    found = []
    for parts in zip(*said, strict=True):
        modules = {module: means for part in parts for module, means in part["modules"].items()}
        rows = [part["tokens"] for part in parts]
        shares = [len(part["modules"]) / max(1, len(modules)) for part in parts]
        tokens = [
            [sum(share * mean for share, mean in zip(shares, of, strict=True)) for of in zip(*token, strict=True)]
            for token in zip(*rows, strict=True)
        ]
        found.append(parts[0] | {"tokens": tokens, "modules": modules})
    return found


def seconds(said: str | None) -> float:
    """How long a change may wait, from a query such as `?wait=10`."""
    if said is None:
        return WAIT
    try:
        found = float(said)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 86400:
        raise ValueError(f"moerge: wait must be a number of seconds from 0 to 86400, got {said[:100]!r}")
    return found


def refusal(status: int, message: str) -> Any:
    """An error as vLLM's server gives it."""
    kinds = {400: "BadRequestError", 404: "NotFoundError", 503: "ServiceUnavailableError"}
    error = {"message": message, "type": kinds.get(status, "InternalServerError"), "param": None, "code": status}
    return answered({"error": error}, status)


def answered(said: dict[str, Any], status: int = 200) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(said, status_code=status)
