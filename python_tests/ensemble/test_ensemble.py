"""PELMo: prompts, judges, labels, the router's weights, and mixed decoding."""

from __future__ import annotations

import json

import builders
import patch_cases as cases
import pytest
import torch
from query_cases import fake_embedder, wide_tokenizer

import moerge_ext as moerge
from moerge_ext.ensemble.config import nearest_passages, read_experts
from moerge_ext.ensemble.judge import exact, judged, label_matrix, numeric
from moerge_ext.ensemble.mixture import PromptEnsemble
from moerge_ext.ensemble.prompts import Template, answer_prompting, chain_of_thought, few_shot, retrieval_augmented
from moerge_ext.ensemble.router import PromptRouter, select

ROWS = [{"input": f"q{i}", "target": f"a{i}", "rationale": f"because {i}."} for i in range(20)]
SHORT = Template(question="{input}:", answer="{target}.")


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_the_four_strategies():
    plain = few_shot("plain", ROWS).prompt("new")
    assert plain.count("Question:") == 17 and plain.endswith("Question: q15\nAnswer: a15\n\nQuestion: new\nAnswer:")
    thought = chain_of_thought("cot", ROWS, count=1).prompt("new")
    assert thought == "Question: q0\nAnswer: because 0. The answer is a0.\n\nQuestion: new\nAnswer:"
    found = retrieval_augmented("rag", lambda q: [f"{q} {i}" for i in range(12)], ROWS, count=1).prompt("new")
    assert found.count("Passage: ") == 10 and found.endswith("Passage: new 9\nQuestion: new\nAnswer:")
    asked = []
    own = answer_prompting("own", ROWS, count=1, samples=3)
    text = own.prompt("new", lambda prompt, n: asked.append((prompt, n)) or ["x ", "y", "x"])
    assert asked == [(few_shot("p", ROWS, count=1).prompt("new"), 3)]
    assert text.endswith("a0\n\nSome answers, not all of them right: x; y; x\nQuestion: new\nAnswer:")
    assert few_shot("bare", count=0, template=SHORT).prompt("new") == "new:"


def test_prompts_explain_what_is_missing():
    for make, text in (
        (lambda: few_shot("a", ROWS[:3]), "expected 16 demonstrations, got 3; pass count=3"),
        (lambda: few_shot("a", ROWS, count=-1), "count must not be negative"),
        (lambda: chain_of_thought("a", [{"input": "", "target": ""}], count=1), "demonstration 0 .* has no rationale"),
        (lambda: few_shot("a", count=0).prompt(" "), "empty question"),
        (lambda: answer_prompting("a", count=0).prompt("q"), "needs the model's own answers"),
        (lambda: retrieval_augmented("a", lambda q: [], count=0).prompt("q"), "the retriever returned no passage"),
    ):
        with pytest.raises(ValueError, match=text):
            make()


