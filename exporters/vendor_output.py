"""Runs other projects' exporters without their output, and makes their errors one sentence."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from exporters.errors import ExportError


@contextmanager
def quiet(exporter: str, what: str, extra: str) -> Iterator[None]:
    """Suppresses an exporter's warnings, logs and progress bars; makes its errors one sentence.

    Args:
        exporter: whose output it is, for messages.
        what: what it exports, for messages.
        extra: the extra of EdgeForge that installs it.

    Raises:
        ExportError: the exporter failed, or is not installed.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stderr(io.StringIO()),
            redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    except ExportError:
        raise
    except ModuleNotFoundError as error:
        # A runtime can be installed without what its exporter imports, as `make demo` does: then
        # running artifacts works and this does not.
        raise ExportError(
            f"{exporter} needs {error.name}, which is not installed: pip install "
            f'"edgeforge[{extra}]"'
        ) from error
    except Exception as error:  # exporters' errors have no common class
        raise ExportError(f"{exporter} failed for {what}: {first_words(error)}") from error
    finally:
        logging.disable(before)


def first_words(error: BaseException) -> str:
    """Returns the first line of what began a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
