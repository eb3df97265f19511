"""The error of the exporters' floor."""


class ExportError(ValueError):
    """A program, a plan or a context that a target cannot hold."""
