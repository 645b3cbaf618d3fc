"""`lorabank merge` of an adapter that draws: plain diffusers draws from the merged pipeline what the adapter draws beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorabank as lb
from lorabank.cli import main
from lorabank.cli.merge import is_pipeline
from lorabank.formats.components import of_component
from lorabank.tasks.diffusion.load import load_image_model
from lorabank.tasks.diffusion.merge import _loaded
from lorabank.tasks.diffusion.sampling import PictureConfig, draw_pictures
from tests.tasks.diffusion.tiny import pipeline

NAMES = ["sd", "sdxl", "sd2", "sd3", "flux"]
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "fc1"]


def trained(base: Path, folder: Path, **settings: Any) -> lb.Adapter:
    """Saves an adapter of the denoiser and the CLIP encoders all of whose leaves moved."""
    bank = lb.attach(load_image_model(str(base), dtype="fp32", device="cpu").model)
    bank.add("a", lb.AdapterConfig(**{"rank": 2, "alpha": 8, "targets": LAYERS, **settings}))
    with torch.no_grad():
        for i, leaf in enumerate(bank.parameters("a")):
            leaf.add_(0.2 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(i)))
    adapter = replace(bank.adapter("a"), base_model=str(base))
    adapter.save(folder)
    return adapter


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bases")

    def of(name: str) -> Path:
        if not (folder / name).exists():
            pipeline(name).save_pretrained(folder / name)
        return folder / name

    return of


def drawn_beside(base: Path, adapter: lb.Adapter, noise: Tensor) -> Tensor:
    """What the adapter draws over the base, in one pass."""
    model = load_image_model(str(base), dtype="fp32", device="cpu").model
    bank = lb.attach(model)
    bank.load("a", adapter)
    with torch.no_grad(), bank.route("a"):
        ids = model.tokenize(["a cat"])
        condition, negative = model.encode(ids), model.encode(model.tokenize([""]))
    if model.zero_empty:
        negative = {name: torch.zeros_like(value) for name, value in negative.items()}
    if model.family.sized:
        condition["sizes"] = negative["sizes"] = model.sizes((16, 16), (0, 0), (16, 16))[None]
    config = PictureConfig(steps=3, guidance=3.0, height=16, width=16)
    return draw_pictures(model, bank, condition, negative, ["a"], seeds=[0], config=config, noise=noise)


def drawn_by_diffusers(folder: Path, name: str, noise: Tensor) -> Tensor:
    """What plain diffusers draws from a folder."""
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {"max_sequence_length": 10} if name in ("sd3", "flux") else {}
    latents = noise.view(1, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 16) if name == "flux" else noise
    size: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "pt"}
    return pipe(["a cat"], latents=latents, **size, **more).images


@pytest.mark.parametrize("name", NAMES)
def test_plain_diffusers_draws_what_the_adapter_draws(
    name: str, saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = saved(name), tmp_path / "merged"
    adapter = trained(base, tmp_path / "a")
    assert main(["merge", str(tmp_path / "a"), "--device", "cpu", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"Pipeline.from_pretrained('{out}')" in said
    assert "weights in float32" in said
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    found, plain = drawn_by_diffusers(out, name, noise), drawn_by_diffusers(base, name, noise)
    torch.testing.assert_close(found, drawn_beside(base, adapter, noise), rtol=0, atol=1e-3)
    assert (found - plain).abs().max() > 0.01
    changed = {path.partition(".")[0] for path in adapter.layers}
    assert {"text_encoder"} < changed
    for path in (path for path in base.rglob("*") if path.is_file()):
        part = path.relative_to(base).parts[0]
        if part not in changed:
            assert (out / path.relative_to(base)).read_bytes() == path.read_bytes(), path


def test_parts_that_no_adapter_changes_stay_as_they_lie(saved: Any, tmp_path: Path) -> None:
    base, out = saved("sd"), tmp_path / "merged"
    trained(base, tmp_path / "a", targets=["to_q"])
    assert main(["merge", str(tmp_path / "a"), "--device", "cpu", "--output", str(out)]) == 0
    encoder = "text_encoder/model.safetensors"
    assert (out / encoder).read_bytes() == (base / encoder).read_bytes()
    again = trained(out, tmp_path / "b", targets=["to_v"])  # it is a base like another
    assert again.layers


def test_other_tools_files_and_halves(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter of the U-Net alone, and a base in fp16 beside which other forms of its weights lie."""
    base, out = tmp_path / "base", tmp_path / "merged"
    pipeline("sd").to(torch.float16).save_pretrained(base)
    held = load_file(base / "vae" / "diffusion_pytorch_model.safetensors")
    for name in ("vae/diffusion_pytorch_model.fp16.safetensors", "v1-5-pruned.safetensors", "vae/diffusion_pytorch_model.bin"):
        save_file(held, base / name)
    (base / "LICENSE").write_text("as it was")
    whole = trained(base, tmp_path / "a", targets=["to_q"])
    replace(of_component(whole, "unet"), base_model=None).save(tmp_path / "unet")
    assert main(["merge", str(tmp_path / "unet"), "--model", str(base), "--device", "cpu", "--output", str(out)]) == 0
    before, after = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (base, out))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("to_q" in name for name in moved)
    assert {value.dtype for value in after.values()} == {torch.float16}
    assert (out / "LICENSE").read_text() == "as it was"
    assert sorted(path.name for path in (out / "vae").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert "StableDiffusionPipeline.from_pretrained" in (said := capsys.readouterr().out) and "dtype=torch.float16)" in said
    assert not (out / "v1-5-pruned.safetensors").exists()


def test_what_is_refused_leaves_nothing(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = saved("sd"), tmp_path / "merged"
    adapter = trained(base, tmp_path / "a", targets=["to_q"])
    torch.manual_seed(5)

    def refused(*words: str) -> str:
        assert main(["merge", *words, "--device", "cpu", "--output", str(out)]) != 0
        assert not out.exists()
        return capsys.readouterr().err

    a = str(tmp_path / "a")
    assert "--by-shard: is for one model's files" in refused(a, "--by-shard")
    assert "no model_index.json there" in refused(a, "--model", str(base / "unet"))
    assert f"(did you mean '{base}'?)" in refused(a, "--model", str(base.with_name("sdd")))
    assert "changes unet" in refused(a, "--model", str(saved("flux")))
    damaged = tmp_path / "damaged"
    pipeline("sd").save_pretrained(damaged)
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "its tensors need" in refused(a, "--model", str(damaged))
    (damaged / "text_encoder" / "config.json").write_text("{")
    weights.write_bytes((base / "unet" / weights.name).read_bytes())
    assert "text_encoder can't be read" in refused(a, "--model", str(damaged))
    other = tmp_path / "other"
    pipe = pipeline("sd")
    with torch.no_grad():
        for value in pipe.unet.parameters():
            value.mul_(1.5)
    pipe.save_pretrained(other)
    assert "another base" in refused(a, "--model", str(other))
    assert main(["merge", a, "--model", str(other), "--force", "--device", "cpu", "--output", str(out)]) == 0
    assert adapter.layers


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"modules_to_save": ["final_layer_norm"]}, "final_layer_norm."),
        ({"trainable_token_indices": {"token_embedding": [3, 4]}}, "token_embedding.weight"),
    ],
    ids=["a module in full", "rows of tokens"],
)
def test_what_changes_beside_low_rank_layers_is_written_too(
    settings: dict[str, Any], changed: str, saved: Any, tmp_path: Path
) -> None:
    """The low-rank layers are the U-Net's alone."""
    base, out = saved("sd"), tmp_path / "merged"
    trained(base, tmp_path / "a", targets=["to_q"], **settings)
    assert main(["merge", str(tmp_path / "a"), "--device", "cpu", "--output", str(out)]) == 0
    before, after = (load_file(folder / "text_encoder" / "model.safetensors") for folder in (base, out))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(changed in name for name in moved)


