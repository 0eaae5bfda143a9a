"""What papers claim of their methods, against what the answers here show."""

from __future__ import annotations

from dataclasses import dataclass

from bench.quality.real_scores import BEST, ORACLE, Scores

OWN, QUERY = "glider (zero-shot)", "glider (no writer)"
HELD_IN, HELD_OUT = "train", "heldout"


@dataclass(frozen=True)
class Claim:
    """`better` is at least as good as `worse` on a part's tasks; strict: it is better, else it comes close."""

    paper: str
    text: str
    better: str
    worse: str
    part: str
    strict: bool = True


PHATGOOSE, GLIDER = "PHATGOOSE, 2402.05859", "GLIDER, 2410.07172"
BENCHMARK, ZOOTER = "Benchmark routing, 2309.15789", "Zooter, 2311.08692"
TOKEN_LEVEL, LORAHUB = "Token-level adaptation, 2311.10847", "LoraHub, 2307.13269"
CLAIMS = (
    Claim(PHATGOOSE, "surpasses Retrieval on held-out tasks (4.3)", "phatgoose", "retrieval", HELD_OUT),
    Claim(PHATGOOSE, "surpasses Arrow, k = 2, on held-out tasks (4.3)", "phatgoose", "arrow_phatgoose", HELD_OUT),
    Claim(PHATGOOSE, "surpasses Average Activation: gate training is essential (4.3)", "phatgoose",
          "average_activation", HELD_OUT),
    Claim(PHATGOOSE, "surpasses merged experts on held-out tasks (4.3)", "phatgoose", "merged", HELD_OUT),
    Claim(PHATGOOSE, "surpasses averaged parameters on held-out tasks (4.3)", "phatgoose", "merged_factors", HELD_OUT),
    Claim(PHATGOOSE, "almost matches Oracle on held-out tasks (4.3)", "phatgoose", ORACLE, HELD_OUT, strict=False),
    Claim(PHATGOOSE, "surpasses the best individual expert (Table 1)", "phatgoose", BEST, HELD_OUT),
    Claim(PHATGOOSE, "Average Activation surpasses Retrieval: composing helps (4.3)", "average_activation",
          "retrieval", HELD_OUT),
    Claim(GLIDER, "surpasses PHATGOOSE on held-in tasks (5.3)", OWN, "phatgoose", HELD_IN),
    Claim(GLIDER, "the same, from the query itself", QUERY, "phatgoose", HELD_IN),
    Claim(GLIDER, "almost matches the Oracle expert on held-in tasks (5.3)", OWN, ORACLE, HELD_IN, strict=False),
    Claim(GLIDER, "best of all on held-out tasks (5.3): not below PHATGOOSE", OWN, "phatgoose", HELD_OUT,
          strict=False),
    Claim(GLIDER, "the same: surpasses Retrieval", OWN, "retrieval", HELD_OUT),
    Claim(GLIDER, "PHATGOOSE surpasses merging on held-in tasks (Table 1)", "phatgoose", "merged", HELD_IN),
    Claim(GLIDER, "Arrow is far below PHATGOOSE on held-in tasks (Table 1)", "phatgoose", "arrow", HELD_IN),
    Claim(GLIDER, "k = 2 is no worse than k = 3 on held-out tasks (Table 3)", "phatgoose", "phatgoose/top_k=3",
          HELD_OUT, strict=False),
    Claim(BENCHMARK, "surpasses any single model for all tasks, on new tasks (abstract)", "benchmark_routing", BEST,
          HELD_OUT),
    Claim(ZOOTER, "surpasses the best single model on average (abstract); here held-in", "zooter", BEST, HELD_IN),
    Claim(ZOOTER, "the same on held-out tasks", "zooter", BEST, HELD_OUT),
    Claim(TOKEN_LEVEL, "surpasses the base on tasks that have an expert (abstract)", "token_level", "base", HELD_IN),
    Claim(TOKEN_LEVEL, "its average there surpasses every single expert's (abstract)", "token_level", BEST, HELD_IN),
    Claim(LORAHUB, "mimics solved examples in the prompt, on new tasks (abstract, version 1)", "lorahub",
          "base/few-shot", HELD_OUT, strict=False),
)  # fmt: skip
CLOSE = 5.0  # points below that still count as coming close


def verdict(claim: Claim, scores: Scores) -> str | None:
    """In words, with the paired difference; None when a row is missing."""
    if claim.better not in scores.known or claim.worse not in scores.known:
        return None
    value, low, high = scores.difference(claim.better, claim.worse, scores.results.part(claim.part))
    if claim.strict:
        word = "yes" if low > 0 else "no, the reverse" if high < 0 else "not told apart"
    else:
        word = "yes" if low > -CLOSE else "no" if high < -CLOSE else "not told apart"
    return f"{word}: {value:+.1f} ({low:+.1f} to {high:+.1f})"


def judged(claim: Claim, scores: Scores, more: Scores | None) -> str:
    """By more items of the held-out tasks where both rows answered them, else by `scores`."""
    if claim.part == HELD_OUT and more is not None and (seen := verdict(claim, more)):
        return f"{seen}, {items(more)} items a task"
    return verdict(claim, scores) or "not run"


def items(scores: Scores) -> str:
    """How many of every task: 24, or 100 to 192."""
    counts = sorted({len(task["targets"]) for task in scores.results.tasks.values()})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def table(scores: Scores, more: Scores | None = None) -> str:
    lines = ["| paper | claimed | seen here, points and 95 % interval |", "| --- | --- | --- |"]
    for claim in CLAIMS:
        lines.append(f"| {claim.paper} | {claim.text} | {judged(claim, scores, more)} |")
    return "\n".join(lines) + (
        f'\n\n"yes" asks for an interval above zero, or, where the claim is to come close, above {-CLOSE:.0f} points.'
    )
