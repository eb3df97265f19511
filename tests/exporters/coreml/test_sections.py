"""What inspect lists of a package is what its files hold."""

from __future__ import annotations

from exporters.registry import find_target

DIMS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def test_operations_and_weights_are_counted_from_the_files(build, llama_config):
    made = build(llama_config(**DIMS), "int4-g32", target="coreml")
    operations, weights = find_target("coreml").structure(made.folder)
    times = {row[:2]: row[2] for row in operations.rows}
    # Each layer updates two caches, and reads them before and after.
    for function in ("decode", "prefill", "verify"):
        assert times[function, "slice_update"] == 4
        assert times[function, "read_state"] == 8
    stored = {row[:2]: row[2:] for row in weights.rows}
    tensors, nbytes = stored["decode", "int4 by constexpr_blockwise_shift_scale"]
    matrices = {
        name: record for name, record in made.manifest.weights.items() if len(record.shape) == 2
    }
    assert tensors == len(matrices)
    weights_of = sum(rows * columns for rows, columns in (r.shape for r in matrices.values()))
    assert nbytes == weights_of // 2 + weights_of // 32 * 2


def test_weights_of_other_packages_are_told_too(tmp_path):
    import coremltools as ct
    import numpy as np
    from coremltools.converters.mil import Builder as mb
    from coremltools.optimize import coreml as optimize

    from exporters.coreml.package import open_package
    from exporters.coreml.structure import weight_formats

    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 64))])
    def program(x):
        return mb.linear(x=x, weight=weight)

    model = ct.convert(program, convert_to="mlprogram", skip_model_load=True)
    config = optimize.OpPalettizerConfig(nbits=4, weight_threshold=0)
    optimize.palettize_weights(model, optimize.OptimizationConfig(config)).save(
        str(tmp_path / "m.mlpackage")
    )
    (label, (count, nbytes)), *_ = [
        row
        for row in weight_formats(open_package(tmp_path / "m.mlpackage"), "main").items()
        if "lut" in row[0]
    ]
    assert label.endswith("by constexpr_lut_to_dense") and count == 1
    assert nbytes >= 64 * 64 // 2
