"""The ops inside torch: opcheck, compile, autocast, threads, fake and meta tensors, devices, memory."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from op_cases import gradients, lora, rand, router
from torch.fx.experimental.proxy_tensor import make_fx

from moerge_ext import ops
from moerge_ext.ops import reference

_ops = torch.ops.moerge


def sample(T=12, N=3, dtype=torch.float32, grad=False):
    """Inputs of routed_lora with every option, by name."""
    case = lora(T, 10, 6, 2, 4, 8, base=dtype, x=dtype, bank=dtype, lora_bias=True)
    case = {n: t for n, t in case.items() if n not in ("weights", "experts")}
    case |= {"gates": rand(6, 10, seed=3), "bias": rand(N, 6, seed=4)}
    return {n: t.requires_grad_(grad) for n, t in case.items()}


def routed(case, module=ops, **options):
    return module.routed_lora(**case, top_k=3, mask=torch.ones(6, dtype=torch.bool), **options)


OTHERS = [(torch.float32, False), (torch.bfloat16, True)]


def opcheck(op, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    ("dtype", "grad"),
    [(torch.float32, True), *(pytest.param(d, g, marks=pytest.mark.slow) for d, g in OTHERS)],
    ids=str,
)
def test_opcheck(dtype, grad):
    """Schema, fake kernels, autograd registration and AOT dispatch with static and dynamic shapes."""
    c = sample(dtype=dtype, grad=grad)
    x, gates, base, a, b = c["x"], c["gates"], c["base"], c["lora_a"], c["lora_b"]
    rows, mask = torch.tensor([0, 2, 1] * 4).int(), torch.tensor([1, 0, 1, 1, 1, 1]).bool()
    opcheck(_ops.route.default, x, gates)
    opcheck(_ops.route.default, x, gates, 3, "unit", True, 0.5, c["bias"], rows, mask, 0.8, "softmax_all")
    weights, ids = (t.detach() for t in ops.route(x, gates))
    weights.requires_grad_(grad)
    opcheck(_ops.lora_apply.default, base, x, a, b, weights, ids)
    opcheck(_ops.lora_apply.default, base, x, a, b, weights[:3], ids[:3], c["lora_bias"], rows, True)
    opcheck(_ops.routed_lora.default, base, x, gates, a, b, 2, "standardize", False, None, c["bias"], rows, mask)
    logits = rand(2, 3, 9, dtype=dtype).requires_grad_(grad)
    opcheck(_ops.mix_log_probs.default, logits, torch.ones(3, 2).requires_grad_(grad))


def test_opcheck_without_gradient():
    c = sample()
    weights, ids = ops.route(c["x"], c["gates"])
    inputs = (c["x"], c["lora_a"], c["lora_b"], weights, ids)
    opcheck(_ops.lora_apply_.default, c["base"], *inputs)
    for shape in ((12,), (3, 4)):
        base, x = (c[name].detach().clone().unflatten(0, shape) for name in ("base", "x"))
        opcheck(_ops.routed_lora_.default, base, x, c["gates"], c["lora_a"], c["lora_b"])
    opcheck(_ops.pack_experts.default, c["lora_a"], c["lora_b"])
    packed = ops.pack_experts(c["lora_a"], c["lora_b"])
    opcheck(_ops.lora_apply.default, c["base"], *inputs, None, None, False, packed)
    for needs in (0, 5, 10, 31):
        opcheck(_ops.lora_apply_backward.default, c["base"], *inputs, needs, c["lora_bias"])
        opcheck(_ops.route_backward.default, weights, weights, ids, c["x"], c["gates"], needs & 7, 2)
    logits, w = rand(2, 3, 9), torch.ones(3, 2)
    result = ops.mix_log_probs(logits, w)
    for needs in range(4):
        opcheck(_ops.mix_log_probs_backward.default, result, result, logits, w, needs)


def model(base, x, gates, lora_a, lora_b, lora_bias, bias):
    y, weights, experts = ops.routed_lora(
        base * 2, x.sin(), gates, lora_a, lora_b, top_k=3, bias=bias, lora_bias=lora_bias
    )
    again, _ = ops.route(y @ y.new_ones(y.shape[1], x.shape[1]), gates.to(y.dtype), weighting="sigmoid")
    y = ops.lora_apply(y, x, lora_a, lora_b, again, experts[:, :2], factored=True)
    return y, weights, experts


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compile_with_gradients(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (12, 3, 48):
        case = sample(T)
        want, want_grads = gradients(model, case, tuple(case))
        got, grads = gradients(compiled, case, tuple(case))
        assert torch.equal(got[2], want[2])
        for a, b in zip((*got[:2], *grads.values()), (*want[:2], *want_grads.values()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_inductor(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for T in (12, 48):
        case = sample(T)
        want, want_grads = gradients(model, case, tuple(case))
        got, grads = gradients(compiled, case, tuple(case))
        for a, b in zip((*got[:2], *grads.values()), (*want[:2], *want_grads.values()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dynamic_tokens_compile_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, g: ops.route(x * 1, g), fullgraph=True, dynamic=True, backend=counter)
    for T in (5, 9, 33, 1000):
        x, gates = router(T)
        assert torch.equal(compiled(x, gates)[1], ops.route(x, gates)[1])
    assert counter.frame_count == 1


def test_compile_in_place():
    torch._dynamo.reset()

    def step(base, x, a, b, weights, ids):
        y = base + 1
        ops.lora_apply_(y, x, a, b, weights, ids)
        ops.lora_apply_(base, x, a, b, weights, ids)
        return y * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (4, 33):
        case = lora(T)
        with torch.no_grad():
            mine, other = case["base"].clone(), case["base"].clone()
            rest = [case[n] for n in ("x", "lora_a", "lora_b", "weights", "experts")]
            assert torch.equal(compiled(mine, *rest), step(other, *rest)) and torch.equal(mine, other)
        with torch.inference_mode():
            assert torch.equal(compiled(case["base"].clone(), *rest), step(case["base"].clone(), *rest))


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_nothing(dtype, module):
    def run():
        case = sample()
        outputs, grads = gradients(lambda **c: routed(c, module=module), case, tuple(case))
        # torch's own backward of a product obeys the autocast in which backward is called
        grads = grads if module is ops else {}
        return *outputs, *grads.values(), module.mix_log_probs(logits=rand(2, 3, 5), weights=torch.ones(3, 2))

    want = run()
    with torch.autocast("cpu", dtype=dtype):
        got = run()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "D"), [(1, 70), (1, 50000), (3, 18000), (530, 70)])  # with one thread and with all
def test_any_number_of_threads_gives_the_same_bits(T, D, dtype):
    case = lora(T, D, 9, 3, 5, 600, base=dtype, x=dtype, bank=dtype, lora_bias=True)
    del case["weights"], case["experts"]
    case |= {"gates": rand(D, 9, seed=3).t(), "bias": rand(1, 9, seed=4)}
    case["lora_a"] = case["lora_a"].mT.contiguous().mT
    mixture = {"logits": rand(3, 7, 9001, seed=5, dtype=dtype), "weights": rand(7, 3, seed=6).sigmoid()}

    def run():
        results = []
        for factored in (False, True):
            outputs, grads = gradients(ops.routed_lora, case, tuple(case), top_k=3, factored=factored)
            results += [*outputs, *grads.values()]
        outputs, grads = gradients(ops.mix_log_probs, mixture, tuple(mixture))
        return [*results, *outputs, *grads.values()]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run()
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True)), threads
    finally:
        torch.set_num_threads(before)


def test_meta_and_fake_tensors():
    case = sample()
    want = routed(case)
    meta = ops.routed_lora(**{n: t.to("meta") for n, t in case.items()}, top_k=3)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ops.routed_lora(**{n: mode.from_tensor(t) for n, t in case.items()}, top_k=3)
    for real, *others in zip(want, meta, fake, strict=True):
        for other in others:
            assert (other.shape, other.dtype, other.stride()) == (real.shape, real.dtype, real.stride())
    assert meta[0].device.type == "meta"
    assert ops.mix_log_probs(torch.empty(2, 3, 4, device="meta"), torch.empty(3, 2, device="meta")).shape == (3, 4)


def test_a_device_without_kernels_is_named():
    x, gates = router()
    with pytest.raises(ValueError, match=r"^moerge::route: this build has no kernels for .*reference"):
        ops.route(x.to_sparse(), gates)


def test_inference_mode():
    with torch.inference_mode():
        case = sample()
        y = routed(case)[0]
    assert torch.equal(y, routed(sample())[0])


def test_without_gradient_autograd_is_not_entered():
    """And what stands around the ops sees them as before: fake tensors, tracing, functorch."""
    case, entered = sample(grad=True), []

    def watch(frame, *event):
        if frame.f_code.co_filename.endswith("autograd.py"):
            entered.append(frame.f_code.co_name)

    def run():
        sys.setprofile(watch)
        try:
            return routed(case)[0]
        finally:
            sys.setprofile(None)

    want = run()
    assert entered and want.requires_grad
    entered.clear()
    with torch.no_grad():
        y = run()
        assert not entered and torch.equal(y, want) and not y.requires_grad and not y.is_inference()
        case = sample()
        graph = make_fx(lambda base, x: ops.route(x, case["gates"])[0] + base[:, :2])(case["base"], case["x"]).graph
        assert _ops.route.default in [node.target for node in graph.nodes]
        with torch._subclasses.FakeTensorMode() as mode:
            fake = ops.routed_lora(**{n: mode.from_tensor(t) for n, t in case.items()})[0]
        assert isinstance(fake, torch._subclasses.FakeTensor) and fake.shape == y.shape

    def detached(x):
        with torch.no_grad():
            return ops.route(x, case["gates"])[0]

    weights = detached(case["x"])
    both = torch.func.grad(lambda x: (detached(x) * x[:, :2]).sum())(case["x"])
    assert torch.equal(both[:, :2], weights) and not both[:, 2:].any()
    assert torch.equal(torch.func.vmap(detached)(case["x"][None])[0], weights)


def test_errors_are_value_errors_under_no_grad_and_grad():
    case = sample(grad=True)
    for mode in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with mode, pytest.raises(ValueError, match=r"^moerge::routed_lora: top_k must be in \[1, E=6\], got 7$"):
            ops.routed_lora(**case, top_k=7)


def test_a_meta_tensor_among_others_is_refused():
    x, gates = torch.randn(2, 3), torch.randn(3, 3)
    with pytest.raises(ValueError, match="must be on one device, got cpu, meta"):
        ops.route(x, gates, mask=torch.ones(3, dtype=torch.bool, device="meta"))
