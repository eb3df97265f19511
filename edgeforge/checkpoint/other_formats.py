"""Names the formats of weights that EdgeForge does not read, by the files of a folder.

Each sentence says what the format is and how to come by a checkpoint that EdgeForge reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Final

_AGAIN: Final = "give the checkpoint as transformers saves it, with config.json and safetensors"

# The first row that matches decides: what is most telling stands first.
_FORMATS: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (
        ("*.gguf",),
        "weights of llama.cpp: name the file itself as the model (of a repository, download it "
        "first)",
    ),
    (
        ("*.ggml",),
        "weights of llama.cpp in the format before GGUF: convert them with a newer llama.cpp, or "
        "give the original checkpoint",
    ),
    (
        ("consolidated*.pth", "consolidated*.safetensors", "consolidated*.pt"),
        "the publisher's own format (Meta's or Mistral's), not that of transformers: take the "
        "files config.json and model*.safetensors instead, which the same repository or the one "
        "ending in -hf has, or convert it with transformers 4's convert_llama_weights_to_hf.py",
    ),
    (
        ("edgeforge.json", "*.pte", "*.mlpackage", "*.mlmodelc", "genai_config.json"),
        "an exported artifact, not a checkpoint: give the checkpoint from which it was made",
    ),
    (
        ("*.onnx", "onnx"),
        f"a model that is exported to ONNX already: {_AGAIN}",
    ),
    (("openvino_model.*",), f"a model that is exported to OpenVINO already: {_AGAIN}"),
    (
        ("tf_model*.h5", "*.h5"),
        "weights of TensorFlow: save them as safetensors with transformers 4, "
        "AutoModelForCausalLM.from_pretrained(FOLDER, from_tf=True).save_pretrained(OTHER)",
    ),
    (
        ("flax_model*.msgpack", "*.msgpack"),
        "weights of Flax: save them as safetensors with transformers 4, "
        "AutoModelForCausalLM.from_pretrained(FOLDER, from_flax=True).save_pretrained(OTHER)",
    ),
    (("*.nemo",), f"a checkpoint of NeMo: {_AGAIN}"),
    (
        ("weights*.npz", "*.npz"),
        f"weights of MLX: convert them back with mlx_lm, or {_AGAIN}",
    ),
    (
        ("zero_to_fp32.py", "global_step*"),
        "the state of a training with DeepSpeed: run 'python zero_to_fp32.py . OUTPUT' in it, "
        "which writes pytorch_model.bin",
    ),
    (
        ("pytorch_model_fsdp*", "*.distcp"),
        "the state of a training with FSDP: merge it with 'accelerate merge-weights'",
    ),
    (
        ("model-*-of-*.safetensors",),
        "shards without their index: add model.safetensors.index.json, which lies beside them "
        "where they come from",
    ),
    (
        ("pytorch_model-*-of-*.bin",),
        "shards without their index: add pytorch_model.bin.index.json, which lies beside them "
        "where they come from",
    ),
    (
        ("*.safetensors",),
        "which is not the name of a checkpoint's weights: if it holds the whole model, name it "
        "model.safetensors",
    ),
    (
        ("*.pt", "*.pth", "*.bin", "*.ckpt"),
        f"which is not the name of a checkpoint's weights: {_AGAIN}",
    ),
)
# Files that a training leaves beside a model, and never weights.
_NOT_WEIGHTS: Final = (
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "scaler*",
    "training_args.bin",
    "adapter_*",
    ".*",
)


def name_other_format(files: Iterable[str]) -> str | None:
    """Returns what the weights among some files are and what to do; None where there are none.

    >>> name_other_format(["README.md", "model-Q4_K_M.gguf"]).split(":")[0]
    'model-Q4_K_M.gguf, weights of llama.cpp'

    Args:
        files: names relative to one folder; of those in folders inside it, the folder counts.
    """
    tops = sorted({PurePosixPath(file).parts[0] for file in files if PurePosixPath(file).parts})
    names = [n for n in tops if not any(fnmatchcase(n, other) for other in _NOT_WEIGHTS)]
    for patterns, what in _FORMATS:
        for pattern in patterns:
            found = [name for name in names if fnmatchcase(name.lower(), pattern)]
            if found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                return f"{found[0]}{more}, {what}"
    return None
