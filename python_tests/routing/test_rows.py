"""Several rows of affinities: each token has the row of its own sequence, or the forward is refused."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import builders
import guard_cases as cases
import moe_cases
import pytest
import torch
import transformers
from torch import Tensor, nn

import moerge_ext as moerge

TWO = torch.tensor([[5.0, 0, 0], [0, 0, 5.0]])
LONG = {**cases.DECODER, "attention_window": 8, "max_position_embeddings": 64}
FSMT = {
    "langs": ["en", "de"], "src_vocab_size": 96, "tgt_vocab_size": 96, "d_model": 32, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}  # fmt: skip
SIZES = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
XLNET = {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}


def routed(model: nn.Module, *without: str) -> moerge.Handle:
    return moerge.patch(model, cases.experts(model, cases.linears(model, *without)), "glider_code", alpha=1000, top_k=1)


@torch.no_grad()
def check(model: nn.Module, *without: str, **inputs: Tensor) -> None:
    """A batch of two with its two rows is what each sequence is with its own."""
    with routed(model, *without) as handle:
        with handle.affinities(TWO):
            both = model(**inputs)[0]
        with handle.affinities(TWO[0]):
            assert not torch.allclose(model(**inputs)[0][1], both[1], atol=1e-2)  # the rows do matter
        for row in (0, 1):
            with handle.affinities(TWO[row]):
                alone = model(**{key: value[row : row + 1] for key, value in inputs.items()})[0][0]
            assert torch.allclose(alone, both[row], atol=1e-4), row


@pytest.mark.parametrize("length", [7, 16])
def test_time_first_in_attention(length):
    check(cases.make("LongformerModel", "LongformerConfig", **LONG), input_ids=cases.ids(2, length))


@pytest.mark.parametrize("tokens", [1, 2])
def test_time_first_on_some_tokens(tokens):
    mask = torch.zeros(2, 16, dtype=torch.long)
    mask[:, :tokens] = 1
    model = cases.make("LongformerModel", "LongformerConfig", **LONG)
    check(model, input_ids=cases.ids(2, 16), global_attention_mask=mask)


def test_time_first_throughout():
    check(cases.make("XLNetModel", "XLNetConfig", **XLNET), input_ids=cases.ids(2, 7))
    model = cases.make("FSMTModel", "FSMTConfig", **FSMT)
    model.config.use_cache = False  # with a cache transformers 5.0 decodes the last token alone
    check(model, input_ids=cases.ids(2, 7), decoder_input_ids=cases.ids(2, 5))


@torch.no_grad()
def test_as_many_tokens_as_sequences():
    check(builders.tiny_llama(), input_ids=cases.ids(2, 2))
    model = cases.make("XLNetModel", "XLNetConfig", **XLNET)
    with routed(model) as handle, handle.affinities(TWO):
        with pytest.raises(ValueError, match=r"\[2, 2, 32\] is \[batch, length, D\] or \[length, batch, D\]"):
            model(cases.ids(2, 2))
        model(cases.ids(2, 3))
        square = model(cases.ids(2, 2))[0]
    with routed(model) as handle, handle.affinities(TWO[1]):
        assert torch.allclose(model(cases.ids(2, 2)[1:])[0][0], square[1], atol=1e-4)


def test_flattened_by_the_model():
    fields = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = cases.make("OPTForCausalLM", "OPTConfig", **fields, ffn_dim=48, word_embed_proj_dim=32)
    check(model, input_ids=cases.ids(2, 7))
    model = cases.make("BertForSequenceClassification", "BertConfig", **cases.DECODER)
    check(model, input_ids=cases.ids(2, 7))


def router_is_flat(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the model flattens the batch before the router."""
    (router, *_) = (m for name, m in model.named_modules() if name.endswith("router.classifier"))
    dims = []
    hook = router.register_forward_pre_hook(lambda _, args: dims.append(args[0].dim()))
    model(**inputs)
    hook.remove()
    return dims[0] == 2


@torch.no_grad()
def test_experts_of_a_mixture_see_a_choice():
    model = cases.switch(2)
    inputs = {"input_ids": cases.ids(2, 7), "decoder_input_ids": cases.ids(2, 6)}
    flat = router_is_flat(model, inputs)  # transformers 5.0: its router is refused
    without = ("router",) if flat else ()
    text = r"experts\.expert_\d\.wi: tokens are not in batch order here"
    with routed(model, *without) as handle, handle.affinities(TWO), pytest.raises(ValueError, match=text):
        model(**inputs)
    with routed(model) as handle, handle.affinities(TWO[0]):
        model(**inputs)  # one row serves all
    check(model, "experts", *without, **inputs)


