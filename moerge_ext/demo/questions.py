"""What the experts of the real model are for: six kinds of requests with one right answer, drawn from a seed.

Every list of names, words and wordings has a part that only the asked questions use and one that only training uses,
so a right answer is never a row that an expert has read. No text is taken from elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import lists

IN_VAIN = 1000  # draws of known questions in a row, after which there are no others


@dataclass(frozen=True)
class Draw:
    """Choices of one side: `test` picks from the part that no training row uses."""

    rng: random.Random
    test: bool

    def of(self, items: Sequence) -> object:
        """One of a list whose every fourth item belongs to the test."""
        mine = items[3::4] if self.test else [item for i, item in enumerate(items) if i % 4 != 3]
        return self.rng.choice(mine)

    def any(self, items: Sequence) -> object:
        """One of a list that both sides use: kinds of requests, numbers, letters."""
        return self.rng.choice(items)

    def number(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)


def sql(draw: Draw) -> tuple[str, str]:
    """A question about one table: counts, aggregates, conditions, groups, the largest rows."""
    table, text, values, number = draw.of(lists.TABLES)
    value, many, few = draw.of(values), draw.number(2, 90) * 5, draw.number(2, 9)
    name, function = draw.any((("average", "AVG"), ("highest", "MAX"), ("lowest", "MIN"), ("total", "SUM")))
    question, query = draw.any(
        (
            (f"how many rows have the {text} {value}", f"SELECT COUNT(*) FROM {table} WHERE {text} = '{value}'"),
            (f"what is the {name} {number}", f"SELECT {function}({number}) FROM {table}"),
            (
                f"what is the {name} {number} where the {text} is {value}",
                f"SELECT {function}({number}) FROM {table} WHERE {text} = '{value}'",
            ),
            (f"which ids have a {number} above {many}", f"SELECT id FROM {table} WHERE {number} > {many}"),
            (f"how many rows are there for each {text}", f"SELECT {text}, COUNT(*) FROM {table} GROUP BY {text}"),
            (
                f"which {few} rows have the largest {number}",
                f"SELECT * FROM {table} ORDER BY {number} DESC LIMIT {few}",
            ),
        )
    )
    frame = draw.of(
        (
            "Table {t}(id, {c}, {n}). Write the SQL query: {q}?",
            "Write SQL for the table {t} with the columns id, {c}, {n}: {q}?",
            "SQL over {t}(id, {c}, {n}), please: {q}?",
            "I have a table {t}(id, {c}, {n}). Which SQL query tells me {q}?",
        )
    )
    return frame.format(t=table, c=text, n=number, q=question), query


def shell(draw: Draw) -> tuple[str, str]:
    """One command line of Unix: find, grep, tar, sed, tail and the like."""
    folder, ending, stem = draw.of(lists.FOLDERS), draw.of(lists.ENDINGS), draw.of(lists.STEMS)
    file, count, word, other = f"{stem}.{ending}", draw.number(2, 60), draw.of(lists.WORDS), draw.of(lists.WORDS)
    what, command = draw.any(
        (
            (f"list all .{ending} files under {folder}", f"find {folder} -name '*.{ending}'"),
            (f"find files under {folder} larger than {count} MB", f"find {folder} -size +{count}M"),
            (
                f"delete the .{ending} files under {folder} older than {count} days",
                f"find {folder} -name '*.{ending}' -mtime +{count} -delete",
            ),
            (f"search for {word} in all files under {folder}", f"grep -r '{word}' {folder}"),
            (f"count the lines of {file}", f"wc -l {file}"),
            (f"show the last {count} lines of {file}", f"tail -n {count} {file}"),
            (f"show the first {count} lines of {file}", f"head -n {count} {file}"),
            (f"pack the folder {folder} into {stem}.tar.gz", f"tar -czf {stem}.tar.gz {folder}"),
            (f"unpack {stem}.tar.gz", f"tar -xzf {stem}.tar.gz"),
            (f"tell how much space the folder {folder} takes", f"du -sh {folder}"),
            (f"replace {word} by {other} in {file}", f"sed -i 's/{word}/{other}/g' {file}"),
        )
    )
    frame = draw.of(
        ("Linux command to {}?", "In bash, how do I {}?", "Give me a shell command to {}.", "Shell one-liner: {}.")
    )
    return frame.format(what), command


def cron(draw: Draw) -> tuple[str, str]:
    """A schedule in words as the five fields of a crontab."""
    hour, minute = draw.number(1, 11), draw.any((0, 5, 10, 15, 20, 30, 40, 45, 50))
    after_noon = draw.any((0, 12))
    clock = f"{hour}:{minute:02d} {'pm' if after_noon else 'am'}"
    if minute == 30:
        clock = draw.any((clock, f"half past {lists.NUMBERS[hour]} in the {'evening' if after_noon else 'morning'}"))
    days, field = draw.any(
        (
            ("every day", "* *"),
            ("every weekday", "* 1-5"),
            ("every weekend day", "* 0,6"),
            *((f"every {day}", f"* {i}") for i, day in enumerate(lists.DAYS)),
        )
    )
    date = draw.number(1, 28)
    month, name = draw.any(tuple(enumerate(lists.MONTHS, 1)))
    when, schedule = draw.any(
        (
            (f"{days} at {clock}", f"{minute} {hour + after_noon} * {field}"),
            (f"{days} at {clock}", f"{minute} {hour + after_noon} * {field}"),
            (f"at {clock} on day {date} of every month", f"{minute} {hour + after_noon} {date} * *"),
            (f"at {clock} on {date} {name}", f"{minute} {hour + after_noon} {date} {month} *"),
            (f"every {minute or 25} minutes", f"*/{minute or 25} * * * *"),
            (f"every {hour + 1} hours", f"0 */{hour + 1} * * *"),
        )
    )
    frame = draw.of(("Cron expression for {}?", "Crontab schedule: {}.", "In cron syntax: {}.", "Write as cron: {}."))
    return frame.format(when), schedule


def latex(draw: Draw) -> tuple[str, str]:
    """A formula read aloud, as LaTeX."""
    (said, written), (said2, written2) = _term(draw), _term(draw)
    top = draw.any(("n", "m", "N"))
    say, write = draw.any(
        (
            (f"{said} plus {said2}", f"{written} + {written2}"),
            (f"{said} minus {said2}", f"{written} - {written2}"),
            (f"{said} over {said2}", rf"\frac{{{written}}}{{{written2}}}"),
            (f"{said} is at most {said2}", rf"{written} \leq {written2}"),
            (f"the sum over i from one to {top} of {said}", rf"\sum_{{i=1}}^{{{top}}} {written}"),
            (f"the integral from zero to {top} of {said}", rf"\int_{{0}}^{{{top}}} {written}"),
            (f"the limit of {said} as {top} goes to infinity", rf"\lim_{{{top} \to \infty}} {written}"),
        )
    )
    frame = draw.of(("In LaTeX: {}.", "Write in LaTeX: {}.", "LaTeX for {}?", "How do I typeset {} in LaTeX?"))
    return frame.format(say), write


def _term(draw: Draw) -> tuple[str, str]:
    letter, index = draw.of(lists.LETTERS), draw.any(("i", "j", "k"))
    greek = draw.of(lists.GREEK)
    return draw.any(
        (
            (letter, letter),
            (greek, f"\\{greek}"),
            (f"{letter} squared", f"{letter}^{{2}}"),
            (f"{greek} cubed", f"\\{greek}^{{3}}"),
            (f"{letter} sub {index}", f"{letter}_{{{index}}}"),
            (f"the square root of {letter}", rf"\sqrt{{{letter}}}"),
            (f"the square root of {greek}", rf"\sqrt{{\{greek}}}"),
            (f"{letter} hat", rf"\hat{{{letter}}}"),
        )
    )


def booking(draw: Draw) -> tuple[str, str]:
    """A request for a table, as JSON."""
    place, day, hour, people = draw.of(lists.PLACES), draw.any(lists.DAYS), draw.number(5, 10), draw.number(2, 9)
    minute = draw.any((0, 15, 30, 45))
    clock = f"{hour}:{minute:02d} pm" if minute else draw.any((f"{hour} pm", f"{hour} o'clock in the evening"))
    wish = draw.of(
        (
            "book a table for {n} at {p} on {d} at {c}",
            "we are {n} and want to eat at {p}, {d}, {c}",
            "can you get us into {p} on {d}? We are {n}, around {c}",
            "dinner at {p} on {d}, {c}, for {n} people",
        )
    ).format(n=lists.NUMBERS[people], p=place, d=day, c=clock)
    frame = draw.of(
        (
            "Turn into JSON (place, day, time, people): {}.",
            "{} -> JSON with place, day, time, people",
            "Extract place, day, time and people as JSON: {}.",
            "JSON with the keys place, day, time, people, please: {}.",
        )
    )
    answer = f'{{"place": "{place}", "day": "{day}", "time": "{hour + 12}:{minute:02d}", "people": {people}}}'
    return frame.format(wish), answer


def support(draw: Draw) -> tuple[str, str]:
    """A customer's message, and the team that answers it."""
    team = draw.any(tuple(lists.MESSAGES))
    message = draw.of(lists.MESSAGES[team]).format(thing=draw.of(lists.THINGS), day=draw.any(lists.DAYS))
    teams = ", ".join(lists.MESSAGES)
    frame = draw.of(
        (
            "Which team answers this ({t})? {m}",
            "Teams: {t}. Who takes this message? {m}",
            "Route to one of {t}: {m}",
            "A customer writes: {m} Which team is it for, of {t}?",
        )
    )
    return frame.format(t=teams, m=message), team


SKILLS: dict[str, Callable[[Draw], tuple[str, str]]] = {
    "sql": sql,
    "shell": shell,
    "cron": cron,
    "latex": latex,
    "booking": booking,
    "support": support,
}


def rows(skill: str, n: int, *, test: bool, seed: int = 0) -> list[dict[str, str]]:
    """n rows {"input", "target"} of one skill, no input twice; the same for the same seed. ValueError for too many."""
    draw = Draw(random.Random(f"{skill} {'test' if test else 'train'} {seed}"), test)
    made: dict[str, str] = {}
    in_vain = 0
    while len(made) < n:
        question, answer = SKILLS[skill](draw)
        question = question[0].upper() + question[1:]
        in_vain = in_vain + 1 if question in made else 0
        if in_vain == IN_VAIN:
            raise ValueError(f"there are fewer than {n} different questions of {skill}: ask for at most {len(made)}")
        made[question] = answer
    return [{"input": question, "target": answer} for question, answer in made.items()]
