"""Image generation from folders of pictures to pictures: five families, alone and jointly, resumed, loaded again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import lorabank as lb
from lorabank import api
from lorabank.cli import main
from lorabank.config.diffusion import DiffusionConfig
from lorabank.config.train import DataConfig
from lorabank.errors import AdapterFileError, ConfigError, DataError
from lorabank.planner.learning_rate import OF_IMAGE_MODELS
from lorabank.tasks.diffusion.task import TextToImage
from lorabank.training.events import Listener, RunPlan
from tests.tasks.diffusion.runs import PICTURES, SETTINGS, assert_near, three_styles
from tests.tasks.diffusion.tiny import folder_of_pictures, saved


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return three_styles(tmp_path_factory.mktemp("styles"))


@pytest.mark.slow
def test_a_style_is_learned_scored_saved_drawn_and_loaded(root: Path, styles: dict[str, Path], tmp_path: Path) -> None:
    run, base = tmp_path / "run", saved("sd", root)
    diffusion = {**PICTURES, "save_format": "diffusers"}
    result = lb.train(
        model=str(base),
        output=str(run),
        adapters={"ink": {"data": str(styles["ink"])}, "oil": {"data": str(styles["oil"])}},
        **{**SETTINGS, "max_steps": 30, "val_split": 2, "diffusion": diffusion, "eval": {"every": 10}},
    )
    for name in ("ink", "oil"):
        assert result.adapters[name].best_metrics["loss"] < 0.98 * result.base_metrics_of[name]["loss"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [f"pass-{n:06}.png" for n in (0, 10, 20, 30)]
    first, last = (np.asarray(Image.open(run / "samples" / f"pass-{n:06}.png")).astype(int) for n in (0, 30))
    assert first.shape == last.shape
    assert np.abs(first - last).max() > 8  # the adapters' columns change
    assert (run / "samples.png").is_file()

    scores = api.evaluate(run, DataConfig(test=str(styles["wax"])), metrics=["loss"])
    assert scores.keys() == {"ink", "oil", "base"}
    again = api.evaluate(run, DataConfig(test=str(styles["wax"])), metrics=["loss"])
    assert scores == again  # the same noise each time

    told = api.predict(
        run, "", tmp_path / "out", options={"prompt": "a cat", "mix": ["ink:0.5,oil:0.5"], "seed": 3, "size": (24, 16)}
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [line["model"] for line in lines] == ["ink", "oil", "base", "ink:0.5,oil:0.5"]
    assert "4 pictures of 1 caption by" in told
    pictures = {line["model"]: np.asarray(Image.open(tmp_path / "out" / line["file_name"])) for line in lines}
    assert all(p.shape == (16, 24, 3) for p in pictures.values())
    assert len({p.tobytes() for p in pictures.values()}) == 4

    pipe = DiffusionPipeline.from_pretrained(base, safety_checker=None, requires_safety_checker=False)
    pipe.load_lora_weights(str(run / "ink" / "pytorch_lora_weights.safetensors"))
    pipe.set_progress_bar_config(disable=True)
    loaded = api.load_run(run, ["ink"])
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    expected = pipe("a cat", height=16, width=24, num_inference_steps=2, latents=noise, output_type="pt").images
    from lorabank.tasks.diffusion.sampling import PictureConfig, draw_pictures

    task = loaded.task
    assert isinstance(task, TextToImage)
    condition = {key: value[None] for key, value in task.encoded.condition("a cat").items()}
    negative = {key: value[None] for key, value in task.encoded.condition("").items()}
    config = PictureConfig(steps=2, height=16, width=24)
    found = draw_pictures(task.images, loaded.bank, condition, negative, ["ink"], seeds=[0], config=config, noise=noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_convolutions_and_feed_forward_are_targets(root: Path, styles: dict[str, Path]) -> None:
    targets = ["to_q", "ff.net.2", "re:unet.*resnets.*conv[12]", "time_emb_proj"]
    result = lb.train(model=str(saved("sd", root)), data=str(styles["ink"]), targets=targets, **SETTINGS)
    kinds = {value.A.ndim for value in result.trained["default"].layers.values()}
    assert kinds == {2, 4}
    plain = lb.train(model=str(saved("sd", root)), data=str(styles["ink"]), **SETTINGS)
    assert {path.split(".")[-1] for path in plain.trained["default"].layers} == {"to_q", "to_k", "to_v", "0"}


@pytest.mark.slow
def test_caches_on_disk_and_none_at_all_give_the_same(root: Path, styles: dict[str, Path], tmp_path: Path) -> None:
    def trained(**more: Any) -> lb.Adapter:
        settings = {**SETTINGS, "diffusion": {**PICTURES, **more}}
        return lb.train(model=str(saved("sd", root)), data=str(styles["ink"]), **settings).trained["default"]

    memory = trained()
    disk = {"cache": "disk", "cache_dir": str(tmp_path / "cache")}
    assert_near(trained(**disk), memory)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(files) == 5 + 1 + 5  # latents, the empty caption and five others
    assert_near(trained(**disk), memory)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")} == files
    assert_near(trained(cache="none"), memory)


@pytest.mark.slow
def test_class_pictures_are_drawn_once_and_trained_beside_the_object(root: Path, styles: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prior = {"prior_prompt": "a dog", "prior_pictures": 6, "cache_dir": str(cache)}
    settings = {**SETTINGS, "diffusion": {**PICTURES, **prior}, "max_steps": None, "epochs": 1}
    runs = {"model": str(saved("sd", root)), "output": str(tmp_path / "run"), "data": str(styles["ink"])}
    result = lb.train(**runs, **settings)
    drawn = sorted(cache.rglob("*.png"))
    assert len(drawn) == 6
    assert result.adapters["default"].steps == 6  # five pictures once, six of the class: eleven rows by two
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert "6 pictures of the class" in str(report)

    before = {p: p.stat().st_mtime_ns for p in drawn}
    drawn[2].with_suffix(".txt").unlink()  # a run that was cut off
    drawn[2].unlink()
    again = lb.train(**{**runs, "output": ""}, **settings)
    after = {p: p.stat().st_mtime_ns for p in sorted(cache.rglob("*.png"))}
    assert [after[p] == before[p] for p in drawn] == [i != 2 for i in range(6)]
    assert_near(again.trained["default"], result.trained["default"])

    heavier = {**settings, "diffusion": {**PICTURES, **prior, "prior_weight": 0.0}}
    other = lb.train(**{**runs, "output": ""}, **heavier)
    assert not torch.equal(
        next(iter(other.trained["default"].layers.values())).B, next(iter(again.trained["default"].layers.values())).B
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "all-linear"}, r"targets: they mean .* layers of text encoders .*diffusion\.text_encoders: true"),
        ({"diffusion": {**PICTURES, "sample_width": 30}}, r"picture size 30 × 32.*multiples of 4"),
        ({"diffusion": {**PICTURES, "prior_prompts": {"ikn": "a dog"}}}, r"prior_prompts: no adapter 'ikn'"),
        ({"diffusion": {**PICTURES, "cache": "memroy"}}, r"diffusion.cache: expected one of .*did you mean 'memory'"),
        ({"eval": {"metrics": ["fid"]}}, r"eval.metrics: expected loss, got 'fid'"),
    ],
)
def test_settings_that_cannot_be_are_refused(root: Path, styles: dict[str, Path], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lb.train(model=str(saved("sd", root)), data=str(styles["ink"]), **{**SETTINGS, **settings})


def test_the_learning_rate_that_nobody_gave_says_where_it_comes_from(root: Path, styles: dict[str, Path]) -> None:
    class Plan(Listener):
        plans: ClassVar[list[RunPlan]] = []

        def on_start(self, plan: RunPlan) -> None:
            self.plans.append(plan)

    settings = {key: value for key, value in SETTINGS.items() if key != "learning_rate"}
    for more in ({}, {"learning_rate": 2e-4}):
        runs = {"model": str(saved("sd", root)), "data": str(styles["ink"]), "dry_run": True, "listeners": [Plan()]}
        lb.train(**runs, **settings, **more)
    first, second = (plan.adapters[0] for plan in Plan.plans)
    assert first.learning_rate == 1e-4
    assert first.learning_rate_reason == f"auto: {OF_IMAGE_MODELS.reason}"
    assert (second.learning_rate, second.learning_rate_reason) == (2e-4, "as given")


def test_min_snr_of_a_flow_is_refused(root: Path, styles: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="min_snr"):
        lb.train(model=str(saved("sd3", root)), data=str(styles["ink"]), **{**SETTINGS, "diffusion": {**PICTURES, "min_snr": 5}})


def test_bad_pictures_stop_a_run_before_it_begins(root: Path, styles: dict[str, Path], tmp_path: Path) -> None:
    folder = folder_of_pictures(tmp_path / "mixed", 3)
    (folder / "01.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(DataError, match=r"1 of 3 pictures can't be used:\n.*no picture that can be read .*01.png"):
        lb.train(model=str(saved("sd", root)), data=str(folder), output=str(tmp_path / "run"), bad_rows="stop", **SETTINGS)
    assert not (tmp_path / "run").exists()
    lb.train(model=str(saved("sd", root)), data=str(folder), output=str(tmp_path / "run"), **SETTINGS)
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert next(iter(report.values()))["kept"] == 2


def test_from_the_command_line(root: Path, styles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    flags = "--task text-to-image --rank 2 --max-steps 2 --batch-size 2 --val-split 0 --resolution 32 --save-format kohya"
    more = "--diffusion.min-side 16 --diffusion.bucket-step 8 --diffusion.sample-steps 2 --learning-rate 1e-3 --device cpu"
    adapters = [part for name in ("ink", "oil") for part in ("--adapter", f"{name},data={styles[name]}")]
    assert main(["train", "--model", str(saved("sd", root)), "--output", str(out), *adapters, *flags.split(), *more.split()]) == 0
    assert (out / "oil" / "oil.safetensors").is_file()
    told = capsys.readouterr()
    assert "ink: none of its captions is held out to be drawn: diffusion.sample_prompts names" in told.out + told.err
    assert "Loading pipeline" not in told.err and "torchvision" not in told.err
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    drawn = ["predict", str(out), "--data", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "drawn"), "--size", "16"]
    assert main([*drawn, "--mix", "ink:0.5,oil:0.5", "--device", "cpu"]) == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2 * 4 + 1
    assert (
        main(["predict", str(out), "--prompt", "a hat", "--output", str(tmp_path / "hat"), "--mix", "ink:x", "--device", "cpu"])
        == 2
    )
    assert "expected adapters with weights, such as a:0.5,b:0.5" in capsys.readouterr().err
    apart = ["predict", str(out), "--prompt", "a hat", "--adapters", "ink", "--mix", "ink:0.5,oil:0.5", "--device", "cpu"]
    assert (
        main([*apart, "--size", "16", "--output", str(tmp_path / "apart")]) == 0
    )  # oil is in the run, though not asked for alone
    assert len(list((tmp_path / "apart").glob("*.png"))) == 3
    both = ["predict", str(out), "--prompt", "a hat", "--data", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "two")]
    assert main(both) == 2
    assert "--prompt: draws one caption, and --data captions of a file" in capsys.readouterr().err
    fox = ["predict", str(out), "--prompt", "a fox", "--device", "cpu", "--size", "16", "--adapters", "ink", "--output"]
    assert main([*fox, str(tmp_path / "new" / "fox.png")]) == 0
    with Image.open(tmp_path / "new" / "fox.png") as picture:
        assert picture.size == (16, 16)
    assert "1 picture by ink: " in capsys.readouterr().out
    assert main([*fox, str(tmp_path / "two.png"), "--adapters", "ink,oil"]) == 2
    captured = capsys.readouterr().err
    assert "loading" not in captured  # refused before that
    assert (
        "--output: two.png is one picture's file, and 2 are asked for (1 × ink, oil). Name a folder, or ask for one" in captured
    )
    listed = ["predict", str(out), "--data", str(tmp_path / "prompts.txt"), "--adapters", "ink", "--device", "cpu", "--output"]
    assert main([*listed, str(tmp_path / "two.png")]) == 2
    captured = capsys.readouterr().err
    assert "loading" not in captured and "and 2 are asked for (2 × ink)" in captured
    (tmp_path / "latin.txt").write_bytes("a cat\nein Kätzchen".encode("latin-1"))
    assert main([part.replace("prompts", "latin") for part in listed] + [str(tmp_path / "latin")]) == 2
    captured = capsys.readouterr().err
    assert "loading" not in captured and "latin.txt:2: expected utf-8 text, got the byte 0xe4" in captured
    assert main([*fox, str(tmp_path / "fox.jpg")]) == 2
    assert "--output: fox.jpg: pictures are written as PNG" in capsys.readouterr().err
    assert not (tmp_path / "two.png").exists() and not (tmp_path / "fox.jpg").exists()
    few = api.evaluate(out, DataConfig(test=str(styles["wax"])), ["ink"], max_rows=1, device="cpu")
    assert few != api.evaluate(out, DataConfig(test=str(styles["wax"])), ["ink"], device="cpu")
    assert main(["eval", str(out), "--device", "cpu"]) == 2
    assert f"{out}: the run held no rows out that could be scored" in capsys.readouterr().err
    assert main(["merge", str(out / "ink"), "--output", str(tmp_path / "merged")]) == 0
    assert "a plain pipeline: StableDiffusionPipeline.from_pretrained" in capsys.readouterr().out
    assert main(["chat", str(out), "--device", "cpu"]) == 2
    assert "this is text-to-image. Use `lorabank predict" in capsys.readouterr().err


def test_an_adapters_own_folder_draws_as_its_run(root: Path, styles: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    adapters = {name: {"data": str(styles[name])} for name in ("ink", "oil")}
    lb.train(model=str(saved("sd", root)), output=str(run), adapters=adapters, **{**SETTINGS, "max_steps": 1})
    for name in adapters:
        shutil.copytree(run / name, tmp_path / name)
    both = lb.combine([(lb.Adapter.load(tmp_path / name), 0.5) for name in adapters])
    both.save(tmp_path / "both")
    for name in ("ink", "both"):
        api.predict(tmp_path / name, "", tmp_path / f"of-{name}", options={"prompt": "a cat"})
        with Image.open(tmp_path / f"of-{name}" / f"0000-{name}.png") as picture:
            assert picture.size == (32, 32)
    of_run = [api.evaluate(folder, DataConfig(test=str(styles["wax"])), ["ink"])["ink"] for folder in (run, tmp_path / "ink")]
    assert of_run[0] == of_run[1]  # pictures of the run's size

    ink = lb.Adapter.load(tmp_path / "ink")
    settings = json.loads(ink.metadata["diffusion"])
    other = replace(ink, metadata={**ink.metadata, "diffusion": json.dumps({**settings, "resolution": 64})})
    other.save(tmp_path / "two" / "wide")
    ink.save(tmp_path / "two" / "ink")
    with pytest.warns(UserWarning, match=r"different settings: resolution \(ink 32, wide 64\)\. The defaults"):
        task = api.load_run(tmp_path / "two").task
    assert isinstance(task, TextToImage)
    assert (task.settings.resolution, task.settings.sample_steps) == (512, 2)
    old = {key: value for key, value in ink.metadata.items() if key != "diffusion"}
    replace(ink, metadata=old).save(tmp_path / "old")
    task = api.load_run(tmp_path / "old").task
    assert isinstance(task, TextToImage)
    assert task.settings == DiffusionConfig()
    for odd, said in (('{"resolution": -1}', "resolution.*got -1"), ('{"negative": 5}', "negative: 5")):
        replace(ink, metadata={**old, "diffusion": odd}).save(tmp_path / odd[2:5])
        with pytest.raises(AdapterFileError, match=rf"settings of diffusion can't be used \(.*{said}"):
            api.load_run(tmp_path / odd[2:5])
