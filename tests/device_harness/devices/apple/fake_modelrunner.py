"""A FAKE of coremltools' runner app: it answers its JSON-RPC messages by EdgeForge's interpreter.

As in the app, each function that is loaded has one state, which lives as long as the function.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from device_harness.coreml_interpreter.interpreter import Interpreter
from device_harness.coreml_interpreter.values import Precision
from exporters.coreml.package import open_package

DTYPES = {"Float16": np.float16, "Float32": np.float32, "Int32": np.int32}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
NANOSECONDS = 2_000_000
Arrays = dict[str, np.ndarray[Any, Any]]


def first_output(operation: Any) -> str:
    """As in the app: the name of the first output, and an empty text where there is none."""
    return operation.outputs[0].name if operation.outputs else ""


class Runner:
    def __init__(self, root: Path) -> None:
        self.root, self.models = root, dict[str, tuple[Interpreter, str, Any]]()

    def load(self, params: dict[str, Any], resource: Path | None, folder: Path) -> dict[str, Any]:
        assert resource is not None
        link = resource.with_suffix(".mlpackage")  # what is not compiled here keeps its own name
        link.symlink_to(resource)
        package = open_package(link)
        interpreter = Interpreter(package, Precision.FP16)
        function = params["functionName"] or package.default_function
        interpreter.bind(function)
        states = interpreter.make_states(function)
        self.models[params["modelID"]] = (interpreter, function, states)
        return {"modelID": params["modelID"], "duration": 30_000_000, "isCached": False}

    def predict(
        self, params: dict[str, Any], resource: Path | None, folder: Path
    ) -> dict[str, Any]:
        assert resource is not None
        interpreter, function, states = self.models[params["modelID"]]
        storage, inputs = resource.read_bytes(), Arrays()
        for name, given in params["inputs"].items():
            place = given["storage"]
            part = storage[place["offset"] : place["offset"] + place["size"]]
            inputs[name] = np.frombuffer(part, DTYPES[given["dataType"]]).reshape(given["shape"])
        found = interpreter.run(inputs, function, states)
        outputs, data = {}, b""
        for name, array in found.items():
            array = np.ascontiguousarray(array)
            outputs[name] = {
                "dataType": NAMES[array.dtype],
                "shape": list(array.shape),
                "strides": [step // array.itemsize for step in array.strides],
                "storage": {"offset": len(data), "size": array.nbytes},
            }
            data += array.tobytes()
        (folder / "outputs.bin").write_bytes(data)
        return {
            "modelID": params["modelID"],
            "outputs": outputs,
            "duration": NANOSECONDS * inputs["inputIds"].size,
        }

    def plan(self, params: dict[str, Any], resource: Path | None, folder: Path) -> dict[str, Any]:
        interpreter, function, _ = self.models[params["modelID"]]
        infos = []
        engine: dict[str, Any] = {"neuralEngine": {"totalCoreCount": 16}}
        for operation in interpreter.package.operations(function):
            on_engine = operation.type in ("linear", "matmul", "conv")
            path = [
                {"program": {}},
                {"programFunction": {"data": {"name": function}}},
                {"programBlock": {"data": {"index": -1}}},
                {"programOperation": {"data": {"outputName": first_output(operation)}}},
            ]
            usage = {
                "preferred": engine if on_engine else {"cpu": {}},
                "supported": [{"cpu": {}}, {"gpu": {}}, *([engine] if on_engine else [])],
            }
            cost = 0.25 if on_engine else None
            infos.append(
                {"deviceUsage": usage, "estimatedCost": cost, "path": {"components": path}}
            )
        return {"modelID": params["modelID"], "infos": infos}

    def unload(self, params: dict[str, Any], resource: Path | None, folder: Path) -> dict[str, Any]:
        del self.models[params["modelID"]]
        return {"modelID": params["modelID"]}

    def serve(self) -> None:
        base = self.root / "Documents" / "modelrunnerd"
        methods = {
            "Load": self.load,
            "Prediction": self.predict,
            "ComputePlan": self.plan,
            "Unload": self.unload,
        }
        done = set[str]()
        while True:
            for message in base.glob("requests/messages/*/message.json"):
                if message.parent.name in done:
                    continue
                done.add(message.parent.name)
                asked = json.loads(message.read_text())
                folder = base / "responses" / asked["id"]
                folder.mkdir(parents=True)
                resource = None
                if "resource" in asked:
                    where = base / "requests" / "resources" / asked["id"]
                    resource = where / asked["resource"]
                said: dict[str, Any] = {"jsonrpc": "2.0", "id": asked["id"]}
                try:
                    method = methods[asked["method"].partition(".")[2]]
                    said["result"] = method(asked["params"], resource, folder)
                    if (folder / "outputs.bin").exists():
                        said["resource"] = "outputs.bin"
                except Exception as error:
                    said["error"] = {"code": -32603, "message": f"FAKE: {error!r}"}
                partial = folder / ".message.json"
                partial.write_text(json.dumps(said))
                partial.rename(folder / "message.json")
            time.sleep(0.01)


if __name__ == "__main__":
    Runner(Path(sys.argv[1])).serve()
