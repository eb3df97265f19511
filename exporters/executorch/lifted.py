"""Reads what the methods of an ExecuTorch program compute; see `exporters.lifted`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from exporters.damaged_files import one_sentence
from exporters.executorch.lifted_kernels import KERNELS
from exporters.executorch.lifted_method import Method, stated_by
from exporters.executorch.lifted_recurrence import lift_loop
from exporters.executorch.lifted_values import Files
from exporters.executorch.reader import read_pte
from exporters.executorch.stock.names import NAMES
from exporters.lifted import Reading

_CONTEXT: Final = "get_max_context_len"
_IDS: Final = {"bos": "get_bos_id", "eos": "get_eos_ids"}


def read_program(file: Path, context: int) -> Reading:
    """Lifts every method of a program.

    Args:
        file: the .pte.
        context: the declared context, tokens.

    Raises:
        ExportError: a file is missing or damaged.
    """
    pte = read_pte(file)
    with one_sentence(file, "an ExecuTorch program"):
        plans = pte.program["execution_plan"]
        told = stated_by(plans)
        unread: tuple[str, ...] = ()
        methods = []
        if (file.parent / NAMES).is_file():
            unread = ("the methods of a program that ExecuTorch's own exporter wrote",)
        else:
            files = Files(pte)
            methods = [
                Method(plan, files, context, KERNELS, lift_loop).lift()
                for plan in plans
                if plan["inputs"]
            ]
    lengths = {_CONTEXT: told[_CONTEXT][0]} if told.get(_CONTEXT) else {}
    ids = {name: told.get(method, ()) for name, method in _IDS.items()}
    return Reading(tuple(methods), integers="int8-token", context=lengths, ids=ids, unread=unread)
