"""The questions of the demo on SmolLM2: right, and never what an expert was trained on."""

import json
import re
import shlex
import sqlite3

import pytest

from moerge_ext.demo import lists
from moerge_ext.demo.questions import SKILLS, Draw, rows

MANY = 150


def both(skill):
    return rows(skill, MANY, test=False) + rows(skill, MANY // 3, test=True)


@pytest.mark.parametrize("skill", SKILLS)
def test_a_seed_fixes_them_and_none_is_asked_twice(skill):
    made = rows(skill, MANY, test=False)
    assert made == rows(skill, MANY, test=False) != rows(skill, MANY, test=False, seed=1)
    assert len({row["input"] for row in made}) == MANY


@pytest.mark.parametrize("skill", SKILLS)
def test_the_test_shares_no_wording_with_training(skill):
    """The frame of a question is never one that training uses: with its own words taken out, none is left."""
    trained, asked = rows(skill, MANY, test=False), rows(skill, MANY // 3, test=True)
    assert not {row["input"] for row in trained} & {row["input"] for row in asked}
    openings = [{" ".join(row["input"].split()[:2]) for row in part} for part in (trained, asked)]
    endings = [{row["input"].split()[-1] for row in part} for part in (trained, asked)]
    assert not openings[0] & openings[1] or not endings[0] & endings[1]


def test_names_and_words_have_a_part_for_the_test():
    class First:
        @staticmethod
        def choice(items):
            return tuple(items)

    for items in (lists.TABLES, lists.CITIES, lists.FOLDERS, lists.PLACES, lists.THINGS, *lists.MESSAGES.values()):
        asked, trained = (set(Draw(First, test).of(items)) for test in (True, False))
        assert asked and trained and not asked & trained and asked | trained == set(items)


def test_too_many_is_said():
    with pytest.raises(ValueError, match="fewer than 100000 different questions of support"):
        rows("support", 100_000, test=True)


def test_queries_run_on_their_table():
    database = sqlite3.connect(":memory:")
    for table, text, values, number in lists.TABLES:
        database.execute(f"CREATE TABLE {table}(id INTEGER, {text} TEXT, {number} INTEGER)")
        database.executemany(f"INSERT INTO {table} VALUES (?, ?, ?)", [(i, v, 7 * i) for i, v in enumerate(values)])
    for row in both("sql"):
        found = database.execute(row["target"]).fetchall()
        if "how many rows have" in row["input"]:
            assert found == [(1,)]
        if "which ids have" in row["input"]:
            assert len(found) < 20 and all(7 * i > int(row["target"].split()[-1]) for (i,) in found)
        if ordered := re.fullmatch(r"SELECT \* FROM (\w+) ORDER BY (\w+) DESC LIMIT (\d)", row["target"]):
            (most,) = database.execute(f"SELECT MAX({ordered[2]}) FROM {ordered[1]}").fetchone()
            assert found[0][2] == most and len(found) == int(ordered[3])


def test_commands_can_be_read_by_a_shell():
    programs = {"find", "grep", "wc", "tail", "head", "tar", "du", "sed"}
    for row in both("shell"):
        parts = shlex.split(row["target"])
        assert parts[0] in programs and not re.search(r"[;&|><$`]", row["target"])
        assert all(word.strip("'\"/*.g+M") for word in parts[1:])


def test_schedules_have_five_fields_in_their_ranges():
    limits = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
    for row in both("cron"):
        fields = row["target"].split()
        assert len(fields) == 5
        for field, (low, high) in zip(fields, limits, strict=True):
            numbers = [int(n) for n in re.findall(r"\d+", field)]
            assert all(low <= n <= high for n in numbers) and re.fullmatch(r"\*(/\d+)?|\d+([-,]\d+)?", field)
    known = {
        "every weekday at 8:30 am": "30 8 * * 1-5",
        "every Monday at 5:05 am": "5 5 * * 1",
        "at 8:45 pm on day 7 of every month": "45 20 7 * *",
        "every 7 hours": "0 */7 * * *",
    }
    found = {k: r["target"] for r in rows("cron", 1200, test=False) for k in known if f"{k}." in r["input"] + "."}
    assert found.items() <= known.items() and len(found) > 1


def test_formulas_can_be_typeset():
    mathtext = pytest.importorskip("matplotlib.mathtext")
    parser = mathtext.MathTextParser("agg")
    for row in both("latex")[::10]:
        parser.parse(f"${row['target']}$")


def test_bookings_are_json_of_what_was_said():
    for row in both("booking"):
        made = json.loads(row["target"])
        assert list(made) == ["place", "day", "time", "people"]
        assert made["place"] in row["input"] and made["day"] in row["input"]
        assert lists.NUMBERS[made["people"]] in row["input"].lower()
        hour, minute = map(int, made["time"].split(":"))
        assert str(hour - 12) in row["input"] and (not minute or f":{minute}" in row["input"])


def test_a_message_goes_to_the_team_it_was_written_for():
    for row in both("support"):
        assert row["target"] in lists.MESSAGES and all(team in row["input"] for team in lists.MESSAGES)
