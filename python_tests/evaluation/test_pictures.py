"""Where modules are in a model, and the pictures and the page of an inspection."""

from __future__ import annotations

import json
import re

import builders
import patch_cases as cases
import pytest
import torch

from moerge_ext.evaluation.heatmaps import draw
from moerge_ext.evaluation.inspect import Inspection
from moerge_ext.evaluation.inspect_page import write_page
from moerge_ext.evaluation.layer_view import STEPS, bars, cell_shares, colours_of
from moerge_ext.evaluation.palette import COLOURS, OTHERS, rgb
from moerge_ext.evaluation.places import grids, part_of
from moerge_ext.evaluation.probe import ModuleSums

DECODER = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
DECODER += [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]


def llama(layers):
    return [f"model.layers.{layer}.{name}" for layer in range(layers) for name in DECODER]


def inspections(modules, experts, tasks, names=None):
    """Random distributions; the task's number is its best expert, and the second task has none."""
    names = tuple(names or (f"expert_{e}" for e in range(experts)))
    random = torch.Generator().manual_seed(0)
    made = []
    for task in range(tasks):
        shares = {m: torch.rand(experts, generator=random, dtype=torch.float64) for m in modules}
        shares = {m: p / p.sum() for m, p in shares.items()}
        sums = {
            m: ModuleSums(distribution=10 * p, weight=10 * p, log=10 * p.log(), tokens=10) for m, p in shares.items()
        }
        oracle = None if task == 1 else names[task % experts]
        made.append(Inspection("phatgoose", f"task {task}", names, oracle, sums))
    return made


def size(png):
    head = png.read_bytes()[16:24]
    return int.from_bytes(head[:4]), int.from_bytes(head[4:])


def linears(family):
    return [path for path, _, _ in builders.linear_sizes(cases.build(family), cases.FAMILIES[family][1])]


def test_places_of_real_families():
    (grid,), others = grids(linears("llama"))
    assert (grid.label, grid.layers, others) == ("", (0, 1), [])
    assert grid.columns == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert grid.cells[1, "v_proj"] == ["model.layers.1.self_attn.v_proj"]
    (grid,), _ = grids(linears("gpt2"))
    assert grid.columns == ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")
    encoder, decoder = grids(linears("t5"))[0]
    assert (encoder.label, decoder.label) == ("encoder", "decoder")
    assert {"SelfAttention.q", "EncDecAttention.q"} < set(decoder.columns)  # cross attention apart
    (grid,), others = grids(linears("bert"))
    assert {"attention.output.dense", "output.dense"} < set(grid.columns) and others == ["bert.pooler.dense"]
    assert part_of("encoder.block.0.layer.0.q") == "encoder" and part_of("model.layers.0.q") == ""


def test_places_that_are_shared_or_missing():
    experts = [f"model.layers.0.moe.experts.{e}.{w}" for e in range(3) for w in ("w1", "w2")]
    (grid,), others = grids([*experts, "model.layers.0.q_proj", "lm_head"])
    assert grid.columns == ("experts.*.w1", "experts.*.w2", "q_proj") and others == ["lm_head"]
    assert grid.cells[0, "experts.*.w1"] == experts[::2]
    found = inspections([*experts, "model.layers.0.q_proj"], 4, 1)[0]
    torch.testing.assert_close(cell_shares(found, grid)[0, 0], found.shares_of(experts[::2]).mean(0))
    towers = [f"model.{tower}.layers.0.q_proj" for tower in ("vision", "language")]
    assert [grid.label for grid in grids(towers)[0]] == ["model.vision.layers", "model.language.layers"]
    assert grids(["fc1", "fc2"]) == ([], ["fc1", "fc2"])
    assert grids(["0", "2"])[0][0].cells == {(0, "module"): ["0"], (2, "module"): ["2"]}


