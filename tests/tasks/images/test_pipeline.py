"""What is done to pixels: the image processor in two steps, augmentation by each row's own draw, scores, pictures of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lorabank.config.images import AUGMENTATIONS, ImagesConfig
from lorabank.errors import ConfigError
from lorabank.models.quiet import quiet_transformers
from lorabank.tasks.images.augment import affine_maps, augment, kornia, uniforms
from lorabank.tasks.images.confusion_plot import confusion_plot
from lorabank.tasks.images.metrics import Answer, confusion, mistaken, scores
from lorabank.tasks.images.preprocess import plain_processor, read_off
from lorabank.tasks.images.rows import ImageRow
from lorabank.tasks.images.samples import sample_of
from lorabank.tasks.images.sheet import Sample, contact_sheet
from tests.tasks.images.made import picture

SMALL: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": {"height": 16, "width": 16}},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 16}},
    "BitImageProcessor": {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}},
    "EfficientNetImageProcessor": {"size": {"height": 18, "width": 18}, "crop_size": {"height": 16, "width": 16}},
    "MobileViTImageProcessor": {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}},
}


def processor(name: str, **settings: Any) -> Any:
    with quiet_transformers():
        return getattr(transformers, name)(**settings)


@pytest.mark.parametrize("name", SMALL)
def test_two_steps_are_the_processors_one(name: str) -> None:
    whole = processor(name, **SMALL[name])
    two = read_off(whole, ImagesConfig())
    image = picture("green", 1, (33, 25))
    expected = whole(images=[image], return_tensors="pt")["pixel_values"]
    found = two.normalise(two.pixels(image)[None].float() / 255)
    assert found.shape == expected.shape == (1, 3, two.height, two.width)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_another_size_is_the_same_processor(name: str) -> None:
    two = read_off(processor(name, **SMALL[name]), ImagesConfig(image_size=40))
    assert (two.height, two.width) == (40, 40)
    assert two.pixels(picture("green", 1, (33, 70))).shape == (3, 40, 40)


def test_a_processor_that_gives_several_sizes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gives pictures of different sizes .* Set do_center_crop"):
        read_off(processor("BitImageProcessor", size={"shortest_edge": 16}, do_center_crop=False), ImagesConfig())


@pytest.mark.parametrize(("fit", "left"), [("crop", 10), ("squash", 0)])
def test_a_model_without_one_gets_squares_by_crop_or_squash(fit: str, left: int) -> None:
    config = ImagesConfig(image_size=20, fit=fit, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    two = read_off(plain_processor(config), config)
    image = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (20, 1, 3)))
    assert abs(int(two.pixels(image)[0, 0, 0]) - left) <= 1
    torch.testing.assert_close(two.normalise(torch.ones(1, 3, 1, 1)), torch.full((1, 3, 1, 1), 2.0))


def test_a_row_is_varied_by_its_own_draw_alone() -> None:
    x = torch.rand(5, 3, 20, 16)
    draws = [7, 8, 2**63 - 1, 7, 0]
    together = augment(x, draws, AUGMENTATIONS)
    apart = torch.cat([augment(x[i : i + 1], [draw], AUGMENTATIONS) for i, draw in enumerate(draws)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)
    before = torch.get_rng_state()
    same = augment(x[[0, 0]], [7, 7], AUGMENTATIONS)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(same[0], same[1])
    assert not torch.allclose(together[0], augment(x[:1], [8], AUGMENTATIONS)[0])
    assert augment(x, draws, ()) is x


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_each_kind_changes_pictures_and_keeps_their_range(kind: str) -> None:
    x = torch.rand(12, 3, 20, 16)
    y = augment(x, range(12), [kind])
    assert y.shape == x.shape
    assert 0 <= float(y.min()) <= float(y.max()) <= 1
    changed = sum(not torch.allclose(a, b, atol=1e-4) for a, b in zip(x, y, strict=True))
    assert changed == 12 if kind in ("crop", "rotate", "colour") else 2 <= changed <= 10


def test_maps_are_where_they_should_be() -> None:
    x = torch.rand(2, 3, 20, 16)
    warp = kornia().geometry.warp_affine
    still, turned = (affine_maps(torch.zeros(2, 16), kinds, 20, 16) for kinds in ((), ("flip",)))
    torch.testing.assert_close(warp(x, still, (20, 16)), x, rtol=0, atol=1e-4)
    torch.testing.assert_close(warp(x, turned, (20, 16)), x.flip(-1), rtol=0, atol=1e-4)
    # a crop of the upper left: what is there moves to the corner
    half = torch.zeros(1, 16)
    half[0, 1] = 0.5
    corner = affine_maps(half, ("crop",), 20, 16)[0] @ torch.tensor([-0.5, -0.5, 1.0])
    torch.testing.assert_close(corner, torch.tensor([-0.5, -0.5]), rtol=0, atol=0.2)


def test_uniform_draws_are_uniform() -> None:
    u = uniforms(range(3000))
    torch.testing.assert_close(u.mean(0), torch.full((16,), 0.5), rtol=0, atol=0.03)
    assert abs(float(torch.corrcoef(u.T).fill_diagonal_(0).abs().max())) < 0.08


def test_scores_are_scikit_learns() -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, top_k_accuracy_score

    generator = np.random.default_rng(0)
    shares = generator.dirichlet(np.ones(8), 60)
    true = generator.integers(0, 8, 60)
    order = np.argsort(-shares, 1)[:, :5]
    answers = [Answer(tuple(map(int, o)), tuple(s[o]), -float(np.log(s[t]))) for o, s, t in zip(order, shares, true, strict=True)]
    found = scores(answers, true.tolist(), 8)
    assert found["accuracy"] == pytest.approx(accuracy_score(true, order[:, 0]))
    assert found["top5_accuracy"] == pytest.approx(top_k_accuracy_score(true, shares, k=5))
    assert found["f1_macro"] == pytest.approx(f1_score(true, order[:, 0], average="macro"))
    assert found["loss"] == pytest.approx(-np.log(shares[np.arange(60), true]).mean())
    counts = confusion(true.tolist(), order[:, 0].tolist(), 8)
    assert np.array_equal(counts, confusion_matrix(true, order[:, 0], labels=range(8)))
    pairs = mistaken(counts, 3)
    assert pairs[0][2] == max(counts[a, b] for a in range(8) for b in range(8) if a != b)
    assert "top5_accuracy" not in scores(answers[:2], [0, 1], 5)


@pytest.mark.parametrize("size", [2, 10, 200])
def test_confusion_is_drawn_for_few_and_many_classes(size: int, tmp_path: Path) -> None:
    true = list(range(size)) * 3
    guess = [(label + (i % 7 == 0)) % size for i, label in enumerate(true)]
    drawn = confusion_plot(confusion(true, guess, size), [f"$kind {i}" for i in range(size)], tmp_path / "c.png", title="a")
    with Image.open(drawn) as image:
        assert min(image.size) > 700
        shades = np.asarray(image.convert("L"))
    assert (shades < 100).mean() > 0.001  # the diagonal, and letters


def test_a_tile_whose_file_is_gone_says_so(tmp_path: Path) -> None:
    row = ImageRow(tmp_path / "gone.png", "0", "red", "gone.png")
    drawn = []
    for number, file in enumerate((None, picture("red", 1))):
        if file is not None:
            file.save(tmp_path / "gone.png")
        sample = sample_of(row, Answer((0,), (0.9,), 0.1), ["red"])
        assert (sample.picture is None) is (file is None)
        with Image.open(contact_sheet([sample], tmp_path / f"sheet{number}.png")) as image:
            drawn.append(np.asarray(image.convert("RGB")))
    inside = [sheet[40:115, 20:140].reshape(-1, 3) for sheet in drawn]
    assert (inside[0] == 255).all(1).mean() > 0.8 and (inside[0] < 100).all(1).any()
    assert not (inside[1] == 255).all(1).any()


def test_a_sheet_shows_mistakes_first(tmp_path: Path) -> None:
    samples = [
        Sample(
            picture=picture("green", i, (40 - i, 30)),
            true="green",
            predicted="green" if i != 4 else "a long name " * 5,
            share=0.5,
        )
        for i in range(8)
    ]
    with Image.open(contact_sheet(samples, tmp_path / "s.png")) as image:
        pixels = np.asarray(image)
    assert pixels[12, 12].tolist() == [213, 94, 0]  # the frame of the first tile: wrong
    assert pixels[12, 12 + 164].tolist() == [0, 158, 115]
