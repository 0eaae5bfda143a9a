"""Answers that answer prompting samples: whose random numbers they use, and from which distribution they are."""

from __future__ import annotations

import patch_cases as cases
import pytest
import torch
from query_cases import wide_tokenizer

from moerge_ext.ensemble.drawing import DrawRows, own_warpers
from moerge_ext.ensemble.mixture import PromptEnsemble
from moerge_ext.ensemble.prompts import Template, answer_prompting
from moerge_ext.evaluation.answers import Answerer
from moerge_ext.models.prompt import PromptFormat
from moerge_ext.queries.cache import TextCache

ROWS = [{"input": f"q{i}", "target": f"a{i}"} for i in range(20)]


def test_samples_are_of_the_prompt_alone_and_drawn_once(tmp_path):
    """The same answers whatever was asked before, in whatever batch, from memory, from disk, and in a new process."""
    model, tokenizer = cases.build("llama"), wide_tokenizer(tmp_path)
    short = Template(question="{input}:", answer="{target}.", samples="={answers}=")
    batches: list[int] = []  # prompts sampled together
    own = answer_prompting("own", ROWS, count=2, samples=3, template=short)

    def asked(questions, seed=0, cache=None, stop=()):
        mix, seen = PromptEnsemble(model, tokenizer, [own], seed=seed), []
        if cache is not None:
            mix.sampler.keep(cache, "model")
        real = mix.asked.generate

        def spy(prompts, *a, **o):
            draw, texts = o["logits_processor"][0], [p.text for p in prompts]
            batches.extend([len(draw.counts)] if isinstance(draw, DrawRows) else [])
            seen.append((isinstance(draw, DrawRows), texts))
            return real(prompts, *a, **o)

        mix.asked.generate = spy
        torch.manual_seed(len(questions))
        state = torch.get_rng_state()
        mix.answer_by("own", questions, max_new_tokens=3, stop=stop)
        mix.answer_by("own", questions, max_new_tokens=3, stop=stop)
        assert state.equal(torch.get_rng_state()), "the caller's random numbers were used up"
        sampled = [text for drawn, texts in seen if drawn for text in texts]
        assert len(sampled) == len(set(sampled)), "a prompt was sampled twice"
        return dict(zip(questions, [texts for drawn, texts in seen if not drawn][0], strict=True)), sampled

    both, sampled = asked(["abc", "de", "fg", "hi", "jk", "lm"])
    assert len(sampled) == 8  # two rows, each after the other one, and six questions
    first = own.facts["demonstrations"][0]
    assert sum(f"{first['input']}:{first['target']}." in text for text in sampled) == 7
    assert not any(text.endswith(f"{first['input']}:{first['target']}.{first['input']}:") for text in sampled)
    assert batches == [1, 1, 2, 2, 2] and asked(["fg", "hi", "jk", "lm"])[0]["fg"] == both["fg"]
    assert asked(["de"])[0]["de"] == both["de"] and asked(["abc"], seed=1)[0]["abc"] != both["abc"]
    cache = TextCache(tmp_path / "samples")
    assert asked(["abc"], cache=cache)[1] and asked(["abc"], cache=cache) == ({"abc": both["abc"]}, [])
    samples = both["abc"].rpartition("=abc:")[0].rpartition("=")[2]
    letter = next(character for character in samples if character not in "; ")
    assert letter not in asked(["abc"], stop=(letter,))[0]["abc"].rpartition("=abc:")[0].rpartition("=")[2]


def test_samples_have_a_length_of_their_own(tmp_path):
    model, tokenizer, limits = cases.build("llama"), wide_tokenizer(tmp_path), []
    words = {"template": Template(question="{input}:", samples="={answers}="), "samples": 2, "count": 0}
    experts = [answer_prompting(name, sample_tokens=n, **words) for name, n in (("a", 2), ("b", None), ("c", 99))]
    mix = PromptEnsemble(model, tokenizer, experts)
    real = mix.asked.generate
    mix.asked.generate = lambda prompts, n, **o: limits.append((len(prompts), n)) or real(prompts, n, **o)
    mix.answer(["abc", "de"], select=(torch.tensor([[0, 1, 2]] * 2), torch.ones(2, 3)), max_new_tokens=5)
    assert limits == [(2, 2), (2, 5), (6, 5)]  # "b" and "c" share their samples


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_k": 5},
        {"top_k": 0, "top_p": 0.6},
        {"min_p": 0.9, "temperature": 2.0},
        {"typical_p": 0.5, "epsilon_cutoff": 0.02},
        {"eta_cutoff": 0.02, "top_k": 0},
    ],
    ids=str,
)
def test_what_is_drawn_from_is_what_generate_draws_from(settings):
    model = cases.build("llama")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    ids = torch.tensor([[5, 6, 7], [9, 3, 2]])
    asked = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, pad_token_id=0, **asked)
    ours = own_warpers(model.generation_config, torch.device("cpu"))(ids, out.logits[0].float())
    torch.testing.assert_close(ours, out.scores[0], rtol=0, atol=0)
    assert (out.scores[0] == -torch.inf).any()  # 50 tokens are left where nothing is said


