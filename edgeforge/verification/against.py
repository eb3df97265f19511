"""Holds FLOAT against a program that others wrote, which shares no bug with it.

FLOAT is what everything else is judged by. For a family that transformers has, transformers loads
the same checkpoint and gives the logits of the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from device_harness.errors import DeviceError
from edgeforge.checkpoint.layout import CONFIG
from edgeforge.errors import UsageError
from edgeforge.model.model import Model
from edgeforge.model.rope import uses_long_set
from edgeforge.reference.walk import ReferenceRunner
from edgeforge.verification.bounds import Bound, Checked, decide
from edgeforge.verification.metrics import DivergenceMeter

# Two float32 programs differ by the order of their sums: 1e-7 to 3e-6 of the logits' range.
LIMIT: Final = 1e-3
_TOKENS: Final = 512


def check_against(
    name: str, model: Model, context: int, blocks: Sequence[Sequence[int]], runner: ReferenceRunner
) -> Checked:
    """Holds FLOAT against another program on the first block of a sample.

    Args:
        name: of the program, a key of `PROGRAMS`.
        model: the checkpoint.
        context: the declared context, in tokens.
        blocks: token ids.
        runner: FLOAT.

    Returns:
        The largest difference of two logits, as a share of their range.

    Raises:
        UsageError: there is no such program, or it has no such family.
        DeviceError: it is not installed, or cannot load the checkpoint.
    """
    check_program(name)
    tokens = torch.tensor(blocks[0][:_TOKENS], dtype=torch.int64)
    theirs = PROGRAMS[name](model, context, tokens)
    meter = DivergenceMeter()
    each = meter.add(theirs, next(iter(runner.logits([tokens]))))[:, 0]
    worst = each.nan_to_num(torch.inf).argsort(descending=True)[:3].tolist()
    bound = Bound(f"against.{name}", LIMIT, "at most")
    value = meter.result().relative_difference
    return decide(bound, value, where=[f"token {at} of block 0" for at in worst])


def check_program(name: str) -> None:
    """Lets pass the name of a program that FLOAT can be held against.

    Raises:
        UsageError: there is no such program.
    """
    if name not in PROGRAMS:
        raise UsageError(f"--against {name!r} is not possible; there is {', '.join(PROGRAMS)}")


def _transformers(model: Model, context: int, tokens: Tensor) -> Tensor:
    """Logits by transformers, ``float32[t, vocab]``; the checkpoint's own code is never run."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise DeviceError(
            f"transformers cannot be loaded ({error}), and --against transformers needs it: pip "
            f'install "edgeforge[transformers]"'
        ) from None
    path = model.checkpoint.path
    file = path if model.checkpoint.gguf is not None else None
    if file is not None:  # its configuration was made of the metadata
        path = model.checkpoint.sidecars[CONFIG].parent
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **where)
    except (ValueError, KeyError, OSError):
        raise UsageError(
            f"transformers has no {model.spec.model_type} without code of the checkpoint's own, "
            f"which is not run: leave --against out"
        ) from None
    rope = getattr(config, "rope_parameters", None)
    ours = model.spec.rope
    if isinstance(rope, dict) and ours is not None and uses_long_set(ours, context):
        # It chooses by the text's length, and an artifact by its declared context.
        config.rope_parameters = {**rope, "short_factor": rope["long_factor"]}
    try:
        if file is not None:
            loaded = _of_gguf(config, file)
        else:
            # In its own dtype, so that constants are rounded as the model's are, then widened.
            loaded = _class_of(config).from_pretrained(
                path, config=config, dtype="auto", attn_implementation="eager", **where
            )
        with torch.no_grad():
            logits: Tensor = loaded.float().eval()(tokens[None], use_cache=False).logits[0].float()
    except Exception as error:  # its errors share no base class
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DeviceError(f"transformers cannot run {file or path}: {reason[:200]}") from error
    return logits


def _class_of(config: Any) -> Any:
    """Returns the class of transformers that gives logits, of texts or of images and texts."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def _of_gguf(config: Any, file: Path) -> Any:
    """Returns transformers' model with the tensors that its own reader of GGUF files finds.

    Raises:
        ValueError: that reader finds too few tensors, or others.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    loaded = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with redirect_stderr(StringIO()):  # a bar of its progress
        read = load_gguf_checkpoint(str(file), True, loaded, torch.float32)["tensors"]
    missing, unexpected = loaded.load_state_dict(read, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ValueError(f"its reader of GGUF files lacks {[*missing, *unexpected][:3]}")
    loaded.tie_weights()
    return loaded


PROGRAMS: Final[dict[str, Callable[[Model, int, Tensor], Tensor]]] = {"transformers": _transformers}
"""Programs that FLOAT can be held against, by the name that the command line takes."""
