"""Ask a model the demo's conversations, greedily and in one batch, and score the answers."""

import time
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from .tasks import Conversation

MAX_ANSWER = 28  # tokens of the longest right answer ('xxxxxxxxxxxxxx, xxxxxxxxxxxx' and its line end)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_new_tokens: int = MAX_ANSWER,
) -> list[str]:
    """The model's next line for every prompt: one left-padded batch, greedy."""
    rows = tokenizer([f"<s>{p}" for p in prompts], padding=True, add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    lines = tokenizer.batch_decode(tokens[:, rows.input_ids.shape[1] :], clean_up_tokenization_spaces=False)
    return [line.split("\n")[0] for line in lines]


def converse(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Conversation]
) -> list[list[str]]:
    """The model's answers to every turn; each turn sees the earlier ones with the model's own answers."""
    answers: list[list[str]] = [[] for _ in conversations]
    texts = [""] * len(conversations)
    for turn in range(max(len(c.turns) for c in conversations)):
        alive = [i for i, c in enumerate(conversations) if turn < len(c.turns)]
        for i in alive:
            request = conversations[i].turns[turn][0]
            texts[i] += "> " + request.replace("{previous}", answers[i][-1] if answers[i] else "") + "\n"
        for i, answer in zip(alive, generate(model, tokenizer, [texts[i] for i in alive]), strict=True):
            answers[i].append(answer)
            texts[i] += answer + "\n"
    return answers


def accuracies(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, suites: dict[str, list[Conversation]]
) -> dict[str, float]:
    """{suite: share of conversations with every answer right}; all suites are asked in one mixed batch."""
    conversations = [c for suite in suites.values() for c in suite]
    given = iter(converse(model, tokenizer, conversations))
    return {
        name: sum(next(given) == [answer for _, answer in c.turns] for c in suite) / len(suite)
        for name, suite in suites.items()
    }


@torch.no_grad()
def tokens_per_second(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], new_tokens: int = 24
) -> float:
    """Generated tokens per second over the whole batch; every row generates exactly `new_tokens`."""
    rows = tokenizer([f"<s>{p}" for p in prompts], padding=True, add_special_tokens=False, return_tensors="pt")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model.generate(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        seconds.append(time.perf_counter() - start)
    return len(prompts) * new_tokens / sorted(seconds)[1]
