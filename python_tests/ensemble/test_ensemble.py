"""PELMo: mixed decoding, its prompts put to the model, and the router's weights."""

from __future__ import annotations

import builders
import patch_cases as cases
import pytest
import torch
from query_cases import wide_tokenizer

import moerge_ext as moerge
from moerge_ext.ensemble.mixture import PromptEnsemble
from moerge_ext.ensemble.prompts import Template, answer_prompting, few_shot
from moerge_ext.ensemble.router import PromptRouter, note_of, select
from moerge_ext.models.prompt import PromptFormat

ROWS = [{"input": f"q{i}", "target": f"a{i}"} for i in range(20)]
SHORT = Template(question="{input}:", answer="{target}.")


def test_selection_is_top_k_of_the_softmax_renormalized():
    ids, weights = select(torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]), 2)
    assert ids.tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.625, 0.375], [0.5, 0.5]]))
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and the number of experts, 3; got {k}"):
            select(torch.ones(1, 3) / 3, k)


def ensemble(family, folder, **options):
    model = cases.build(family)
    experts = [few_shot(name, count=0, template=Template(question=name + "{input}")) for name in ("x ", "why ", "z: ")]
    return PromptEnsemble(model, wide_tokenizer(folder), experts, **options)


def by_hand(mix: PromptEnsemble, question, ids, weights, steps):
    """Greedy tokens without cache or batch."""
    model, prompts = mix.asked.model, [mix.experts[e].prompt(question) for e in ids]
    starts, chosen = [torch.tensor([mix.asked.prompt_ids(p)]) for p in prompts], []
    for _ in range(steps):
        mean = 0
        for weight, start in zip(weights, starts, strict=True):
            if mix.asked.seq2seq:
                decoder = torch.tensor([[model.config.decoder_start_token_id, *chosen]])
                logits = cases.logits(model, input_ids=start, decoder_input_ids=decoder)
            else:
                logits = cases.logits(model, input_ids=torch.cat([start, torch.tensor([chosen], dtype=torch.long)], 1))
            mean = mean + weight * logits[0, -1].double().softmax(-1)
        chosen.append(int(mean.argmax()))
        if chosen[-1] in mix.asked.ends:
            break
    return mix.asked.tokenizer.decode(chosen, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_mixture_is_the_weighted_mean_at_every_step(family, tmp_path):
    mix = ensemble(family, tmp_path)
    questions = ["abc", "hello there", "q"]
    ids, weights = torch.tensor([[0, 2], [1, 0], [2, 1]]), torch.tensor([[0.7, 0.3], [0.5, 0.5], [1.0, 0.0]])
    got = mix.answer(questions, select=(ids, weights), max_new_tokens=8)
    want = [by_hand(mix, q, i, w, 8) for q, i, w in zip(questions, ids.tolist(), weights.tolist(), strict=True)]
    assert got == want and any(want)
    assert mix.answer_by("why ", questions, max_new_tokens=8) == [by_hand(mix, q, [1], [1.0], 8) for q in questions]


def test_sampling_keeps_the_rows_together(tmp_path):
    mix = ensemble("llama", tmp_path)
    select = (torch.tensor([[0, 1, 2]] * 2), torch.ones(2, 3) / 3)
    options = {"select": select, "max_new_tokens": 12, "sample": True, "temperature": 1.5}
    rows = []
    real = mix.asked.generate
    mix.asked.generate = lambda *a, **o: rows.append(real(*a, **o)) or rows[-1]
    first, again = mix.answer(["abc", "de"], seed=3, **options), mix.answer(["abc", "de"], seed=3, **options)
    assert first == again != mix.answer(["abc", "de"], seed=4, **options)
    assert all(texts[:2] == texts[2:4] == texts[4:] for texts in rows)
    cold = {**options, "temperature": 1e-4}
    assert mix.answer(["abc", "de"], **cold) == mix.answer(["abc", "de"], select=select, max_new_tokens=12)
    assert mix.answer(["abc", "de"], **{**options, "top_k_tokens": 1}) == mix.answer(["abc", "de"], **cold)


def test_stopping_and_streaming(tmp_path):
    from transformers import TextStreamer

    mix = ensemble("llama", tmp_path)
    select = (torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    whole = mix.answer("abc", select=select, max_new_tokens=12)[0]
    letter = next(c for c in whole[1:] if c not in whole[0] + " ")
    assert mix.answer("abc", select=select, max_new_tokens=12, stop=[letter])[0] == whole[: whole.index(letter)].strip()
    pieces = []

    class Spy(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    streamer = Spy(mix.asked.tokenizer, skip_prompt=True, skip_special_tokens=True)
    assert mix.answer("abc", select=select, max_new_tokens=12, streamer=streamer)[0] == "".join(pieces).strip()


def test_lora_experts_share_a_batch(tmp_path):
    model = cases.build("llama")
    bank = cases.bank("llama", model, tmp_path / "experts")
    tokenizer, questions = wide_tokenizer(tmp_path), ["abc", "de"]
    plain = [few_shot(name, count=0, template=SHORT) for name in ("base", "one", "two")]
    want = {"base": PromptEnsemble(model, tokenizer, plain).answer_by("base", questions, max_new_tokens=6)}
    for name, lora in (("one", "ant"), ("two", "cat")):
        with moerge.patch(model, bank, f"expert:{lora}"):
            want[name] = PromptEnsemble(model, tokenizer, plain).answer_by("base", questions, max_new_tokens=6)
    experts = [plain[0], *(few_shot(n, count=0, template=SHORT, lora=e) for n, e in (("one", "ant"), ("two", "cat")))]
    with pytest.raises(ValueError, match=r"experts with a LoRA \(ant, cat\) need handle=patch"):
        PromptEnsemble(model, tokenizer, experts)
    with moerge.patch(model, bank, "given", top_k=1) as handle:
        mix = PromptEnsemble(model, tokenizer, experts, handle=handle)
        for name in want:
            assert mix.answer_by(name, questions, max_new_tokens=6) == want[name]
        one_hot = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        mixed = mix.answer(questions, select=(torch.tensor([[0, 1, 2]] * 2), one_hot), max_new_tokens=6)
        assert mixed == [want["one"][0], want["two"][1]]
        lost = [few_shot("a", count=0, lora="dog")]
        with pytest.raises(ValueError, match="no LoRA expert named dog; there are: ant, bee, cat"):
            PromptEnsemble(model, tokenizer, lost, handle=handle)


def test_answer_prompting_asks_the_model(tmp_path):
    model, tokenizer = cases.build("llama"), wide_tokenizer(tmp_path)
    mix = PromptEnsemble(model, tokenizer, [answer_prompting("own", count=0, samples=2, template=SHORT)])
    seen = []
    real = mix.asked.generate
    mix.asked.generate = lambda prompts, *a, **o: seen.append(prompts) or real(prompts, *a, **o)
    assert len(mix.answer_by("own", ["abc"], max_new_tokens=4)) == 1
    assert [p.text for p in seen[0]] == ["abc:"] and "Some answers" in seen[1][0].text


def test_ensembles_explain(tmp_path):
    mix = ensemble("llama", tmp_path)
    ids, weights = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]])
    for call, text in (
        (lambda: mix.answer([]), "no questions"),
        (lambda: mix.answer("abc"), "no router: pass one, or select="),
        (lambda: mix.answer("abc", select=(ids + 2, weights)), r"ids in 0 .. 2 and weights, both \[N=1, k\]"),
        (lambda: mix.answer(["a", "b"], select=(ids, weights)), r"got \[1, 2\] and \[1, 2\]"),
        (lambda: mix.answer("abc", select=(ids, -weights)), "not negative"),
        (lambda: mix.answer("abc", select=(ids, weights * 0)), "a positive one for every question"),
        (lambda: mix.answer("abc", select=(ids, weights), top_p=0.5), "are for sample=True"),
        (lambda: mix.answer("abc", select=(ids, weights), sample=True, top_p=1.5), "top_p <= 1 .* got 1.5 and None"),
        (lambda: mix.answer("abc", select=(ids, weights), sample=True, top_k_tokens=0), ">= 1, got None and 0"),
        (lambda: mix.answer("abc", select=(ids, weights), sample=True, temperature=0), "temperature"),
        (lambda: mix.answer("a" * 120, select=(ids, weights), max_new_tokens=9), "more than the context of 128"),
        (lambda: mix.answer(["a", "b"], streamer=object()), "a streamer follows one question, got 2"),
        (lambda: mix.answer_by("nobody", "abc"), "no prompt expert named 'nobody'"),
        (lambda: PromptEnsemble(mix.asked.model, None, []), "distinct names"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    router = PromptRouter(cases.build("bert"), wide_tokenizer(tmp_path), ("a", "b", "c"))
    with pytest.raises(ValueError, match="trained for the experts a, b, c, got x , why , z: "):
        ensemble("llama", tmp_path, router=router)
    with pytest.raises(ValueError, match="3 outputs, expected one per expert: 2"):
        PromptRouter(builders.tiny_bert(), None, ("a", "b"))


def test_demonstrations_are_turns_of_the_chat_template(tmp_path):
    tokenizer = wide_tokenizer(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}={{ m['content'] }}.{% endfor %}"
        "{% if add_generation_prompt %}a={% endif %}"
    )
    model, experts = cases.build("llama"), [few_shot("one", ROWS, count=2, template=SHORT)]
    shown = experts[0].facts["demonstrations"]
    form = PromptFormat(chat=True)
    mix = PromptEnsemble(model, tokenizer, experts, form=form)
    put = mix.put(experts[0].turns("new"))
    turns = "".join(f"u={row['input']}:.a={row['target']}.." for row in shown)
    assert put.text == turns + "u=new:.a=" and put.special
    assert PromptEnsemble(model, tokenizer, experts).put(experts[0].turns("new")).text == experts[0].prompt("new")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="this tokenizer has no chat template"):
        mix.answer_by("one", "abc", max_new_tokens=2)


def test_a_router_of_other_prompts_is_noticed(tmp_path, recwarn):
    model, tokenizer = cases.build("llama"), wide_tokenizer(tmp_path)
    experts = [few_shot(name, ROWS, count=2, template=SHORT) for name in ("a", "b", "c")]
    form = PromptFormat("Q {input}", chat=True)
    router = PromptRouter(cases.build("bert"), tokenizer, "abc", note=note_of(form, experts))
    PromptEnsemble(model, tokenizer, experts, router, form=form)
    assert not [w for w in recwarn.list if "router" in str(w.message)]
    changed = [*experts[:2], few_shot("c", ROWS, count=2, seed=1, template=SHORT)]
    with pytest.warns(UserWarning, match="the answers of other prompts of c$"):
        PromptEnsemble(model, tokenizer, changed, router, form=form)
    with pytest.warns(UserWarning, match=r"trained with --template 'Q {input}' --chat, and is asked with --template"):
        PromptEnsemble(model, tokenizer, experts, router)
    router.note = {"prompt": 3}
    with pytest.raises(ValueError, match="note of its training cannot be read"):
        PromptEnsemble(model, tokenizer, experts, router)