def test_half_a_pipeline_draws_as_it_says(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = saved("sd"), tmp_path / "merged"
    trained(base, tmp_path / "a", targets=["to_q"])
    assert main(["merge", str(tmp_path / "a"), "--dtype", "bf16", "--device", "cpu", "--output", str(out)]) == 0
    call = f"StableDiffusionPipeline.from_pretrained('{out}', dtype=torch.bfloat16)"
    assert call in capsys.readouterr().out
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(out), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", num_inference_steps=1, height=16, width=16).images[0].size == (16, 16)


def test_weights_that_diffusers_loads_are_told_from_other_forms_of_them() -> None:
    other = ("model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json", "model.fp16.safetensors", "model.bin")
    assert not any(_loaded(Path(name)) for name in other)
    assert all(_loaded(Path(name)) for name in ("model.safetensors", "model-00001-of-00002.safetensors", "config.json"))
    assert _loaded(Path("model.safetensors.index.json"))


def test_an_adapter_of_another_tool_means_a_pipeline_by_its_layers(saved: Any, tmp_path: Path) -> None:
    adapter = replace(trained(saved("sd"), tmp_path / "a", targets=["to_q"]), base_model=None)
    assert not adapter.metadata.get("task") and is_pipeline("stabilityai/sdxl", adapter)
    assert not is_pipeline("openai-community/gpt2", of_component(adapter, "unet"))


def test_an_adapter_of_the_first_two_encoders_of_stable_diffusion_3_goes_to_kohyas_form_and_back(
    saved: Any, tmp_path: Path
) -> None:
    """There, the first is a class that spells its layers otherwise than that of Stable Diffusion 1."""
    adapter = trained(saved("sd3"), tmp_path / "a", targets=["q_proj"])
    assert {path.partition(".")[0] for path in adapter.layers} == {"text_encoder", "text_encoder_2"}
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "a.safetensors"), "--to", "kohya"]) == 0
    held = load_file(tmp_path / "a.safetensors")
    assert len([name for name in held if name.endswith("lora_down.weight")]) == len(adapter.layers)
