"""Layers that patch refuses by name: they carry an adapter, are never called, are no linear layer, or lie in parts."""

from __future__ import annotations

import types
import warnings
from types import SimpleNamespace

import builders
import guard_cases as cases
import pytest
import torch
from torch import nn

import moerge_ext as moerge
from moerge_ext.routing.callers import Use, use_of
from moerge_ext.training.gated_lora import gated_model

Q = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]


def refused(model: nn.Module, paths) -> str:
    with pytest.raises(ValueError, match="cannot patch the model") as caught:
        moerge.patch(model, cases.experts(model, paths))
    assert not any(isinstance(module, moerge.RoutedLinear) for module in model.modules())
    return str(caught.value)


def base_weights_read_past(model: nn.Module) -> list[str]:
    """The layers that one forward passes by: what patch should refuse."""
    ran = set()
    hooks = [m.register_forward_pre_hook(lambda m, a, p=p: ran.add(p)) for p, m in model.named_modules()]
    model(cases.ids(1, 5)) if hasattr(model, "get_input_embeddings") else None
    for hook in hooks:
        hook.remove()
    return [path for path in cases.linears(model) if path not in ran]


# ---- a parent that reads the weight ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba"])
@torch.no_grad()
def test_layers_whose_weight_is_read_are_refused_and_no_others(kind):
    model = cases.mamba(kind)
    passed_by = base_weights_read_past(model)
    assert passed_by == [f"backbone.layers.{layer}.mixer.dt_proj" for layer in (0, 1)]
    text = refused(model, cases.linears(model))
    assert all(path in text for path in passed_by) and "in_proj" not in text and f"{kind}Mixer reads its weight" in text
    with moerge.patch(model, cases.experts(model, cases.linears(model, "dt_proj")), strict=True):
        model(cases.ids(1, 5))


def test_attention_by_a_function_of_torch():
    model = cases.wavlm()
    text = refused(model, [f"encoder.layers.0.attention.{n}_proj" for n in "qkv"])
    assert "WavLMAttention reads its weight and never calls it" in text
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    assert "MultiheadAttention reads its weight" in refused(attention, ["a.out_proj"])


@torch.no_grad()
def test_torchs_fast_path():
    model, x = cases.Encoder(batch_first=True).eval(), torch.randn(2, 5, 16)
    paths = ["layers.layers.0.linear1", "layers.layers.1.linear2"]
    assert "set_fastpath_enabled(False)" in refused(model, paths)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        base = model(x)
        with moerge.patch(model, cases.experts(model, paths), strict=True):
            assert not torch.allclose(model(x), base)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    slow = cases.Encoder(batch_first=False).eval()
    with moerge.patch(slow, cases.experts(slow, paths), strict=True):
        slow(x)


def test_conditions_about_the_module_itself_are_answered():
    class Gated(nn.Module):
        def __init__(self, fused: bool):
            super().__init__()
            self.proj, self.fused = nn.Linear(4, 4), fused

        def forward(self, x):
            if self.fused and hasattr(self, "proj"):
                return x @ self.proj.weight.T
            return self.proj(x.to(self.proj.weight.dtype))

    assert use_of(Gated(True), "proj") == Use(read=True)
    assert use_of(Gated(False), "proj") == Use(called=True)
    assert use_of(nn.Sequential(nn.Linear(4, 4)), "0") is None


