"""`TextToImage`: LoRA on the denoiser of a pipeline, and on its text encoders where that is asked for."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorabank.bank.bank import AdapterBank, all_layers
from lorabank.bank.reach import is_attached
from lorabank.bank.routing import RowRoute
from lorabank.config.diffusion import DiffusionConfig
from lorabank.config.paths import expanded
from lorabank.config.train import EvalConfig, TrainConfig
from lorabank.data.prepare import Progress
from lorabank.data.preview import Printer
from lorabank.data.read import Source
from lorabank.data.row_report import Splits
from lorabank.engine.engine import Engine
from lorabank.engine.model_pass import row_losses
from lorabank.errors import ConfigError, closest
from lorabank.formats.adapter import Adapter
from lorabank.formats.components import components
from lorabank.formats.diffusers import save_diffusers
from lorabank.formats.files import write_files
from lorabank.formats.kohya import save_kohya
from lorabank.models.cache import default_cache
from lorabank.planner.learning_rate import OF_IMAGE_MODELS
from lorabank.tasks.diffusion.batch import PictureBatch, picture_batch
from lorabank.tasks.diffusion.cache import Cache, Encoded
from lorabank.tasks.diffusion.draws import RowDraw, draw, fixed_draw, mixed, number_of
from lorabank.tasks.diffusion.guided import Prompts
from lorabank.tasks.diffusion.kept import KEPT
from lorabank.tasks.diffusion.model import ImageModel
from lorabank.tasks.diffusion.objective import Objective, objective_of, row_tensors
from lorabank.tasks.diffusion.pictures import Picture
from lorabank.tasks.diffusion.preview import preview
from lorabank.tasks.diffusion.prior import draw_prior, drawn_by, prior_folder
from lorabank.tasks.diffusion.prompts import examples, one_file, read_captions, routes_of
from lorabank.tasks.diffusion.rows import caption_note, captions_of, prepare, with_prior
from lorabank.tasks.diffusion.sampling import PictureConfig, check_size
from lorabank.tasks.diffusion.speed import compile_image_model
from lorabank.tasks.sheet import as_picture, png, sheet
from lorabank.training.base_rows import BASE_NAME
from lorabank.training.data_sets import DataSets, RowObjects, read_sets
from lorabank.training.evaluate import route_of, spread
from lorabank.training.jobs import AdapterJob
from lorabank.training.next_steps import NextSteps
from lorabank.training.task import Busy, Draws, Prediction, Task
from lorabank.wording import counted

PARTS = 4
"""Looks at each held-out picture in a validation, at as many places of the schedule."""
FEW_PASSES, MANY_PASSES = 800, 12_000
"""Below the first a run is over before compiled blocks pay; from the second on convolutions pay.

