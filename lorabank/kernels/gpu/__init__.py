"""Kernels for a GPU, written in Triton. Each has a plain twin in torch beside it; `runtime` says whether they can run here."""
