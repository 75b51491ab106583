"""Models of transformers, built small from their configurations: nothing is downloaded.

Widths that stand side by side differ, so that a mistaken one shows: 64 wide, 4 heads (2 for keys and values where they
are grouped), feed-forward 96 (80 in decoders), vocabulary 128, texts of 11 and 7 tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import UsageError
from graphprune.zoo.models import ZooModel, vary

__all__ = [
    "BOTH",
    "DECODER",
    "ENCODER",
    "FAST",
    "IMAGE",
    "SOUND",
    "TEXT",
    "TEXTS",
    "VISION",
    "VOCABULARY",
    "WAVE",
    "TransformersModel",
    "model",
    "transformers_models",
]

FAST = ("distilbert", "vit", "beit", "segformer", "t5", "gpt2", "llama", "qwen", "mixtral")
"""Those that are quick to capture, and the ones that language models are most like."""

PARTS = ("heads", "feed-forward", "embedding")
VOCABULARY = 128
_LENGTH, _ANSWER = 11, 7


@dataclass(frozen=True, kw_only=True)
class TransformersModel(ZooModel):
    """A model of transformers with random weights."""

    architecture: str
    """The class of the model; its configuration is found by it."""
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Parameter -> shape of one sample; integers where the name ends in ``ids``."""

    @property
    def input_text(self) -> str:
        """The shapes of one sample as text, ``input_ids 11``."""
        return ", ".join(f"{name} {'x'.join(map(str, s))}" for name, s in self.inputs.items())

    def build(self, *, seed: int = 0) -> nn.Module:
        """Return the model with random weights, in evaluation mode; no tensor is constant."""
        library = _library()
        kind = getattr(library, self.architecture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = kind(_config(library, kind.config_class, self.options))
            vary(model)
        return model.eval()

    def example(self, *, batch: int = 1, seed: int = 0) -> Any:
        """Return one tensor for each input, by name."""
        generator = torch.Generator().manual_seed(seed)

        def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
            if name.endswith("ids"):  # 0 and 1 pad and end
                return torch.randint(2, VOCABULARY, (batch, *shape), generator=generator)
            return torch.randn(batch, *shape, generator=generator)

        return {name: tensor(name, shape) for name, shape in self.inputs.items()}


def _library() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(
            "the suite transformers needs transformers: pip install 'graphprune[transformers]'"
        ) from error


def _config(library: ModuleType, kind: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """Make a configuration; a pair (class, options) among the options is one, too."""
    values = {
        key: _config(library, getattr(library, value[0]), value[1])
        if isinstance(value, tuple)
        else value
        for key, value in options.items()
    }
    return kind(**values)


def transformers_models() -> tuple[TransformersModel, ...]:
    """Return one model of each architecture."""
    return _MODELS


def model(
    name: str,
    architecture: str,
    options: Mapping[str, Any],
    parts: tuple[str, str, str] | None = None,
    inputs: Mapping[str, tuple[int, ...]] | None = None,
    outputs: tuple[str, ...] = ("logits",),
) -> TransformersModel:
    """Return one model; `parts` are parameter dimensions of its heads, feed-forward and embedding width."""
    return TransformersModel(
        name=name,
        kind="transformers",
        shape=(),
        options=options,
        library="transformers",
        architecture=architecture,
        inputs=TEXT if inputs is None else inputs,
        outputs=outputs,
        parts=dict(zip(PARTS, parts, strict=True)) if parts else {},
    )


TEXT = {"input_ids": (_LENGTH,)}
TEXTS = {"input_ids": (_LENGTH,), "decoder_input_ids": (_ANSWER,)}
IMAGE = {"pixel_values": (3, 32, 32)}
WAVE = {"input_values": (800,)}

ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 48,
}
DECODER = {**ENCODER, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
SOUND = {
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "conv_dim": [24, 40],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
BOTH = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 80,
}


def _bert(name: str) -> tuple[str, str, str]:
    layer = f"{name}.encoder.layer.0"
    return (
        f"{layer}.attention.self.value.weight[0]",
        f"{layer}.intermediate.dense.weight[0]",
        f"{name}.embeddings.word_embeddings.weight[1]",
    )


_LLAMA = (
    "model.layers.0.self_attn.v_proj.weight[0]",
    "model.layers.0.mlp.gate_proj.weight[0]",
    "model.embed_tokens.weight[1]",
)

_PHI3 = (
    "model.layers.0.self_attn.o_proj.weight[1]",
    "model.layers.0.mlp.down_proj.weight[1]",
    _LLAMA[2],
)
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MIXTRAL = (_LLAMA[0], "model.layers.0.mlp.experts.down_proj[2]", _LLAMA[2])

_MODELS = (
    model(
        "bert",
        "BertForSequenceClassification",
        {**ENCODER, "num_labels": 3},
        _bert("bert"),
    ),
    model(
        "roberta",
        "RobertaForSequenceClassification",
        {**ENCODER, "num_labels": 3},
        _bert("roberta"),
    ),
    model(
        "distilbert",
        "DistilBertForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 96,
            "max_position_embeddings": 48,
            "num_labels": 3,
        },
        (
            "distilbert.transformer.layer.0.attention.v_lin.weight[0]",
            "distilbert.transformer.layer.0.ffn.lin1.weight[0]",
            "distilbert.embeddings.word_embeddings.weight[1]",
        ),
    ),
    model(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 96,
            "n_positions": 48,
        },
        (
            "transformer.h.0.attn.c_proj.weight[0]",
            "transformer.h.0.mlp.c_fc.weight[1]",
            "transformer.wpe.weight[1]",
        ),
    ),
    model(
        "opt",
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 96,
            "max_position_embeddings": 48,
            "word_embed_proj_dim": 64,
        },
        (
            "model.decoder.layers.0.self_attn.v_proj.weight[0]",
            "model.decoder.layers.0.fc1.weight[0]",
            "model.decoder.embed_positions.weight[1]",
        ),
    ),
    model("llama", "LlamaForCausalLM", DECODER, _LLAMA),
    model("mistral", "MistralForCausalLM", {**DECODER, "sliding_window": 8}, _LLAMA),
    model("qwen", "Qwen3ForCausalLM", {**DECODER, "head_dim": 16}, _LLAMA),
    model(
        "gemma",
        "GemmaForCausalLM",
        {**DECODER, "head_dim": 24},
        (*_LLAMA[:2], "lm_head.weight[1]"),
    ),
    model("phi3", "Phi3ForCausalLM", {**DECODER, "pad_token_id": 0}, _PHI3),
    model("mixtral", "MixtralForCausalLM", {**DECODER, **_EXPERTS}, _MIXTRAL),
    model(
        "gpt-oss",
        "GptOssForCausalLM",
        {**DECODER, **_EXPERTS, "head_dim": 16, "sliding_window": 8},
        _MIXTRAL,
    ),
    model(
        "qwen-moe",
        "Qwen3MoeForCausalLM",
        {
            **DECODER,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
        },
        _MIXTRAL,
    ),
    model(
        "deepseek",
        "DeepseekV3ForCausalLM",
        {
            **ENCODER,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        (
            "model.layers.0.self_attn.o_proj.weight[1]",
            "model.layers.1.mlp.experts.down_proj[2]",
            _LLAMA[2],
        ),
    ),
    model(
        "jamba",
        "JambaForCausalLM",
        {
            **DECODER,
            "use_mamba_kernels": False,
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 12,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        (
            "model.layers.1.self_attn.v_proj.weight[0]",
            "model.layers.1.feed_forward.experts.down_proj[2]",
            _LLAMA[2],
        ),
    ),
    model(
        "t5",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        (
            "encoder.block.0.layer.0.SelfAttention.v.weight[0]",
            "encoder.block.0.layer.1.DenseReluDense.wi.weight[0]",
            "lm_head.weight[1]",
        ),
        TEXTS,
    ),
    model(
        "bart",
        "BartForConditionalGeneration",
        {"vocab_size": VOCABULARY, "max_position_embeddings": 48, **BOTH},
        (
            "model.encoder.layers.0.self_attn.v_proj.weight[0]",
            "model.encoder.layers.0.fc1.weight[0]",
            "model.encoder.embed_positions.weight[1]",
        ),
        TEXTS,
    ),
    model(
        "vit",
        "ViTForImageClassification",
        {**VISION, "num_labels": 10},
        (
            "vit.layers.0.attention.v_proj.weight[0]",
            "vit.layers.0.mlp.fc1.weight[0]",
            "vit.embeddings.position_embeddings[2]",
        ),
        IMAGE,
    ),
    model(
        "deit",
        "DeiTForImageClassificationWithTeacher",
        {**VISION, "num_labels": 10},
        (
            "deit.layers.0.attention.v_proj.weight[0]",
            "deit.layers.0.mlp.fc1.weight[0]",
            "deit.embeddings.position_embeddings[2]",
        ),
        IMAGE,
    ),
    model(
        "beit",
        "BeitForImageClassification",
        {**VISION, "num_labels": 10, "use_relative_position_bias": True},
        (
            "beit.layers.0.attention.v_proj.weight[0]",
            "beit.layers.0.mlp.fc1.weight[0]",
            "beit.embeddings.cls_token[2]",
        ),
        IMAGE,
    ),
    model(
        "swin",
        "SwinForImageClassification",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": 10,
        },
        (
            "swin.encoder.layers.0.blocks.0.attention.v_proj.weight[0]",
            "swin.encoder.layers.0.blocks.0.mlp.fc1.weight[0]",
            "swin.embeddings.norm.weight[0]",
        ),
        IMAGE,
    ),
    model(
        "segformer",
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 4,
            "depths": [1, 1, 1, 1],
            "sr_ratios": [4, 2, 1, 1],
            "hidden_sizes": [16, 32, 48, 64],
            "num_attention_heads": [1, 2, 4, 4],
            "mlp_ratios": [2, 2, 2, 2],
            "decoder_hidden_size": 40,
            "num_labels": 10,
        },
        (
            "segformer.stages.1.blocks.0.attention.v_proj.weight[0]",
            "segformer.stages.1.blocks.0.mlp.fc1.weight[0]",
            "segformer.stages.1.patch_embeddings.proj.weight[0]",
        ),
        {"pixel_values": (3, 64, 64)},
    ),
    model(
        "detr",
        "DetrForObjectDetection",
        {
            "use_timm_backbone": False,
            "backbone": None,
            "use_pretrained_backbone": False,
            "backbone_config": (
                "ResNetConfig",
                {
                    "embedding_size": 16,
                    "hidden_sizes": [16, 24, 32, 40],
                    "depths": [1, 1, 1, 1],
                    "out_features": ["stage4"],
                },
            ),
            "num_queries": 9,
            "num_labels": 7,
            **BOTH,
        },
        (
            "model.encoder.layers.0.self_attn.v_proj.weight[0]",
            "model.encoder.layers.0.mlp.fc1.weight[0]",
            "model.query_position_embeddings.weight[1]",
        ),
        {"pixel_values": (3, 64, 64)},
        ("logits", "pred_boxes"),
    ),
    model(
        "clip",
        "CLIPModel",
        {
            "text_config": {**ENCODER, "eos_token_id": 1, "projection_dim": 40},
            "vision_config": {**VISION, "intermediate_size": 80, "projection_dim": 40},
            "projection_dim": 40,
        },
        (
            "text_model.encoder.layers.0.self_attn.v_proj.weight[0]",
            "text_model.encoder.layers.0.mlp.fc1.weight[0]",
            "text_model.embeddings.token_embedding.weight[1]",
        ),
        {"input_ids": (_LENGTH,), **IMAGE},
        ("logits_per_image",),
    ),
    model(
        "whisper",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": 20,
            "max_source_positions": 25,
            "max_target_positions": 48,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "decoder_start_token_id": 1,
            **BOTH,
        },
        (
            "model.encoder.layers.0.self_attn.v_proj.weight[0]",
            "model.encoder.layers.0.fc1.weight[0]",
            "model.encoder.embed_positions.weight[1]",
        ),
        {"input_features": (20, 50), "decoder_input_ids": (_ANSWER,)},
    ),
    model(
        "wav2vec2",
        "Wav2Vec2ForCTC",
        SOUND,
        (
            "wav2vec2.encoder.layers.0.attention.v_proj.weight[0]",
            "wav2vec2.encoder.layers.0.feed_forward.intermediate_dense.weight[0]",
            "wav2vec2.feature_projection.projection.weight[0]",
        ),
        WAVE,
    ),
    model(
        "mamba",
        "MambaForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "state_size": 8,
            "num_hidden_layers": 2,
            "time_step_rank": 12,
        },
        ("", "backbone.layers.0.mixer.conv1d.weight[0]", "backbone.layers.0.norm.weight[0]"),
    ),
)
