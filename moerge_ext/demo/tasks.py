"""The demo's text tasks: eight skills for the experts, and held-out compositions that no expert was trained on.

A conversation is a list of turns; a turn is a request line and an answer line:

    > reverse stone
    enots
    > shout tree
    TREE

Every generator draws from the `random.Random` that it is given, so a seed fixes the text. Words of `TEST_WORDS` and
the made-up words that `is_test_word` picks never occur as the input of a training request.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

_WORD_LIST = """
apple arm army ash baby bag ball band bank barn basket bat bath beach bean bear bed bee bell belt bench berry bike
bird blade boat body bone book boot bottle bowl box boy branch brick bridge broom brush bucket bug bush button cab
cake camel camp candle cap car card cart castle cat cave chair cherry chest chick child city class clock cloud club
coat coin comb cook copy corn couch crab crane cross crow crown cup dance day deer desk dish diary doctor dog doll
donkey door dress drum duck eagle ear egg engine eye face factory fairy fan farm ferry field fig finger fire fish
flag flame flea floor flower fly fog forest fork fox frog fruit game garden gate ghost giant girl glass glove goat
gold goose grape grass guest hammer hand harp hat hawk heart hen hill hook horn horse house ice ink inn island jar
jelly jet jewel job judge juice jug key king kite kitten lady lake lamb lamp leaf lemon letter lily lime lion lip
log lunch map march mask match meal melon milk mill mirror monkey moon moth mouse mouth nail neck needle nest net
night nose nut oak ocean onion orange oven owl ox page paint palm pan paper park party path peach pear pen penny
piano pie pig pilot pin pipe pit plane plant plate plum pocket pond pony pool pot potato puppy queen rabbit radio
rain rat ring river road robin rock roof room root rope rose rug sail salt sand saw school sea seed sheep shelf
shell ship shirt shoe shop shrub sink sky slope snail snake snow sock sofa song soup spider spoon star stick stone
stool storm story street sun swan table tail tent thumb tiger toe torch towel tower town toy train tray tree truck
tulip turtle valley van vase vine violin wagon wall wasp watch water wave whale wheel wind window wing witch wolf
wood worm yard zebra zoo
"""
WORDS = tuple(_WORD_LIST.split())
_ONSETS = "b c d f g h j k l m n p r s t v w y z bl br ch cl cr dr fl gr pl pr sh sl st th tr qu"
_NUCLEI = "a e i o u a e i o ee oo ai"
_CODAS = "n t r l ck m sh x y p d ss z ch"
VOWELS = "aeiou"


def is_test_word(word: str) -> bool:
    """True for the quarter of all words (real or made up) that only evaluation may use as an input."""
    return zlib.crc32(word.encode()) % 4 == 0


TRAIN_WORDS = tuple(w for w in WORDS if not is_test_word(w))
TEST_WORDS = tuple(w for w in WORDS if is_test_word(w))


def made_up_word(rng: random.Random) -> str:
    """A pronounceable training word of one to three syllables and 3 to 6 letters, such as 'blick' or 'tavoro'."""
    while True:
        parts = [
            rng.choice(["", *_ONSETS.split()]) + rng.choice(_NUCLEI.split()) + rng.choice(["", "", *_CODAS.split()])
            for _ in range(rng.randint(1, 3))
        ]
        word = "".join(parts)
        if 3 <= len(word) <= 6 and not is_test_word(word) and word not in TEST_WORDS:
            return word


def train_word(rng: random.Random) -> str:
    return rng.choice(TRAIN_WORDS) if rng.random() < 0.4 else made_up_word(rng)


def test_word(rng: random.Random) -> str:
    return rng.choice(TEST_WORDS)


def reverse(word: str) -> str:
    return word[::-1]


def shout(word: str) -> str:
    return word.upper()


def consonants(word: str) -> str:
    return "".join(c for c in word if c.lower() not in VOWELS)


def stutter(word: str) -> str:
    return "".join(c + c for c in word)


def title(word: str) -> str:
    return word.capitalize()


def spell(word: str) -> str:
    return "-".join(word)


def plural(word: str) -> str:
    """The regular English plural by its spelling rules (also for words with an irregular one)."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in VOWELS:
        return word[:-1] + "ies"
    return word + "s"


def twice(word: str) -> str:
    return f"{word} {word}"


