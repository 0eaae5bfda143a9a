"""Experts, gates and mean activations of models that do not read `input_ids`: speech and images."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from gate_builders import (
    Untouched,
    make_adapter,
    one_thread,  # noqa: F401 (used by being here)
    quiet,
)
from safetensors.torch import load_file

import moerge_ext as moerge
from moerge_ext.experts.gates import read_gates
from moerge_ext.training.activation import average_activation
from moerge_ext.training.experts import train_expert
from moerge_ext.training.gated_lora import gated_model
from moerge_ext.training.gates import train_gates

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
SPEECH_TEXT = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_target_positions": 20,
    "pad_token_id": 0,
    "decoder_start_token_id": 3,
}
IMAGE = {**SIZES, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}


def whisper():
    config = transformers.WhisperConfig(num_mel_bins=8, max_source_positions=20, bos_token_id=1, eos_token_id=2,
                                        suppress_tokens=None, begin_suppress_tokens=None, **SPEECH_TEXT)  # fmt: skip
    batch = {"input_features": torch.randn(2, 8, 40), "labels": torch.randint(4, 60, (2, 6))}
    return transformers.WhisperForConditionalGeneration(config), batch


def speech2text():
    config = transformers.Speech2TextConfig(
        input_feat_per_channel=8, conv_channels=8, max_source_positions=60, **SPEECH_TEXT
    )
    batch = {"input_features": torch.randn(2, 40, 8), "attention_mask": torch.ones(2, 40, dtype=torch.long)}
    return transformers.Speech2TextForConditionalGeneration(config), batch | {"labels": torch.randint(4, 60, (2, 6))}


def vision_text():
    decoder = transformers.TrOCRConfig(
        vocab_size=60, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24,
        max_position_embeddings=20, cross_attention_hidden_size=16, is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    encoder = transformers.ViTConfig(**IMAGE)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    batch = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.randint(4, 60, (2, 6))}
    return transformers.VisionEncoderDecoderModel(config), batch


def vit():
    config = transformers.ViTConfig(num_labels=3, **IMAGE)
    return transformers.ViTForImageClassification(config), {
        "pixel_values": torch.randn(2, 3, 8, 8),
        "labels": torch.tensor([0, 2]),
    }


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        vocab_size=20, num_hidden_layers=2, conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(4, 4),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_length=2, **SIZES,
    )  # fmt: skip
    batch = {"input_values": torch.randn(2, 800), "attention_mask": torch.ones(2, 800, dtype=torch.long)}
    return transformers.Wav2Vec2ForCTC(config), batch | {"labels": torch.randint(1, 20, (2, 4))}


def parakeet():
    """Its encoder has batch normalization."""
    encoder = {"num_hidden_layers": 1, "num_mel_bins": 16, "subsampling_factor": 4, "subsampling_conv_channels": 8}
    config = transformers.ParakeetCTCConfig(
        vocab_size=20, pad_token_id=19, encoder_config={**SIZES, **encoder, "conv_kernel_size": 3}
    )
    batch = {"input_features": torch.randn(2, 60, 16), "attention_mask": torch.ones(2, 60, dtype=torch.long)}
    return transformers.ParakeetForCTC(config), batch | {"labels": torch.randint(1, 19, (2, 3))}


MODELS = {f.__name__: f for f in (whisper, speech2text, vision_text, vit, wav2vec2, parakeet)}
UNUSED = {"vision_text": {"encoder.pooler.dense"}}  # runs, and nothing reads it


@pytest.mark.filterwarnings("ignore:no gate is written")
@pytest.mark.parametrize("name", MODELS)
def test_experts_gates_and_activations(name, tmp_path):
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    model.eval()
    untouched = Untouched(model)
    result = train_expert(model, [batch], tmp_path / "e", rank=2, alpha=4, **quiet(steps=8, lr=0.02))
    untouched.check()
    assert min(result.losses[4:]) < result.losses[0]
    assert json.loads((tmp_path / "e" / "adapter_config.json").read_text())["task_type"] is None
    tensors = load_file(tmp_path / "e" / "adapter_model.safetensors")
    silent = {key for key, value in tensors.items() if "lora_B" in key and not value.any()}
    assert silent == {f"base_model.model.{path}.lora_B.weight" for path in UNUSED.get(name, ())}

    folder = make_adapter(model, tmp_path / "a")
    untouched = Untouched(model)
    train_gates(model, folder, [batch], **quiet(lr=0.02))
    untouched.check()
    average_activation(model, folder, [batch], progress=False)
    untouched.check()
    gates = read_gates(folder)
    assert gates["average-activation"].gates.keys() - gates["sigmoid-gate"].gates.keys() == UNUSED.get(name, set())
    moerge.patch(model, moerge.load_experts([folder]), "average_activation", top_k=1).remove()


@pytest.mark.parametrize("name", ["whisper", "vit", "wav2vec2"])
def test_reentrant_checkpointing_without_input_ids(name, tmp_path):
    """No token embedding stands before the first block; its gates learn all the same."""

    def trained(reentrant):
        torch.manual_seed(0)
        model, batch = MODELS[name]()
        if reentrant:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        folder = make_adapter(model, tmp_path / "a")
        train_gates(model, folder, [batch], **quiet(steps=2))
        return read_gates(folder)["sigmoid-gate"].gates

    plain, checkpointed = trained(False), trained(True)
    assert plain.keys() == checkpointed.keys()
    for path, gate in plain.items():
        torch.testing.assert_close(checkpointed[path], gate, rtol=1e-3, atol=1e-6)


def test_padding_of_speech_does_not_count(tmp_path):
    torch.manual_seed(0)
    model, batch = wav2vec2()
    model.eval()
    batch["attention_mask"][1, 400:] = 0
    folder = make_adapter(model, tmp_path / "a")
    inputs = {}
    with gated_model(model, folder, gate=False) as gated, torch.no_grad():
        for path, layer in gated.layers.items():
            layer.register_forward_pre_hook(lambda _m, args, path=path: inputs.__setitem__(path, args[0]))
        gated.model.eval()
        model(**batch)
    average_activation(model, folder, [batch], progress=False)
    mask = model._get_feature_vector_attention_mask(50, batch["attention_mask"]).bool()
    assert mask.sum(1).tolist() == [50, 25]
    for path, gate in read_gates(folder)["average-activation"].gates.items():
        torch.testing.assert_close(gate, inputs[path][mask].mean(0), rtol=1e-4, atol=1e-6)
