"""Compiles the C files beside it for this processor with the machine's own C compiler, once, into the user's cache.

Where there is no compiler, no OpenMP runtime to share with torch or no Linux, there is no library, and the plain path serves.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCES = tuple(Path(__file__).with_name(name) for name in ("lora.c", "attention.c", "adamw.c"))
HEADER = Path(__file__).with_name("vectors.h")
FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno")
SWITCH = "LORABANK_NATIVE"
"""Environment variable: 0 keeps lorabank from compiling and loading them."""
_SECONDS = 60


def compiler() -> tuple[str, ...] | None:
    """The C compiler's command: `$CC` (words after the first are its flags), else gcc or cc.

    clang would need an OpenMP runtime of its own, which isn't the one that torch loads; with $CC it can still be asked for.
    """
    for command in (shlex.split(os.environ.get("CC", "")), ["gcc"], ["cc"]):
        if command and (found := shutil.which(command[0])):
            return found, *command[1:]
    return None


def openmp_runtime() -> str | None:
    """Path of the OpenMP runtime that torch has loaded. Sharing it keeps two pools of threads from fighting over the cores."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    loaded = dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if "/" in line)
    runtimes = [path for path in loaded if Path(path).name.startswith(("libgomp", "libomp", "libiomp5"))]
    torchs = str(Path(torch.__file__).parent)  # its own folder, and torch.libs beside it
    return next((path for path in runtimes if path.startswith(torchs)), runtimes[0] if runtimes else None)


def library_path(cache: Path | None = None, flags: Sequence[str] = FLAGS) -> Path | None:
    """The compiled library, made now where it isn't in the cache (a second or two), or None where it can't be had.

    `cache`: its folder (default `~/.cache/lorabank/kernels`). A compiler that fails is warned about; its absence is not.
    """
    tool, runtime = compiler(), openmp_runtime()
    if os.environ.get(SWITCH) == "0" or not sys.platform.startswith("linux") or tool is None or runtime is None:
        return None
    try:
        folder = cache or Path.home() / ".cache" / "lorabank" / "kernels"
        name = f"lora-{_identity(tool, runtime, flags)}"
        folder.mkdir(parents=True, exist_ok=True)
        return _whole(folder, name) or _made(folder, name, tool, runtime, flags)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: a user without a home
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        warnings.warn(
            f"lorabank's C functions weren't compiled by {shlex.join(tool)}, so the slower plain ones serve: "
            f"{(said.strip() or 'no reason given').splitlines()[0]}. {SWITCH}=0 silences this.",
            stacklevel=2,
        )
        return None


def _whole(folder: Path, name: str) -> Path | None:
    """The cached library whose content is what its name says. Loading a damaged one would end the process."""
    for path in folder.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{_content(path)}":
            return path
        path.unlink(missing_ok=True)
    return None


def _made(folder: Path, name: str, tool: Sequence[str], runtime: str, flags: Sequence[str]) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as work:
        library = _compile(tool, runtime, flags, Path(work))
        # in one move: another process may be at it too
        return library.replace(folder / f"{name}-{_content(library)}.so")


def _compile(tool: Sequence[str], runtime: str, flags: Sequence[str], work: Path) -> Path:
    library = work / "lora.so"
    objects = [str(work / f"{source.stem}.o") for source in SOURCES]
    commands = [[*tool, *flags, "-c", str(source), "-o", built] for source, built in zip(SOURCES, objects, strict=True)]
    # linked by the runtime's own path: -fopenmp at this point would name the system's
    link = [*tool, "-shared", *objects, runtime, "-lm", "-Wl,--no-undefined", "-o", str(library)]
    for command in [*commands, link]:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    return library


def _identity(tool: Sequence[str], runtime: str, flags: Sequence[str]) -> str:
    """What a compiled library depends on: sources, compiler, runtime, flags, and the processor that `native` meant."""
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in (*SOURCES, HEADER)))
    for part in (*tool, runtime, *flags, *_stamp(tool[0]), *_stamp(runtime), platform.machine(), _processor()):
        digest.update(str(part).encode() + b"\0")
    return digest.hexdigest()[:16]


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _stamp(path: str) -> tuple[int, int]:
    found = Path(path).stat()
    return found.st_size, found.st_mtime_ns


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
