"""Checkpoints of awkward dims, and artifacts of them, made once for all tests of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from device_harness import executorch_session
from edgeforge.export_options import ExportOptions
from edgeforge.families.facts import facts_of
from edgeforge.model import trace
from edgeforge.model.model import Model, open_model
from edgeforge.pipeline import export
from edgeforge.planning.choose import choose_plan
from edgeforge.reference.walk import ReferenceRunner, store_reader
from edgeforge.synth.shapes import tensor_shapes
from edgeforge.synth.synthesise import write_byte_tokenizer
from edgeforge.verification.meaning.check import check_meaning
from edgeforge.weight_store import quantize
from exporters.manifest import Manifest
from exporters.options import TargetOptions
from exporters.registry import find_target
from quant.plans.recipes import find_recipe
from quant.program.program import Program
from quant.program.rewrite import quantize_program
from quant.store.store import WeightStore
from tests.exporters.executorch.forked_worker import ForkedWorker

Config = dict[str, object]

VOCAB, BOS, EOS = 320, 256, 257
CONTEXT = 48
NOTHING_ASKED = TargetOptions()


def llama(**changes: object) -> Config:
    """A config of one Llama layer; changes may make it Mistral's."""
    return {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "hidden_size": 64,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **changes,
    }


def phi3(**changes: object) -> Config:
    """A config of Phi-3: fused projections, untied."""
    base = llama(model_type="phi3", num_key_value_heads=4, sliding_window=None)
    return {**base, "original_max_position_embeddings": 4096, **changes}


def openelm(
    heads: list[int], kv_heads: list[int], *, head_dim: int = 16, **changes: object
) -> Config:
    """A config of OpenELM, head counts layer by layer."""
    count = len(heads)
    return {
        "model_type": "openelm",
        "vocab_size": VOCAB,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "model_dim": 64,
        "head_dim": head_dim,
        "num_transformer_layers": count,
        "num_gqa_groups": heads[0] // kv_heads[0],
        "num_query_heads": heads,
        "num_kv_heads": kv_heads,
        "ffn_multipliers": [1.0 + 0.5 * i for i in range(count)],
        "ffn_dim_divisor": 32,
        "ffn_with_glu": True,
        "activation_fn_name": "swish",
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
        "rope_freq_constant": 10000,
        "max_context_length": 4096,
        **changes,
    }


def _longrope(long: bool) -> Config:
    # The declared context of 48 tokens lies on one side of the original context or the other.
    return phi3(
        head_dim=32,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=256,
        original_max_position_embeddings=32 if long else 64,
        rope_scaling={
            "type": "longrope",
            "long_factor": [1 + 0.9 * i for i in range(16)],
            "short_factor": [1 + 0.1 * i for i in range(16)],
        },
    )


# Every reason a graph has to differ from the plainest one.
CASES: dict[str, Config] = {
    "llama-gqa": llama(),
    "llama-head-8": llama(head_dim=8),
    "llama-head-24-3-1": llama(head_dim=24, num_attention_heads=3, num_key_value_heads=1),
    "llama-head-40-tied": llama(head_dim=40, tie_word_embeddings=True),
    "llama-5-5": llama(num_attention_heads=5, num_key_value_heads=5),
    "llama-15-5-head-80": llama(head_dim=80, num_attention_heads=15, num_key_value_heads=5),
    "llama-head-96": llama(head_dim=96, num_attention_heads=2, num_key_value_heads=1),
    "llama-linear-rope": llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama-3-rope": llama(
        tie_word_embeddings=True,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral-window-7": llama(model_type="mistral", sliding_window=7),
    "mistral-window-1": llama(model_type="mistral", sliding_window=1),
    "mistral-window-7-head-24": llama(model_type="mistral", sliding_window=7, head_dim=24),
    "mistral-window-39": llama(model_type="mistral", sliding_window=39),
    "mistral-window-40": llama(model_type="mistral", sliding_window=40),
    "mistral-window-41": llama(model_type="mistral", sliding_window=41),
    "mistral-window-context": llama(model_type="mistral", sliding_window=CONTEXT),
    "phi3": phi3(),
    "phi3-half-rotary": phi3(head_dim=32, partial_rotary_factor=0.5),
    "phi3-three-quarter-rotary": phi3(head_dim=32, partial_rotary_factor=0.75),
    "phi3-half-rotary-head-40": phi3(head_dim=40, partial_rotary_factor=0.4),
    "phi3-longrope-short": _longrope(long=False),
    "phi3-longrope-long": _longrope(long=True),
    "phi3-window-5": phi3(sliding_window=5),
    "openelm-uneven": openelm([3, 4, 6], [1, 2, 3]),
    "openelm-head-24": openelm([2, 4], [1, 2], head_dim=24),
    "openelm-untied": openelm([4, 8], [1, 2], share_input_output_layers=False),
    "openelm-no-qk-norm": openelm([2, 4], [1, 2], normalize_qk_projections=False),
}

# Six of them that still take every way through the lowerings. What the others add is another number
# (a window's or a head's width, a count of heads, the entries of the rotary tables), and the one
# test of every target that runs all cases shows it.
DISTINCT = (
    "llama-3-rope",  # q, k and v of one product, rotated in the attention; scaled rope; tied
    "llama-head-24-3-1",  # rotated before the attention, whose widths are too narrow; one kv head
    "mistral-window-7",  # a window, and two query heads for each kv head
    "phi3-half-rotary",  # half of a head rotated, in the attention; fused gate and up; untied
    "phi3-half-rotary-head-40",  # part of a head rotated, before the attention
    "openelm-uneven",  # other counts of heads in every layer, and norms of q and k
)


