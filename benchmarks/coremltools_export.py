"""Lets coremltools read one function of a package, convert it with its passes, and save it.

The package already holds integers. Reading it, coremltools unpacks them into NumPy arrays with one
element per byte, and that time is measured too.
"""

import json
import sys
import time
import warnings
from pathlib import Path

from exporters.coreml.names import WEIGHTS_PATH


def main() -> None:
    """Reads a package, keeps one function, converts, saves; prints each step's seconds as JSON."""
    package, out, function = sys.argv[1:4]
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools
        from coremltools.converters.mil.frontend.milproto.load import load
    imported = time.perf_counter()
    spec = coremltools.models.MLModel(package, skip_model_load=True).get_spec()
    program = load(spec, spec.specificationVersion, str((Path(package) / WEIGHTS_PATH).parent))
    for name in list(program.functions):
        if name != function:
            del program.functions[name]
    program.functions["main"] = program.functions.pop(function)
    loaded = time.perf_counter()
    model = coremltools.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=coremltools.target.iOS18,
        skip_model_load=True,
    )
    model.save(out)
    saved = time.perf_counter()
    steps = {"import": imported - started, "read": loaded - imported, "write": saved - loaded}
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
