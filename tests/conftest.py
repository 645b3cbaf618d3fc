"""Before anything is imported: Triton's kernels run through its interpreter on a machine without a GPU."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read as triton is imported, which torch.compile and transformers do