def write_checkpoint(folder: Path, config: Config, seed: int = 0) -> Path:
    """A Hugging Face folder of random float32 weights, skewed so that asymmetry shows."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    draw = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config):
        if len(shape) == 1:
            tensors[name] = draw.normal(1, 0.1, shape).astype(np.float32)
        else:
            skewed = draw.gamma(2.0, 1.0, shape) - 1.7
            tensors[name] = (skewed / np.sqrt(2 * shape[1])).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    write_byte_tokenizer(folder, VOCAB)
    return folder


@dataclass(frozen=True)
class Exported:
    """An artifact and all it was made of."""

    folder: Path
    manifest: Manifest
    model: Model
    float_program: Program
    program: Program
    store: WeightStore

    def float_logits(self, tokens: np.ndarray) -> np.ndarray:
        """FLOAT: logits of every position of a fresh text, ``float32[t, vocab]``."""
        weights = self.model.weights
        runner = ReferenceRunner(self.float_program, lambda given: weights.float_weight(given.name))
        return next(runner.logits([torch.from_numpy(tokens)])).numpy()

    def quantized_logits(self, tokens: np.ndarray) -> np.ndarray:
        """QUANTIZED, likewise."""
        runner = ReferenceRunner(self.program, store_reader(self.store))
        return next(runner.logits([torch.from_numpy(tokens)])).numpy()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of this run's own; models this small run fastest on one thread."""
    folder = tmp_path_factory.mktemp("cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(folder))
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def forked_workers() -> Iterator[None]:
    """Sessions' processes are forked from one that has the runtime, in place of started anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executorch_session, "start_worker", ForkedWorker)
        yield


Build = Callable[..., Exported]


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], Model]:
    """Writes a checkpoint of a config, once, and opens it."""
    root = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Model] = {}

    def checkpoint_of(config: Config) -> Model:
        key = json.dumps(config, sort_keys=True)
        if key not in made:
            made[key] = open_model(str(write_checkpoint(root / str(len(made)), config)))
        return made[key]

    return checkpoint_of


@pytest.fixture(scope="session")
def build(
    cache: Path,
    checkpoint_of: Callable[[Config], Model],
    tmp_path_factory: pytest.TempPathFactory,
) -> Build:
    """Exports a config by a recipe (or a format's name); the same again is not made twice."""
    root = tmp_path_factory.mktemp("artifacts")
    made: dict[tuple[str, str, int, str, TargetOptions], Exported] = {}

    def build(
        config: Config,
        recipe: str = "fp32",
        context: int = CONTEXT,
        target: str = "onnx",
        asked: TargetOptions = NOTHING_ASKED,
    ) -> Exported:
        key = (json.dumps(config, sort_keys=True), recipe, context, target, asked)
        if key not in made:
            model = checkpoint_of(config)
            out = root / str(len(made))
            chosen = as_recipe(recipe, root)
            options = ExportOptions(recipe=chosen, context=context, threads=2, target=asked)
            export(model, [find_target(target)], out, options)
            weights, targets = model.weights, [find_target(target)]
            facts = facts_of(model.spec, context)
            plan = choose_plan(model, options.plan_request(targets, facts, None)).plan
            store = quantize(
                weights, model.checkpoint.digest(), plan, 2, lambda stage, done, size: None
            )
            traced = trace.trace(model.spec, context)
            program = quantize_program(traced, plan)
            manifest = Manifest.read(out)
            made[key] = Exported(out, manifest, model, traced, program, store)
            # No sound artifact may be called otherwise, whatever family, recipe and options it has.
            checks = check_meaning(out, manifest, model)
            assert [check for check in checks if check.verdict == "failed"] == []
        return made[key]

    return build


def as_recipe(name: str, root: Path) -> str:
    """A recipe's name, or for a format's name a file with one rule for it."""
    try:
        find_recipe(name)
    except ValueError:
        path = root / f"{name}.yaml"
        path.write_text(f"- {{match: '*', format: {name}}}\n", encoding="utf-8")
        return str(path)
    return name


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """As many random tokens as the artifacts' context holds, and one more: ``int64[49]``."""
    return np.random.default_rng(7).integers(0, VOCAB, CONTEXT + 1, dtype=np.int64)


@pytest.fixture(scope="session", params=CASES)
def case(request: pytest.FixtureRequest) -> Config:
    """Every reason a graph has to differ from the plainest one."""
    return CASES[request.param]


@pytest.fixture(scope="session", params=DISTINCT)
def distinct_case(request: pytest.FixtureRequest) -> Config:
    """A case of each way through the lowerings."""
    return CASES[request.param]


@pytest.fixture
def exported(case: Config, build: Build) -> Exported:
    """Every case as float32: the artifact must equal FLOAT."""
    return build(case)


@pytest.fixture
def exported_distinct(distinct_case: Config, build: Build) -> Exported:
    """As `exported`, of six cases."""
    return build(distinct_case)


@pytest.fixture(scope="session")
def llama_config() -> Callable[..., Config]:
    """Makes a Llama config from what is to differ."""
    return llama


@pytest.fixture(scope="session")
def openelm_config() -> Callable[..., Config]:
    """Makes an OpenELM config from head counts and what is to differ."""
    return openelm


@pytest.fixture(scope="session")
def phi3_config() -> Callable[..., Config]:
    """Makes a Phi-3 config from what is to differ."""
    return phi3
