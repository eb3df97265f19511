"""The public Python API: the command line's work as functions.

>>> import edgeforge
>>> folder = edgeforge.export("demo", "out/demo")       # doctest: +SKIP
>>> edgeforge.verify(folder).lowering.kl_mean           # doctest: +SKIP
"""

from edgeforge.api.judging import check, compare, diagnose, report, verify
from edgeforge.api.making import export, export_adapter, plan
from edgeforge.api.modules import export_module, verify_module
from edgeforge.api.running import bench, conversation, load

__all__ = [
    "bench",
    "check",
    "compare",
    "conversation",
    "diagnose",
    "export",
    "export_adapter",
    "export_module",
    "load",
    "plan",
    "report",
    "verify",
    "verify_module",
]
