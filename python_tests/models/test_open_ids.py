"""Token ids of a prompt: no end that the tokenizer adds, every end that is the text's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moerge_ext.models.pretrained import one_start, open_ids

END = 2


class WithEnds:
    """A tokenizer of characters whose line end is the end of a sequence; it adds one when told so."""

    def __init__(self, adds: bool):
        self.adds = adds

    def __call__(self, text, add_special_tokens=True):
        ids = [END if c == "\n" else ord(c) for c in text] + [END] * (self.adds and add_special_tokens)
        return SimpleNamespace(input_ids=ids)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("text", ["ab", "ab\n", "ab\n\n", "\n"])
def test_a_prompt_keeps_its_own_end_and_no_other(adds, text):
    assert open_ids(WithEnds(adds), text, (END,)) == WithEnds(False)(text).input_ids


def test_a_text_that_begins_with_the_start_has_no_second():
    assert one_start([1, 1, 5], SimpleNamespace(bos_token_id=1)) == [1, 5]
    assert one_start([1, 5], SimpleNamespace(bos_token_id=1)) == [1, 5]
    assert one_start([5, 5], SimpleNamespace(bos_token_id=None)) == [5, 5]