def test_every_prompt_draws_from_its_distribution_with_its_own_numbers():
    probabilities = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.0, 0.2, 0.7]])
    scores = probabilities.log().repeat_interleave(torch.tensor([3000, 2000]), 0)

    def drawn(counts, seeds, scores):
        out = DrawRows(lambda ids, scores: scores, counts, seeds)(None, scores)
        assert (out == 0).sum() == len(out) and (out == -torch.inf).sum() == out.numel() - len(out)
        return out.argmax(-1)

    tokens = drawn((3000, 2000), (1, 2), scores)
    for part, wanted in zip(tokens.split((3000, 2000)), probabilities, strict=True):
        torch.testing.assert_close(part.bincount(minlength=4) / len(part), wanted, rtol=0, atol=0.04)
    assert drawn((2000,), (2,), scores[3000:]).equal(tokens[3000:])
    assert not drawn((2000,), (3,), scores[3000:]).equal(tokens[3000:])


def _sliding():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5, "max_position_embeddings": 128}
    return MistralForCausalLM(MistralConfig(**sizes, **heads)).eval()


def _static():
    model = cases.build("llama")
    model.generation_config.cache_implementation = "static"
    return model


def _mamba():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()


@pytest.mark.parametrize(
    ("build", "once"),
    [
        (lambda: cases.build("llama"), True),
        (lambda: cases.build("gpt2"), True),
        (_sliding, True),
        (lambda: cases.build("t5"), False),
        (_mamba, False),
        (_static, False),
    ],
    ids=["llama", "gpt2", "sliding", "t5", "mamba", "static"],
)
def test_several_answers_to_a_prompt_are_those_of_the_prompt_repeated(build, once, tmp_path):
    """Where the model's cache allows, it reads the prompt once."""
    model, tokenizer = build(), wide_tokenizer(tmp_path)
    asked, fed = Answerer(model, tokenizer), []
    asked.ends, model.generation_config.eos_token_id = (), None
    prompts, counts = ["abcdefgh", "xy", "a longer prompt"], [2, 1, 3]
    draw = [DrawRows(lambda ids, scores: scores, counts, (1, 2, 3)) for _ in range(2)]
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: fed.append(args[0].numel()))
    repeated = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
    wanted = asked.texts(repeated, 6, logits_processor=draw[:1])
    read = fed[0] if once else 0
    fed.clear()
    assert asked.texts(prompts, 6, counts=counts, logits_processor=draw[1:]) == wanted and len(set(wanted)) > 3
    if once:
        assert sum(fed) < read + 6 * 6 and fed[0] == read // 2 - 3  # six rows of three prompts, without the last token
    assert asked.texts(["a", "bcd"], 2, counts=[1, 2]) == asked.texts(["a", "bcd", "bcd"], 2)  # one token alone


def test_a_chats_samples_are_its_own(tmp_path):
    """One cache for both: what was sampled as a conversation is not what the plain prompt gets."""
    model, tokenizer = cases.build("llama"), wide_tokenizer(tmp_path / "tokenizer")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    own = answer_prompting("own", count=0, samples=2, template=Template(question="{input}:", samples="={answers}="))

    def sampled(folder, chat):
        mix = PromptEnsemble(model, tokenizer, [own], form=PromptFormat(chat=chat))
        mix.sampler.keep(TextCache(tmp_path / folder), "model")
        mix.answer_by("own", "abc", max_new_tokens=5)
        return list(mix.sampler.kept.values())

    alone = sampled("one", chat=True)
    assert sampled("both", chat=False) != alone and sampled("both", chat=True) == alone
