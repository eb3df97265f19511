"""The error that the runtimes raise."""


class DeviceError(RuntimeError):
    """A runtime is missing, refuses an artifact, or failed while it ran."""
