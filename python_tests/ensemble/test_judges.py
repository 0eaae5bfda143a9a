"""When an answer is right: judges, among them a language model, several right answers, and the label matrix."""

from __future__ import annotations

import pytest
import torch
from query_cases import completion, fake_embedder, server

from moerge_ext import InstructionWriter
from moerge_ext.ensemble.judge import (
    choice,
    contains,
    exact,
    final_answer,
    is_right,
    judged,
    label_matrix,
    number,
    numeric,
)
from moerge_ext.ensemble.llm_judge import LLMJudge, VerdictError, parse_verdict
from moerge_ext.queries.cache import TextCache


def test_judges():
    assert exact("q", " a ", "a") and not exact("q", "a b", "a")
    assert (
        numeric("q", "so 3 + 4 = 1,007.", "#### 1007")
        and not numeric("q", "no idea", "7")
        and numeric("q", "-2", "-2.0")
    )
    for answer, value in (
        ("-$5.", -5),
        ("\u22125", -5),
        ("about .75", 0.75),
        ("pages 5-7", 7),
        ("10-3 = 7", 7),
        ("$1,200.50.", 1200.5),
        ("x=-3", -3),
        ("#### 72\n\nQuestion 3", 72),
        ("2 + 3 = 5 #### -5 apples", -5),
    ):
        assert number(answer) == value, answer
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


def test_the_fallback_takes_the_nearest_of_several_golds():
    right, golds = torch.zeros(1, 2, dtype=torch.bool), [("one thing", "red blue")]
    with pytest.warns(UserWarning):
        labels = label_matrix(right, [["red", "x"]], golds, "ab", embedder=fake_embedder(), theta=0.6)
    assert labels.tolist() == [[True, False]]


def test_several_right_answers():
    assert is_right(exact, "q", "NYC", ("New York", "NYC")) and not is_right(exact, "q", "Paris", ("New York", "NYC"))
    assert judged([exact, numeric], ["q", "r"], [["b"], ["so 4"]], [("a", "b"), "4"]).tolist() == [[True], [True]]
    with pytest.raises(ValueError, match="no gold answer to 'q'"):
        is_right(exact, "q", "x", ())


def test_words_in_an_answer():
    assert contains("q", "I think it is New York, of course.", "new york")
    assert not contains("q", "newyork", "new york") and not contains("q", "Yorkshire", "York")
    assert contains("q", "über-groß", "Über") and not contains("q", "", "a")
    assert not contains("q", "\u0926\u093f\u0932\u094d\u0932\u0940", "\u0926\u093e\u0932")  # Delhi, dal
    assert not contains("q", "1.5 km", "1") and not contains("q", "1,5", "5") and contains("q", "it is 5.", "5")
    assert contains("q", "cafe\u0301", "caf\u00e9")
    with pytest.raises(ValueError, match="needs a word in the gold answer, got '...'"):
        contains("q", "x", "...")


def test_letters_of_choices():
    for answer in ("C\nbecause", "C because", "**C**", "**C.** so", "I, for one, say (C)"):
        assert choice("q", answer, "C"), answer
    assert choice("q", "A, since", "A") and choice("q", "I", "I") and not choice("q", "A cat", "A")
    for answer in ("C", "(C) The retired guy", "c.", "C) the guy (B)", "The right one is (C), not (A)", "C: the guy"):
        assert choice("q", answer, "C"), answer
    for answer in ("", "B", "A man (C)"[:5], "(B) or (C)", "Can't say", "Cats", "the guy C"):
        assert not choice("q", answer, "C"), answer
    with pytest.raises(ValueError, match="needs a letter as gold answer, got 'yes'"):
        choice("q", "C", "yes")


def test_the_answer_after_the_reasoning():
    after = "The answer is"
    assert final_answer("As The answer is 3. No: The answer is 4.", after) == "4"
    assert final_answer("just 5.", after) == "just 5." == final_answer("just 5.", None)


# ---- a language model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("yes", True), ("No.", False), ("**Yes**", True), ("Verdict: no", False), ("Yes, it does. No doubt.", True),
        ("<think>no? no!</think>\nYes", True), ("The answer is yes.", True), ("YES\nbecause", True), ("`No`", False),
        ("", None), ("maybe", None), ("No idea", None), ("not sure", None), ("yesterday", None), ("nothing", None),
        ("It is right", None), ("<think>yes", None), (None, None), ("I would say yes", None),
    ],
)  # fmt: skip
def test_verdicts(said, verdict):
    if verdict is None:
        with pytest.raises(VerdictError, match="expected a verdict, yes or no, got"):
            parse_verdict(said)
    else:
        assert parse_verdict(said) is verdict


def test_a_model_judges_once_with_all_right_answers(tmp_path):
    prompts = []

    def generate(prompt):
        prompts.append(prompt)
        return "Yes" if "Proposed answer: NYC\n" in prompt else "no"

    judge = LLMJudge(InstructionWriter(generate, name="tiny", cache=TextCache(tmp_path)))
    questions, golds = ["where {golds}?", "where {golds}?"], [("New York", "NYC")] * 2
    matrix = judged(judge, questions, [["NYC", "Rome"], ["NYC", " "]], golds)
    assert matrix.tolist() == [[True, False], [True, False]]
    assert len(prompts) == 2, "an answer was judged twice, or an empty one asked about"
    assert "Right answer: New York | NYC\n" in prompts[0] and "Question: where {golds}?\n" in prompts[0]
    assert judge("where {golds}?", "NYC", "New York") and len(prompts) == 3
    with pytest.raises(ValueError, match="must hold {golds}, {answer}"):
        LLMJudge(judge.model, "{question}")


def test_what_is_no_verdict_is_refused_and_not_kept(tmp_path):
    with server(completion("I cannot say"), completion("Maybe"), completion("no")) as (url, seen):
        model = InstructionWriter.from_endpoint(url, "gpt", attempts=2, backoff=0.01, cache=TextCache(tmp_path))
        judge = LLMJudge(model)
        with pytest.raises(
            VerdictError, match=r"got 'Maybe'.*\(2 attempts\); it was asked about the answer '4' to 'q'"
        ):
            judge("q", "4", "5")
        assert judge("q", "4", "5") is False and judge("q", "4", "5") is False
    assert len(seen) == 3 and seen[0]["temperature"] == 0
    with server((401, b"who are you")) as (url, _), pytest.raises(ConnectionError, match="answered 401: who are you"):
        LLMJudge(InstructionWriter.from_endpoint(url, "gpt", cache=TextCache(tmp_path))).check()
