"""COLLECTIONS: which tasks of the hub make up the sets that the papers train and evaluate on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from . import layouts
from .layouts import Layout

P3, FLAN, BIGBENCH, BBH = "bigscience/P3", "Muennighoff/flan", "tasksource/bigbench", "SaylorTwift/bbh"
NOT_TOKENIZED = "left out by PHATGOOSE (appendix B) and GLIDER, as T5's tokenizer cannot read them; they can be named"


@dataclass(frozen=True)
class Source:
    """Where a task lies: a repository, a pattern of its configurations (or, with `files`, of its files), their layout.

    test: the first of these splits that is there makes test.jsonl ("a+b": both), if none is, it is cut from train's;
    train: whether the split "train" makes train.jsonl. metric: where not every row has choices, else it is "rank";
    ranked: rows without choices are left out.
    """

    path: str
    pattern: str
    layout: Layout
    test: tuple[str, ...] = ("validation", "test")  # published test splits often have no answers
    train: bool = True
    metric: str = "exact_match"
    ranked: bool = False
    files: bool = False


@dataclass(frozen=True)
class Collection:
    """tasks: {name: Source}; part: "train" for tasks that experts are made for, "heldout"; optional: tasks that are
    taken only when they are named, and why.
    """

    summary: str
    part: str
    tasks: Mapping[str, Source]
    optional: Mapping[str, Source] = field(default_factory=dict)
    why: str = ""


# the 36 data sets of T0's training, by the beginnings of their configurations in P3, of which there is one per prompt
_T0 = {
    "adversarial_qa": "adversarial_qa_", "ag_news": "ag_news_", "amazon_polarity": "amazon_polarity_",
    "app_reviews": "app_reviews_", "cnn_dailymail": "cnn_dailymail_3.0.0_", "common_gen": "common_gen_",
    "commonsense_qa": "commonsense_qa_", "cos_e": "cos_e_v1.11_", "cosmos_qa": "cosmos_qa_",
    "dbpedia_14": "dbpedia_14_", "dream": "dream_", "duorc": "duorc_", "gigaword": "gigaword_",
    "hotpot_qa": "kilt_tasks_hotpotqa_", "imdb": "imdb_", "mrpc": "glue_mrpc_", "multi_news": "multi_news_",
    "paws": "paws_labeled_final_", "qasc": "qasc_",
    "qqp": "glue_qqp_", "quail": "quail_", "quarel": "quarel_", "quartz": "quartz_", "quoref": "quoref_",
    "ropes": "ropes_", "rotten_tomatoes": "rotten_tomatoes_", "samsum": "samsum_", "sciq": "sciq_",
    "social_i_qa": "social_i_qa_", "trec": "trec_", "wiki_bio": "wiki_bio_", "wiki_hop": "wiki_hop_original_",
    "wiki_qa": "wiki_qa_", "wiqa": "wiqa_", "xsum": "xsum_", "yelp": "yelp_review_full_",
}  # fmt: skip
_WRITTEN = ("cnn_dailymail", "common_gen", "gigaword", "multi_news", "samsum", "wiki_bio", "xsum")  # scored by ROUGE
_T0_HELD_OUT = {
    "rte": "super_glue_rte_*", "hellaswag": "hellaswag_*", "copa": "super_glue_copa_*", "wic": "super_glue_wic_*",
    "winogrande": "winogrande_winogrande_xl_*", "cb": "super_glue_cb_*", "story_cloze": "story_cloze_2016_*",
    "anli_r1": "anli_*_r1", "anli_r2": "anli_*_r2", "anli_r3": "anli_*_r3", "wsc": "super_glue_wsc.fixed_*",
}  # fmt: skip
_BBH = (
    "causal_judgment date_understanding disambiguation_qa formal_fallacies_syllogisms_negation geometric_shapes "
    "hyperbaton logical_deduction movie_recommendation navigate object_counting penguins_in_a_table "
    "reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks sports_understanding "
    "temporal_sequences tracking_shuffled_objects word_sorting"
)
_BBH_ONLY = "boolean_expressions multistep_arithmetic_two web_of_lies"  # which BIG-bench has not in this form
_BBL = (
    "bbq_lite_json conceptual_combinations conlang_translation formal_fallacies_syllogisms_negation hindu_knowledge "
    "known_unknowns linguistics_puzzles logic_grid_puzzle logical_deduction novel_concepts operators "
    "play_dialog_same_or_different repeat_copy_logic strange_stories strategyqa vitaminc_fact_verification winowhy"
)
_BBL_MORE = (
    "auto_debugging code_line_description emoji_movie language_identification misconceptions_russian "
    "parsinlu_reading_comprehension symbol_interpretation"
)
# of the FLAN pool's 166 those of FLAN 2021 (36 are T0's, the rest Natural Instructions by category, dialogs, others)
_FLAN = (
    "arc_easy arc_challenge math_dataset bool_q coqa definite_pronoun_resolution drop fix_punct dart e2e_nlg "
    "web_nlg_en wiki_lingua_english_en sst2 cola mnli_matched qnli stsb wnli natural_questions openbookqa "
    "opinion_abstracts_idebate opinion_abstracts_rotten_tomatoes para_crawl_enes piqa quac sentiment140 snli "
    "squad_v1 multirc record trivia_qa true_case word_segment"
)


def _bigbench(names: str) -> dict[str, Source]:
    every = ("train+validation", "default", "validation", "train")  # all of BIG-bench's examples
    return {name: Source(BIGBENCH, name, layouts.bigbench, every, train=False) for name in names.split()}


COLLECTIONS: dict[str, Collection] = {
    "t0": Collection(
        "the 36 data sets of T0 that PHATGOOSE and GLIDER train an expert on each (T0 Held-In), all prompts pooled",
        "train",
        {
            name: Source(P3, f"{start}*", layouts.p3, metric="rougeL" if name in _WRITTEN else "exact_match")
            for name, start in _T0.items()
        },
    ),
    "t0_heldout": Collection(
        "the 11 data sets of T0's evaluation (T0HO), the prompts that have choices",
        "heldout",
        {name: Source(P3, pattern, layouts.p3, ranked=True) for name, pattern in _T0_HELD_OUT.items()},
    ),
    "flan": Collection(
        "33 of the 36 data sets of FLAN 2021 in the FLAN pool, zero-shot prompts",
        "train",
        {
            name: Source(FLAN, f"{{split}}/{name}_10templates*", layouts.flan, metric="rougeL", files=True)
            for name in _FLAN.split()
        },
    ),
    "bbh": Collection(
        "the 22 tasks of BIG-bench Hard that the papers evaluate on",
        "heldout",
        _bigbench(_BBH) | {name: Source(BBH, name, layouts.bbh, ("test",), train=False) for name in _BBH_ONLY.split()},
        optional=_bigbench("dyck_languages"),
        why=NOT_TOKENIZED,
    ),
    "bbl": Collection(
        "the 17 tasks of BIG-bench Lite that the papers evaluate on",
        "heldout",
        _bigbench(_BBL),
        optional=_bigbench(_BBL_MORE),
        why=NOT_TOKENIZED,
    ),
    "pelmo": Collection(
        "PELMo's four question sets: NQ, HotpotQA, CommonsenseQA, GSM8K",
        "train",
        {
            "nq": Source("google-research-datasets/nq_open", "nq_open", layouts.nq_open),
            "hotpotqa": Source("hotpotqa/hotpot_qa", "distractor", layouts.hotpotqa),
            "csqa": Source("tau/commonsense_qa", "default", layouts.commonsense_qa),
            "gsm8k": Source("openai/gsm8k", "main", layouts.gsm8k, ("test",)),
        },
    ),
}
