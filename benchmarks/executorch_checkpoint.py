"""Converts a Llama checkpoint from Hugging Face's layout to Meta's, which `export_llm` reads."""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
OUTER = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight"}


def main() -> None:
    """Converts the given folder; writes ``meta.pth`` and ``params.json`` into it."""
    folder = Path(sys.argv[1])
    config = json.loads((folder / "config.json").read_text())
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118  (the stream is not a mapping)
                weights[meta_name(name)] = in_pairs(name, stream.get_tensor(name), config)
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    torch.save(weights, folder / "meta.pth")
    params = {
        "dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "vocab_size": config["vocab_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "use_scaled_rope": True,
    }
    (folder / "params.json").write_text(json.dumps(params, indent=1))


def meta_name(name: str) -> str:
    """Returns Meta's name for a weight."""
    if name in OUTER:
        return OUTER[name]
    _, _, number, rest = name.split(".", 3)
    return f"layers.{number}.{NAMES[rest.removesuffix('.weight')]}.weight"


def in_pairs(name: str, weight: torch.Tensor, config: dict) -> torch.Tensor:
    """Returns rows of q and k in Meta's order, where RoPE rotates adjacent rows as a pair."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    rows, columns = weight.shape
    halves = weight.view(rows // config["head_dim"], 2, config["head_dim"] // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns).contiguous()


if __name__ == "__main__":
    main()
