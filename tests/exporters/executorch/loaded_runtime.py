"""Loads ExecuTorch's runtime when it is imported: what `forked_worker` forks from."""

from device_harness.executorch_worker import load_runtime

load_runtime()
