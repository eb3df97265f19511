"""The errors that the runtimes raise."""


class DeviceError(RuntimeError):
    """A runtime is missing, refuses an artifact, or failed while it ran."""


class LogitsNotFiniteError(DeviceError):
    """A runtime ran to its end and gave NaN or infinite logits."""
