"""The steps that a spec says must stand between the products and sums of its decoder."""

from __future__ import annotations

from edgeforge.families.assembly import FINAL_NORM, HEAD_BIAS
from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.verification.meaning.steps import Wanted, WantedBias, WantedNorm, WantedNumber
from edgeforge.verification.meaning.steps import WantedRope as WantedRope
from exporters.lifted import Clamp, LayerNorm, Norm, Scaled, Softcap

Expected = tuple[Wanted, ...]
"""Steps from the last to the first, as `edgeforge.verification.meaning.chains.Chain` has them."""


def embedded(spec: ModelSpec) -> Expected:
    """Between the embedding and the first layer."""
    own = "model.embedding_norm"
    norm = (_norm(spec, "the embedding's norm", own),) if f"{own}.weight" in spec.weights else ()
    return *norm, *_factor("embedding_multiplier", spec.embedding_multiplier)


def final(spec: ModelSpec) -> Expected:
    """Between the last layer and the head, or the matrix that a rotation puts before it."""
    return (_norm(spec, "the last norm", FINAL_NORM.removesuffix(".weight")),)


def logits(spec: ModelSpec) -> Expected:
    """After the head."""
    cap = spec.logit_softcap
    bound = (WantedNumber("logit_softcap", Softcap, cap),) if cap else ()
    factor = _factor("logit_multiplier", spec.logit_multiplier)
    return *bound, *factor, *_bias(spec, HEAD_BIAS.removesuffix(".bias"))


def entering_mixer(spec: ModelSpec, at: str) -> Expected:
    """Between the residual stream and the part of a layer that mixes tokens.

    Args:
        spec: the model.
        at: the layer's name, with a dot at its end.
    """
    if spec.block == "post":
        return ()
    return (_norm(spec, "input_layernorm", f"{at}input_layernorm"),)


def entering_feed_forward(spec: ModelSpec, at: str) -> Expected:
    """Between the residual stream and the feed-forward part; arguments as `entering_mixer`."""
    if spec.block in ("post", "parallel"):
        return entering_mixer(spec, at)
    return (_norm(spec, "post_attention_layernorm", f"{at}post_attention_layernorm"),)


def leaving(spec: ModelSpec, at: str, norm: str, product: str) -> Expected:
    """Between a part's last product and the residual stream.

    Args:
        spec: the model.
        at: the layer's name, with a dot at its end.
        norm: the name of the norm that stands there in some blocks.
        product: the name of the product.
    """
    found: list[Wanted] = [*_factor("residual_multiplier", spec.residual_multiplier)]
    if spec.block in ("sandwich", "post"):
        found.append(_norm(spec, norm, f"{at}{norm}"))
    return *found, *_bias(spec, f"{at}{product}")


def projected(spec: ModelSpec, layer: LayerSpec, at: str, part: str) -> Expected:
    """Between attention and the product that gives its queries, keys or values.

    Args:
        spec: the model.
        layer: the layer's dimensions.
        at: the layer's name, with a dot at its end.
        part: ``q``, ``k`` or ``v``.
    """
    found: list[Wanted] = []
    bound = [WantedNumber("clip_qkv", Clamp, spec.clip_qkv)] if spec.clip_qkv else []
    if part == "v":
        return *bound, *_bias(spec, f"{at}self_attn.v_proj")
    rope = layer.query_rope if part == "q" and layer.query_rope is not None else layer.rope
    if layer.rope is not None and rope is not None:
        found.append(WantedRope(rope))
    norm = spec.weights.get(f"{at}self_attn.{part}_norm.weight")
    normed = [WantedNorm(f"{part}_norm", f"{at}self_attn.{part}_norm", Norm)] if norm else []
    # Of a norm over all heads the result is bounded, of one over each head what it reads.
    is_whole = norm is not None and norm.shape[0] != spec.head_dim
    found += [*bound, *normed] if is_whole else [*normed, *bound]
    if not layer.attention_experts:
        return *found, *_bias(spec, f"{at}self_attn.qk_proj")
    # Experts' queries have products of their own.
    return *found, *(_bias(spec, f"{at}self_attn.k_proj") if part == "k" else ())


def biased(spec: ModelSpec, product: str) -> Expected:
    """Nothing but the bias of a product or a convolution, if it has one.

    Args:
        spec: the model.
        product: its name in the program.
    """
    return _bias(spec, product)


def _norm(spec: ModelSpec, what: str, at: str) -> WantedNorm:
    return WantedNorm(what, at, LayerNorm if spec.norm == "layer" else Norm)


def _bias(spec: ModelSpec, product: str) -> tuple[WantedBias, ...]:
    name = f"{product}.bias"
    return (WantedBias(name),) if name in spec.weights else ()


def _factor(fact: str, number: float) -> tuple[WantedNumber, ...]:
    return (WantedNumber(fact, Scaled, number),) if number != 1 else ()