@dataclass(frozen=True)
class Task:
    """One skill: its rule and the wordings of a request ('{}' is the input)."""

    name: str
    rule: Callable[[str], str]
    wordings: tuple[str, ...]

    def draw(self, rng: random.Random, *, test: bool = False) -> str:
        """An input; test inputs and training inputs never overlap."""
        while True:
            word = test_word(rng) if test else train_word(rng)
            if self.rule(word):
                return word

    def request(self, text: str, rng: random.Random) -> str:
        return rng.choice(self.wordings).format(text)


TASKS = {
    task.name: task
    for task in (
        Task("reverse", reverse, ("reverse {}", "backwards {}", "flip {}")),
        Task("shout", shout, ("shout {}", "capitals {}", "loudly {}")),
        Task("consonants", consonants, ("consonants of {}", "drop vowels of {}", "squeeze {}")),
        Task("stutter", stutter, ("stutter {}", "double letters of {}", "echo {}")),
        Task("title", title, ("title {}", "baptize {}", "name {}")),
        Task("spell", spell, ("spell {}", "letter by letter {}", "dashes {}")),
        Task("plural", plural, ("plural of {}", "many {}", "more than one {}")),
        Task("twice", twice, ("twice {}", "duplicate {}", "pair {}")),
    )
}


@dataclass(frozen=True)
class Conversation:
    """Requests with the right answers, all of which a model must give to score.

    A request may hold '{previous}': it becomes the model's own answer to the turn before.
    `skills` names the experts that the turns need, in order.
    """

    skills: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]  # (request, answer)


def single(task: Task, rng: random.Random) -> Conversation:
    """One turn of one skill with a test input: the held-in kind."""
    text = task.draw(rng, test=True)
    return Conversation((task.name,), ((task.request(text, rng), task.rule(text)),))


def two_turns(a: Task, b: Task, rng: random.Random) -> Conversation:
    """Two skills, one after the other, on two inputs: no single expert can give both answers."""
    first, second = single(a, rng), single(b, rng)
    return Conversation(first.skills + second.skills, first.turns + second.turns)


def relay(a: Task, b: Task, rng: random.Random) -> Conversation:
    """The second skill works on the model's own answer of the first: b(a(x)) in two turns."""
    first = single(a, rng)
    answer = first.turns[0][1]
    return Conversation((a.name, b.name), (*first.turns, (b.request("{previous}", rng), b.rule(answer))))


def one_line(a: Task, b: Task, rng: random.Random) -> Conversation:
    """Two requests in one line, both answers in the next line."""
    (request_a, answer_a), (request_b, answer_b) = two_turns(a, b, rng).turns
    return Conversation((a.name, b.name), ((f"{request_a}, {request_b}", f"{answer_a}, {answer_b}"),))


def nested(a: Task, b: Task, rng: random.Random) -> Conversation:
    """b(a(x)) asked for at once, as in 'shout reverse stone': a true composition of functions."""
    text = a.draw(rng, test=True)
    request = b.request(a.request(text, rng), rng)
    return Conversation((a.name, b.name), ((request, b.rule(a.rule(text))),))


# skills whose answer is again a lower-case word, and skills that such a word can be given to
_TO_WORD = ("reverse", "consonants", "stutter", "plural")
_FROM_WORD = ("reverse", "shout", "consonants", "title", "spell")


def _mixed(kind: Callable, n: int, rng: random.Random, firsts: tuple, seconds: tuple) -> list[Conversation]:
    pairs = [(a, b) for a in firsts for b in seconds if a != b]
    return [kind(TASKS[a], TASKS[b], rng) for a, b in (pairs[i] for i in _order(n, len(pairs), rng))]


def _order(n: int, pairs: int, rng: random.Random) -> list[int]:
    """n indices that visit every pair as evenly as possible, in random order."""
    indices: list[int] = []
    while len(indices) < n:
        indices += rng.sample(range(pairs), pairs)
    return indices[:n]


def held_in(n: int, seed: int = 0) -> dict[str, list[Conversation]]:
    """n one-turn conversations for every skill: {skill: conversations}."""
    rng = random.Random(f"held in {seed}")
    return {name: [single(task, rng) for _ in range(n)] for name, task in TASKS.items()}


def held_out(n: int, seed: int = 0) -> dict[str, list[Conversation]]:
    """n conversations of every composition that no expert was trained on: {composition: conversations}."""
    rng = random.Random(f"held out {seed}")
    names = tuple(TASKS)
    return {
        "two turns": _mixed(two_turns, n, rng, names, names),
        "relay": _mixed(relay, n, rng, _TO_WORD, _FROM_WORD),
        "one line": _mixed(one_line, n, rng, names, names),
        "nested": _mixed(nested, n, rng, _TO_WORD, _FROM_WORD),
    }
