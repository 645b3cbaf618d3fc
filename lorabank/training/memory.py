"""Memory and GPU use of this process, for the console."""

from __future__ import annotations

from pathlib import Path

from lorabank.training import human


def resident_bytes() -> int | None:
    """This process's memory; None where the system doesn't say."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return None


def peak_bytes() -> int | None:
    """The most memory that this process had; None where the system doesn't say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_line(device: str) -> str | None:
    """Memory and utilisation of the run's GPU; None on the CPU. Never wakes a GPU that the run doesn't use."""
    if not device.startswith("cuda"):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(device)
    peak = human.size(torch.cuda.max_memory_allocated(device))
    line = f"GPU {human.size(total - free)} of {human.size(total)} (peak of this run {peak})"
    try:
        return f"{line}, {torch.cuda.utilization(device)} % busy"
    except (ModuleNotFoundError, RuntimeError):  # utilisation needs NVIDIA's management library
        return line


def memory_line(device: str) -> str:
    """One line on memory: the process, and the GPU where one is used."""
    now, peak = resident_bytes(), peak_bytes()
    parts = []
    if now is not None:
        parts.append(f"memory {human.size(now)}" + (f" (peak {human.size(peak)})" if peak and peak > now else ""))
    gpu = gpu_line(device)
    if gpu:
        parts.append(gpu)
    return " · ".join(parts)
