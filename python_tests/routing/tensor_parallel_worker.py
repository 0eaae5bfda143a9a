"""One of two gloo processes: a tensor parallel model of transformers, patched, against the same in one process."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import transformers  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402

import moerge_ext as moerge  # noqa: E402
from moerge_ext.routing.patch import check_patch  # noqa: E402

METHODS = ("phatgoose", "arrow", "merged_factors", "expert:bee")
IDS = torch.arange(3, 45).view(2, 21)


def main(model: str, *folders: str) -> None:
    warnings.simplefilter("ignore")
    one = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    shared = parallel(model)
    experts = moerge.load_experts(list(folders))
    plain = logits(shared)
    for method in METHODS:
        with moerge.patch(one, experts, method), moerge.patch(shared, experts, method) as handle:
            same(logits(shared), logits(one), method)
            assert not torch.allclose(logits(one), plain, atol=1e-2), method
            assert len(str(handle.explain()))
            with handle.disabled():
                assert torch.equal(logits(shared), plain)
            if method == "phatgoose":
                assert torch.equal(generated(shared), generated(one))
    assert torch.equal(logits(shared), plain)
    chosen(one, shared, experts)
    affinities(one, shared, experts)
    reference(one, shared, experts)
    refusals(model, shared, experts)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may outlive their group, which ends the interpreter's own exit by SIGABRT


def parallel(model: str, **plan: object):
    config = DistributedConfig(tp_size=2, **plan)
    return transformers.AutoModelForCausalLM.from_pretrained(model, distributed_config=config).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def generated(model) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)


def same(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    error = (got - want).abs().max() / want.abs().max()
    assert error < 1e-5, f"{what}: {error:.2e}"


def chosen(one, shared, experts) -> None:
    """The same experts with the same weights, on all ranks, in layers of both kinds."""
    with moerge.patch(one, experts) as ours, moerge.patch(shared, experts) as theirs:
        with ours.record(tokens=True) as want, theirs.record(tokens=True) as got:
            logits(one), logits(shared)
        for path in ours.modules:
            ((weights, ids),), ((our_weights, our_ids),) = got.calls[path], want.calls[path]
            assert torch.equal(ids, our_ids), path
            assert torch.allclose(weights, our_weights, atol=1e-5), path
        said = [None, None]
        dist.all_gather_object(said, {path: calls[0][1].tolist() for path, calls in got.calls.items()})
        assert said[0] == said[1]


def affinities(one, shared, experts) -> None:
    """What is added to the scores of every row."""
    scores = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    with moerge.patch(one, experts, "glider_code") as ours, moerge.patch(shared, experts, "glider_code") as theirs:
        with ours.affinities(scores), theirs.affinities(scores):
            same(logits(shared), logits(one), "glider_code")
        with theirs.affinities(scores.flip(0)):
            assert not torch.allclose(logits(shared), plain_of(ours, one, scores), atol=1e-3)


def plain_of(handle, one, scores) -> torch.Tensor:
    with handle.affinities(scores):
        return logits(one)


def reference(one, shared, experts) -> None:
    with moerge.patch(one, experts), moerge.patch(shared, experts, backend="reference"):
        same(logits(shared), logits(one), "reference")


def refusals(model: str, shared, experts) -> None:
    """What cannot be right is said by name, on all ranks alike."""
    with moerge.patch(shared, experts):
        raises(RuntimeError, "experts of a tensor parallel model are for inference", lambda: shared(IDS))
    raises(
        ValueError,
        "spare=1: a tensor parallel model has no spare slots",
        lambda: moerge.patch(shared, experts, spare=1),
    )
    rank = dist.get_rank()
    differing = experts if rank else moerge.ExpertBank(experts.names, dict(list(experts.modules.items())[:3]))
    raises(ValueError, "the ranks were given different experts", lambda: moerge.patch(shared, differing))
    raises(ValueError, "the ranks were given different", lambda: moerge.patch(shared, experts, top_k=1 + rank))
    raises(ValueError, "top_k=9", lambda: moerge.patch(shared, experts, top_k=9 if rank else 2))
    check_patch(shared, experts)
    other = parallel(model, tp_plan={"model.layers.*.mlp.up_proj": "packed_colwise"})
    raises(ValueError, "shared out over ranks as 'packed_colwise'", lambda: moerge.patch(other, experts))


def raises(kind: type[Exception], words: str, call) -> None:
    try:
        call()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"nothing was raised: {words}")


if __name__ == "__main__":
    main(*sys.argv[1:])
