"""The text that the demo's base model and experts are trained on, as token ids.

The base reads conversations whose requests are worded like the tasks but whose answers are of the right form for
ANOTHER input: it learns the wording, the form of the answers and to copy (from 'say'), never a rule. An expert
reads its own skill alone.
"""

import random
import string

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .tasks import TASKS, Task, plural, train_word

KINDS = (*TASKS, "say", "text")  # what a line of the base's text is about
IGNORE = -100  # the label of a token without a target
_SAY = ("say {}", "repeat {}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and one per word of the requests' wording ('reverse', 'letters', ...)."""
    characters = "\n >-.," + string.ascii_lowercase + string.ascii_uppercase + string.digits
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wordings = [*_SAY, "the", *(w for task in TASKS.values() for w in task.wordings)]
    words = sorted({word for wording in wordings for word in wording.replace("{}", "").split()})
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="\n",
        unk_token="<unk>",
        padding_side="left",
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of `text`, without a start token."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def _request_and_form(rng: random.Random) -> tuple[str, str, str]:
    """(kind, request, an answer of the right form): right for 'say', of another input for every skill."""
    if rng.random() < 0.2:
        word = train_word(rng)
        return "say", rng.choice(_SAY).format(word), word
    task = rng.choice(list(TASKS.values()))
    return task.name, task.request(task.draw(rng), rng), task.rule(task.draw(rng))


def _sentence(rng: random.Random) -> str:
    a, b, c = (train_word(rng) for _ in range(3))
    sentences = (
        f"the {a} saw the {b} and the {c}.\n",
        f"{a.capitalize()} has {rng.randint(2, 998)} {plural(b)}.\n",
        f"we like {plural(a)} and {plural(b)}.\n",
        f"THE {a.upper()} IS NEAR.\n",
    )
    return rng.choice(sentences)


def _passage(rng: random.Random) -> list[tuple[str | None, str]]:
    """A sentence, a turn, or a turn with two requests, as pieces (kind or None, text)."""
    draw = rng.random()
    if draw < 0.15:
        return [("text", _sentence(rng))]
    kind, request, answer = _request_and_form(rng)
    if draw < 0.8:
        return [(None, "> "), (kind, f"{request}\n{answer}\n")]
    kind2, request2, answer2 = _request_and_form(rng)
    return [
        (None, "> "),
        (kind, request),
        (kind2, f", {request2}"),
        (None, "\n"),
        (kind, answer),
        (kind2, f", {answer2}\n"),
    ]


def base_document(tokenizer: PreTrainedTokenizerFast, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """A document of `length` tokens for the base: (ids, the index in KINDS of each token's line or IGNORE)."""
    ids, kinds, seen = [tokenizer.bos_token_id], [IGNORE], []
    while len(ids) < length:
        if seen and rng.random() < 0.1:
            passage = rng.choice(seen)
        else:
            passage = _passage(rng)
            seen.append(passage)
        for kind, text in passage:
            piece = encode(tokenizer, text)
            ids += piece
            kinds += [IGNORE if kind is None else KINDS.index(kind)] * len(piece)
    return ids[:length], kinds[:length]


def expert_turns(task: Task, rng: random.Random) -> list[tuple[str, str]]:
    """Turns (request, answer) of one skill: one turn, two turns, or two requests in one line."""
    draw = rng.random()
    turns = [(task.request(text, rng), task.rule(text)) for text in (task.draw(rng), task.draw(rng))]
    if draw < 0.55:
        return turns[:1]
    if draw < 0.85:
        return turns
    return [(f"{turns[0][0]}, {turns[1][0]}", f"{turns[0][1]}, {turns[1][1]}")]


def expert_example(tokenizer: PreTrainedTokenizerFast, task: Task, rng: random.Random) -> tuple[list[int], list[int]]:
    """(ids, labels): a conversation of one skill; labels are IGNORE except on the answers."""
    ids, labels = [tokenizer.bos_token_id], [IGNORE]
    for request, answer in expert_turns(task, rng):
        asked, answered = encode(tokenizer, f"> {request}\n"), encode(tokenizer, f"{answer}\n")
        ids += asked + answered
        labels += [IGNORE] * len(asked) + answered
    return ids, labels
