"""Base models: found, checked and loaded (level 1)."""

from lorabank.models.load import LoadedBase, load_base, locate

__all__ = ["LoadedBase", "load_base", "locate"]
