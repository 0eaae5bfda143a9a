"""vLLM without a server: many prompts at once through `vllm.LLM`, with the plugin or without."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..settings import KEY, Settings

Routing = Mapping[str, Any] | None  # what a request says of its routing; None for nothing


class Offline:
    """An engine that starts when it is first asked, and is let go of by `close`.

    model: folder of the base; settings: of its experts, None for the base alone; options: further arguments of
    `vllm.LLM`, such as tensor_parallel_size.
    """

    def __init__(self, model: str, settings: Settings | None, options: Mapping[str, Any]):
        self._model, self._settings, self._options = model, settings, dict(options)
        self._llm: Any = None

    def start(self) -> None:
        """Takes the engine's memory; nothing where it runs already."""
        if self._llm is not None:
            return
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # before vLLM is imported
        import vllm

        said = {} if self._settings is None else {KEY: self._settings.as_dict()}
        ours = {"additional_config": said, "skip_tokenizer_init": True, "generation_config": "vllm"}
        self._llm = vllm.LLM(model=self._model, **ours | self._options)

    def close(self) -> None:
        """Gives the memory back; the next question starts it again."""
        if self._llm is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def write(
        self,
        prompts: Sequence[list[int]],
        routing: Sequence[Routing],
        limit: int,
        ends: Sequence[int],
        repetition_penalty: float = 1.0,
    ) -> list[list[int]]:
        """Token ids of greedy answers to N prompts, of at most `limit` tokens, each with the end that it came to."""
        asked = {"max_tokens": limit, "stop_token_ids": list(ends), "repetition_penalty": repetition_penalty}
        return [list(output.outputs[0].token_ids) for output in self._asked(prompts, routing, ignore_eos=True, **asked)]

    def log_probs(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]], routing: Sequence[Routing]
    ) -> list[list[float]]:
        """log p(token | prompt, tokens before) of the tokens of an answer to each of N prompts."""
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        made = self._asked(texts, routing, max_tokens=1, prompt_logprobs=0)
        rows = [output.prompt_logprobs[len(prompt) :] for output, prompt in zip(made, prompts, strict=True)]
        return [
            [row[token].logprob for row, token in zip(found, answer, strict=True)]
            for found, answer in zip(rows, answers, strict=True)
        ]

    def _asked(self, prompts: Sequence[list[int]], routing: Sequence[Routing], **options: Any) -> list[Any]:
        import vllm

        self.start()
        shared = {"temperature": 0.0, "detokenize": False} | options
        extra = [None if said is None else {KEY: said} for said in routing]
        params = [vllm.SamplingParams(extra_args=one, **shared) for one in extra]
        return self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
