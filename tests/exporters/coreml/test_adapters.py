"""Functions with adapters, as coremltools reads them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from exporters.adapters import write_adapter

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("int4", {"chunk": "4,8"}), ("lut4", {"profile": "ane"}), ("fp32", {})],
    ids=str,
)
def test_the_types_of_all_operations_are_as_coremltools_infers_them(
    recipe, options, package, llama_config, reopen, tmp_path
):
    config = llama_config(num_hidden_layers=1, head_dim=32, intermediate_size=128)
    artifact = package(config, recipe, **options)
    folder = shutil.copytree(artifact.folder, tmp_path / "a")
    rows = config["hidden_size"]
    pair = np.ones((128, 3), np.float32), np.ones((3, rows), np.float32)
    write_adapter("coreml", folder, "style", {DOWN: pair}, [DOWN])
    spec, program = reopen(folder)
    for name in ("decode", "prefill"):
        function = program.functions[f"{name}_style"]
        stated = spec.mlProgram.functions[f"{name}_style"]
        (block,) = stated.block_specializations.values()
        made = {each.name: each for operation in function.operations for each in operation.outputs}
        written = [each for operation in block.operations for each in operation.outputs]
        (low,) = (each for each in written if str(each.name).endswith("_low"))
        kind = {10: "fp16", 11: "fp32"}[low.type.tensorType.dataType]
        inferred = made[str(low.name)]
        assert (inferred.shape[-1], inferred.dtype.__name__) == (3, kind)
        logits = function.outputs[0]
        assert logits.shape[-1] == config["vocab_size"]