Stable Diffusion 1.5 on an H200: blocks take 77 s and save about 0.09 s a pass, convolutions 72 s more and save 0.006
(benchmarks/results/text-to-image-h200.json).
"""
AT_ONCE = 8
"""Pictures that are drawn in one pass."""
OPTIONS = ("prompt", "mix", "steps", "guidance", "seed", "size", "negative")


class TextToImage(Task[Picture]):
    """Of one pipeline."""

    name = "text-to-image"
    compiling = "one to three minutes"
    unit = "latents"
    section = "diffusion"
    learning_rate = OF_IMAGE_MODELS

    def __init__(self, config: TrainConfig, model: ImageModel, loaded: Mapping[str, Adapter]) -> None:
        super().__init__(config, model, None)
        self.settings: DiffusionConfig = KEPT.merged(config.diffusion, loaded)
        self.images = model
        adapted = any(part.startswith("text_encoder") for each in loaded.values() for part in components(list(each.layers)))
        self.adapts_text = self.settings.text_encoders or adapted
        cache = None if self.settings.cache == "none" else Cache(self._cache_folder() if self.settings.cache == "disk" else None)
        self.encoded = Encoded(model, cache)
        self.objective = objective_of(model.scheduler, min_snr=self.settings.min_snr, kind=self.settings.prediction)
        self.prompts = Prompts(self.encoded, negative=self.settings.negative, adapted_text=self.adapts_text)
        self._ids: dict[str, Mapping[str, Tensor]] = {}
        self._passes = 0
        """Of the longest adapter."""

    def modules(self) -> Iterable[nn.Module]:
        return self.images.every_module

    # ---- rows -------------------------------------------------------------------------------------------------------

    def read(self, config: TrainConfig, rows: RowObjects | None = None, progress: Progress | None = None) -> DataSets[Picture]:
        sets = self._checked(config, rows, progress)
        if not is_attached(self.images):  # of a training: scoring has adapters, and no use for pictures of the class
            sets = self._with_priors(sets, progress)
        every = {p.content: p for each in sets.by_adapter.values() for p in (*each.train, *each.val, *each.test)}
        captions = [] if self.adapts_text else ["", *captions_of(list(every.values()))]
        busy = _as_busy(progress)
        self.encoded.prepare(list(every.values()), captions, busy)
        return sets

    def _checked(self, config: TrainConfig, rows: RowObjects | None, progress: Progress | None) -> DataSets[Picture]:
        """Pictures looked at, nothing encoded."""

        def one(_name: str, train: Source | None, val: Source | None) -> Splits[Picture]:
            how: Any = {"step": self._step, "seed": config.seed, "progress": progress}
            note = partial(caption_note, self.images)
            return prepare(config.data, self.settings, train=train, val=val, caption_note=note, **how)

        self._picture_config()  # what can't be drawn is known now, not at the first evaluation
        return read_sets(config, rows, one)

    def read_preview(self, config: TrainConfig, progress: Progress | None = None) -> DataSets[Picture]:
        return self._checked(config, None, progress)

    def preview(self, name: str, rows: Sequence[Picture], out: Printer, draws: Draws) -> Mapping[str, bytes]:
        return preview(self, rows, out)

    @property
    def _step(self) -> int:
        """What sides of pictures are a multiple of: as it was asked for, and as the model needs."""
        step, multiple = self.settings.bucket_step, self.images.multiple
        return step if step % multiple == 0 else multiple * max(1, round(step / multiple))

    def _with_priors(self, sets: DataSets[Picture], progress: Progress | None) -> DataSets[Picture]:
        shared = self.settings.prior_prompt
        by_name = {} if shared is None else dict.fromkeys(sets.by_adapter, shared)
        for name, prompt in self.settings.prior_prompts.items():
            if name not in sets.by_adapter:
                raise ConfigError(f"diffusion.prior_prompts: no adapter {name!r}{closest(name, sets.by_adapter)}")
            by_name[name] = prompt
        if not by_name:
            return sets
        config, made_by = self._picture_config(), drawn_by(self.images)
        found: dict[str, Any] = dict(sets.by_adapter)
        for name, prompt in by_name.items():
            folder = prior_folder(self._cache_folder(), made_by, prompt, config)
            draw_prior(self.encoded, prompt, self.settings.prior_pictures, config, folder, progress or _quiet)
            found[name] = with_prior(found[name], folder, self.settings, step=self._step, progress=progress)
        reports = {**sets.reports, **{sets.names[name]: found[name].report.to_dict() for name in by_name}}
        return DataSets(found, reports, sets.names)

    def _cache_folder(self) -> Path:
        chosen = self.settings.cache_dir
        return default_cache() / "pictures" if chosen is None else expanded(chosen, place="diffusion.cache_dir")

    def batch(
        self, rows: Sequence[Sequence[Picture]], routes: Sequence[RowRoute], *, examples: Sequence[int], draws: Sequence[int]
    ) -> PictureBatch:
        flat = [row for (row,) in rows]
        each = []
        for row, seed in zip(flat, draws, strict=True):
            latents = self.encoded.latents(row)
            shape = tuple(latents.shape)
            made = draw(shape, seed) if seed else fixed_draw(shape, row=number_of(row.digest), part=0, parts=1)
            each.append(self._tensors(row, latents, made, self.objective))
        return picture_batch(each, routes, sizes=[row.size for row in flat], examples=examples)

    def _tensors(self, row: Picture, latents: Tensor, made: RowDraw, objective: Objective) -> dict[str, Tensor]:
        """What a pass reads of one row, without the dimension of rows."""
        caption = "" if made.drop < self.settings.caption_dropout else row.caption
        numbers = objective.numbers(made)
        if row.prior:
            numbers = replace(numbers, weight=numbers.weight * self.settings.prior_weight)
        scalars = {name: value[0] for name, value in row_tensors([numbers]).items()}
        noise = made.noise_with(self.settings.noise_offset)
        found = {"clean": latents, "noise": noise, **scalars}
        if self.adapts_text:
            found |= {f"ids.{name}": value for name, value in self._tokens(caption).items()}
        else:
            found |= {f"condition.{name}": value for name, value in self.encoded.condition(caption).items()}
        if self.images.family.sized:
            how = row.fit
            original, bucket = (row.original.height, row.original.width), (how.bucket.height, how.bucket.width)
            found["condition.sizes"] = self.images.sizes(original, (how.top, how.left), bucket)
        if self.images.family.distilled:
            found["condition.guidance"] = torch.tensor(1.0)
        return found

    def _tokens(self, caption: str) -> Mapping[str, Tensor]:
        if caption not in self._ids:
            self._ids[caption] = {name: value[0] for name, value in self.images.tokenize([caption]).items()}
        return self._ids[caption]

    # ---- the adapters -----------------------------------------------------------------------------------------------

    def about(self, adapter: str) -> Mapping[str, str]:
        return KEPT.as_metadata(self.settings)

    def engine(self, bank: AdapterBank) -> Engine:
        if not self.adapts_text and (
            paths := [layer.path for layer in all_layers(bank) if layer.path.startswith("text_encoder")]
        ):
            raise ConfigError(
                f"targets: they mean {counted(len(paths), 'layer')} of text encoders ({paths[0]!r} for one), "
                f"whose conditions are made "
                "once, before training. Set diffusion.text_encoders: true, or leave them out: exclude: ['text_encoder*']."
            )
        if self.config.gradient_checkpointing:  # diffusers' models recompute by themselves
            context = bank.checkpoint_context
            recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=context)
            self.images.denoiser.enable_gradient_checkpointing(recompute)
        return Engine(bank, masks=self.adapts_text)

    def check(self, name: str, job: AdapterJob) -> None:
        self._passes = max(self._passes, job.total_steps * job.run.gradient_accumulation)
        if self.config.eval.samples and not job.val and not self.settings.sample_prompts:
            told = "none of its captions is held out to be drawn: diffusion.sample_prompts names what sample pictures are of"
            warnings.warn(told, stacklevel=2)

    def compile_model(self, *, recompute: bool) -> list[Any]:
        if recompute or self.config.gradient_checkpointing:
            return []
        whole = self.config.compile is True or self._passes >= MANY_PASSES
        return compile_image_model(self.images, convolutions=whole) if whole or self._passes >= FEW_PASSES else []

    def save_more(self, adapter: Adapter, folder: Path, name: str) -> None:
        """The adapter in another tool's form, beside PEFT's."""
        if self.settings.save_format == "kohya":
            save_kohya(adapter, folder / f"{name}.safetensors")
        elif self.settings.save_format == "diffusers":
            save_diffusers(adapter, folder)

    # ---- scores -----------------------------------------------------------------------------------------------------

    @property
    def loss_unit(self) -> str:
        return "squared error a number of the latents"

    def metric_names(self, config: EvalConfig) -> Sequence[str]:
        return ()

    def validate(
        self, engine: Engine, rows: Mapping[str, Sequence[Picture]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        """Mean squared error, unweighted, at the same places and with the same noise each time."""
        plain = replace(self.objective, min_snr=None)
        jobs = [(name, row, part) for name, own in rows.items() for row in own for part in range(PARTS)]
        jobs.sort(key=lambda job: job[1].fit.bucket)
        sums = dict.fromkeys(rows, 0.0)
        for start in range(0, len(jobs), config.batch_size):
            part = jobs[start : start + config.batch_size]
            each = []
            for _, row, look in part:
                latents = self.encoded.latents(row)
                made = fixed_draw(tuple(latents.shape), row=number_of(row.digest), part=look, parts=PARTS)
                each.append(self._tensors(row, latents, made, plain))
            routes = [route_of(name) for name, _, _ in part]
            batch = picture_batch(each, routes, sizes=[row.size for _, row, _ in part], examples=range(len(part)))
            for (name, _, _), loss in zip(part, row_losses(engine, batch).tolist(), strict=True):
                sums[name] += loss
            busy("scoring", min(start + config.batch_size, len(jobs)), len(jobs))
        return {name: {"loss": sums[name] / (PARTS * len(own))} for name, own in rows.items() if own}

    def scores(
        self, engine: Engine, rows: Mapping[str, Sequence[Picture]], *, config: EvalConfig, busy: Busy
    ) -> dict[str, dict[str, float]]:
        few = {name: spread(own, config.max_rows) for name, own in rows.items()}
        return self.validate(engine, few, config=config, busy=busy)

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def samples(
        self, engine: Engine, rows: Mapping[str, Sequence[Picture]], folder: Path, *, config: EvalConfig, busy: Busy
    ) -> None:
        self._sheet(engine, rows, folder / "samples.png", config, busy)

    def show(
        self,
        engine: Engine,
        rows: Mapping[str, Sequence[Picture]],
        folder: Path,
        *,
        pass_index: int,
        config: EvalConfig,
        busy: Busy,
    ) -> None:
        """A sheet of the same captions and noise each time."""
        self._sheet(engine, rows, folder / "samples" / f"pass-{pass_index:06}.png", config, busy)

    def _sheet(self, engine: Engine, rows: Mapping[str, Sequence[Picture]], file: Path, config: EvalConfig, busy: Busy) -> None:
        """Every adapter beside the base, the same noise along a row."""
        captions = list(self.settings.sample_prompts)
        if not captions:
            captions = (
                list(spread(captions_of([p for own in rows.values() for p in own]), config.samples)) if config.samples else []
            )
        if not captions:
            return
        names = {BASE_NAME: route_of(BASE_NAME), **{name: route_of(name) for name in engine.bank.names}}
        columns = self.drawn(engine.bank, captions, names, self._picture_config(), seed=self.config.seed, busy=busy)
        write_files(file.parent, {file.name: png(sheet(_as_pictures(columns), captions))})

    def _picture_config(self) -> PictureConfig:
        own = self.settings
        side = max(self._step, own.resolution // self._step * self._step)
        made = PictureConfig(
            steps=own.sample_steps,
            guidance=own.sample_guidance,
            height=own.sample_height or side,
            width=own.sample_width or side,
        )
        check_size(self.images, made.height, made.width)
        return made

    def drawn(
        self,
        bank: AdapterBank,
        captions: Sequence[str],
        routes: Mapping[str, RowRoute],
        config: PictureConfig,
        *,
        seed: int,
        busy: Busy,
    ) -> dict[str, list[Tensor]]:
        """Heading → its picture of each caption, all headings in the same passes. A caption's noise is the same for all."""
        jobs = [(heading, i) for i in range(len(captions)) for heading in routes]
        found: dict[str, list[Tensor]] = {heading: [] for heading in routes}
        for start in range(0, len(jobs), AT_ONCE):
            part = jobs[start : start + AT_ONCE]
            pictures = self.prompts.draw(
                bank,
                [captions[i] for _, i in part],
                [routes[heading] for heading, _ in part],
                seeds=[mixed(seed, i) for _, i in part],
                config=config,
            )
            for (heading, _), picture in zip(part, pictures, strict=True):
                found[heading].append(picture)
            busy("drawing pictures", min(start + AT_ONCE, len(jobs)), len(jobs))
        return found

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def predict(self, engine: Engine, wanted: Prediction, *, busy: Busy) -> str:
        """A folder: a picture for each caption and model, `metadata.jsonl`, and all of them on one sheet; or one picture."""
        options = dict(wanted.options)
        for name in options:
            if name not in OPTIONS:
                raise ConfigError(f"{name}: text-to-image doesn't know it{closest(name, OPTIONS)}. It has: {', '.join(OPTIONS)}")
        given = options.get("prompt")
        captions = [given] if isinstance(given, str) else read_captions(wanted.data, wanted.max_rows)
        routes = routes_of(wanted.names, options.get("mix") or (), engine.bank.names)
        alone = one_file(wanted.output, captions, list(routes))
        config = self._picture_config()
        if options.get("size"):
            width, height = options["size"]
            config = replace(config, height=height, width=width)
        config = replace(config, **{name: options[name] for name in ("steps", "guidance") if options.get(name) is not None})
        check_size(self.images, config.height, config.width)
        if options.get("negative") is not None:
            self.prompts.negative = options["negative"]
        seed = self.config.seed if options.get("seed") is None else int(options["seed"])
        columns = self.drawn(engine.bank, captions, routes, config, seed=seed, busy=busy)
        if alone:
            (((pixels,),),) = (columns.values(),)
            write_files(wanted.output.parent, {wanted.output.name: png(as_picture(pixels))})
            return f"1 picture by {next(iter(routes))}: {wanted.output}"
        files, lines = {"sheet.png": png(sheet(_as_pictures(columns), captions))}, list[str]()
        for heading, pictures in columns.items():
            folder = heading.replace(":", "-").replace(",", "+")
            for i, pixels in enumerate(pictures):
                file = f"{i:04}-{folder}.png"
                files[file] = png(as_picture(pixels))
                about = {"file_name": file, "text": captions[i], "model": heading, "seed": mixed(seed, i)}
                lines.append(json.dumps(about, ensure_ascii=False) + "\n")
        write_files(wanted.output, {**files, "metadata.jsonl": "".join(lines)})
        drawn = f"{counted(len(lines), 'picture')} of {counted(len(captions), 'caption')}"
        return f"{drawn} by {', '.join(routes)}: {wanted.output / 'sheet.png'}"

    def next_steps(self, names: Sequence[str]) -> NextSteps:
        return NextSteps(title="draw captions of your own:", asks=examples(names))


def _as_pictures(columns: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Image.Image]]:
    return {heading: [as_picture(pixels) for pixels in own] for heading, own in columns.items()}


def _quiet(done: int, total: int) -> None:
    """For progress that nobody asked for."""


def _as_busy(progress: Progress | None) -> Callable[[str, int, int], None]:
    def busy(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)

    return busy
