"""Writes a program that returns values inside a method, to look at what the method computes.

Whatever a call outside of the delegates or a delegate as a whole gives is a value of the method:
attention's results and the residual stream after each layer are. What a delegate computes between
its operations is none, and cannot be shown.
"""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from exporters.damaged_files import one_sentence
from exporters.executorch.flatbuffer import Record
from exporters.executorch.lifted_kernels import KERNELS
from exporters.executorch.lifted_method import Method
from exporters.executorch.lifted_recurrence import lift_loop
from exporters.executorch.lifted_values import Files
from exporters.executorch.method import SCALAR_TYPES
from exporters.executorch.pte_file import HEADER, HEADER_MAGIC
from exporters.executorch.reader import read_pte
from exporters.executorch.schemas import PROGRAM
from exporters.executorch.segments import SEGMENT_ALIGNMENT, align

_HEADER_AT: Final = 8
_ALIGNMENT: Final = 64
_WIDTHS: Final = dict(SCALAR_TYPES.values())


def write_probing(
    file: Path, context: int, method: str, names: Sequence[str], out: Path
) -> list[str]:
    """Writes a copy of a program in which a method returns these values.

    Args:
        file: the .pte.
        context: the declared context, tokens.
        method: the method's name.
        names: values as `exporters.lifted` names them.
        out: the new file.

    Returns:
        The names that are values of the method, in the order in which the new method returns them.

    Raises:
        ExportError: the file is damaged.
    """
    pte = read_pte(file)
    with one_sentence(file, "an ExecuTorch program"):
        plans = list(pte.program["execution_plan"])
        place = next(i for i, plan in enumerate(plans) if plan["name"] == method)
        lifted = Method(plans[place], Files(pte), context, KERNELS, lift_loop)
        lifted.lift()
        numbers: dict[str, int] = {}
        for number, value in lifted.values.items():
            if lifted.has_memory(number):  # a view of a tensor has the tensor's
                numbers[value.name] = number
        shown = [name for name in dict.fromkeys(names) if name in numbers]
        plans[place] = _returning(plans[place], [numbers[name] for name in shown])
        _rewrite(file, _with(pte.program, execution_plan=plans), out)
        return shown


def _returning(plan: Record, numbers: Sequence[int]) -> Record:
    """A method that returns these values, each of which gets memory that nothing else uses."""
    sizes = list(plan["non_const_buffer_sizes"])
    values = list(plan["values"])
    for number in dict.fromkeys(numbers):
        tensor = values[number]["val"]
        details = tensor["allocation_info"] if tensor.table == "Tensor" else None
        if details is None:
            raise ValueError(f"its value {number} has no memory of its own")
        arena = details["memory_id"]
        offset = -(-sizes[arena] // _ALIGNMENT) * _ALIGNMENT
        moved = _with(
            details,
            memory_offset_low=offset & 0xFFFFFFFF,
            memory_offset_high=offset >> 32,
        )
        values[number] = _with(values[number], val=_with(tensor, allocation_info=moved))
        sizes[arena] = offset + math.prod(tensor["sizes"]) * _WIDTHS[tensor["scalar_type"]]
    return _with(plan, values=values, outputs=list(numbers), non_const_buffer_sizes=sizes)


def _with(record: Record, **fields: Any) -> Record:
    kept: Mapping[str, object] = {**record.fields, **fields}
    return replace(record, fields=kept)


def _rewrite(file: Path, program: Record, out: Path) -> None:
    """Writes a file with another program and the same segments."""
    encoded = PROGRAM.encode(program)
    size = len(encoded) + HEADER.size
    base = align(size, SEGMENT_ALIGNMENT)
    with file.open("rb") as source, out.open("wb") as target:
        source.seek(_HEADER_AT)
        *_, old_base, total = HEADER.unpack(source.read(HEADER.size))
        header = HEADER.pack(HEADER_MAGIC, HEADER.size, size, base, total)
        root = struct.unpack_from("<I", encoded)[0] + HEADER.size
        target.write(
            struct.pack("<I", root) + encoded[4:_HEADER_AT] + header + encoded[_HEADER_AT:]
        )
        target.write(bytes(base - target.tell()))
        source.seek(old_base)
        shutil.copyfileobj(source, target, 1 << 20)
