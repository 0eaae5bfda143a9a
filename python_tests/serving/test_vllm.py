"""The plugin in the real vLLM, on a CPU: `make test-serve` makes an environment that has it. Skipped without."""

from __future__ import annotations

from pathlib import Path

import builders
import pytest
import torch
import transformers
from server_cases import word_tokenizer
from serving_cases import LINEARS, NAMES
from vllm_engine import LENGTH, Engine, Reference, prompts, vllm

import moerge_ext as moerge
from moerge_ext.queries.cache import TextCache

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama whose heads are of a size that vLLM computes."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, initializer_range=0.2))
    made.float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts(model, tmp_path_factory) -> list[str]:
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    made = builders.random_experts(base, tmp_path_factory.mktemp("experts"), NAMES, LINEARS)
    return [str(made[name]) for name in NAMES]


@pytest.fixture(scope="module")
def reference(model, experts) -> Reference:
    return Reference(model, experts)


@pytest.mark.parametrize("method", ("phatgoose", "arrow", "arrow_mttl", "merged", "expert:cat"))
def test_the_tokens_of_the_patched_model(model, experts, reference, method):
    many, count = (64, 64) if method == "phatgoose" else (16, 12)
    asked = prompts(many)
    with Engine(model, experts, {"method": method}, max_num_seqs=32) as engine:
        outputs = engine.answers(asked, count=count)
        few = [output for batch in (1, 8) for output in engine.answers(asked[:batch])]
    reference.check(few, method=method)
    reference.check(outputs, method=method)
    with Engine(model, None) as plain:
        base = plain.answers(asked, count=count)
    ids = [[output.outputs[0].token_ids for output in found] for found in (outputs, base)]
    assert sum(a != b for a, b in zip(*ids, strict=True)) > len(asked) // 2, "the experts do nothing here"


def test_compiled_chunked_and_preempted(model, experts, reference):
    """One graph for all steps; prompts in pieces of 16 tokens; a cache so small that requests are put back."""
    asked = prompts(8, 90)
    small = {"block_size": 32, "num_gpu_blocks_override": 12, "max_num_batched_tokens": 16}
    with Engine(model, experts, enforce_eager=False, enable_prefix_caching=False, **small) as engine:
        said = [None, {"routing": False}] * 4
        outputs = engine.answers(asked, said, count=40)
        metrics = {m.name: getattr(m, "value", None) for m in engine.llm.get_metrics()}
    assert metrics["vllm:num_preemptions"] > 0
    reference.check(outputs[::2])
    reference.check(outputs[1::2], {"routing": False})


def test_requests_of_one_batch_and_their_cache(model, experts, reference):
    """Each has its own routing, and no block of another's cache."""
    weights, affinities = {"weights": {"ant": 0.5, "cat": -1.0}}, {"affinities": {"bee": 0.9}}
    said = [None, weights, {"routing": False}, {"expert": "dog"}, {"method": "arrow"}]
    said.append({"method": "glider_code"} | affinities)
    text = prompts(1, 60, seed=5)[0] * 4
    with Engine(model, experts, {"methods": ["arrow", "glider_code"]}, block_size=32) as engine:
        first = engine.answers([text] * len(said), said)
        assert all(output.num_cached_tokens == 0 for output in first)
        again = engine.answers([text] * len(said), said)
        assert all(output.num_cached_tokens >= 32 for output in again)
        for before, after in zip(first, again, strict=True):
            assert before.outputs[0].token_ids == after.outputs[0].token_ids
        salted = engine.llm.generate(
            [{"prompt_token_ids": text, "cache_salt": "other"}], vllm.SamplingParams(max_tokens=1, detokenize=False)
        )
        assert salted[0].num_cached_tokens == 0
        for outputs in (first, again):
            reference.check(outputs[:1])
            reference.check(outputs[1:2], weights, "given")
            reference.check(outputs[2:3], {"routing": False})
            reference.check(outputs[3:4], {"weights": {"dog": 1.0}}, "given")
            reference.check(outputs[4:5], method="arrow")
            reference.check(outputs[5:6], affinities, "glider_code")
        refused(engine, text, reference)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """Folder of a tokenizer for the model, and of an encoder that embeds its words."""
    folder = tmp_path_factory.mktemp("words")
    word_tokenizer().save_pretrained(folder)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)
    return folder


