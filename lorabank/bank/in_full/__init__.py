"""Modules that adapters train in full, and the heads of classifiers."""
