"""How many tokens transformers' continuous batching keeps, and that no request is larger than that.

Left to itself it takes 60 % of a CPU's memory, with attention masks for 8192 tokens a step. A request that does not fit
would stop it for all requests ("No requests can be scheduled and no requests can be offloaded", transformers 5.23).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ...experts.memory import free_memory
from ...files.counting import counted
from .checks import context
from .context import check_counts, refusal

STEP_TOKENS = 512  # of a batch, on a CPU
REQUESTS = 4  # of the model's whole context, that the cache holds if memory allows
PART = 8  # of the free memory, one part for the cache
PAGE = 256  # tokens of a block, transformers' own default


def on_cpu(options: dict[str, Any]) -> bool:
    """Whether the server computes on the CPU."""
    device = str(options["device"])
    return device.startswith("cpu") or (device == "auto" and not torch.accelerator.is_available())


def bounded(options: dict[str, Any], config: Any) -> dict[str, Any]:
    """Options of the server for the size of its cache on a CPU, those that are not given."""
    if not options["continuous_batching"] or not on_cpu(options):
        return {}
    found = {}
    if options["cb_num_blocks"] is None and options["cb_max_memory_percent"] is None:
        page = options["cb_block_size"] or PAGE
        found["cb_num_blocks"] = blocks(config, page, free_memory(torch.device("cpu")))
    if options["cb_max_batch_tokens"] is None:
        found["cb_max_batch_tokens"] = STEP_TOKENS
    return found


def blocks(config: Any, page: int, free: int | None) -> int:
    """Blocks of `page` tokens for some requests of the whole context, or as many as an eighth of `free` bytes holds."""
    wanted = math.ceil(REQUESTS * context(config) / page)
    return wanted if free is None else max(1, min(wanted, free // PART // (page * bytes_of_token(config))))


def bytes_of_token(config: Any) -> int:
    """Bytes of one token's keys and values in float32."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers * 2 * heads * width * torch.float32.itemsize


def hold_to_cache(model: nn.Module) -> None:
    """Refuses, by HTTP 400, every request of the model's continuous batching that its whole cache could not hold."""
    theirs = model.init_continuous_batching

    def init_continuous_batching(*args: Any, **kwargs: Any) -> Any:
        batching = theirs(*args, **kwargs)
        add = batching.add_request

        def add_request(input_ids: list[int], request_id: str | None = None, **said: Any) -> str | None:
            new = said.get("max_new_tokens")
            try:
                check_counts(len(input_ids), new)
                if problem := too_large(batching.continuous_batching_config, len(input_ids), new):
                    raise refusal(problem)
            except Exception:
                batching.output_router.result_handlers.pop(request_id, None)
                raise
            return add(input_ids, request_id=request_id, **said)

        batching.add_request = add_request
        return batching

    model.init_continuous_batching = init_continuous_batching


def too_large(config: Any, prompt: int, new: int | None) -> str | None:
    """Why a cache of this config holds no request of so many tokens; None where it does, or where its size is not
    known yet."""
    if config.num_blocks is None:
        return None
    room, asked = config.num_blocks * config.page_size, prompt + (new or 0)
    if asked <= room:
        return None
    return (
        f"the prompt has {counted(prompt, 'token')}, and {new} more do not fit the cache of {room} tokens: "
        "ask for fewer by max_tokens, or start the server with a larger --cb-num-blocks"
    )
