"""`Prompts`: pictures for captions, each row under its own route, text encoders that adapters change included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorabank.bank.bank import AdapterBank
from lorabank.bank.routing import RowRoute
from lorabank.engine.modes import evaluation_mode
from lorabank.tasks.diffusion.cache import Encoded
from lorabank.tasks.diffusion.model import ImageModel, stacked
from lorabank.tasks.diffusion.sampling import PictureConfig, draw_pictures

Busy = Callable[[str, int, int], None]


class Prompts:
    """What draws for a model: conditions from the cache, or by the rows' own text encoders."""

    def __init__(self, encoded: Encoded, *, negative: str | None = None, adapted_text: bool = False) -> None:
        """`negative`: what guidance leads away from; None: the empty caption, or zeros where the model was trained so.

        `adapted_text`: adapters may have changed the text encoders.
        """
        self.encoded, self.negative, self.adapted_text = encoded, negative, adapted_text

    @property
    def model(self) -> ImageModel:
        """Of the pictures."""
        return self.encoded.model

    def draw(
        self,
        bank: AdapterBank | None,
        captions: Sequence[str],
        routes: Sequence[RowRoute],
        *,
        seeds: Sequence[int],
        config: PictureConfig,
        busy: Busy | None = None,
    ) -> Tensor:
        """Pictures in [0, 1] (N, 3, H, W), fp32 on the host."""
        condition = self._conditions(bank, captions, routes)
        negative = self._conditions(bank, [self.negative or ""] * len(captions), routes)
        if self.negative is None and self.model.zero_empty:
            negative = {name: torch.zeros_like(value) for name, value in negative.items()}
        if self.model.family.sized:
            size = (config.height, config.width)
            sizes = self.model.sizes(size, (0, 0), size).expand(len(captions), -1)
            condition["sizes"], negative["sizes"] = sizes, sizes
        return draw_pictures(self.model, bank, condition, negative, routes, seeds=seeds, config=config, busy=busy)

    def _conditions(self, bank: AdapterBank | None, captions: Sequence[str], routes: Sequence[RowRoute]) -> dict[str, Tensor]:
        if not self.adapted_text or bank is None:
            return stacked([self.encoded.condition(caption) for caption in captions])
        with torch.no_grad(), evaluation_mode(self.model.modules()), bank.route(list(routes)):
            return self.model.encode(self.model.tokenize(captions))
