"""Train the demo model on a CPU within a given time.

`--threads` processes of one thread each compute the gradient of their share of a step's windows;
they meet once a step, so a busy machine costs no more than the time it takes.

Matrices are trained by Muon (orthogonalized momentum), the embedding and the norms by AdamW. The
learning rate follows the clock: it warms up, holds, and falls to zero when the time is used up, so
`--minutes` alone decides how long the run is. The last part of the run uses the full context.

Usage::

    python train.py --data build --out build/model --minutes 60 --threads 2
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from llama import Llama, LlamaShape
from model import SHAPES as OPENELM_SHAPES
from model import OpenELM, Shape, negative_log_likelihood, save
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

SHAPES: dict[str, Shape | LlamaShape] = {**OPENELM_SHAPES, "llama": LlamaShape()}
BOS, EOS = 1, 2
# Without instructions for it, a product of bfloat16 matrices takes 30 times as long as of float32.
BFLOAT16_IS_FAST = torch.ops.mkldnn._is_mkldnn_bf16_supported()
VALIDATION_EVERY = 60  # each 60th training document is kept to watch the run, not trained on
WARMUP, DECAY_START = 0.01, 0.45  # shares of the run
LONG_CONTEXT_START = 0.8  # from this share on, windows are as long as the model's context
SHORT_WINDOW = 512
BOS_SHARE = 0.75  # of the windows start with <s>, as text does at inference


@dataclass(frozen=True)
class Recipe:
    """What is tuned: rates at their peak, decay, tokens of one step."""

    matrix_rate: float = 0.02
    embedding_rate: float = 0.003
    norm_rate: float = 0.003
    weight_decay: float = 0.02
    tokens_per_step: int = 4096


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with singular values near one (five Newton-Schulz steps)."""
    x = matrix.bfloat16() if BFLOAT16_IS_FAST else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for a, b, c in (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is orthogonalized before the step; weight decay is decoupled."""

    def __init__(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(
            parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95, "peak": lr}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(momentum, group["momentum"]))
                rows, columns = parameter.shape
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-rate)


def new_model(shape: Shape | LlamaShape) -> OpenELM | Llama:
    """A model of the shape's architecture; its weights are not drawn yet."""
    return Llama(shape) if isinstance(shape, LlamaShape) else OpenELM(shape)


def optimizers(model: OpenELM | Llama, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding, the head and the norms."""
    named = dict(model.named_parameters())
    embedding = [v for k, v in named.items() if "embed" in k or k.startswith("lm_head")]
    norms = [v for k, v in named.items() if k.endswith("norm.weight")]
    matrices = [v for k, v in named.items() if k.endswith("proj.weight") or ".proj_" in k]
    groups = [
        {"params": embedding, "lr": recipe.embedding_rate, "peak": recipe.embedding_rate},
        {"params": norms, "lr": recipe.norm_rate, "peak": recipe.norm_rate},
    ]
    return [
        Muon(matrices, recipe.matrix_rate, recipe.weight_decay),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0),
    ]


def schedule(progress: float) -> float:
    """Factor on the peak rate when `progress` (0 to 1) of the time is used."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.02)
    return min(1.0, max(0.0, (1 - progress) / (1 - DECAY_START)))


class Windows:
    """Draws windows of the token stream: shuffled passes, each with a new random offset."""

    def __init__(self, tokens: np.ndarray, seed: int) -> None:
        self.tokens = tokens
        self.random = np.random.default_rng(seed)
        self.length = 0
        self.starts: list[int] = []
        self.passes = 0.0

    def batch(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, each int64[count, length]."""
        if length != self.length:
            self.length, self.starts = length, []
        rows = []
        for _ in range(count):
            if not self.starts:
                first = int(self.random.integers(1, length))
                starts = np.arange(first, len(self.tokens) - length - 1, length)
                self.starts = self.random.permutation(starts).tolist()
            start = self.starts.pop()
            rows.append(self.tokens[start - 1 : start + length])
        self.passes += count * length / len(self.tokens)
        block = np.stack(rows).astype(np.int64)
        inputs, targets = block[:, :-1].copy(), block[:, 1:].copy()
        inputs[self.random.random(count) < BOS_SHARE, 0] = BOS
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def read_tokens(data: Path, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the training and the validation stream, uint16: `<s> document </s>` after another."""
    with (data / "train.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    streams: tuple[list[int], list[int]] = ([], [])
    for i, encoding in enumerate(tokenizer.encode_batch(texts, add_special_tokens=False)):
        streams[i % VALIDATION_EVERY == 0].extend([BOS, *encoding.ids, EOS])
    return np.array(streams[0], np.uint16), np.array(streams[1], np.uint16)


def loss_of(model: OpenELM | Llama, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of the next token; products in bfloat16 where that is fast."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=BFLOAT16_IS_FAST):
        logits = model(inputs)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def rounded(model: OpenELM | Llama) -> OpenELM | Llama:
    """A copy with the weights as the file will hold them (bfloat16), for float32 maths."""
    copy = new_model(model.shape)
    copy.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    return copy.eval()


def average_gradients(
    model: OpenELM | Llama, loss: float, used: float, rank: int
) -> tuple[float, float]:
    """Average gradients over the processes; return the mean loss and the first one's clock."""
    gradients = [p.grad for p in model.parameters()]
    tail = torch.tensor([loss, used if rank == 0 else 0.0], dtype=torch.float32)
    flat = torch.cat([*(g.flatten() for g in gradients), tail])
    dist.all_reduce(flat)
    flat[:-1] /= dist.get_world_size()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
    return flat[-2].item(), flat[-1].item()


@dataclass
class Run:
    """One process of a training run and all that a checkpoint holds."""

    model: OpenELM | Llama
    optims: list[torch.optim.Optimizer]
    folder: Path
    step: int = 0
    used: float = 0.0
    """Seconds of training so far, compilation not counted."""
    seen: int = 0
    """Tokens trained on so far, over all processes."""

    def save(self) -> None:
        """Write `checkpoint.pt`, complete or not at all, and the exported folder."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optims],
            "step": self.step, "used": self.used, "seen": self.seen,
        }  # fmt: skip
        path = self.folder / "checkpoint.pt"
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
        save(self.model, self.folder)

    def resume(self) -> None:
        """Go on from `checkpoint.pt`, if there is one."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optims, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.used, self.seen = state["step"], state["used"], state["seen"]

    def set_rates(self, progress: float) -> None:
        """Set the learning rates and Muon's momentum for `progress` (0 to 1) of the time."""
        for optimizer in self.optims:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(progress)
                if "momentum" in group:
                    group["momentum"] = 0.85 + 0.1 * min(1.0, self.step / 300)

    def perplexity(self, tokens: np.ndarray) -> float:
        """Perplexity over `tokens` of the weights rounded to bfloat16."""
        text = torch.from_numpy(tokens.astype(np.int64))
        context = self.model.shape.max_context_length
        total, number = negative_log_likelihood(rounded(self.model), text, context)
        return math.exp(total / number)


def train(rank: int, arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Run process `rank` until the time is used up; the first process writes the files."""
    torch.set_num_threads(1)
    world = arguments.threads
    meeting = f"file://{(arguments.out / 'meeting').resolve()}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    tokenizer = Tokenizer.from_file(str(arguments.out / "tokenizer.json"))
    training, validation = read_tokens(arguments.data, tokenizer)
    shape = SHAPES[arguments.size]
    model = new_model(shape)
    model.initialize(torch.Generator().manual_seed(arguments.seed))
    run = Run(model, optimizers(model, recipe), arguments.out)
    if arguments.resume:
        run.resume()
    count = sum(p.numel() for p in model.parameters())
    if rank == 0:
        print(f"{count:,} parameters, {len(training):,} training tokens,"
              f" heads {shape.query_heads}, widths {shape.ffn_dims}", flush=True)  # fmt: skip
    windows = Windows(training, arguments.seed + 1000 * rank + run.step)
    loss_function = loss_of if arguments.eager else torch.compile(loss_of, dynamic=False)
    share = recipe.tokens_per_step // world
    for length in (shape.max_context_length, SHORT_WINDOW):  # compile before the clock starts
        block = torch.zeros(share // length, length, dtype=torch.int64)
        loss_function(model, block, block).backward()
        model.zero_grad()
    dist.barrier()
    budget = arguments.minutes * 60.0
    last = saved_at = time.monotonic()
    running = float("nan")
    while run.used < budget:
        progress = run.used / budget
        run.set_rates(progress)
        long = progress >= LONG_CONTEXT_START
        length = shape.max_context_length if long else SHORT_WINDOW
        loss = loss_function(model, *windows.batch(share // length, length))
        loss.backward()
        now = time.monotonic()
        value, run.used = average_gradients(model, loss.item(), run.used + now - last, rank)
        last = now
        for optimizer in run.optims:
            optimizer.step()
            optimizer.zero_grad()
        run.step, run.seen = run.step + 1, run.seen + share * world
        running = value if math.isnan(running) else 0.98 * running + 0.02 * value
        if rank > 0:
            continue
        if run.step % 50 == 0:
            pace = f"{run.seen / 1e6:.2f} M tokens, {run.seen / run.used:.0f} tokens/s"
            print(f"step {run.step} {run.used:.0f} s {pace} loss {running:.4f}", flush=True)
        if now - saved_at > arguments.save_seconds:
            saved_at = now
            run.save()
            ppl = run.perplexity(validation[: 8 * shape.max_context_length])
            print(f"step {run.step} validation perplexity {ppl:.3f}", flush=True)
    if rank == 0:
        run.save()
        record = {
            "size": arguments.size, "seed": arguments.seed, "parameters": count,
            "minutes": run.used / 60, "processes": world, "steps": run.step,
            "tokens_trained_on": run.seen, "training_tokens": len(training),
            "passes": run.seen / len(training), "validation_tokens": len(validation),
            "validation_perplexity": run.perplexity(validation),
            "recipe": vars(recipe), "torch": torch.__version__,
        }  # fmt: skip
        text = json.dumps(record, indent=2) + "\n"
        (arguments.data / "training.json").write_text(text, encoding="utf-8")
        print(text)
    dist.destroy_process_group()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--data", type=Path, default=Path("build"))
    parser.add_argument("--out", type=Path, default=Path("build/model"))
    parser.add_argument("--size", choices=sorted(SHAPES), default="small")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2, help="processes of one thread")
    parser.add_argument("--seed", type=int, default=2404)
    parser.add_argument("--save-seconds", type=float, default=180.0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--eager", action="store_true", help="run without torch.compile")
    for name, default in vars(Recipe()).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(default), default=default)
    arguments = parser.parse_args()
    recipe = Recipe(**{name: getattr(arguments, name) for name in vars(Recipe())})
    if recipe.tokens_per_step % (arguments.threads * SHAPES[arguments.size].max_context_length):
        parser.error("--tokens-per-step must be a multiple of --threads times the context length")
    (arguments.out / "meeting").unlink(missing_ok=True)
    os.environ["PYTHONSAFEPATH"] = "1"  # a file of the current folder is no module of the workers
    mp.spawn(train, (arguments, recipe), nprocs=arguments.threads)


if __name__ == "__main__":
    main()
