"""Functions of a package that run it with an adapter, over the same weights.

Each function is written once more for each adapter, as ``decode_NAME``, ``prefill_NAME`` and so on.
Its weights are the base's, at the same places of the weight file; the adapter's factors are
appended to that file. The base's own functions stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from exporters.adapter_entries import require_free, with_adapter
from exporters.adapter_pair import no_product
from exporters.blobs import Blob
from exporters.coreml import names, weight_file
from exporters.coreml.function import FileValue, file_value, text_value, value_type
from exporters.coreml.package import Package, open_package
from exporters.coreml.schema import DATA_TYPE_NAMES, messages
from exporters.coreml.weights import DESCALE, WIDENED_NAME
from exporters.errors import ExportError
from exporters.replaced import replace_file

if TYPE_CHECKING:
    from exporters.adapter_pair import Pair

ADAPTERS: Final = "edgeforge.adapters"
"""The metadata's field that names the adapters, separated by commas."""

_DTYPES: Final[Mapping[str, npt.DTypeLike]] = {"fp16": np.float16, "fp32": np.float32}

Placed = Mapping[tuple[str, str], tuple[FileValue, FileValue]]
"""The places of the two factors of a weight, by the weight's name and the product's dtype."""


@dataclass(frozen=True)
class _Product:
    """A product with a weight in a function.

    Attributes:
        weight: the weight's name.
        source: the name of ``x``.
        dtype: the dtype of ``x`` and of the product.
    """

    weight: str
    source: str
    dtype: str


def check_options(options: Mapping[str, object]) -> None:
    """Refuses options of an artifact that takes no adapters.

    Raises:
        ExportError: it is for iOS 17.
    """
    if options.get("opset") == "ios17":
        raise ExportError(
            "--adapter-mode separate needs functions of its own for each adapter, and a package "
            "for iOS 17 holds only one: use --opset ios18, or leave --adapter-mode out, and the "
            "adapter is merged into the weights"
        )


def write_coreml_adapter(folder: Path, name: str, pairs: Mapping[str, Pair]) -> str:
    """Adds the functions of an adapter; see `exporters.adapters.write_adapter`."""
    root = folder / names.PACKAGE
    package = open_package(root)
    base = [each for each in names.FUNCTIONS if each in package.functions]
    require_free(base, name, package.functions, names.PACKAGE)
    products = {function: _products(package.block(function)) for function in base}
    for function, found in products.items():
        missing = pairs.keys() - {product.weight for product in found.values()}
        if missing:
            raise no_product(f"{names.PACKAGE}'s function {function}", min(missing))
    needed = sorted(
        {
            (product.weight, product.dtype)
            for found in products.values()
            for product in found.values()
            if product.weight in pairs
        }
    )
    placed = _place(root / names.WEIGHTS_PATH, pairs, needed)
    for function, found in products.items():
        _add_function(package, function, name, found, placed)
    told = package.spec.description.metadata.userDefined
    told[ADAPTERS] = ",".join([*filter(None, [told.get(ADAPTERS)]), name])
    data = package.spec.SerializeToString(deterministic=True)
    replace_file(root / names.MODEL_PATH, data)
    return names.PACKAGE


def _place(path: Path, pairs: Mapping[str, Pair], needed: list[tuple[str, str]]) -> Placed:
    """Appends factors to the weight file, as operations of a dtype read them.

    Raises:
        ExportError: the dtype cannot hold one.
    """
    arrays = []
    for weight, dtype in needed:
        for factor in _balanced(pairs[weight]):
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(factor.T.astype(_DTYPES[dtype]))
            if not np.isfinite(array).all():
                raise ExportError(
                    f"the adapter's factors of {weight} reach {np.abs(factor).max():g}, more than "
                    f"float16 holds: leave --adapter-mode out, and the adapter is merged"
                )
            arrays.append((dtype, array))
    blobs = [(dtype, array.size, Blob(array.tobytes())) for dtype, array in arrays]
    values = [
        FileValue(dtype, array.shape, offset)
        for (dtype, array), offset in zip(arrays, weight_file.append(path, blobs), strict=True)
    ]
    return dict(zip(needed, zip(values[::2], values[1::2], strict=True), strict=True))


def _balanced(pair: Pair) -> Pair:
    """Factors with the same product whose largest magnitudes are alike.

    A power of two goes from one into the other, which is exact. Trained factors of an output are
    often so small that float16 would round them to few bits.
    """
    down, up = pair
    large, small = (float(np.abs(each).max()) for each in pair)
    if not large or not small:
        return pair
    shift = round((math.log2(large) - math.log2(small)) / 2)
    return np.ldexp(down, -shift), np.ldexp(up, shift)