def test_routed_by_the_text_of_a_request(model, experts, reference, words, tmp_path):
    """Its query, its prompt as text or as tokens: the tokens of the patched model with the affinities of that text."""
    embedder = moerge.Embedder.from_transformers(str(words), name="words", cache=TextCache(tmp_path))
    for i, folder in enumerate(experts):
        moerge.index_examples(folder, [{"input": f"w{10 + 20 * i} w{11 + 20 * i}"}], embedder)
    bank, options = moerge.load_experts(experts), moerge.get_method("retrieval").configure()[2]
    texts = ["w10 w11 w3", "w50 w51 w4"]
    scores = moerge.ExampleRouter(bank, embedder).scores(texts, options)
    assert scores.argmax(1).tolist() == [0, 2]
    said = {"method": "retrieval", "embedder": {"model": str(words), "name": "words", "mean_pool": True}}
    with Engine(model, experts, said, skip_tokenizer_init=False, tokenizer=str(words)) as engine:
        ids = [engine.llm.get_tokenizer()(text)["input_ids"] for text in texts]
        asked = [*ids, ids[0]], [None, None, {"query": texts[1]}]
        outputs = engine.answers(*asked)
        params = vllm.SamplingParams(max_tokens=12, temperature=0, logprobs=1, ignore_eos=True)
        outputs += engine.llm.generate(texts, params, use_tqdm=False)
        with pytest.raises(ValueError, match="query must be a text"):
            engine.answers(ids, [None, {"query": ""}])
        with pytest.raises(ValueError, match="beam search makes longer"):
            engine.llm.beam_search(texts, vllm.sampling_params.BeamSearchParams(beam_width=2, max_tokens=2))
    for output, row in zip(outputs, (0, 1, 1, 0, 1), strict=True):
        affinities = dict(zip(NAMES, scores[row].tolist(), strict=True))
        reference.check([output], {"affinities": affinities}, "retrieval")


def refused(engine: Engine, text: list[int], reference: Reference) -> None:
    """In our words, before anything of the request begins; others are not touched."""
    for said, words in (
        ({"expert": "eel"}, "no expert 'eel'; there are ant, bee, cat, dog"),
        ({"weights": [1.0]}, "must have E=4 numbers"),
        ({"weights": {"ant": float("nan")}}, "must be finite"),
        ({"method": "retrieval"}, "no method 'retrieval' on this server"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.answers([text, text], [None, said])
    with pytest.raises(ValueError, match="is no argument of requests"):
        params = vllm.SamplingParams(extra_args={"_moerge": {"method": None}})
        engine.llm.generate([{"prompt_token_ids": text}], params)
    reference.check(engine.answers([text]))


def test_what_does_not_fit_ends_the_start_by_name(model, experts):
    for said, options, words in (
        ({"method": "phatgoose"}, {"enable_lora": True}, "--enable-lora"),
        ({"top_k": 9}, {}, "top_k=9 is more than the number of experts"),
        ({"method": "average_activation"}, {}, "average-activation"),
    ):
        with pytest.raises(Exception, match=words), Engine(model, experts, said, **options):
            pass


def test_two_ranks(model, experts, reference, monkeypatch):
    """Tensor parallel in processes of their own, with requests that are routed in their own ways."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    asked = prompts(8)
    with Engine(model, experts, tensor_parallel_size=2, distributed_executor_backend="mp") as engine:
        outputs = engine.answers(asked, [None, {"weights": {"ant": 1.0, "dog": 0.5}}] * 4)
    reference.check(outputs[::2])
    reference.check(outputs[1::2], {"weights": {"ant": 1.0, "dog": 0.5}}, "given")


def test_drafted_by_ngrams(model, experts, reference):
    """The last one: vLLM 0.32 starts no other engine in a process in which numba, which drafts, was imported."""
    said = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
    asked = [ids * 3 for ids in prompts(6, 20)]
    with Engine(model, experts, speculative_config=said) as engine:
        outputs = engine.answers(asked, [None, {"weights": {"bee": 1.0}}] * 3, count=24)
    reference.check(outputs[::2])
    reference.check(outputs[1::2], {"weights": {"bee": 1.0}}, "given")
