"""Twin-Merging: the factors against the dense matrices, and the row on a real model."""

from __future__ import annotations

import patch_cases as cases
import pytest
import torch
from builders import write_adapter

import moerge_ext as moerge
from moerge_ext.methods.twin import twin_factors


def dense(updates, scale, rank):
    """S + SVD_rank(D_t - S), from the matrices themselves."""
    shared = scale * sum(updates)
    made = []
    for update in updates:
        u, s, vh = torch.linalg.svd(update - shared, full_matrices=False)
        made.append(shared + (u[:, :rank] * s[:rank]) @ vh[:rank])
    return made


@pytest.mark.parametrize(
    ("experts", "inner", "width", "out"), [(3, 4, 20, 16), (3, 4, 9, 30), (1, 2, 8, 8), (4, 3, 7, 5)]
)
@pytest.mark.parametrize("rank", (1, 3, 40))
def test_factors_are_those_of_the_dense_matrices(experts, inner, width, out, rank):
    generator = torch.Generator().manual_seed(experts + width)
    a = torch.randn(experts, inner, width, generator=generator)
    b = torch.randn(experts, out, inner, generator=generator)
    a[0, -1] = 0  # padding of a smaller rank
    got_a, got_b = twin_factors(a, b, 0.3, rank)
    assert got_a.shape[1] <= min(experts * inner, width, out)
    for got, want in zip(got_b @ got_a, dense(list(b.double() @ a.double()), 0.3, rank), strict=True):
        torch.testing.assert_close(got, want)


def test_row_on_a_model(tmp_path):
    """Merged by hand into the weights, one text per row; an expert that lacks a module counts as zero there."""
    torch.manual_seed(0)
    path = "model.layers.0.mlp.up_proj"
    other = "model.layers.1.self_attn.o_proj"
    model = cases.build("llama")
    sizes = {name: model.get_submodule(name).weight.shape for name in (path, other)}
    updates = {name: [] for name in sizes}
    folders = {}
    for e, name in enumerate(cases.NAMES):
        modules = {}
        for where, (out, width) in sizes.items():
            a, b = torch.randn(4, width) / 4, torch.randn(out, 4) / 4
            has = (e, where) != (1, other)
            updates[where].append((2.0 * b @ a).double() if has else torch.zeros(out, width).double())
            modules |= {where: (a, b)} if has else {}
        folders[name] = write_adapter(tmp_path / name, modules)
    bank, inputs = moerge.load_experts(folders), cases.batch("llama", rows=2)
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.1, 0.9]])
    with moerge.patch(model, bank, "twin_merging", rank=2) as handle, handle.affinities(weights):
        got = cases.logits(model, **inputs)
    made = {where: dense(parts, 1 / 3, 2) for where, parts in updates.items()}
    kept = {where: model.get_submodule(where).weight.data.clone() for where in sizes}
    for row in range(2):
        for where in sizes:
            change = sum(w * part for w, part in zip(weights[row].tolist(), made[where], strict=True))
            model.get_submodule(where).weight.data = kept[where] + change.float()
        want = cases.logits(model, **{key: value[row : row + 1] for key, value in inputs.items()})
        assert cases.error(got[row : row + 1], want) < 1e-4
    with pytest.raises(ValueError, match="rank must be a positive integer, got 0; shared_scale must be a finite"):
        moerge.patch(model, bank, "twin_merging", rank=0, shared_scale="x")
