"""Patterns of module names: as in PEFT, and in bounded time."""

import re
import time

import pytest
from adapter_cases import Q, factors, refused
from builders import write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from moerge_ext.experts.formats.peft_patterns import LayerNumbers, ModuleNames, ModulePattern


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        "self_attn.q_proj",
        "elf_attn.q_proj",
        "^model.layers.0.self_attn.q_proj",
        "^q_proj",
        "q_proj$",
    ]
    + [
        Q,
        "layers.0",
        r".*q_proj",
        r"layers\.\d+\.self_attn\.(q|k)_proj",
        r"layers\.[1-9]\..*",
        r"layers\.[^1]\..*",
    ]
    + [
        "layersx0.self_attn.q_proj",
        ".*",
        r"(?:model\.)?layers.*?proj",
        "(q|)_proj",
        r"\w+",
        "v_proj|q_proj",
        "$",
    ],
)
def test_patterns_match_as_in_peft(key):
    from peft.utils.other import get_pattern_key

    for path in (
        Q,
        "q_proj",
        "model.layers.10.self_attn.k_proj",
        "layers.0",
        "model.layersX0.self_attn.q_proj",
    ):
        assert ModulePattern(key).matches(path) == (get_pattern_key([key], path) == key and True), path


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        Q,
        f"^{Q}$",
        ".*",
        ".*q_proj",
        r"q_proj|.*\.k_proj",
        "layers.0",
        r".*layers\.([1-9]\d*|0)\..*",
        "q|k|",
        "$",
    ]
    + [Q.replace(".", "?."), "model.layers.0.self_attn.._proj", r"(?:.*\.)?(q|k)_proj"],
)
def test_string_targets_match_as_in_peft(key):
    for path in (Q, "q_proj", "model.layers.10.self_attn.k_proj", "layers.0", "q", "model.layers.0.self_attn.xq_proj"):
        assert ModuleNames(key).knows([path])
        assert ModuleNames(key).match(path) == bool(re.fullmatch(key, path)), path


def test_what_is_not_known():
    assert not ModuleNames("all-linear").knows([Q]) and not ModuleNames(r"a{1,2}").knows([Q])
    assert not ModuleNames(".*" * 500).knows([Q] * 10_000)
    assert ModuleNames(["q_proj"]).unused([Q, "k_proj"]) == [] and ModuleNames(["a", "b"]).unused([Q]) == ["a", "b"]


def test_layer_numbers():
    def match(path, *names):
        return LayerNumbers([1], names).match(path)

    assert match("h.1.attn") and match("h.1.attn", "h") and not match("h.1.attn", "layers")
    assert match("t.h.1.attn", "x", "t.h") and not match("h.1", "h") and not match("h.11.attn") and not match("attn")


ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", r"[\d.]", r"[a\-]", r"\b", r"\B", "^", "$", "q_proj", "1"]
)
SIGNS = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{1,2}", "{0,3}", "{1,}", "{,2}", "*?"])
OPENED = st.sampled_from(["(", "(?:", "(?=", "(?!"])
KEYS = st.recursive(
    st.tuples(ATOMS, SIGNS).map("".join),
    lambda inner: (
        st.tuples(OPENED, st.lists(inner, min_size=1, max_size=3).map("".join), SIGNS).map(
            lambda parts: f"{parts[0]}{parts[1]}){parts[2]}"
        )
        | st.lists(inner, min_size=2, max_size=3).map("".join)
        | st.tuples(inner, inner).map("|".join)
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(KEYS)
def test_wide_patterns_match_as_in_re(key):
    try:
        pattern, by_peft, whole = ModulePattern(key, wide=True), re.compile(rf"(.*\.)?({key})$"), re.compile(key)
    except (ValueError, re.error):
        return
    for path in ("a", "ab", "a.b", "a.1.q_proj", "b.1", "aab.a1", "a.a.11.q_proj"):
        assert pattern.matches(path) == bool(by_peft.match(path)), path
        assert pattern.fits_all_of(path) == bool(whole.fullmatch(path)), path


@pytest.mark.alone
@pytest.mark.parametrize(
    "key",
    ["(a|a)" * 60, "a*" * 300, "(a?b?)" * 100, ".*" * 400 + "x", "(.|.|.)" * 100 + "!"]
    + ["(?=.*a)" * 100 + "!", "(?!(?!(?!.*b)))" * 60, "(?<=a*)" * 140, "a{100}" * 150, "(aa?){100}" * 100],
)
def test_patterns_cannot_blow_up(key):
    start = time.perf_counter()
    assert not ModulePattern(key, wide=True).matches("a" * 400 + "b")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "key",
    ["", "(", ")", "a)", "*", "a**", "a{2}", r"\1", "\\", "[", "[]", "[b-a]", "(" * 20, "(?i)a", "(a*)*"],
)
def test_bad_patterns(key):
    with pytest.raises(ValueError):
        ModulePattern(key)


def test_too_many_patterns_are_refused(tmp_path):
    modules = {f"layers.{i}.{'deep.' * 20}q_proj": factors(2, 2, 1) for i in range(200)}
    patterns = {f".*{i}{'.*x' * 300}": 1 for i in range(50)}
    write_adapter(tmp_path, modules, r=1, rank_pattern=patterns)
    start = time.perf_counter()
    refused(tmp_path, "50 patterns for 200 modules: too many to match")
    assert time.perf_counter() - start < 5
