"""The error that the exporters raise."""


class ExportError(ValueError):
    """A target cannot hold the program, the plan or the context, or an artifact is damaged."""
