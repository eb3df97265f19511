"""The error of the device floor."""


class DeviceError(RuntimeError):
    """A runtime is missing, refuses an artifact, or failed while it ran."""
