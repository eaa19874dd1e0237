"""What the config of an architecture says of its blocks, to compare with what `ir/blocks` finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..ir.graph import Graph


@dataclass(frozen=True)
class Declared:
    """The blocks of a model as its config has them; None: the config does not say, or it differs from layer to layer."""

    attention: int
    """Attention blocks, cross attention included."""
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    causal: bool | None = None
    window: int | None = None
    norm: str | None = None
    """"pre-norm", "post-norm", "sandwich-norm" or "output-norm"."""
    rope: bool | None = None
    qk_norm: bool | None = None
    ffn: int = 0
    """Feed-forward blocks, shared experts included."""
    ffn_kind: str | None = None
    """"plain", "gated" or "fused gated"."""
    width: int | None = None
    hidden: int | None = None
    activation: str | None = None
    experts: int | None = None
    """Experts a layer."""
    top_k: int | None = None
    """Experts a token."""
    cross: int = 0
    """How many of the attention blocks read another sequence."""


def differences(declared: Declared, graph: Graph) -> list[str]:
    """Where the blocks found in a canonical graph are not those declared, in words; nothing when they agree."""
    from ..ir.blocks import attention_blocks, ffn_blocks

    attentions = attention_blocks(graph)
    ffns = [f for f in ffn_blocks(graph) if f.residual is not None]
    routed = [f for f in ffns if f.experts is not None]
    said = [
        *_count("attention blocks", declared.attention, len(attentions)),
        *_count("cross-attention blocks", declared.cross, sum(a.kind == "cross" for a in attentions)),
        *_count("feed-forward blocks", declared.ffn, len(ffns)),
    ]
    facts = (
        ("heads", declared.heads, [a.heads for a in attentions]),
        ("key-value heads", declared.kv_heads, [a.kv_heads for a in attentions]),
        ("head width", declared.head_dim, [a.head_dim for a in attentions]),
        ("causal", declared.causal, [a.causal for a in attentions]),
        ("window", declared.window, [a.window for a in attentions]),
        ("norm", declared.norm, [a.norm for a in attentions if a.kind != "pooling"] + [f.norm for f in ffns]),
        ("RoPE", declared.rope, [bool(a.rope) for a in attentions]),
        ("query-key norm", declared.qk_norm, [a.qk_norm for a in attentions]),
        ("kind of FFN", declared.ffn_kind, [f.kind for f in ffns if f.experts is None]),
        ("width", declared.width, [f.width for f in ffns]),
        ("hidden width", declared.hidden, [f.hidden for f in ffns]),
        ("activation", declared.activation, [f.act for f in ffns]),
        ("experts", declared.experts, [f.experts for f in routed] or [None]),
        ("experts a token", declared.top_k, [f.top_k for f in routed] or [None]),
    )
    for what, expected, found in facts:
        if expected is not None and (wrong := [v for v in found if v != expected]):
            said.append(f"{what}: declared {expected}, found {', '.join(dict.fromkeys(map(str, wrong)))} in {len(wrong)} of {len(found)} blocks")
    for block in attentions:
        lost = [n for n, p in (("q", block.to_q), ("k", block.to_k), ("v", block.to_v)) if not p.linears] + ([] if block.out else ["out"])
        if lost:
            said.append(f"no projection found for {', '.join(lost)} of {block.layer}")
    return said


def _count(what: str, expected: int, found: int) -> list[str]:
    return [] if expected == found else [f"{expected} {what} declared, {found} found"]


# -- reading configs ------------------------------------------------------------------------------------------------

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
_WIDTH = ("hidden_size", "n_embd", "dim", "d_model")
_HIDDEN = ("ffn_hidden_size", "intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "d_ff", "encoder_ffn_dim")


def _first(config: Any, names: tuple[str, ...], default: Any = None) -> Any:
    return next((v for n in names if (v := getattr(config, n, None)) is not None), default)


def _transformer(config: Any, **more: Any) -> Declared:
    """One stack of equal layers, an attention and an FFN each; `more` overrides what the config has under another name or not at all."""
    width, heads, layers = (_first(config, names) for names in (_WIDTH, _HEADS, _LAYERS))
    facts = {
        "attention": layers,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or width // heads,
        "ffn": layers,
        "width": width,
        "hidden": _first(config, _HIDDEN, 4 * width),
        "rope": False,
        "qk_norm": False,
        "ffn_kind": "plain",
    }
    return Declared(**{**facts, **more})


def _encoder(norm: str = "post-norm", **more: Any) -> Callable[[nn.Module], Declared]:
    return lambda model: _transformer(model.config, causal=False, norm=norm, **more)


def _gpt(**more: Any) -> Callable[[nn.Module], Declared]:
    """A causal decoder with a plain FFN."""
    return lambda model: _transformer(model.config, **{"causal": True, "norm": "pre-norm", **more})


def _llama(**more: Any) -> Callable[[nn.Module], Declared]:
    """A causal decoder with RoPE and a gated FFN."""
    return _gpt(**{"rope": True, "ffn_kind": "gated", "activation": "silu", **more})


def _gemma(model: nn.Module) -> Declared:
    return _transformer(model.config, causal=True, norm="sandwich-norm", rope=True, ffn_kind="gated", activation="gelu", qk_norm=_has(model, "q_norm"))


def _has(model: nn.Module, part: str) -> bool:
    return any(name.endswith(part) for name, _ in model.named_modules())


def _mixture(experts: str) -> Callable[[nn.Module], Declared]:
    """A Llama whose FFNs are experts."""

    def declared(model: nn.Module) -> Declared:
        c: Any = model.config
        hidden = getattr(c, "moe_intermediate_size", None) or c.intermediate_size
        more = {"experts": getattr(c, experts), "top_k": c.num_experts_per_tok, "hidden": hidden, "qk_norm": _has(model, "q_norm"), "ffn_kind": None}
        return _llama(**more)(model)

    return declared


def _deepseek(model: nn.Module) -> Declared:
    c: Any = model.config
    routed = c.num_hidden_layers - c.first_k_dense_replace
    return _llama(
        head_dim=c.qk_nope_head_dim + c.qk_rope_head_dim,
        ffn=c.num_hidden_layers + routed,  # a shared expert beside each layer of experts
        ffn_kind="gated",
        hidden=None,
        experts=c.n_routed_experts,
        top_k=c.num_experts_per_tok,
        qk_norm=None,  # its norms stand between the two halves of a low-rank projection
    )(model)


def _encoder_decoder(model: nn.Module, norm: str, layers: tuple[int, int], **more: Any) -> Declared:
    encoder, decoder = layers
    return _transformer(model.config, attention=encoder + 2 * decoder, cross=decoder, ffn=encoder + decoder, norm=norm, **more)


def _t5(model: nn.Module) -> Declared:
    c: Any = model.config
    return _encoder_decoder(model, "pre-norm", (c.num_layers, c.num_decoder_layers), head_dim=c.d_kv, activation=c.dense_act_fn)


def _seq2seq(norm: str) -> Callable[[nn.Module], Declared]:
    def declared(model: nn.Module) -> Declared:
        c: Any = model.config
        return _encoder_decoder(model, norm, (c.encoder_layers, c.decoder_layers), activation="gelu")

    return declared


def _vit(**more: Any) -> Callable[[nn.Module], Declared]:
    return lambda model: _transformer(model.config, **{"causal": False, "norm": "pre-norm", "activation": "gelu", **more})


def _dinov2(model: nn.Module) -> Declared:
    c: Any = model.config
    return _vit(hidden=int(c.hidden_size * c.mlp_ratio))(model)


def _swin(model: nn.Module) -> Declared:
    c: Any = model.config
    blocks = sum(c.depths)
    return Declared(blocks, head_dim=c.embed_dim // c.num_heads[0], causal=False, norm="pre-norm", ffn=blocks, ffn_kind="plain", activation="gelu")


def _segformer(model: nn.Module) -> Declared:
    c: Any = model.config
    blocks = sum(c.depths)
    return Declared(blocks, causal=False, norm="pre-norm", ffn=blocks, ffn_kind="plain", activation="gelu")


def _convnext(model: nn.Module) -> Declared:
    blocks = sum(model.config.depths)  # type: ignore[union-attr, arg-type]
    return Declared(0, ffn=blocks, ffn_kind="plain", activation="gelu")


def _siglip(model: nn.Module) -> Declared:
    c: Any = model.config
    return _vit(attention=c.num_hidden_layers + 1, ffn=c.num_hidden_layers + 1)(model)  # one more of each in the pooling head


def _two_towers(model: nn.Module) -> Declared:
    c: Any = model.config
    text, vision = c.text_config, c.vision_config
    same = {n: _first(text, names) for n, names in (("heads", _HEADS), ("width", _WIDTH), ("hidden", _HIDDEN))}
    layers = text.num_hidden_layers + vision.num_hidden_layers
    return Declared(layers, head_dim=same["width"] // same["heads"], norm="pre-norm", ffn=layers, **same)


def _timm_vit(kind: str = "plain", **more: Any) -> Callable[[nn.Module], Declared]:
    """timm keeps no config: its blocks say."""

    def declared(model: nn.Module) -> Declared:
        blocks: Any = model.blocks
        heads, width = blocks[0].attn.num_heads, model.embed_dim
        facts = {"heads": heads, "kv_heads": heads, "head_dim": width // heads, "causal": False, "norm": "pre-norm", "width": width}  # type: ignore[operator]
        return Declared(len(blocks), ffn=len(blocks), ffn_kind=kind, **{**facts, **more})

    return declared


def _timm_swin(model: nn.Module) -> Declared:
    blocks = [b for layer in model.layers for b in layer.blocks]  # type: ignore[union-attr]
    return Declared(len(blocks), causal=False, norm="pre-norm", ffn=len(blocks), ffn_kind="plain", activation="gelu")


def _wav2vec2(model: nn.Module) -> Declared:
    return _transformer(model.config, causal=False, norm="post-norm", activation="gelu")


def _torch_encoder(model: nn.Module) -> Declared:
    layers: Any = model.layers
    a, up = layers[0].self_attn, layers[0].linear1
    n, heads = len(layers), a.num_heads
    return Declared(n, heads, heads, a.head_dim, False, None, "post-norm", False, False, n, "plain", a.embed_dim, up.out_features, "gelu")


DECLARED: dict[str, Callable[[nn.Module], Declared]] = {
    "minilm": _encoder(activation="gelu"),
    "bert": _encoder(activation="gelu"),
    "roberta": _encoder(activation="gelu"),
    "distilbert": _encoder(activation="gelu"),
    "albert": _encoder(activation="gelu"),
    "electra": _encoder(activation="gelu"),
    "mpnet": _encoder(activation="gelu"),
    "modernbert": _encoder(None, rope=True, ffn_kind="fused gated", activation="gelu"),  # type: ignore[arg-type]  # its first layer has no attention norm
    "t5_encoder": lambda model: _transformer(model.config, causal=False, norm="pre-norm", head_dim=model.config.d_kv, activation=model.config.dense_act_fn),  # type: ignore[union-attr]
    "torch_encoder": _torch_encoder,
    "gpt2": _gpt(activation="gelu"),
    "opt": _gpt(activation="relu"),
    "bloom": _gpt(activation="gelu"),
    "gptneox": _gpt(rope=True, activation="gelu"),
    "falcon": _gpt(rope=True, kv_heads=1, activation="gelu"),
    "llama": _llama(),
    "qwen2": _llama(),
    "qwen3": _llama(qk_norm=True),
    "mistral": lambda model: _llama(window=model.config.sliding_window)(model),  # type: ignore[union-attr]
    "gemma2": _gemma,
    "gemma3": _gemma,
    "phi3": _llama(ffn_kind="fused gated"),
    "olmo2": _llama(norm="output-norm", qk_norm=True),
    "starcoder2": lambda model: _gpt(rope=True, activation="gelu", window=model.config.sliding_window)(model),  # type: ignore[union-attr]
    "cohere": _llama(),
    "mixtral": _mixture("num_local_experts"),
    "qwen3_moe": _mixture("num_experts"),
    "deepseek_v3": _deepseek,
    "t5": _t5,
    "bart": _seq2seq("post-norm"),
    "whisper_encoder": lambda model: _transformer(model.config, causal=False, norm="pre-norm", activation="gelu"),
    "whisper": _seq2seq("pre-norm"),
    "wav2vec2": _wav2vec2,
    "vit": _vit(),
    "deit": _vit(),
    "beit": _vit(),
    "swin": _swin,
    "dinov2": _dinov2,
    "dinov2_any_size": _dinov2,
    "dinov2_registers": _dinov2,
    "siglip_vision": _siglip,
    "segformer": _segformer,
    "yolos": _vit(),
    "clip": _two_towers,
    "llava_tower": _vit(activation="quick_gelu"),
    "llava_language": _llama(),
    "convnext_hf": _convnext,
    "timm_vit": _timm_vit(activation="gelu"),
    "timm_deit": _timm_vit(activation="gelu"),
    "timm_eva02": _timm_vit("fused gated", rope=True, activation="silu"),
    "timm_swin": _timm_swin,
}
"""Architecture's name -> its model -> what is declared of it."""
