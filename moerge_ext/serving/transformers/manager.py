"""transformers' manager of models, with one model: the routed one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.cli.serving.model_manager import ModelManager

from ...routing.patch import Handle
from .cache import hold_to_cache
from .context import hold_to_context, hold_to_template
from .leaving import end_with_client
from .texts import Scores, route_by_texts

REVISION = "main"  # which transformers' server adds to a name without one


class RoutedManager(ModelManager):
    """Loads the model `name` (folder or hub id) and gives it to `route`, which adds the experts; again after it was
    unloaded by `/reset`. Every other model is refused by HTTP 404, so that none answers without experts.

    scores: where requests are routed by their texts, what finds their affinities
    """

    def __init__(self, name: str, route: Callable[[nn.Module], Handle], scores: Scores | None = None, **options: Any):
        self.name, self.route, self.scores, self._started = name, route, scores, int(time.time())
        self.handle: Handle | None = None
        self.generation: Any = None  # transformers' `GenerationState` of the server
        super().__init__(**options)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name that answers carry: the one that was asked for."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        """The routed model and its tokenizer."""
        self._check(model_id_and_revision)
        return super().load_model_and_processor(model_id_and_revision, *args, **kwargs)

    def load_model_streaming(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
        """Tells how far the loading of the routed model is."""
        self._check(model_id_and_revision if gguf_file is None else f"{model_id_and_revision}:{gguf_file}")
        return super().load_model_streaming(model_id_and_revision)

    def get_gen_models(self) -> list[dict[str, Any]]:
        """What `/v1/models` lists."""
        return [{"id": self.name, "object": "model", "created": self._started, "owned_by": "moerge_ext"}]

    def shutdown(self) -> None:
        """Lets go of the model, as `/reset` asks for."""
        super().shutdown()
        self._end_batching()

    def _end_batching(self) -> None:
        """Requests that run are answered by the model that was, later ones by the next: left to itself the server
        keeps that model and answers all of them with it (transformers 5.23)."""
        old = None if self.generation is None else self.generation._cb_manager
        if old is None:
            return
        self.generation._cb_manager = None
        if old._cb is not None:
            threading.Thread(target=old._cb.stop, daemon=True).start()

    def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        model = super()._load_model(f"{model_id_and_revision}@{REVISION}", *args, **kwargs)
        self._end_batching()
        self.handle = self.route(model)
        if self.scores is not None:
            route_by_texts(model, self.handle, self.scores)
        hold_to_cache(model)
        hold_to_context(model)
        end_with_client(model)
        return model

    def _load_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        processor = super()._load_processor(f"{model_id_and_revision}@{REVISION}", *args, **kwargs)
        hold_to_template(processor)
        return processor

    def _check(self, name: str) -> None:
        from fastapi import HTTPException

        if name != self.name:
            said = f"moerge: this server has one model, {self.name!r}; got {name!r}"
            raise HTTPException(status_code=404, detail=said)
