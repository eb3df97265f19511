"""The errors that the runtimes raise."""


class DeviceError(RuntimeError):
    """A runtime is missing, refuses an artifact, or failed while it ran."""


class WorkerEndedError(DeviceError):
    """The process that runs an artifact ended before it answered."""


class LogitsNotFiniteError(DeviceError):
    """A runtime ran to its end and gave NaN or infinite logits."""


class SetupError(DeviceError):
    """What a device needs on this machine cannot be set up, or is not whole."""
