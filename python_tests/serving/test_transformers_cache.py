"""The size of the cache of transformers' continuous batching on a CPU."""

from __future__ import annotations

import builders
import pytest

from moerge_ext.serving.transformers import cache

CONFIG = builders.tiny_llama().config  # 2 layers, 2 heads of 8 keys and values, 128 positions
TOKEN = 2 * 2 * 2 * 8 * 4  # bytes
OPTIONS = {
    "continuous_batching": True,
    "device": "cpu",
    "cb_num_blocks": None,
    "cb_max_batch_tokens": None,
    "cb_max_memory_percent": None,
    "cb_block_size": 16,
}


def test_a_token_takes_its_keys_and_values():
    assert cache.bytes_of_token(CONFIG) == TOKEN


def test_it_holds_a_few_whole_contexts_or_what_memory_allows():
    assert cache.blocks(CONFIG, 16, None) == 4 * 128 // 16
    assert cache.blocks(CONFIG, 16, 8 * 16 * TOKEN * 5) == 5
    assert cache.blocks(CONFIG, 16, 0) == 1


@pytest.mark.parametrize(
    "said, found",
    [
        ({}, {"cb_num_blocks": 32, "cb_max_batch_tokens": 512}),
        ({"cb_num_blocks": 3}, {"cb_max_batch_tokens": 512}),
        ({"cb_max_memory_percent": 0.1, "cb_max_batch_tokens": 9}, {}),
        ({"continuous_batching": False}, {}),
        ({"device": "cuda:0"}, {}),
    ],
)
def test_what_is_said_stays(said, found):
    assert cache.bounded(OPTIONS | said, CONFIG) == found
