"""The architectures rewright is judged by: small models of every family, with random seeded weights (one has real ones)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..ir.errors import UsageError, near
from . import example_inputs as given
from .declared import DECLARED, Declared
from .example_inputs import MakeInputs

TEXT_SHAPES = ((2, 16), (3, 24), (1, 7))
FIXED_IMAGES = ((2, 32), (3, 32), (1, 32))
ANY_IMAGES = ((2, 64), (3, 96), (1, 128))


@dataclass(frozen=True)
class Architecture:
    """One architecture: how to build a small one, and what to run it on."""

    name: str
    family: str
    """encoder, decoder, encoder-decoder, vision, convnet, diffusion, state-space, vision-language or audio."""
    package: str
    """What has to be installed: transformers, timm, diffusers or torch."""
    make: Callable[[], nn.Module]
    inputs: MakeInputs
    shapes: tuple[tuple[int, int], ...] = TEXT_SHAPES
    """(batch, size) to try; the first is captured, one has batch 1."""
    dynamic: Mapping[str, Any] | None = None
    """`dynamic_shapes` of the capture; None for its default."""
    fast: bool = False
    """Part of the subset that CI runs."""
    real: bool = False
    """Whether its weights are trained ones, which are left as they are."""

    def build(self) -> nn.Module:
        """The model in eval mode; random weights are seeded and of a scale at which every layer matters.

        Raises UsageError, in one sentence, when the package it comes from is not installed.
        """
        torch.manual_seed(0)
        try:
            model = self.make().eval()
        except ImportError as error:
            raise UsageError(f"{self.name} needs {self.package}: `make matrix` installs it") from error
        if not self.real:
            _liven(model)
        return model

    @property
    def declares(self) -> Callable[[nn.Module], Declared] | None:
        """Model -> what its config says of its blocks; None where nobody wrote that down."""
        return DECLARED.get(self.name)


def find_architectures(names: list[str] | tuple[str, ...] = (), fast: bool = False) -> tuple[Architecture, ...]:
    """Architectures by name or family, all without a name; `fast` leaves CI's subset. Raises UsageError for an unknown name."""
    known = {a.name for a in ARCHITECTURES} | {a.family for a in ARCHITECTURES}
    families = ", ".join(dict.fromkeys(a.family for a in ARCHITECTURES))
    for name in names:
        if name not in known:
            raise UsageError(f"no architecture or family {name!r}.{near(name, sorted(known))} There are {len(ARCHITECTURES)}, of the families {families}")
    return tuple(a for a in ARCHITECTURES if (not names or a.name in names or a.family in names) and (a.fast or not fast))


@torch.no_grad()
def _liven(model: nn.Module) -> None:
    """Weights at unit gain, vectors off their zeros and ones: many models begin as (nearly) the identity or give (nearly) zero,
    where a forgotten norm weight, bias, LayerScale or adaLN gate would not show."""
    for name, p in model.named_parameters():
        if name.endswith("A_log"):  # state-space decay: its values are the model's time scales
            continue
        if p.dim() < 2:
            p.add_(torch.randn_like(p) * 0.1)
        else:
            fan_in = p.shape[-1] if "experts" in name else p[0].numel()
            p.normal_(0, fan_in**-0.5)
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.add_(torch.randn_like(b) * 0.1)
        elif name.endswith("running_var"):
            b.mul_(torch.rand_like(b) + 0.5)


# -- builders ---------------------------------------------------------------------------------------------------------


def _transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return make


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from .torchvision_stand_in import torchvision_stand_in

        with torchvision_stand_in():
            import timm  # type: ignore[import-not-found]
        return timm.create_model(name, pretrained=False, num_classes=10, **options)

    return make


def _mixer() -> nn.Module:
    """timm's named mixers have fixed sizes."""
    from .torchvision_stand_in import torchvision_stand_in

    with torchvision_stand_in():
        from timm.models.mlp_mixer import MlpMixer  # type: ignore[import-not-found]
    return MlpMixer(num_classes=10, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)


