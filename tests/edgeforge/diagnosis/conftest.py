"""The sound exports on which faults are planted are those of the tests of meaning."""

from tests.edgeforge.verification.meaning.conftest import captures

__all__ = ["captures"]