def _products(block: Any) -> dict[str, _Product]:
    """The products with weights, by the name of the whole product.

    Products in a block of their own belong to a mixture's experts, and are left out.
    """
    made = {
        str(output.name): operation
        for operation in block.operations
        for output in operation.outputs
    }
    found: dict[str, _Product] = {}
    for operation in block.operations:
        if operation.type == "linear":
            result = operation.outputs[0]
            source = _operand(operation, "x")
            weight = _weight_of(made, _operand(operation, "weight"))
            rounded = source in made and made[source].type == "dequantize"
            dtype = DATA_TYPE_NAMES[result.type.tensorType.dataType]
            if weight is not None and not rounded:
                found[str(result.name)] = _Product(weight, source, dtype)
        elif operation.type == "mul":
            pair = _operand(operation, "x"), _operand(operation, "y")
            for raw, factors in (pair, pair[::-1]):
                product = found.get(raw)
                if product is not None and factors.startswith(
                    names.identifier(product.weight) + DESCALE
                ):
                    found[str(operation.outputs[0].name)] = found.pop(raw)
    return found


def _operand(operation: Any, key: str) -> str:
    return str(operation.inputs[key].arguments[0].name)


def _weight_of(made: Mapping[str, Any], name: str) -> str | None:
    """The name of the weight that a value is; None where it is no weight."""
    while name in made and made[name].type == "cast":
        name = _operand(made[name], "x")
    plain = name.removesuffix(WIDENED_NAME)
    return names.weight_name(plain) if names.is_weight(plain) else None


def _add_function(
    package: Package, function: str, adapter: str, products: Mapping[str, _Product], placed: Placed
) -> None:
    """Adds a function that does what another does, with an adapter.

    Given::

        y = linear(x, W, b)

    Result, where ``A[rank, in]`` and ``B[out, rank]`` are constants::

        y_base = linear(x, W, b)
        y_low = linear(x, A)
        y_change = linear(y_low, B)
        y = add(y_base, y_change)
    """
    source, new = package.functions[function], with_adapter(function, adapter)
    made = package.spec.mlProgram.functions[new]
    made.CopyFrom(source)
    block = made.block_specializations[made.opset]
    del block.operations[:]
    for operation in package.block(function).operations:
        copy = block.operations.add()
        copy.CopyFrom(operation)
        whole = str(copy.outputs[0].name) if copy.outputs else ""
        product = products.get(whole)
        factors = None if product is None else placed.get((product.weight, product.dtype))
        if product is None or factors is None:
            continue
        kind = copy.outputs[0].type
        base, low, change = (f"{whole}_{part}" for part in ("base", "low", "change"))
        copy.outputs[0].name = base
        copy.attributes["name"].CopyFrom(text_value(base))
        for each in _additions(product, factors, kind, (whole, base, low, change)):
            block.operations.add().CopyFrom(each)
    described = package.spec.description.functions.add()
    for each in package.spec.description.functions:
        if each.name == function:
            described.CopyFrom(each)
    described.name = new


def _additions(
    product: _Product, factors: tuple[FileValue, FileValue], kind: Any, results: tuple[str, ...]
) -> Iterator[Any]:
    """The operations that add what an adapter adds to a product of this type."""
    whole, base, low, change = results
    constants = []
    for suffix, value in zip((names.LORA_A, names.LORA_B), factors, strict=True):
        name = names.factor_name(product.weight, suffix)
        constants.append(name)
        made = _operation("const", name, value_type(value.dtype, value.shape))
        made.attributes["val"].CopyFrom(file_value(value))
        yield made
    narrow = messages()["ValueType"]()
    narrow.CopyFrom(kind)
    narrow.tensorType.dimensions[-1].constant.size = factors[0].shape[0]
    yield _operation("linear", low, narrow, x=product.source, weight=constants[0])
    yield _operation("linear", change, kind, x=low, weight=constants[1])
    yield _operation("add", whole, kind, x=base, y=change)


def _operation(kind: str, name: str, type: Any, **operands: str) -> Any:
    made = messages()["Operation"](type=kind)
    made.attributes["name"].CopyFrom(text_value(name))
    made.outputs.add(name=name, type=type)
    for key, operand in operands.items():
        made.inputs[key].arguments.add(name=operand)
    return made