@torch.no_grad()
def test_images():
    model, tokens = cases.llava(), cases.ids(2, 10)
    one_each = tokens.clone()
    one_each[:, 1:5] = 95
    check(model, "lm_head", input_ids=one_each, pixel_values=torch.randn(2, 3, 16, 16))
    both_in_one = tokens.clone()
    both_in_one[0, 1:9] = 95
    inputs = {"input_ids": both_in_one, "pixel_values": torch.randn(2, 3, 16, 16)}
    text = "vision_tower.*tokens are not in batch order here"
    with routed(model) as handle, handle.affinities(TWO), pytest.raises(ValueError, match=text):
        model(**inputs)
    with routed(model, "vision_tower", "projector") as handle, handle.affinities(TWO):
        model(**inputs)


@torch.no_grad()
def test_image_patches_back_to_back():
    text = {**cases.DECODER, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"embed_dim": 32, "hidden_size": 32, "depth": 1, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    model = cases.make(
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig", text_config=text, vision_config=vision, image_token_id=95,
        video_token_id=94, vision_start_token_id=93,
    )  # fmt: skip
    tokens = cases.ids(2, 10)
    tokens[:, 2:6] = 95
    images = {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}
    text = r"visual.*tokens are not in batch order here: its input is \[32, 32\]"
    with routed(model) as handle, handle.affinities(TWO), pytest.raises(ValueError, match=text):
        model(input_ids=tokens, mm_token_type_ids=(tokens == 95).int(), **images)
    check(model, "visual", "lm_head", input_ids=cases.ids(2, 7))


@pytest.mark.parametrize("sub", ["ends", "positions"])
@torch.no_grad()
def test_packed_sequences(sub):
    model, parts = builders.tiny_llama(), [cases.ids(1, 5), cases.ids(1, 3, seed=1)]
    packed = torch.cat(parts, 1)
    positions = torch.cat([torch.arange(5), torch.arange(3)])[None]
    ends = torch.tensor([0, 5, 8], dtype=torch.int32)
    marks = {"position_ids": positions} | ({"cu_seq_lens_q": ends, "cu_seq_lens_k": ends} if sub == "ends" else {})
    with routed(model) as handle:
        alone = []
        for row, part in enumerate(parts):
            with handle.affinities(TWO[row]):
                alone.append(model(part).logits)
        with handle.affinities(TWO):
            got = model(packed, use_cache=False, **marks).logits
            assert torch.allclose(got, torch.cat(alone, 1), atol=1e-4)
            with pytest.raises(ValueError, match="2 rows of affinities are set and the model got a batch of 1"):
                model(packed)
            with pytest.raises(ValueError, match="the batch packs 1 sequence:"):
                model(packed, position_ids=torch.arange(8)[None])
        with handle.affinities(torch.zeros(3, 3)), pytest.raises(ValueError, match="the batch packs 2 sequences"):
            model(packed, **marks)


@torch.no_grad()
def test_compiled():
    model = builders.tiny_llama()
    with routed(model) as handle:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for length in (7, 5):
            with handle.affinities(TWO):
                x = cases.ids(2, length)
                assert torch.allclose(compiled(x).logits, model(x).logits, atol=1e-5)


@torch.no_grad()
def test_padding_is_no_packed_sequence():
    """One sequence with one pad token has positions that start again, once."""
    model, mask = builders.tiny_llama(), torch.tensor([[0, 1, 1, 1, 1]])
    text = "2 rows of affinities are set and the model got a batch of"
    with routed(model) as handle, handle.affinities(TWO):
        with pytest.raises(ValueError, match=text + " 1"):
            model(cases.ids(1, 5), attention_mask=mask, position_ids=torch.tensor([[1, 0, 1, 2, 3]]))
        with pytest.raises(ValueError, match=text + " 1"):
            model.generate(cases.ids(1, 5), attention_mask=mask, max_new_tokens=2)
        with pytest.raises(ValueError, match=text + " 3"):
            model.generate(cases.ids(3, 5), max_new_tokens=2)


# ---- forwards side by side, and those that backward repeats ----------------------------------------------------------


def packed(first: int, second: int, seed: int = 0) -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(first), torch.arange(second)])[None]
    return {"input_ids": cases.ids(1, first + second, seed), "position_ids": positions, "use_cache": False}


