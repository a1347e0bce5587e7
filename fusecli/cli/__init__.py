"""The command line: read options, call one function, render, exit. One command per file."""

from fusecli.cli.app import main

__all__ = ["main"]