def _diffusers(model: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import diffusers  # type: ignore[import-not-found]

        return getattr(diffusers, model)(**options)

    return make


def _minilm() -> nn.Module:
    from .zoo import load_zoo

    return load_zoo("minilm").module


def _torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _part(model: Callable[[], nn.Module], path: str) -> Callable[[], nn.Module]:
    """One tower of a model of several."""
    return lambda: model().get_submodule(path)


def _qwen2_vl_vision() -> nn.Module:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    return Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=4))


# -- the table --------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SMALL, "vocab_size": 128, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LM = {**TEXT, "num_key_value_heads": 2, "use_cache": False}
GEMMA = {**LM, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128, "use_cache": False, "decoder_start_token_id": 0}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 128,
    "num_mel_bins": 80,
    "max_source_positions": 30,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
CLIP = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16}
LLAVA = {
    "vision_config": {**IMAGE, "image_size": 16, "patch_size": 4, "model_type": "clip_vision_model", "projection_dim": 16},
    "text_config": {**LM, "model_type": "llama"},
    "image_token_index": 99,
}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 128, "use_cache": False, "pad_token_id": 0, "eos_token_id": 2}
SPEECH = {
    **SMALL,
    "vocab_size": 32,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 8),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
ANY_PIXELS = {"pixel_values": {0: "batch", 2: "height", 3: "width"}}
ANY_X = {"x": {0: "batch", 2: "height", 3: "width"}}
IMAGE_PATCHES = {"hidden_states": {0: "patches"}, "position_ids": {0: "patches"}, "grid_thw": {0: "images"}, "cu_seqlens": {0: "bounds"}}
DIFFUSION = {"timestep": {0: "batch"}, "encoder_hidden_states": {0: "batch"}}


def _text(name: str, family: str, model: str, options: Mapping[str, Any], inputs: MakeInputs = given.tokens, fast: bool = False) -> Architecture:
    """A transformers model whose config is named after it."""
    kind = model
    for ending in ("ForCausalLM", "LMHeadModel", "EncoderModel", "ForConditionalGeneration", "Model"):
        kind = kind.removesuffix(ending)
    return Architecture(name, family, "transformers", _transformers(model, f"{kind}Config", **options), inputs, fast=fast)


def _vision(name: str, model: str, options: Mapping[str, Any], shapes: Any = FIXED_IMAGES, family: str = "vision", **more: Any) -> Architecture:
    config = model.removesuffix("ForSemanticSegmentation").removesuffix("ForObjectDetection").removesuffix("Model") + "Config"
    return Architecture(name, family, "transformers", _transformers(model, config, **options), given.image, shapes, **more)


def _timm_row(name: str, model: str, options: Mapping[str, Any], shapes: Any = FIXED_IMAGES, family: str = "vision", **more: Any) -> Architecture:
    return Architecture(name, family, "timm", _timm(model, **options), given.plain_image, shapes, **more)


def _diffusers_row(name: str, model: str, options: Mapping[str, Any], inputs: MakeInputs, shapes: Any = FIXED_IMAGES, **more: Any) -> Architecture:
    return Architecture(name, "diffusion", "diffusers", _diffusers(model, **options), inputs, shapes, **more)


