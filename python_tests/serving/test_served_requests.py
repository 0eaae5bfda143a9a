"""What a server and a request may say, and the words in which it is refused."""

from __future__ import annotations

import json

import pytest
import torch

from moerge_ext.serving.requests import Choice, Rules
from moerge_ext.serving.settings import Settings
from moerge_ext.serving.slices import Segment, by_kind, shares

RULES = Rules(("news", "code"), {"phatgoose": False, "arrow": False, "glider": True})


@pytest.mark.parametrize(
    "said, choice",
    [
        (None, None),
        ({}, None),
        ({"routing": True}, None),
        ({"method": "phatgoose"}, None),
        ({"routing": False}, Choice(None)),
        ('{"routing": false}', Choice(None)),
        ({"weights": {"code": 2}}, Choice(None, weights=(0.0, 2.0))),
        ({"weights": [0.5, -1]}, Choice(None, weights=(0.5, -1.0))),
        ({"expert": "code"}, Choice(None, weights=(0.0, 1.0))),
        ({"method": "arrow"}, Choice("arrow")),
        ({"method": "glider", "affinities": {"news": 0.9}}, Choice("glider", affinities=(0.9, 0.0))),
    ],
)
def test_what_is_said_becomes_a_choice(said, choice):
    assert RULES.read(said) == choice
    if choice is not None:
        assert Choice(**json.loads(json.dumps(choice.as_dict()))).key() == choice.key()


@pytest.mark.parametrize(
    "said, words",
    [
        ({"weight": [1, 0]}, "unknown 'weight'; a request may say weights, expert"),
        ({"weights": [1.0]}, "weights must have E=2 numbers, got 1"),
        ({"weights": {"jokes": 1.0}}, "no expert 'jokes'; there are news, code"),
        ({"weights": [float("nan"), 0]}, "must be finite numbers, got nan"),
        ('{"weights": [NaN, 0]}', "must be finite numbers, got nan"),
        ({"weights": [1e39, 0]}, "weights must be between -100 and 100, got 1e+39"),
        ({"weights": {"ant": -101}}, "weights must be between -100 and 100, got -101"),
        ({"weights": "x" * 5000}, "got 'xxxxxx"),
        ({"weights": {f"n{i}": 1 for i in range(5000)}}, "'n4', 4995 more; there are"),
        ({"weights": [True, 0]}, "must be finite numbers, got True"),
        ({"weights": 3}, 'weights must be {"news": 1.0}'),
        ({"weights": ["1", 0]}, "must be finite numbers, got '1'"),
        ({"expert": "jokes"}, "no expert 'jokes'"),
        ({"expert": ["news"]}, "no expert ['news']"),
        ({"expert": "news", "weights": [1, 0]}, "'weights' stands alone"),
        ({"routing": "off"}, "routing must be true or false, got 'off'"),
        ({"routing": 0}, "routing must be true or false, got 0"),
        ({"method": "lorahub"}, "no method 'lorahub' on this server; there are phatgoose, arrow, glider"),
        ({"method": ["arrow"]}, "no method ['arrow']"),
        ({"method": "glider"}, "the method 'glider' needs affinities"),
        ({"affinities": [1, 0]}, "the method 'phatgoose' takes no affinities"),
        ({"trace": True}, "this server keeps no traces"),
        ({"trace": 1}, "trace must be true or false, got 1"),
        ("{", "expected an object or its JSON text"),
        ([1], "expected an object"),
        ("[" * 100000, "expected an object or its JSON text"),
    ],
)
def test_what_is_wrong_is_refused_in_our_words(said, words):
    with pytest.raises(ValueError) as refused:
        RULES.read(said)
    assert len(str(refused.value)) < 400
    assert words in str(refused.value) and str(refused.value).startswith("moerge: ")


def test_a_trace_is_no_part_of_the_routing():
    rules = Rules(RULES.names, RULES.methods, traces=True)
    for routing in ({}, {"expert": "code"}, {"routing": False}, {"method": "glider", "affinities": [1, 0]}):
        assert rules.read(routing | {"trace": True}) == rules.read(routing)
        assert rules.traced(routing | {"trace": True}) and not rules.traced(routing | {"trace": False})
    assert rules.traced('{"trace": true}') and not rules.traced(None) and not rules.traced({})


def test_keys_differ_with_the_routing_and_only_with_it():
    said = [{"weights": [1, 0]}, {"weights": [0, 1]}, {"routing": False}, {"method": "arrow"}]
    said += [{"method": "glider", "affinities": [1, 0]}]
    keys = [RULES.read(one).key() for one in said]
    assert len(set(keys)) == len(keys)
    assert RULES.read({"expert": "news"}).key() == RULES.read({"weights": {"news": 1}}).key() == keys[0]


