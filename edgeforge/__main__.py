"""Runs the command line as ``python -m edgeforge``."""

from edgeforge.cli.entry import entry

entry()