ARCHITECTURES = (
    Architecture("minilm", "encoder", "transformers", _minilm, given.tokens, real=True),
    _text("bert", "encoder", "BertModel", TEXT, fast=True),
    _text("roberta", "encoder", "RobertaModel", {**TEXT, "pad_token_id": 1, "bos_token_id": 0}),
    _text("distilbert", "encoder", "DistilBertModel", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 128}),
    _text("albert", "encoder", "AlbertModel", {**TEXT, "embedding_size": 16}),
    _text("electra", "encoder", "ElectraModel", {**TEXT, "embedding_size": 16}),
    _text("mpnet", "encoder", "MPNetModel", TEXT),
    _text(
        "deberta_v2",
        "encoder",
        "DebertaV2Model",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    ),
    _text("modernbert", "encoder", "ModernBertModel", {**TEXT, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}),
    _text("t5_encoder", "encoder", "T5EncoderModel", T5),
    Architecture("torch_encoder", "encoder", "torch", _torch_encoder, given.features, dynamic={"src": {0: "batch", 1: "sequence"}}, fast=True),
    _text("gpt2", "decoder", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64, "use_cache": False}, fast=True),
    _text("opt", "decoder", "OPTForCausalLM", {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "use_cache": False}),
    _text("bloom", "decoder", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "use_cache": False}),
    _text("gptneox", "decoder", "GPTNeoXForCausalLM", {**TEXT, "use_cache": False}),
    _text("falcon", "decoder", "FalconForCausalLM", {**TEXT, "use_cache": False, "multi_query": True}),
    _text("llama", "decoder", "LlamaForCausalLM", LM, fast=True),
    _text("qwen2", "decoder", "Qwen2ForCausalLM", LM),
    _text("qwen3", "decoder", "Qwen3ForCausalLM", {**LM, "head_dim": 8}),
    _text("mistral", "decoder", "MistralForCausalLM", {**LM, "sliding_window": 8}),
    _text("gemma2", "decoder", "Gemma2ForCausalLM", {**GEMMA, "attn_implementation": "eager"}),
    Architecture(
        "gemma3",
        "decoder",
        "transformers",
        _transformers("Gemma3ForCausalLM", "Gemma3TextConfig", **GEMMA, layer_types=["sliding_attention", "full_attention"]),
        given.tokens,
    ),
    _text("phi3", "decoder", "Phi3ForCausalLM", LM),
    _text("olmo2", "decoder", "Olmo2ForCausalLM", LM),
    _text("starcoder2", "decoder", "Starcoder2ForCausalLM", {**LM, "sliding_window": 8}),
    _text("cohere", "decoder", "CohereForCausalLM", {**LM, "logit_scale": 0.5}),
    _text("mixtral", "decoder", "MixtralForCausalLM", {**LM, "num_local_experts": 4, "num_experts_per_tok": 2}, fast=True),
    _text("qwen3_moe", "decoder", "Qwen3MoeForCausalLM", {**LM, **EXPERTS, "head_dim": 8, "num_experts": 4}),
    _text(
        "deepseek_v3",
        "decoder",
        "DeepseekV3ForCausalLM",
        {
            **LM,
            **EXPERTS,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    _text("mamba", "state-space", "MambaForCausalLM", MAMBA, given.bare_tokens, fast=True),
    _text("mamba2", "state-space", "Mamba2ForCausalLM", {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}, given.bare_tokens),
    _text("t5", "encoder-decoder", "T5ForConditionalGeneration", T5, given.translation, fast=True),
    Architecture(
        "bart",
        "encoder-decoder",
        "transformers",
        _transformers(
            "BartModel",
            "BartConfig",
            **{k: WHISPER[k] for k in WHISPER if k[:3] not in ("num", "max", "sup", "beg")},
            max_position_embeddings=64,
            forced_eos_token_id=None,
        ),
        given.translation,
    ),
    Architecture("whisper_encoder", "audio", "transformers", _part(_transformers("WhisperModel", "WhisperConfig", **WHISPER), "encoder"), given.spectrogram),
    Architecture("whisper", "audio", "transformers", _transformers("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER), given.speech_and_text),
    Architecture(
        "wav2vec2",
        "audio",
        "transformers",
        _transformers("Wav2Vec2Model", "Wav2Vec2Config", **SPEECH),
        given.waveform,
        dynamic={"input_values": {0: "batch", 1: "samples"}},
    ),
    _vision("vit", "ViTModel", IMAGE, fast=True),
    _vision("deit", "DeiTModel", IMAGE),
    _vision("beit", "BeitModel", {**IMAGE, "use_relative_position_bias": True, "layer_scale_init_value": 0.1}),
    _vision("swin", "SwinModel", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, fast=True),
    _vision("dinov2", "Dinov2Model", {**IMAGE, "mlp_ratio": 2}),
    _vision("dinov2_any_size", "Dinov2Model", {**IMAGE, "mlp_ratio": 2}, ((2, 48), (3, 32), (1, 96)), dynamic=ANY_PIXELS),
    _vision("dinov2_registers", "Dinov2WithRegistersModel", {**IMAGE, "mlp_ratio": 2, "num_register_tokens": 2}),
    _vision("siglip_vision", "SiglipVisionModel", IMAGE),
    _vision(
        "segformer",
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
            "num_labels": 5,
        },
        ANY_IMAGES,
        dynamic=ANY_PIXELS,
    ),
    _vision("yolos", "YolosForObjectDetection", {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 5}),
    Architecture("clip", "vision-language", "transformers", _transformers("CLIPModel", "CLIPConfig", **CLIP), given.image_and_text),
    Architecture("llava", "vision-language", "transformers", _transformers("LlavaForConditionalGeneration", "LlavaConfig", **LLAVA), given.image_in_text),
    Architecture(
        "llava_tower",
        "vision-language",
        "transformers",
        _part(_transformers("LlavaForConditionalGeneration", "LlavaConfig", **LLAVA), "model.vision_tower"),
        given.image,
        ((2, 16), (3, 16), (1, 16)),
    ),
    Architecture(
        "llava_language",
        "vision-language",
        "transformers",
        _part(_transformers("LlavaForConditionalGeneration", "LlavaConfig", **LLAVA), "model.language_model"),
        given.embeddings,
        dynamic={"inputs_embeds": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}},
    ),
    Architecture("qwen2_vl_vision", "vision-language", "transformers", _qwen2_vl_vision, given.patches, FIXED_IMAGES, dynamic=IMAGE_PATCHES),
    _vision("convnext_hf", "ConvNextModel", {"depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2}, ANY_IMAGES, "convnet", dynamic=ANY_PIXELS),
    _vision(
        "resnet_hf",
        "ResNetModel",
        {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 8, "layer_type": "basic"},
        ANY_IMAGES,
        "convnet",
        dynamic=ANY_PIXELS,
    ),
    _timm_row("timm_resnet18", "resnet18", {}, ANY_IMAGES, "convnet", dynamic=ANY_X),
    _timm_row("timm_resnet50", "resnet50", {"layers": (1, 1, 1, 1)}, ANY_IMAGES, "convnet", dynamic=ANY_X),
    _timm_row("timm_regnet", "regnety_002", {}, ANY_IMAGES, "convnet", dynamic=ANY_X),
    _timm_row("timm_densenet", "densenet121", {"block_config": (2, 2), "growth_rate": 8}, ANY_IMAGES, "convnet", dynamic=ANY_X),
    _timm_row("timm_vit", "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4}),
    _timm_row("timm_deit", "deit_tiny_distilled_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4}),
    _timm_row("timm_eva02", "eva02_tiny_patch14_224", {"img_size": 28, "depth": 2}, ((2, 28), (3, 28), (1, 28))),
    _timm_row("timm_swin", "swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4, "depths": (2, 2), "embed_dim": 16, "num_heads": (2, 4)}),
    _timm_row("timm_convnext", "convnext_atto", {"depths": (1, 1, 1, 1)}, ANY_IMAGES, "convnet", dynamic=ANY_X),
    _timm_row("timm_mobilenetv3", "mobilenetv3_small_100", {}, ANY_IMAGES, "convnet", dynamic=ANY_X),
    _timm_row("timm_efficientnet", "efficientnet_b0", {}, ANY_IMAGES, "convnet", dynamic=ANY_X),
    Architecture("timm_mixer", "vision", "timm", _mixer, given.plain_image, FIXED_IMAGES),
    _diffusers_row("sd_unet", "UNet2DConditionModel", UNET, given.noisy_latent, ((2, 16), (3, 16), (1, 16))),
    _diffusers_row(
        "sd_unet_any_size",
        "UNet2DConditionModel",
        UNET,
        given.noisy_latent,
        ((2, 16), (3, 24), (1, 32)),
        dynamic={**DIFFUSION, "sample": {0: "batch", 2: "height", 3: "width"}},
    ),
    _diffusers_row(
        "dit",
        "DiTTransformer2DModel",
        {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "norm_num_groups": 8, "sample_size": 16},
        given.class_latent,
    ),
    _diffusers_row(
        "sd3",
        "SD3Transformer2DModel",
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "out_channels": 4,
            "pos_embed_max_size": 16,
        },
        given.prompted_latent,
    ),
    _diffusers_row(
        "vae",
        "AutoencoderKL",
        {
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "latent_channels": 4,
            "sample_size": 32,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        given.sample_image,
    ),
)
"""Every architecture, by family. `make matrix` runs them all."""
