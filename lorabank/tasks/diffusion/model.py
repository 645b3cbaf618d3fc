"""`ImageModel`: a pipeline's trained models as children of one module, under diffusers' names, and the frozen rest beside it.

The bank is attached to this module, so an adapter's paths begin with `unet.`, `transformer.` or `text_encoder.`, as they do in
kohya's and diffusers' files (formats/components.py): one adapter for the user, whatever it changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorabank.errors import ConfigError, DataError
from lorabank.tasks.diffusion.families import Condition, Family

_EXACT = ("sizes", "guidance")
"""Of a condition: what bf16 would round to another picture's."""


class ImageModel(nn.Module):
    """The denoiser, and the text encoders that are trained with it."""

    def __init__(
        self,
        family: Family,
        denoiser: nn.Module,
        *,
        scheduler: Any,
        encoders: Mapping[str, nn.Module] | None = None,
        tokenizers: Mapping[str, Any] | None = None,
        trained: Sequence[str] = (),
        vae: nn.Module | None = None,
        zero_empty: bool = False,
        prediction: str | None = None,
    ) -> None:
        """`encoders`, `tokenizers`: by the encoder's name, those that are there. `trained`: encoders that adapters may change.

        `vae`: None for a denoiser of pixels. `zero_empty`: sampling without a negative prompt takes zeros (SDXL), not the
        condition of an empty one.
        """
        super().__init__()
        self.add_module(family.denoiser, denoiser)
        own = vars(self)
        own["family"], own["scheduler"], own["zero_empty"], own["prediction"] = family, scheduler, zero_empty, prediction
        own["tokenizers"] = dict(tokenizers or {})
        own["frozen"], own["vae"] = dict(encoders or {}), vae
        self.train_encoders(trained)

    def train_encoders(self, names: Sequence[str]) -> None:
        """Put these text encoders into the module tree, where adapters find them. Before a bank is attached."""
        for name in names:
            if name not in self.frozen and name not in self._modules:
                raise ConfigError(f"text encoder {name!r}: {self.family.name} has {', '.join(self.family.encoders)}")
            if name in self.frozen:
                self.add_module(name, self.frozen.pop(name))

    family: Family
    scheduler: Any
    tokenizers: dict[str, Any]
    frozen: dict[str, nn.Module]
    """Text encoders that no adapter changes: not in the module tree, so no target means them."""
    vae: Any
    """None for a denoiser of pixels."""
    zero_empty: bool
    prediction: str | None

    @property
    def denoiser(self) -> Any:
        """The U-Net or transformer."""
        return self.get_submodule(self.family.denoiser)

    @property
    def trained_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders in the module tree."""
        return tuple(name for name in self.family.encoders if name in self._modules)

    @property
    def dtype(self) -> torch.dtype:
        """In which the denoiser computes."""
        return next(self.denoiser.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def parts(self) -> dict[str, Any]:
        """All of the pipeline's models by name, trained or not."""
        return {self.family.denoiser: self.denoiser, **self.frozen, **{n: self._modules[n] for n in self.trained_encoders}}

    @property
    def every_module(self) -> list[nn.Module]:
        """Of all parts, in the module tree or beside it."""
        beside = [part for part in (*self.frozen.values(), self.vae) if part is not None]
        return [*self.modules(), *(module for part in beside for module in part.modules())]

    @property
    def channels(self) -> int:
        """Of the latents. Flux's transformer takes squares of four as one token."""
        channels = int(self.denoiser.config.in_channels)
        return channels // 4 if self.family.name == "flux" else channels

    @property
    def scale(self) -> int:
        """Pixels along one latent."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """What a picture's sides must be a multiple of: latents halve at each level of a U-Net, or come in squares of four."""
        config: Any = self.denoiser.config
        halvings = len(config.block_out_channels) - 1 if self.family.denoiser == "unet" else 1
        patch = int(getattr(config, "patch_size", 1) or 1) if self.family.name == "sd3" else 1
        return self.scale * max(2**halvings, patch)

    # ---- captions ----------------------------------------------------------------------------------------------------

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Token ids by encoder, int64 (N, L): each row padded to the encoder's full length, longer captions cut."""
        found: dict[str, Tensor] = {}
        for name in self.tokenizers:
            padded = {"padding": "max_length", "max_length": self._text_length(name), "truncation": True, "return_tensors": "pt"}
            found[name] = self.tokenizers[name](list(captions), **padded)["input_ids"]
        return found

    def token_counts(self, caption: str) -> dict[str, tuple[int, int]]:
        """Encoder → (tokens of a caption before it is cut, tokens that are read), special ones included."""
        return {
            name: (len(self.tokenizers[name](caption, verbose=False)["input_ids"]), self._text_length(name))
            for name in self.tokenizers
        }

    def _text_length(self, encoder: str) -> int:
        length = int(self.tokenizers[encoder].model_max_length)
        most = self.family.text_tokens if encoder == self.family.encoders[-1] else None
        return length if most is None else min(length, most)

    def encode(self, ids: Condition) -> dict[str, Tensor]:
        """The condition of token ids, on the encoders' device, in the denoiser's dtype."""
        parts = self.parts
        where = {name: next(parts[name].parameters()).device for name in ids if isinstance(parts.get(name), nn.Module)}
        placed = {name: value.to(where.get(name, self.device)) for name, value in ids.items()}
        made = self.family.encode(parts, placed)
        return {name: value.to(self.device, self.dtype) for name, value in made.items()}

    def sizes(self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> Tensor:
        """SDXL's six numbers a row: (height, width) as taken, (top, left) of the crop, (height, width) of the picture."""
        return torch.tensor([*original, *crop, *target], dtype=torch.float32)

    # ---- the passes --------------------------------------------------------------------------------------------------

    def denoise(self, x: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The denoiser's prediction (N, C, H, W) for noisy latents and times (N,); sizes and guidance stay in fp32."""
        dtype = self.dtype
        condition = {name: value if name in _EXACT else value.to(dtype) for name, value in condition.items()}
        return self.family.denoise(self.denoiser, x.to(dtype), times, condition)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The prediction for a training batch, its captions encoded here where they are token ids."""
        from lorabank.tasks.diffusion.objective import noisy

        condition = {name.removeprefix("condition."): value for name, value in batch.items() if name.startswith("condition.")}
        ids = {name.removeprefix("ids."): value for name, value in batch.items() if name.startswith("ids.")}
        if ids:
            condition |= self.encode(ids)
        return self.denoise(noisy(batch), batch["time"], condition)

    # ---- pictures ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """The VAE's mean latents of pictures in [0, 1] (N, 3, H, W), scaled as the denoiser takes them; fp32 on the host."""
        x = pictures * 2.0 - 1.0
        if self.vae is None:
            return x.float().cpu()
        first = next(self.vae.parameters())
        found = self.vae.encode(x.to(first.device, first.dtype)).latent_dist.mode().float()
        shift, scale = self._scaling()
        return ((found - shift) * scale).cpu()

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """Pictures in [0, 1] (N, 3, H, W), fp32 on the host, one row at a time: a VAE needs more memory than a denoiser."""
        if self.vae is None:
            return (latents.float() / 2 + 0.5).clamp(0, 1).cpu()
        first = next(self.vae.parameters())
        shift, scale = self._scaling()
        found = [self.vae.decode((row[None].to(first) / scale + shift).to(first.dtype))[0] for row in latents]
        return (torch.cat(found).float() / 2 + 0.5).clamp(0, 1).cpu()

    def _scaling(self) -> tuple[float, float]:
        """(shift, scale) of latents; pipelines of Stable Diffusion before 3 know no shift, whatever their VAE says."""
        config: Any = None if self.vae is None else self.vae.config
        if config is None:
            return 0.0, 1.0
        shift = float(getattr(config, "shift_factor", None) or 0.0) if self.family.denoiser == "transformer" else 0.0
        return shift, float(config.scaling_factor)


def stacked(conditions: Sequence[Condition]) -> dict[str, Tensor]:
    """Rows' conditions as one of (N, …). Raises DataError where they have different names."""
    names = conditions[0].keys()
    if any(each.keys() != names for each in conditions):
        raise DataError("conditions: rows of one batch hold different tensors")
    return {name: torch.stack([each[name] for each in conditions]) for name in names}