def test_a_module_that_keeps_tensors_as_plain_attributes():
    """As recurrent models keep their states from one forward to the next."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.state = nn.Linear(4, 4), torch.zeros(2, 4)

        def forward(self, x):
            self.state = self.state + self.proj(x)
            return self.state

    assert use_of(Recurrent(), "proj") == Use(called=True)


def test_a_fused_kernel_that_asks_for_pefts_adapters():
    def fast(self, x):
        layer = self.up
        if getattr(layer, "disable_adapters", True):
            return self.side(cases.by_weight(getattr(layer, "base_layer", layer), x))
        raise NotImplementedError

    model = cases.Net()
    model.block.forward = types.MethodType(fast, model.block)
    text = refused(model, ["block.up", "block.side"])
    assert "'block.up'" in text and "fused kernels (Unsloth's)" in text and "block.side" not in text


# ---- what is no linear layer -----------------------------------------------------------------------------------------


def test_a_linear_layer_that_returns_a_tuple():
    class Pair(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T, x

    text = refused(nn.Sequential(Pair(8, 8, bias=False)), ["0"])
    assert "module '0'" in text and "Pair" in text and "into a tuple" in text


class Own(nn.Linear):
    """Linear layers whose own forward takes what else they hold, by module, plain attribute and closure."""

    def __init__(self):
        super().__init__(8, 8, bias=False)
        self.scale, table = torch.ones(8), [torch.ones(8)]
        self.down = nn.Linear(8, 8)
        self.hooked = nn.Sequential(nn.Linear(8, 8))
        self.hooked[0].register_forward_hook(lambda module, args, y: y + table[0])
        self.table = table

    def forward(self, x):
        return x @ self.weight.T * self.scale + self.down(x) + self.hooked(x)


class Closed(Own):
    def forward(self, x):
        return super().forward(x) + self.table[0]


@pytest.mark.parametrize("kind", [Own, Closed])
def test_a_subclass_that_is_a_linear_layer_passes(kind):
    model, x = nn.Sequential(kind()), torch.randn(2, 8)
    plain, experts = model(x), cases.experts(model, ["0"])
    module = experts.modules["0"]
    with moerge.patch(model, experts, "merged"):
        want = plain + x @ torch.einsum("erd,eor->do", module.lora_A, module.lora_B) / len(experts.names)
        torch.testing.assert_close(model(x), want)


def test_a_tuple_that_only_shows_when_it_runs():
    class Loud(nn.Module):
        in_features = out_features = 8

        def forward(self, x):
            return x, x

    model = nn.Sequential(Loud())
    with moerge.patch(model, cases.experts(model, ["0"])), pytest.raises(TypeError, match="0: Loud returned a tuple"):
        model(torch.randn(2, 8))


# ---- adapters of PEFT ------------------------------------------------------------------------------------------------


def adapted(**fields):
    peft = pytest.importorskip("peft")
    model = builders.tiny_llama()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **fields))
    return model


def test_an_adapter_of_transformers():
    model = adapted()
    text = refused(model, Q)
    assert all(path in text for path in Q) and "'default'" in text and "model.delete_adapter('default')" in text
    model.delete_adapter("default")
    with moerge.patch(model, cases.experts(model, Q)):
        model(cases.ids(1, 4))


@pytest.mark.parametrize("config", ["LoraConfig", "LoHaConfig", "IA3Config", "VeraConfig"])
def test_the_base_model_of_a_peft_model_still_carries_its_adapters(config):
    peft = pytest.importorskip("peft")
    fields = {"feedforward_modules": []} if config == "IA3Config" else {}
    wrapped = peft.get_peft_model(builders.tiny_llama(), getattr(peft, config)(target_modules=["q_proj"], **fields))
    text = refused(wrapped.get_base_model(), Q)
    assert "'default'" in text and "peft_model.unload()" in text
    with pytest.raises(ValueError, match=r"pass model\.unload\(\).*get_base_model\(\) leaves them on"):
        moerge.patch(wrapped, cases.experts(wrapped.get_base_model(), []))
    base = wrapped.unload()
    with moerge.patch(base, cases.experts(base, Q)):
        base(cases.ids(1, 4))


@torch.no_grad()
def test_a_merged_adapter_is_part_of_the_base():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(builders.tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    wrapped.merge_adapter()
    base = wrapped.get_base_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        moerge.patch(base, cases.experts(base, Q)).remove()


def test_idle_adapters_and_those_on_other_layers_are_said():
    model = adapted()
    with pytest.warns(UserWarning, match=f"'default' stays active beside the experts in {Q[0]}"):
        moerge.patch(model, cases.experts(model, ["model.layers.0.mlp.up_proj"])).remove()
    model.disable_adapters()
    with pytest.warns(UserWarning, match=f"'default' is there but idle in {Q[0]}"):
        moerge.patch(model, cases.experts(model, Q)).remove()


def test_peft_on_a_patched_model():
    """It cannot train below the experts: a routed layer is refused by PEFT, by name, or left alone."""
    peft = pytest.importorskip("peft")
    model = builders.tiny_llama()
    handle = moerge.patch(model, cases.experts(model, Q))
    with pytest.raises(ValueError, match="RoutedLinear"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    handle.remove()
    model = builders.tiny_llama()
    handle = moerge.patch(model, cases.experts(model, Q))
    peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    routed = [model.get_submodule(name) for name in handle.modules]
    assert {type(layer.base_layer) for layer in routed} == {torch.nn.Linear}
    assert not [name for layer in routed for name, _ in layer.named_parameters() if "default" in name]


def test_gate_training_is_on(tmp_path):
    model = builders.tiny_llama()
    folder = builders.random_experts(model, tmp_path, ["ant"], ["q_proj"])["ant"]
    with gated_model(model, folder):
        assert "GatedLoRA with a LoRA of its own" in refused(model, Q)


# ---- models in parts -------------------------------------------------------------------------------------------------


def test_tensor_parallel():
    model = builders.tiny_llama()
    model._tp_size = 2
    assert "tensor parallel (tp_size=2)" in refused(model, Q)
    model._tp_size = 1
    moerge.patch(model, cases.experts(model, Q)).remove()


def sharded(rank: int, port: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = builders.tiny_llama()
    want, inputs = None, cases.ids(2, 6)
    experts = cases.experts(model, Q)
    with torch.no_grad(), moerge.patch(model, experts):
        want = model(inputs).logits
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with torch.no_grad(), moerge.patch(model, experts):
        assert torch.allclose(model(inputs).logits, want, atol=1e-5)
    model = builders.tiny_llama()
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"model.layers.*.self_attn.q_proj": ColwiseParallel()})
    assert "its weight is a DTensor" in refused(model, Q)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_fsdp2_passes_and_torchs_tensor_parallel_does_not(free_port):
    torch.multiprocessing.spawn(sharded, args=(free_port,), nprocs=2)


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- layers that no branch can reach ---------------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.up = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return self.up(self.attention(x, x, x)[0])


def test_what_changes_nothing_there_is_left_out():
    """As PEFT's all-linear leaves it: what it trains there gets no gradient."""
    model, x = Attends().eval(), torch.randn(2, 3, 8)
    bank = cases.experts(model, ["attention.out_proj", "up"])
    assert "'attention.out_proj'" in refused(model, ["attention.out_proj", "up"])
    bank.modules["attention.out_proj"]._lora_B.zero_()
    with pytest.warns(UserWarning, match=r"'attention\.out_proj' is left out, where no expert changes anything"):
        handle = moerge.patch(model, bank, "expert:ant")
    assert [*handle.modules] == ["up"]
    with torch.no_grad():
        got, module = model(x), bank.modules["up"]
        handle.remove()
        hidden = model.attention(x, x, x)[0]
        want = model.up(hidden) + hidden @ module.lora_A[0].T @ module.lora_B[0].T
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_what_changes_nothing_there_joins_and_gets_no_gate(tmp_path):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(Attends(), peft.LoraConfig(r=2, target_modules=["out_proj", "up"]))
    nn.init.normal_(tuned.base_model.model.up.lora_B["default"].weight)
    tuned.save_pretrained(tmp_path / "late")
    model, x = Attends(), torch.randn(2, 3, 8)
    with (
        pytest.warns(UserWarning, match="is left out"),
        moerge.patch(model, moerge.load_experts([tmp_path / "late"]), "given", spare=1) as handle,
    ):
        handle.add_expert(tmp_path / "late", name="later")
        assert handle.names == ("late", "later")
    forward = model.forward
    model.forward = lambda x: SimpleNamespace(loss=forward(x).square().mean())
    for write in (moerge.train_gates, moerge.average_activation):
        options = {"steps": 1} if write is moerge.train_gates else {}
        with pytest.warns(UserWarning, match=r"no gate for attention\.out_proj, where 'late' changes nothing"):
            write(model, tmp_path / "late", [{"x": x}], progress=False, **options)
    del model.forward
    with pytest.warns(UserWarning, match="is left out"):
        moerge.patch(model, moerge.load_experts([tmp_path / "late"]), "phatgoose").remove()
