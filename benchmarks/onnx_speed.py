"""Loads one ONNX language model folder and times it: the measuring half of onnx_export.py.

Prints one line of JSON. Folders of all exporters run with the same code and the same session
options: plain onnxruntime with input and output binding, keys and values updated in place, or
onnxruntime-genai (``--runtime genai``).
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from measured_process import high_water_mark


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds model.onnx and genai_config.json")
    parser.add_argument("--runtime", choices=["onnxruntime", "genai"], default="onnxruntime")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=128, help="tokens in the prompt")
    parser.add_argument("--decode", type=int, default=64, help="tokens generated after it")
    parser.add_argument("--rounds", type=int, default=3, help="prompts timed in one process")
    options = parser.parse_args()
    measure = measure_genai if options.runtime == "genai" else measure_onnxruntime
    print(json.dumps(measure(options)))


def measure_onnxruntime(options: argparse.Namespace) -> dict[str, Any]:
    """Returns seconds to load, peak bytes, tokens/s of prefill and decode, and greedy tokens."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    began = time.perf_counter()
    graph = options.folder / decoder_config(options.folder)["filename"]
    session = ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    load = time.perf_counter() - began
    loaded = high_water_mark()
    capacity = options.prefill + options.decode
    model = Decoder(session, ort, capacity, decoder_config(options.folder)["head_size"])
    prompt = np.random.default_rng(0).integers(0, 256, (1, options.prefill), dtype=np.int64)
    model.generate(prompt[:, :8], 4)
    rounds = [model.generate(prompt, options.decode) for _ in range(options.rounds)]
    return {
        "load_s": load,
        "loaded_peak": loaded,
        "peak": high_water_mark(),
        "prefill_tps": options.prefill / statistics.median(prefill for prefill, _ in rounds),
        "decode_tps": options.decode / statistics.median(decode for _, decode in rounds),
        "tokens": model.tokens,
    }


class Decoder:
    """Runs a graph with genai's names: input_ids, attention_mask, past_key_values.N.key."""

    def __init__(self, session, ort, capacity: int, head_size: int):
        """Allocates key and value buffers for ``capacity`` tokens."""
        self.session = session
        self.ort = ort
        self.inputs = {entry.name: entry for entry in session.get_inputs()}
        self.caches = {}
        self.tokens: list[int] = []
        for name, entry in self.inputs.items():
            if name.endswith((".key", ".value")):
                _, heads, _, width = entry.shape
                shape = (1, heads, capacity, width if isinstance(width, int) else head_size)
            elif name.startswith("past"):  # a state of one size
                shape = (1, *entry.shape[1:])
            if name.startswith("past"):
                zeros = np.zeros(shape, numpy_type(entry.type))
                self.caches[name] = ort.OrtValue.ortvalue_from_numpy(zeros)

    def generate(self, prompt: np.ndarray, count: int) -> tuple[float, float]:
        """Decodes greedily after ``prompt`` int64[1, tokens].

        Returns the seconds of the prefill and the seconds of all decoding.
        """
        began = time.perf_counter()
        token = self.step(prompt, prompt.shape[1])
        prefilled = time.perf_counter()
        self.tokens = [token]
        for i in range(count):
            token = self.step(np.array([[token]]), prompt.shape[1] + i + 1)
            self.tokens.append(token)
        return prefilled - began, time.perf_counter() - prefilled

    def step(self, tokens: np.ndarray, length: int) -> int:
        """Runs ``tokens``, after which the cache holds ``length``; returns the likeliest token."""
        binding = self.session.io_binding()
        feeds = {
            "input_ids": tokens,
            "attention_mask": np.ones((1, length)),
            "position_ids": np.arange(length - tokens.shape[1], length)[None],
        }
        for name, entry in self.inputs.items():
            if name in self.caches:
                binding.bind_ortvalue_input(name, self.caches[name])
                present = f"present.{name.partition('.')[2]}"
                binding.bind_ortvalue_output(present, self.caches[name])
            elif name in feeds:
                value = np.ascontiguousarray(feeds[name], numpy_type(entry.type))
                binding.bind_cpu_input(name, value)
            else:
                raise SystemExit(
                    f"the graph has the input {name}, for which this script has no value"
                )
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        # Outputs come in the order in which they were bound, so logits are the last.
        logits = binding.get_outputs()[-1].numpy()
        return int(logits[0, -1].argmax())


def numpy_type(onnx_type: str) -> type:
    """Returns the NumPy type of an ONNX type such as ``tensor(float)``."""
    names = {
        "float": np.float32,
        "float16": np.float16,
        "int64": np.int64,
        "int32": np.int32,
        "int8": np.int8,
    }
    return names[onnx_type.removeprefix("tensor(").removesuffix(")")]


def decoder_config(folder: Path) -> dict[str, Any]:
    """Returns genai_config.json's ``decoder`` table: file name, head size, names of inputs."""
    return json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]


def measure_genai(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the same figures with onnxruntime-genai, with the same number of threads."""
    import onnxruntime_genai as og

    settings = {"intra_op_num_threads": options.threads, "inter_op_num_threads": 1}
    overlay = json.dumps({"model": {"decoder": {"session_options": settings}}})
    began = time.perf_counter()
    config = og.Config(str(options.folder))
    config.overlay(overlay)
    model = og.Model(config)
    load = time.perf_counter() - began
    loaded = high_water_mark()
    prompt = np.random.default_rng(0).integers(0, 256, options.prefill, dtype=np.int32)
    rounds = []
    for tokens, count in [(prompt[:8], 4), *[(prompt, options.decode)] * options.rounds]:
        length = len(tokens) + count
        search = og.GeneratorParams(model)
        search.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = og.Generator(model, search)
        began = time.perf_counter()
        generator.append_tokens(tokens)
        generator.generate_next_token()
        prefilled = time.perf_counter()
        for _ in range(count - 1):
            generator.generate_next_token()
        decode = (time.perf_counter() - prefilled) / (count - 1)
        rounds.append((prefilled - began, decode))
        generated = [int(token) for token in generator.get_sequence(0)[len(tokens) :]]
    return {
        "load_s": load,
        "loaded_peak": loaded,
        "peak": high_water_mark(),
        "prefill_tps": options.prefill / statistics.median(prefill for prefill, _ in rounds[1:]),
        "decode_tps": 1 / statistics.median(decode for _, decode in rounds[1:]),
        "tokens": generated,
    }


if __name__ == "__main__":
    main()
