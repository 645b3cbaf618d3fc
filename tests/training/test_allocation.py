"""Memory that was freed is used again. Each case in a process of its own, since the setting is the whole process's."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from lorabank.training.allocation import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("no glibc")

def faults(mebibytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(mebibytes * 2**18)  # every page is touched, and freed again
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(257)  # glibc before 2.38 finds an aligned block only in a hole that is a little larger
print(faults(256))
"""


def faults_of_the_second(how: str) -> int:
    found = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=False)
    if found.stderr.strip() == "no glibc":
        pytest.skip("the C library isn't glibc: there is no mallopt to ask")
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


def test_a_second_tensor_faults_no_pages() -> None:
    """As it is, glibc maps a large block anew each time: a fault a page of 4 KiB, or of 2 MiB."""
    kept, plain = faults_of_the_second("kept"), faults_of_the_second("plain")
    assert plain >= 256 // 2
    assert kept * 10 < plain