def test_threads_of_one_block_pack_their_own():
    model, batches = builders.tiny_llama(), [packed(first, 24 - first) for first in (2, 6, 12, 20)]

    @torch.no_grad()
    def ask(i: int) -> Tensor:
        return model(**batches[i]).logits

    with routed(model) as handle, handle.affinities(TWO):
        want = [ask(i) for i in range(4)]
        with ThreadPoolExecutor(4) as pool:
            for i, got in enumerate(pool.map(ask, [i % 4 for i in range(48)], timeout=60)):
                assert torch.equal(got, want[i % 4]), i


def gradients(model: nn.Module, run: Callable[[], Tensor], **checkpointing) -> list[Tensor]:
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    model.train()
    run().backward()
    model.eval()
    model.gradient_checkpointing_disable()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("experts_of", ["linears", "mixture"])
@pytest.mark.filterwarnings("ignore")
def test_backward_repeats_each_forward_as_it_was(experts_of, reentrant, tmp_path):
    """Forwards of several batches and blocks, one backward after all: each has its own rows, with checkpointing too."""
    if experts_of == "linears":
        model = builders.tiny_llama()
        bank = cases.experts(model, cases.linears(model))
    else:
        model = moe_cases.build("qwen3_moe")
        for i, name in enumerate(cases.NAMES):
            moe_cases.adapter("qwen3_moe", model, tmp_path / name, i, layout="whole", linear="q_proj")
        bank = moerge.load_experts([tmp_path / name for name in cases.NAMES])
    handle = moerge.patch(model, bank, "given")
    x = cases.ids(2, 6)

    def one_block() -> Tensor:
        with handle.affinities(TWO / 5):
            return sum(model(**packed(*parts)).logits.square().mean() for parts in ((5, 3), (2, 6)))

    def two_blocks() -> Tensor:
        loss = 0
        for rows in (TWO / 5, TWO[[1, 0]] / 5, TWO[0] / 5):
            with handle.affinities(rows):
                loss = loss + model(x, use_cache=False).logits.square().mean()
        with handle.disabled():
            return loss + model(x, use_cache=False).logits.square().mean()

    for run in (one_block, two_blocks):
        want, got = gradients(model, run), gradients(model, run, use_reentrant=reentrant)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(want, got, strict=True)), run.__name__


@pytest.mark.parametrize("kind", ["speech", "images"])
@torch.no_grad()
def test_generate_calls_the_encoder_by_itself(kind):
    random, tokens = torch.Generator().manual_seed(0), {"pad_token_id": 0, "eos_token_id": 95, "bos_token_id": 1}
    if kind == "speech":
        fields = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in SIZES.items()}
        model = cases.make(
            "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=96, d_model=32, num_mel_bins=8, **tokens,
            max_source_positions=16, max_target_positions=32, decoder_start_token_id=1, **fields,
        )  # fmt: skip
        inputs = {"input_features": torch.randn(2, 8, 32, generator=random)}
    else:
        encoder = {"model_type": "vit", "image_size": 16, "patch_size": 8, **cases.DECODER, "num_hidden_layers": 1}
        decoder = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "vocab_size": 96}
        model = cases.make(
            "VisionEncoderDecoderModel", "VisionEncoderDecoderConfig", encoder=encoder,
            decoder=decoder | {"add_cross_attention": True} | tokens, decoder_start_token_id=1, **tokens,
        )  # fmt: skip
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=random)}
    only = transformers.GenerationConfig(num_beams=2, max_new_tokens=4, min_new_tokens=4, **tokens)
    only.decoder_start_token_id = 1
    ((name, x),) = inputs.items()
    with routed(model) as handle:
        with handle.affinities(TWO):
            for _ in range(2):  # the second encoder comes after a decoder with more sequences
                both = model.generate(**inputs, generation_config=only)
        for row in (0, 1):
            with handle.affinities(TWO[row]):
                alone = model.generate(**{name: x[row : row + 1]}, generation_config=only)
            assert torch.equal(alone[0], both[row]), row
