"""`TracedModule`: a module that torch.export has traced, with named inputs, outputs and weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from exporters.errors import ExportError

if TYPE_CHECKING:
    import torch
    from torch import fx
    from torch.export import ExportedProgram

PREFIX = "module."
"""What the program's names of parameters and buffers begin with, and EdgeForge's do not."""
Dims = tuple[int | str, ...]
Role = Literal["linear", "conv", "embedding"]


@dataclass(frozen=True)
class ModuleValue:
    """An input or an output.

    Attributes:
        name: its name in every artifact.
        dtype: as torch names it, such as ``float32`` or ``int64``.
        dims: its shape; a dynamic dimension is a name, or a formula of names in an output.
    """

    name: str
    dtype: str
    dims: Dims

    @property
    def text(self) -> str:
        """The form of a manifest: ``dtype[dims]``."""
        return f"{self.dtype}[{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class ModuleWeight:
    """A weight that can be quantized.

    Attributes:
        name: the parameter's name in the module.
        role: the layer that reads it.
        shape: the parameter's shape; the first dimension counts output channels or table rows.
    """

    name: str
    role: Role
    shape: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns: all dimensions but the first are one row."""
        columns = 1
        for dim in self.shape[1:]:
            columns *= dim
        return self.shape[0], columns


@dataclass(frozen=True)
class TracedModule:
    """A traced module.

    Attributes:
        program: torch.export's program, before any decomposition. Its inputs are tensors, its
            outputs a tuple of tensors.
        inputs: the inputs in the order of the program.
        outputs: the outputs in the order of the program.
        ranges: the least and the largest size of every dynamic dimension by name; None where it has
            no largest.
        weights: the weights that can be quantized, by the parameter's name.
        examples: the tensors that the module was traced with, in the order of ``inputs``.
        dynamic_shapes: by input, the dynamic dimensions as torch.export takes them.
    """

    program: ExportedProgram
    inputs: tuple[ModuleValue, ...]
    outputs: tuple[ModuleValue, ...]
    ranges: Mapping[str, tuple[int, int | None]]
    weights: Mapping[str, ModuleWeight]
    examples: tuple[torch.Tensor, ...]
    dynamic_shapes: tuple[Mapping[int, object], ...]

    def state(self, name: str) -> torch.Tensor:
        """A parameter, buffer or constant of the program by its name."""
        for held in (self.program.state_dict, self.program.constants):
            for given in (f"{PREFIX}{name}", name):
                if given in held:
                    value: torch.Tensor = held[given]
                    return value
        raise KeyError(name)


def require_largest_sizes(traced: TracedModule, runtime: str) -> None:
    """Refuses a dynamic dimension without a largest size.

    Raises:
        ExportError: names the dimension.
    """
    for name, (_, most) in traced.ranges.items():
        if most is None:
            raise ExportError(
                f"{runtime} needs a largest size of the dynamic dimension {name}: give "
                f"torch.export.Dim({name!r}, max=...)"
            )


def user_line(node: fx.Node) -> str:
    """The line of the user's code that a node came from, for a message; empty if not known."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', trace)
    own = [frame for frame in frames if "/torch/" not in frame[0].replace("\\", "/")]
    for file, line, code in reversed(own or frames):
        return f" at {file}:{line} (`{code}`)"
    return ""
