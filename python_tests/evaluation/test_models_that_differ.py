"""Models whose numbers are none, that read padding, or whose generation config asks for more than one answer."""

from __future__ import annotations

import json

import builders
import patch_cases as cases
import pytest
import torch
import transformers
from query_cases import fake_embedder, wide_tokenizer

import moerge_ext as moerge
from moerge_ext.ensemble.mixture import PromptEnsemble
from moerge_ext.ensemble.prompts import few_shot
from moerge_ext.evaluation.answers import Answerer
from moerge_ext.evaluation.evaluate import Settings, evaluate
from moerge_ext.evaluation.runs import parse_run
from moerge_ext.evaluation.tasks import load_task

ROWS = [{"input": text, "target": "b"} for text in ("a", "long enough", "abc", "xy")]


def task_of(folder, metric, rows=ROWS, **meta):
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "meta.json").write_text(json.dumps({"metric": metric, **meta}))
    return load_task(folder)


@pytest.fixture
def ready(tmp_path):
    """(model, tokenizer, the bank of two experts)."""
    model = cases.build("llama")
    folders = builders.random_experts(model, tmp_path / "experts", ["ant", "bee"], cases.DECODER)
    for folder in folders.values():
        moerge.index_examples(folder, [{"input": "a"}], fake_embedder())
    return model, builders.make_tokenizer(tmp_path / "tokenizer"), moerge.load_experts(folders)


@pytest.mark.parametrize("metric", ["rank", "exact_match"])
def test_nan_is_an_error_and_never_a_score(ready, tmp_path, metric):
    """One token's embedding is NaN: its row is named, and what was answered before it stays."""
    model, tokenizer, experts = ready
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("x", add_special_tokens=False).input_ids[0]] = torch.nan
    task = task_of(tmp_path / "t", metric, choices=["b", "c", "d"])
    settings, out = Settings(batch_size=2, max_new_tokens=2), tmp_path / "out"
    said = "the log-likelihood of 'b' is nan" if metric == "rank" else "the model's logits are NaN or infinite"
    with pytest.raises(ValueError, match=rf"^phatgoose, task t, row 3 \(from 0\): {said}: weights or an adapter hold"):
        evaluate(model, tokenizer, experts, [parse_run("phatgoose")], [task], settings, output=out, progress=False)
    (path,) = (out / "answers" / "t").iterdir()
    assert len(path.read_text().splitlines()) == 3 and "NaN" not in path.read_text()


def test_a_model_that_reads_padding_is_asked_one_by_one(tmp_path):
    tokenizer = wide_tokenizer(tmp_path / "tokenizer")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "context_length": 64}
    config = transformers.RwkvConfig(vocab_size=len(tokenizer), eos_token_id=None, bos_token_id=None, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.dim() > 1 else 1)
    folders = builders.random_experts(model, tmp_path / "experts", ["ant", "bee"], ["receptance", "value"])
    experts, runs = moerge.load_experts(folders), [parse_run("base"), parse_run("phatgoose")]
    for metric, field in (("rank", "log_likelihoods"), ("exact_match", "answer")):
        task = task_of(tmp_path / metric, metric, choices=["b", "hello there"])
        kept = []
        for size in (1, 4):
            settings, out = Settings(batch_size=size, max_new_tokens=4), tmp_path / f"{metric}{size}"
            evaluate(model, tokenizer, experts, runs, [task], settings, output=out, progress=False)
            paths = sorted((out / "answers" / metric).iterdir())
            kept.append([json.loads(line)[field] for path in paths for line in path.read_text().splitlines()[1:]])
        assert kept[0] == kept[1] and len(kept[0]) == 8
    with pytest.raises(ValueError, match="an ensemble asks its prompts in one batch, and models of type rwkv"):
        PromptEnsemble(model, tokenizer, [few_shot("x", count=0)])


@pytest.mark.parametrize(
    "asked",
    [
        {"return_dict_in_generate": True},
        {"stop_strings": ["a"]},
        {"num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"max_time": 1e-9},
    ],
)
def test_what_a_generation_config_asks_beside_logits_is_set_aside(ready, asked):
    """One greedy answer to a prompt, and sampled ones, as without; the model keeps its config."""
    model, tokenizer, _ = ready
    answerer, prompts = Answerer(model, tokenizer), ["abc", "hello"]
    plain = answerer.generate(prompts, 5)
    config = model.generation_config
    for name, value in asked.items():
        setattr(config, name, value)
    assert answerer.generate(prompts, 5) == plain
    assert len(answerer.generate(prompts, 3, counts=[2, 1])) == 3
    assert model.generation_config is config and all(getattr(config, name) == value for name, value in asked.items())
