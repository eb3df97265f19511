"""Packages that coremltools itself converts and compresses, against PyTorch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from device_harness.coreml_interpreter.interpreter import Interpreter
from device_harness.coreml_interpreter.values import Precision
from exporters.coreml.package import open_package

TOKENS, WIDTH, HEADS, WORDS = 8, 32, 4, 50
COMPRESSED = ("int4", "int8", "lut4", "lut4_ios16", "sparse")


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, groups=4)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Linear(8 * 7 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.avg_pool2d(self.up(F.silu(self.second(x))), 2, padding=1, count_include_pad=False)
        x = F.interpolate(x, size=(7, 7), mode="bilinear")
        return torch.log_softmax(self.head(F.hardswish(torch.flatten(x, 1))), -1)


class Block(nn.Module):
    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.before(x)).chunk(3, -1)
        heads = [part.reshape(1, TOKENS, HEADS, -1).transpose(1, 2) for part in parts]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(1, TOKENS, WIDTH)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.after(x)), approximate=self.approximate))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.blocks = nn.ModuleList([Block("none"), Block("tanh")])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * mask.unsqueeze(-1)


@pytest.fixture(scope="module", params=["cnn", "encoder"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, its inputs, and packages of it as coremltools writes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools

        torch.manual_seed(0)
        if request.param == "cnn":
            model: nn.Module = Cnn().eval()
            inputs: dict[str, Tensor] = {"x": torch.randn(1, 3, 24, 24)}
        else:
            model = Encoder().eval()
            ids = torch.randint(0, WORDS, (1, TOKENS), dtype=torch.int32)
            inputs = {"ids": ids, "mask": torch.ones(1, TOKENS)}
        traced = torch.jit.trace(model, tuple(inputs.values()), check_trace=False)
        types = [
            coremltools.TensorType(
                name, tuple(value.shape), np.int32 if name == "ids" else np.float32
            )
            for name, value in inputs.items()
        ]
        folder = tmp_path_factory.mktemp(request.param)
        spec: dict[str, Any] = {}
        for tag, target, precision in (
            ("fp32", coremltools.target.iOS18, coremltools.precision.FLOAT32),
            ("fp16", coremltools.target.iOS18, coremltools.precision.FLOAT16),
            ("ios16", coremltools.target.iOS16, coremltools.precision.FLOAT16),
        ):
            made = coremltools.convert(
                traced,
                inputs=types,
                minimum_deployment_target=target,
                compute_precision=precision,
                skip_model_load=True,
            )
            made.save(str(folder / f"{tag}.mlpackage"))
            spec[tag] = made
        compress(coremltools, spec, folder)
    return model, inputs, folder


def compress(coremltools: Any, made: dict[str, Any], folder: Path) -> None:
    tools = coremltools.optimize.coreml

    def config(kind: Any, **options: Any) -> Any:
        return tools.OptimizationConfig(global_config=kind(weight_threshold=100, **options))

    linear, palette = tools.OpLinearQuantizerConfig, tools.OpPalettizerConfig
    per_block = {"dtype": "int4", "granularity": "per_block", "block_size": 8}
    symmetric = config(linear, mode="linear_symmetric", **per_block)
    for name, result in (
        ("int4", tools.linear_quantize_weights(made["fp16"], symmetric)),
        ("int8", tools.linear_quantize_weights(made["fp16"], config(linear, mode="linear"))),
        ("lut4", tools.palettize_weights(made["fp16"], config(palette, mode="uniform", nbits=4))),
        (
            "lut4_ios16",
            tools.palettize_weights(made["ios16"], config(palette, mode="uniform", nbits=4)),
        ),
        (
            "sparse",
            tools.prune_weights(
                made["fp16"], config(tools.OpMagnitudePrunerConfig, target_sparsity=0.3)
            ),
        ),
    ):
        result.save(str(folder / f"{name}.mlpackage"))


def error_of(converted: Any, name: str, precision: Precision) -> float:
    """Largest difference from PyTorch, relative to its largest output."""
    model, inputs, folder = converted
    interpreter = Interpreter(open_package(folder / f"{name}.mlpackage"), precision)
    (found,) = interpreter.run({key: value.numpy() for key, value in inputs.items()}).values()
    with torch.inference_mode():
        wanted = model(*inputs.values())
    return float((torch.from_numpy(found).float() - wanted).abs().max() / wanted.abs().max())


def test_float_packages_agree_with_pytorch(converted: Any) -> None:
    assert error_of(converted, "fp32", Precision.FP32) < 1e-6
    for name in ("fp16", "ios16"):
        assert error_of(converted, name, Precision.FP32) < 5e-4  # the weights' rounding
        assert error_of(converted, name, Precision.FP16) < 2e-3


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_packages_agree_with_the_weights_they_hold(converted: Any, name: str) -> None:
    """The oracle's weights are those that coremltools itself unpacks."""
    _, inputs, folder = converted
    import coremltools

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = coremltools.models.MLModel(str(folder / f"{name}.mlpackage"), skip_model_load=True)
        plain = coremltools.optimize.coreml.decompress_weights(packed)
    path = folder / f"{name}-plain.mlpackage"
    if not path.exists():
        plain.save(str(path))
    found = [
        next(
            iter(
                Interpreter(open_package(each), Precision.FP32)
                .run({key: value.numpy() for key, value in inputs.items()})
                .values()
            )
        )
        for each in (folder / f"{name}.mlpackage", path)
    ]
    scale = np.ptp(found[1])
    assert np.abs(found[0] - found[1]).max() / scale < 2e-3
    # It is another model than the one that was not compressed, and not far from it.
    assert 1e-6 < error_of(converted, name, Precision.FP32) < 0.3
