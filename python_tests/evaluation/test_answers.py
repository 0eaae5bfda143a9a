"""What a model is asked for, and where its answers end."""

from __future__ import annotations

import patch_cases as cases
from builders import make_tokenizer

from moerge_ext.evaluation.answers import Answerer


def test_answers_end_where_training_ends_them(tmp_path):
    """Also where neither config names an end, and the tokenizer does."""
    model, tokenizer = cases.build("llama"), make_tokenizer(tmp_path)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
    asked, seen = Answerer(model, tokenizer), {}
    generate = model.generate
    model.generate = lambda **said: seen.update(said) or generate(**said)
    asked.generate(["ab"], 3)
    assert seen["eos_token_id"] == [5] == list(asked.ends)
    asked.texts(["ab"], 3, eos_token_id=None)
    assert seen["eos_token_id"] is None
