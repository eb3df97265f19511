"""The error that the exporters raise."""


class ExportError(ValueError):
    """A target cannot hold the program, the plan or the context, or an artifact is damaged."""


class WeightRefused(ExportError):
    """A target cannot hold a weight as a plan says; it can hold another format.

    Attributes:
        problem: what the target lacks, without what to do instead.
    """

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(f"{problem}: {advice}")
        self.problem = problem
