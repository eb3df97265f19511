"""OpenELM in plain PyTorch, written from the paper (arXiv 2404.14619), for training and as oracle.

It shares no code with EdgeForge: the package reads the checkpoint its own way, and tests compare.
Parameter names are the published checkpoints' names, so `state_dict` is what goes into the file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

RMS_EPS = 1e-6
ROPE_THETA = 10000.0


def make_divisible(value: float, divisor: int) -> int:
    """Round to a multiple of `divisor` that is not more than a tenth below `value`.

    >>> make_divisible(158.7, 128), make_divisible(353.3, 128)
    (256, 384)
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def _spread(low: float, high: float, count: int) -> list[float]:
    """Return `count` values from `low` to `high`, rounded to hundredths."""
    return [round(low + (high - low) * i / max(1, count - 1), 2) for i in range(count)]


@dataclass(frozen=True)
class Shape:
    """What fixes OpenELM's dimensions; every per-layer list follows from it."""

    model_dim: int = 256
    head_dim: int = 32
    num_layers: int = 5
    vocab_size: int = 3072
    max_context_length: int = 1024
    num_gqa_groups: int = 4
    ffn_dim_divisor: int = 128
    qkv_multipliers: tuple[float, float] = (0.5, 1.0)
    ffn_multipliers: tuple[float, float] = (0.5, 4.0)

    @property
    def query_heads(self) -> list[int]:
        """Query heads of each layer."""
        unit = self.head_dim * self.num_gqa_groups
        spread = _spread(*self.qkv_multipliers, self.num_layers)
        return [make_divisible(self.model_dim * m, unit) // self.head_dim for m in spread]

    @property
    def kv_heads(self) -> list[int]:
        """Key and value heads of each layer."""
        return [heads // self.num_gqa_groups for heads in self.query_heads]

    @property
    def layer_ffn_multipliers(self) -> list[float]:
        """FFN width over model width, layer by layer, before rounding to the divisor."""
        return _spread(*self.ffn_multipliers, self.num_layers)

    @property
    def ffn_dims(self) -> list[int]:
        """FFN width of each layer (columns of proj_2)."""
        divisor = self.ffn_dim_divisor
        return [make_divisible(m * self.model_dim, divisor) for m in self.layer_ffn_multipliers]

    def config(self) -> dict[str, object]:
        """Return the checkpoint's `config.json`."""
        return {
            "architectures": ["OpenELMForCausalLM"],
            "model_type": "openelm",
            "activation_fn_name": "swish",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "ffn_dim_divisor": self.ffn_dim_divisor,
            "ffn_multipliers": self.layer_ffn_multipliers,
            "ffn_with_glu": True,
            "head_dim": self.head_dim,
            "initializer_range": 0.02,
            "max_context_length": self.max_context_length,
            "model_dim": self.model_dim,
            "normalization_layer_name": "rms_norm",
            "normalize_qk_projections": True,
            "num_gqa_groups": self.num_gqa_groups,
            "num_kv_heads": self.kv_heads,
            "num_query_heads": self.query_heads,
            "num_transformer_layers": self.num_layers,
            "qkv_multipliers": list(self.qkv_multipliers),
            "rope_freq_constant": 10000,
            "rope_max_length": 2 * self.max_context_length,
            "share_input_output_layers": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }


SHAPES = {
    "small": Shape(),
    "medium": Shape(model_dim=512, head_dim=64, num_layers=10, vocab_size=3072),
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension; the dtype stays."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + RMS_EPS)
        return (wide * scale * self.weight.float()).to(x.dtype)


def rope_tables(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each float32[length, head_dim]: the half-dim angles written twice."""
    frequency = ROPE_THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of x[..., length, head_dim] in float32."""
    first, second = x.chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1).float() * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm on every query and key head before rotation."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.query_heads[layer], shape.kv_heads[layer]
        self.head_dim = shape.head_dim
        rows = (self.heads + 2 * self.kv_heads) * shape.head_dim  # q, then k, then v
        self.qkv_proj = nn.Linear(shape.model_dim, rows, bias=False)
        self.q_norm = RMSNorm(shape.head_dim)
        self.k_norm = RMSNorm(shape.head_dim)
        self.out_proj = nn.Linear(self.heads * shape.head_dim, shape.model_dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend causally over x[batch, length, model_dim]."""
        batch, length, _ = x.shape
        heads = self.qkv_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """proj_2(silu(first half of proj_1) * second half)."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.proj_1 = nn.Linear(shape.model_dim, 2 * shape.ffn_dims[layer], bias=False)
        self.proj_2 = nn.Linear(shape.ffn_dims[layer], shape.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x[..., model_dim]."""
        gate, value = self.proj_1(x).chunk(2, dim=-1)
        return self.proj_2(F.silu(gate) * value)


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(shape.model_dim)
        self.attn = Attention(shape, layer)
        self.ffn_norm = RMSNorm(shape.model_dim)
        self.ffn = FeedForward(shape, layer)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply the layer to x[batch, length, model_dim]."""
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class OpenELM(nn.Module):
    """The whole model; the head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.transformer = nn.Module()
        self.transformer.token_embeddings = nn.Embedding(shape.vocab_size, shape.model_dim)
        self.transformer.layers = nn.ModuleList(Layer(shape, i) for i in range(shape.num_layers))
        self.transformer.norm = RMSNorm(shape.model_dim)
        cos, sin = rope_tables(2 * shape.max_context_length, shape.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw the weights; the projections that write to the residual start at zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith(("out_proj.weight", "proj_2.weight")):
                nn.init.zeros_(parameter)
            else:
                deviation = 0.02 if "embeddings" in name else parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=deviation, generator=generator)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the normalized hidden states [batch, length, model_dim] of int64 tokens."""
        x = self.transformer.token_embeddings(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.transformer.layers:
            x = layer(x, cos, sin)
        return self.transformer.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [batch, length, vocab_size] of int64 tokens [batch, length]."""
        return F.linear(self.hidden(tokens), self.transformer.token_embeddings.weight)


def save(model: nn.Module, folder: Path) -> None:
    """Write `model.safetensors` in bfloat16 and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(model.shape.config(), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
    text = json.dumps(generation, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


def load(folder: Path) -> OpenELM:
    """Read a checkpoint of this layout; the maths is float32 on the stored bfloat16 weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        model_dim=config["model_dim"],
        head_dim=config["head_dim"],
        num_layers=config["num_transformer_layers"],
        vocab_size=config["vocab_size"],
        max_context_length=config["max_context_length"],
        num_gqa_groups=config["num_gqa_groups"],
        ffn_dim_divisor=config["ffn_dim_divisor"],
        qkv_multipliers=tuple(config["qkv_multipliers"]),
        ffn_multipliers=(config["ffn_multipliers"][0], config["ffn_multipliers"][-1]),
    )
    model = OpenELM(shape)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()


@torch.inference_mode()
def negative_log_likelihood(
    model: nn.Module, tokens: Tensor, context: int, bos: int = 1
) -> tuple[float, int]:
    """Return the sum of -ln p (nats) over `tokens` and their count.

    The text is cut into windows of `context - 1` tokens, `<s>` is put before each, and every token
    of the text is predicted once.
    """
    total = 0.0
    for start in range(0, len(tokens), context - 1):
        window = tokens[start : start + context - 1]
        inputs = torch.cat([torch.tensor([bos]), window[:-1]])
        logits = model(inputs[None])[0].float()
        total += F.cross_entropy(logits, window, reduction="sum").item()
    return total, len(tokens)


@torch.inference_mode()
def sampled(
    model: OpenELM, prompt: list[int], count: int, temperature: float, top_p: float, seed: int
) -> list[int]:
    """Continue the token ids by draws from the likeliest tokens that make up `top_p` together."""
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        window = torch.tensor([tokens[-model.shape.max_context_length :]])
        probability, order = (model(window)[0, -1] / temperature).softmax(-1).sort(descending=True)
        probability[probability.cumsum(-1) - probability >= top_p] = 0
        tokens.append(int(order[torch.multinomial(probability, 1, generator=generator)]))
    return tokens[len(prompt) :]


@torch.inference_mode()
def greedy(model: OpenELM, prompt: list[int], count: int, eos: int = 2) -> list[int]:
    """Continue the token ids by the likeliest token, `count` times or until `</s>`."""
    tokens = list(prompt)
    for _ in range(count):
        window = torch.tensor([tokens[-model.shape.max_context_length :]])
        token = int(model(window)[0, -1].argmax())
        if token == eos:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def unigram_perplexity(counts: Tensor, tokens: Tensor) -> float:
    """Perplexity over int64 `tokens` of the unigram model with `counts[vocab]` (plus one each)."""
    probability = (counts.double() + 1) / (counts.double() + 1).sum()
    return math.exp(-probability.log()[tokens].mean().item())