def test_experts_from_a_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "texts.txt").write_text("flying bees\n\ndigging ants\n")
    entries = [
        {"name": "plain", "demonstrations": "rows.jsonl", "template": {"question": "{input}?"}},
        {"name": "cot", "kind": "chain-of-thought", "demonstrations": "rows.jsonl", "count": 2},
        {"name": "rag", "kind": "retrieval", "passages": "texts.txt", "passage_count": 1},
        {"name": "own", "kind": "answer-prompting"},
        {"name": "tuned", "lora": "adapters/sql"},
    ]
    (tmp_path / "experts.json").write_text(json.dumps(entries))
    experts, loras = read_experts(tmp_path / "experts.json", fake_embedder)
    assert [e.name for e in experts] == ["plain", "cot", "rag", "own", "tuned"] and experts[-1].lora == "sql"
    assert loras == {"sql": tmp_path / "adapters" / "sql"}
    assert experts[0].prompt("new").count("?") == 17 and "Passage: digging ants\nQ" in experts[2].prompt("digging")
    bad = [
        {"name": "a", "kind": "x"},
        {"name": "b", "oops": 1},
        {"name": "c", "template": {"x": ""}},
    ]
    (tmp_path / "experts.json").write_text(json.dumps([*bad, {"name": "d", "kind": "retrieval"}]))
    with pytest.raises(ValueError) as caught:
        read_experts(tmp_path / "experts.json", fake_embedder)
    for text in ("kind must be one of", "unknown key(s) oops", "template takes", '"passages"'):
        assert text in str(caught.value)
    for content, text in (
        ('[{"name": "a"}, {"kind": "few-shot"}]', r'expected a "name" for every expert; number 1 \(from 0\) has none'),
        ("{oops", "is not JSON"),
        ('{"name": "a"}', "must hold a list of objects"),
        ('[{"name": "a", "kind": "retrieval", "passages": "nosuch.txt"}]', "there is no file .*nosuch.txt"),
    ):
        (tmp_path / "experts.json").write_text(content)
        with pytest.raises(ValueError, match=text):
            read_experts(tmp_path / "experts.json", fake_embedder)
    with pytest.raises(ValueError, match="there is no file .*nosuch.json: expected a list of prompt experts"):
        read_experts(tmp_path / "nosuch.json", fake_embedder)
    with pytest.raises(ValueError, match="no passages"):
        nearest_passages(fake_embedder(), [])


# ---- judges and labels -----------------------------------------------------------------------------------------------


def test_judges():
    assert exact("q", " a ", "a") and not exact("q", "a b", "a")
    assert (
        numeric("q", "so 3 + 4 = 1,007.", "#### 1007")
        and not numeric("q", "no idea", "7")
        and numeric("q", "-2", "-2.0")
    )
    with pytest.raises(ValueError, match="needs a number in the gold answer"):
        numeric("q", "7", "seven")
    matrix = judged(exact, ["q", "r"], [["a", "b"], ["c", "c"]], ["a", "c"])
    assert matrix.tolist() == [[True, False], [True, True]]
    with pytest.raises(ValueError, match=r"answers per question \[1, 2\]"):
        judged(exact, ["q", "r"], [["a", "b"], ["c"]], ["a", "c"])
    with pytest.raises(ValueError, match="must answer True or False, got 'yes'"):
        judged(lambda *_: "yes", ["q"], [["a"]], ["a"])


def test_fallback_is_for_rows_where_nobody_is_right_and_only_those():
    right = torch.tensor([[True, False, False], [False] * 3, [False] * 3])
    answers = [["gold", "gold gold", "x"], ["red", "red blue", "x"], ["x", "", "gold x y z"]]
    golds = ["gold", "red green", "gold"]
    with pytest.warns(UserWarning, match="never right on these questions: two, three"):
        labels = label_matrix(right, answers, golds, ("one", "two", "three"), embedder=fake_embedder(), theta=0.49)
    assert labels.tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    assert right.sum() == 1
    for options, text in (({}, "in 2 of 3 questions .* pass an embedder and theta"), ({"theta": 2.0}, r"in \[-1, 1\]")):
        with pytest.raises(ValueError, match=text), pytest.warns(UserWarning):
            label_matrix(right, answers, golds, "abc", embedder=fake_embedder() if options else None, **options)
    full = torch.ones(3, 3, dtype=torch.bool)
    assert label_matrix(full, answers, golds, "abc").equal(full)
    with pytest.raises(ValueError, match=r"labels must be \[M=3, N=2\], got \[3, 3\]"):
        label_matrix(full, answers, golds, "ab")


def test_selection_is_top_k_of_the_softmax_renormalized():
    ids, weights = select(torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]), 2)
    assert ids.tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.625, 0.375], [0.5, 0.5]]))
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and the number of experts, 3; got {k}"):
            select(torch.ones(1, 3) / 3, k)


# ---- mixed decoding --------------------------------------------------------------------------------------------------


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
    assert seen[0] == ["abc:"] and "Some answers" in seen[1][0]


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
