"""What papers claim of their methods, against what the answers here show, and what of it was not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.quality import real_nearness, real_weights
from bench.quality.real_answers import items
from bench.quality.real_scores import BEST, ORACLE, Scores
from bench.quality.real_verdicts import ABOVE, BELOW, CLOSE, margin, verdict

OWN, QUERY, WRITTEN = "glider (zero-shot)", "glider (no writer)", "glider (zero-shot)/written"
HELD_IN, HELD_OUT = "train", "heldout"
ALPHA = "glider/gamma=0/beta={} (zero-shot)"
TOP_K, TOP_P = "glider/top_k={} (zero-shot)", "glider/top_k=none/top_p={} (zero-shot)"
OTHERS = "others"  # in place of a row: the best of all others that were asked


@dataclass(frozen=True)
class Claim:
    """`better` is above `worse` on a part's tasks (strict), else it comes close; pool: experts, else the main pool."""

    paper: str
    text: str
    better: str
    worse: str
    part: str
    strict: bool = True
    pool: int | None = None


PHATGOOSE, GLIDER = "PHATGOOSE", "GLIDER"
BENCHMARK, ZOOTER = "Benchmark routing", "Zooter"
TOKEN_LEVEL, LORAHUB = "Token-level adaptation", "LoraHub"
CLAIMS = (
    Claim(PHATGOOSE, "surpasses Retrieval on held-out tasks (4.3)", "phatgoose", "retrieval", HELD_OUT),
    Claim(PHATGOOSE, "surpasses Arrow, k = 2, on held-out tasks (4.3)", "phatgoose", "arrow_phatgoose", HELD_OUT),
    Claim(PHATGOOSE, "surpasses Average Activation: gate training is essential (4.3)", "phatgoose",
          "average_activation", HELD_OUT),
    Claim(PHATGOOSE, "surpasses merged experts on T0HO and BBL, not on BBH (4.3)", "phatgoose", "merged", HELD_OUT),
    Claim(PHATGOOSE, "the same, with a pool of 4 experts", "phatgoose", "merged", HELD_OUT, pool=4),
    Claim(PHATGOOSE, "surpasses averaged parameters on held-out tasks (Tables 3 to 7)", "phatgoose", "merged_factors",
          HELD_OUT),
    Claim(PHATGOOSE, "matches or surpasses Multitask on held-out tasks (4.3)", "phatgoose", "multitask", HELD_OUT,
          strict=False),
    Claim(PHATGOOSE, "almost matches Oracle on T0HO (4.3)", "phatgoose", ORACLE, HELD_OUT, strict=False),
    Claim(PHATGOOSE, "surpasses the best individual expert (Table 1: in three of five columns)", "phatgoose", BEST,
          HELD_OUT),
    Claim(PHATGOOSE, "Average Activation surpasses Retrieval: composing helps (4.3)", "average_activation",
          "retrieval", HELD_OUT),
    Claim(GLIDER, "surpasses PHATGOOSE on held-in tasks (5.3)", OWN, "phatgoose", HELD_IN),
    Claim(GLIDER, "the same from the query itself, which is not the paper's", QUERY, "phatgoose", HELD_IN),
    Claim(GLIDER, "the same with a writer, here the base, without solved examples", WRITTEN, "phatgoose", HELD_IN),
    Claim(GLIDER, "surpasses LoraHub on held-in tasks (5.3)", OWN, "lorahub", HELD_IN),
    Claim(GLIDER, "surpasses Multitask on held-in tasks (5.3)", OWN, "multitask", HELD_IN),
    Claim(GLIDER, "almost matches the Oracle expert on held-in tasks (5.3)", OWN, ORACLE, HELD_IN, strict=False),
    Claim(GLIDER, "best of all on T0-HO and BBL (5.3)", OWN, OTHERS, HELD_OUT),
    Claim(GLIDER, "surpasses PHATGOOSE there (Table 1)", OWN, "phatgoose", HELD_OUT),
    Claim(GLIDER, "surpasses merging there (5.3)", OWN, "merged", HELD_OUT),
    Claim(GLIDER, "PHATGOOSE surpasses merging on held-in tasks (Table 1)", "phatgoose", "merged", HELD_IN),
    Claim(GLIDER, "Arrow, k = 2, is below PHATGOOSE on held-in tasks (Table 1)", "phatgoose", "arrow_phatgoose",
          HELD_IN),
    Claim(GLIDER, "alpha = 100 surpasses alpha = 3 on held-in tasks (Table 2)", ALPHA.format(100), ALPHA.format(3),
          HELD_IN),
    Claim(GLIDER, "alpha = 3 surpasses alpha = 100 on held-out tasks (Table 2)", ALPHA.format(3), ALPHA.format(100),
          HELD_OUT),
    Claim(GLIDER, "k = 2 surpasses k = 1 on held-out tasks (Table 3)", OWN, TOP_K.format(1), HELD_OUT),
    Claim(GLIDER, "k = 2 comes close to k = 3 on held-out tasks (Table 3)", OWN, TOP_K.format(3), HELD_OUT,
          strict=False),
    Claim(GLIDER, "top-p = 75 % surpasses 25 % on held-out tasks (Table 3)", TOP_P.format(0.75), TOP_P.format(0.25),
          HELD_OUT),
    Claim(BENCHMARK, "surpasses any single model for all tasks, on new tasks (abstract)", "benchmark_routing", BEST,
          HELD_OUT),
    Claim(ZOOTER, "surpasses the best single model on average (abstract); here held-in", "zooter", BEST, HELD_IN),
    Claim(ZOOTER, "the same on held-out tasks", "zooter", BEST, HELD_OUT),
    Claim(TOKEN_LEVEL, "surpasses the base on tasks that have an expert (abstract)", "token_level", "base", HELD_IN),
    Claim(TOKEN_LEVEL, "its average there surpasses every single expert's (abstract)", "token_level", BEST, HELD_IN),
    Claim(LORAHUB, "mimics solved examples in the prompt, on new tasks (abstract, version 1)", "lorahub",
          "base/few-shot", HELD_OUT, strict=False),
)  # fmt: skip
NOT_RUN = (
    (PHATGOOSE, "joint training of gate and module is worse (appendix A)", "needs every expert trained a second time"),
    (PHATGOOSE, "166 experts instead of 36: better at reasoning, worse at knowledge (4.3)",
     "there are 28 experts, and no held-out tasks of these two kinds"),
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """The answers there are: of the main pool, more items of its held-out tasks, and pools by size."""

    scores: Scores
    more: Scores | None = None
    pools: Mapping[int, Scores] | None = None

    def of(self, claim: Claim) -> Scores | None:
        """Those that know both rows, with more items where there are; None when a row was not asked."""
        rows = {claim.better, claim.worse} - {OTHERS}
        if claim.pool is not None:
            found = [(self.pools or {}).get(claim.pool)]
        else:
            found = [self.more if claim.part == HELD_OUT else None, self.scores]
        return next((scores for scores in found if scores is not None and rows <= scores.known), None)


def line(claim: Claim, asked: Asked) -> str:
    scores = asked.of(claim)
    if scores is None:
        return f"| {claim.paper} | {claim.text} | not run | | |"
    names, worse, text = scores.results.part(claim.part), claim.worse, claim.text
    if worse == OTHERS:
        worse = scores.best([row for row in scores.rows if row != claim.better], names)
        text += f"; here against the best other row, `{worse}`"
    found = verdict(scores.differences(claim.better, worse, names), None if claim.strict else scores)
    words = {ABOVE: "yes", BELOW: ("below" if found.other else "no, the reverse") if claim.strict else "no"}
    word = words.get(found.word, found.word)
    fragile = " (fragile)" if found.other and found.word in words else ""
    asked_of = f"{len(names)}, {items(scores.results, names)}"
    return f"| {claim.paper} | {text} | {word}{fragile}: {found.points} | {asked_of} | {found.rests_on} |"


def table(asked: Asked) -> str:
    lines = [
        "| paper | claimed | seen here: points and 95 % interval | tasks, items of each | one task that decides |",
        "| --- | --- | --- | ---: | --- |",
        *(line(claim, asked) for claim in CLAIMS),
        *real_nearness.claims(asked.scores),
        real_weights.claim(asked.scores.results),
        *(f"| {paper} | {text} | not run | | {why} |" for paper, text, why in NOT_RUN),
    ]
    parts = {"held in": asked.scores, "held out": asked.more or asked.scores}
    names = {"held in": parts["held in"].results.part(HELD_IN), "held out": parts["held out"].results.part(HELD_OUT)}
    margins = " and ".join(f"{margin(scores, names[part]):.1f} {part}" for part, scores in parts.items() if names[part])
    told = " and ".join(f"{len(s.telling(names[p]))} of {len(names[p])}" for p, s in parts.items() if names[p])
    return "\n".join(lines) + (
        '\n\n"yes" asks for an interval above zero, or, where the claim is to come close, above minus '
        f"{margins}: {CLOSE:.0f} points on the tasks that tell some row from chance ({told}). Every claim was judged "
        'again with each task left out in turn; "fragile" is what one of them decides.'
    )