def test_bars_are_the_distribution():
    names = [f"e{e}" for e in range(20)]
    colours = dict(zip(names, COLOURS, strict=False))
    shares = torch.zeros(1, 2, 20, dtype=torch.float64)
    shares[0, 0, 1], shares[0, 0, 0], shares[0, 0, 19] = 0.5, 0.25, 0.25  # the last has no colour
    shares[0, 1] = torch.nan
    picture = bars(shares, names, colours, "e1")[0].tolist()
    want = [COLOURS[1]] * (STEPS // 2) + [COLOURS[0]] * (STEPS // 4) + [OTHERS] * (STEPS // 4)
    assert picture[:STEPS] == [list(rgb(colour)) for colour in want]
    assert picture[STEPS:] == [[255] * 3] * STEPS  # no such module
    one = torch.zeros(1, 1, 20, dtype=torch.float64)
    one[..., 3] = 1
    assert bars(one, names, colours, "e0")[0].tolist() == [list(rgb(COLOURS[3]))] * STEPS


def test_leading_experts_have_colours():
    found = inspections(llama(1), 40, 3)
    colours = colours_of(found)
    assert len(colours) == len(COLOURS)
    second = found[1].shares_of(list(found[1].modules)).mean(0).argmax()
    assert list(colours)[:3] == ["expert_0", f"expert_{second}", "expert_2"]  # the best, or the largest share


@pytest.mark.parametrize(
    "layers, experts, tasks, pages", [(30, 8, 6, 1), (80, 166, 5, 2), (1, 4, 1, 1), (300, 30, 2, 1)]
)
def test_pictures_are_bounded(layers, experts, tasks, pages, tmp_path):
    pytest.importorskip("matplotlib")
    paths, notes = draw(inspections(llama(layers), experts, tasks), tmp_path)
    assert [path.name for path in paths] == ["routing-phatgoose.png", "routing-phatgoose-2.png"][:pages] and not notes
    for path in paths:
        assert max(size(path)) <= 2400 and min(size(path)) >= 240


@pytest.mark.parametrize(
    "view, names", [("layers", ["routing"]), ("modules", ["modules"]), ("both", ["routing", "modules"])]
)
def test_views(view, names, tmp_path):
    """A name that would be a formula to matplotlib; a module outside of the layers."""
    pytest.importorskip("matplotlib")
    found = inspections([*llama(2), "lm_head"], 3, 2, names=["$x_{", "b" * 80, "<c>"])
    paths, notes = draw(found, tmp_path, view)
    others = "modules" if view != "layers" else "routing"
    assert sorted(p.stem for p in paths) == sorted([f"{n}-phatgoose" for n in names] + [f"{others}-phatgoose-others"])
    assert all(max(size(path)) <= 2400 for path in paths)
    assert notes == (
        []
        if view == "modules"
        else ["phatgoose: no layer is in the path of lm_head: drawn one by one, modules by experts"]
    )
    flat, notes = draw(inspections(["fc1", "fc2"], 3, 1), tmp_path / "flat")
    assert [p.name for p in flat] == ["routing-phatgoose.png"] and "no layer is in the path of the modules" in notes[0]
    with pytest.raises(ValueError, match="layers, modules, both, got 'x'"):
        draw(found, tmp_path, "x")


def test_page_is_whole_and_escaped(tmp_path):
    pytest.importorskip("plotly")
    names = ["</script><b>x", "a&b", "<img src=x onerror=alert(1)>"]
    found = inspections(linears("t5"), 3, 2, names)
    path = tmp_path / "new" / "page.html"
    assert write_page(found, path) == path.stat().st_size < 6e6
    text = path.read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)  # nothing is fetched
    ours = text[text.index("plotly-graph-div") :]
    assert "<img" not in ours and "<b>x" not in ours
    data = json.loads(re.search(r'Plotly\.newPlot\(\s*"[^"]+",\s*(\[.*?\]),\s*\{', ours, re.DOTALL)[1])
    grid = grids(list(found[0].modules))[0][0]
    shown = cell_shares(found[0], grid)[..., 0]  # of the best expert
    torch.testing.assert_close(torch.tensor(data[0]["z"], dtype=torch.float64), shown, atol=6e-4, rtol=0)
    assert data[0]["text"][0][0].startswith(("&lt;", "a&amp;b"))
