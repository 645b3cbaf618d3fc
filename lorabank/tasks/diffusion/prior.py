"""Pictures of the class that an object belongs to, drawn by the base (DreamBooth, arXiv:2208.12242).

They are trained beside the object's own, so that the adapter doesn't make every dog this dog.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from lorabank.bank.routing import BASE
from lorabank.formats.files import write_files
from lorabank.tasks.diffusion.cache import Encoded, identity
from lorabank.tasks.diffusion.draws import mixed
from lorabank.tasks.diffusion.guided import Prompts
from lorabank.tasks.diffusion.model import ImageModel
from lorabank.tasks.diffusion.sampling import PictureConfig
from lorabank.tasks.sheet import as_picture, png

AT_ONCE = 4
"""Pictures a pass."""


def drawn_by(model: ImageModel) -> str:
    """A digest of the denoiser and the text encoders. Reads every weight."""
    return repr([(name, identity(part)) for name, part in sorted(model.parts.items())])


def prior_folder(root: Path, made_by: str, prompt: str, config: PictureConfig) -> Path:
    """Where the class pictures of this base (`drawn_by`), caption and way of drawing are: another of any is another folder."""
    return root / "prior" / hashlib.sha256(repr((made_by, prompt, config)).encode()).hexdigest()[:24]


def draw_prior(
    encoded: Encoded, prompt: str, count: int, config: PictureConfig, folder: Path, busy: Callable[[int, int], None]
) -> Path:
    """A folder with at least `count` pictures and their captions; only those that are missing are drawn.

    For a model without a bank. A run that is cut off leaves whole pictures, and the next goes on.
    """
    missing = [i for i in range(count) if not (folder / f"{i:05}.txt").is_file()]
    prompts = Prompts(encoded)
    for start in range(0, len(missing), AT_ONCE):
        numbers = missing[start : start + AT_ONCE]
        found = prompts.draw(
            None, [prompt] * len(numbers), [BASE] * len(numbers), seeds=[mixed(i) for i in numbers], config=config
        )
        files: dict[str, bytes] = {}
        for number, pixels in zip(numbers, found, strict=True):
            files |= {f"{number:05}.png": png(as_picture(pixels)), f"{number:05}.txt": f"{prompt}\n".encode()}
        write_files(folder, files)  # all of them, or none
        busy(min(start + AT_ONCE, len(missing)), len(missing))
    return folder