def test_servers_that_take_less():
    with pytest.raises(ValueError, match="takes no routing from requests"):
        Rules(("news",), {"phatgoose": False}, open=False).read({"routing": False})
    with pytest.raises(ValueError, match="has the experts merged"):
        Rules(("news",), {"merged": False}, whole=False).read({"expert": "news"})
    for said in (None, {}, {"routing": True}, '{"routing": true}'):
        with pytest.raises(ValueError, match="needs (the )?affinities"):
            Rules(("news",), {"glider": True}).read(said)


def test_settings_list_everything_wrong():
    said = {"experts": [], "method": "phatgose", "methods": {"arrow": {"top_z": 1}}, "dtype": "int8", "requests": 1}
    with pytest.raises(ValueError) as refused:
        Settings.parse(said | {"absent": "x"})
    for words in ("experts must be", "did you mean 'phatgoose'", "top_z", "dtype must", "requests must", "absent must"):
        assert words in str(refused.value)
    with pytest.raises(ValueError) as refused:
        Settings.parse({"experts": ["a"], "names": "a", "rename": [], "spare": -1, "traces": True, "metrics": 1})
    for wrong in ("names must", "rename must", "spare must", "traces must", "metrics must"):
        assert wrong in str(refused.value)
    with pytest.raises(ValueError, match="top_k must be a positive integer"):
        Settings.parse({"experts": ["a"], "top_k": 0})
    with pytest.raises(ValueError, match="must be an object"):
        Settings.parse(["a"])
    for wrong, words in (
        ({"methods": [["a"]]}, "methods must be a list of names"),
        ({1: 2}, "names of methods and options must be texts"),
        ({"top_k": 1, "methods": {"phatgoose": {"top_k": 2}}}, "has the default method 'phatgoose' once more"),
    ):
        with pytest.raises(ValueError, match=words):
            Settings.parse({"experts": ["a"]} | wrong)


def test_settings_say_what_they_were_told():
    said = {"experts": {"a": "x"}, "method": "arrow", "top_k": 3, "methods": {"merged": {}}, "requests": False}
    assert Settings.parse(said).as_dict() == said
    said |= {"spare": 2, "metrics": True, "traces": 8}
    assert Settings.parse(said).as_dict() == said and Settings.parse(said).answers_more
    assert Settings.parse(Settings.parse(said).as_dict()) == Settings.parse(said)
    assert Settings.parse({"experts": "a", "methods": ["arrow"]}).variants() == {"phatgoose": {}, "arrow": {}}
    both = Settings.parse({"experts": "a", "top_k": 1, "methods": ["arrow", "phatgoose"]})
    assert both.variants() == {"phatgoose": {"top_k": 1}, "arrow": {}}


def test_shares_of_modules_and_of_pieces():
    """Modules that are a piece each, one module of all pieces, and pieces that do not fit."""
    pieces = [Segment(4, 4, 8), Segment(2, 2, 4), Segment(2, 2, 4)]
    apart = shares(pieces, {"q": 8, "k": 4, "v": 4})
    assert [(s.offset, s.size, s.rows) for s in apart.values()] == [
        (0, 4, ((4, 4),)),
        (4, 2, ((2, 2),)),
        (6, 2, ((2, 2),)),
    ]
    whole = shares(pieces, {"qkv": 16})["qkv"]
    assert (whole.offset, whole.size, whole.rows) == (0, 8, ((4, 4), (10, 2), (14, 2)))
    for modules in ({"q": 6, "k": 10}, {"q": 8}, {"q": 8, "k": 4, "v": 4, "w": 4}):
        with pytest.raises(ValueError):
            shares(pieces, modules)


def test_shares_of_a_module_whose_rows_an_engine_puts_in_another_order():
    """Two groups of two heads of q, one of k and one of v, three wide: all of q, then k, then v."""
    rows = torch.arange(24).view(2, 4, 3)
    wanted = [rows[:, :2].reshape(-1), rows[:, 2].reshape(-1), rows[:, 3].reshape(-1)]

    def of_rank(rank: int, ranks: int) -> list[int]:
        pieces = [Segment(whole // ranks, rank * whole // ranks, whole) for whole in (12, 6, 6)]
        share = shares(pieces, {"qkv": 24}, order=by_kind(2, 2, 3))["qkv"]
        assert (share.offset, share.size) == (0, 24 // ranks)
        return [row for start, size in share.rows for row in range(start, start + size)]

    assert of_rank(0, 1) == torch.cat(wanted).tolist()
    for rank in (0, 1):
        assert of_rank(rank, 2) == torch.cat([part.chunk(2)[rank] for part in wanted]).tolist()
