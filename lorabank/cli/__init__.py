"""The command line. One file a command; nothing here imports torch before a command runs."""

from lorabank.cli.main import main

__all__ = ["main"]
