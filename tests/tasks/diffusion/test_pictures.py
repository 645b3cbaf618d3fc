"""Pictures and captions as users have them, whole and broken; sizes; the cache."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorabank.config.diffusion import DiffusionConfig
from lorabank.config.train import DataConfig
from lorabank.errors import DataError, OutputError
from lorabank.tasks.diffusion.buckets import Size, buckets_of, fit, fitted, nearest
from lorabank.tasks.diffusion.cache import Cache, Encoded, identity
from lorabank.tasks.diffusion.pictures import Read, opened, read_pictures
from lorabank.tasks.diffusion.rows import caption_note, prepare
from lorabank.tasks.picture_bytes import digest_of_pixels
from tests.data.locked import locked
from tests.tasks.diffusion.tiny import folder_of_pictures, model_of, picture, pipeline

CONFIG = DiffusionConfig(resolution=32, bucket_step=8, min_side=16)


def read(source: Any, bad_rows: str = "drop", **settings: Any) -> Read:
    return read_pictures(source, DataConfig(bad_rows=bad_rows), replace(CONFIG, **settings), step=8)


def test_captions_beside_pictures(tmp_path: Path) -> None:
    folder = folder_of_pictures(tmp_path / "pictures", 3, sizes=[(80, 80), (120, 60)])
    (folder / "02.txt").write_text("\ufeff a  hat\n")
    found = read(folder)
    assert [p.caption for p in found.pictures] == ["a cat a", "a cat b", "a hat"]
    assert [p.fit.bucket for p in found.pictures] == [Size(32, 32), Size(24, 40), Size(32, 32)]
    assert found.pictures[1].load().size == (40, 24)
    assert read(folder, trigger="sks").pictures[0].caption == "sks a cat a"


@pytest.mark.parametrize("form", ["folder", "file", "csv", "rows"])
def test_metadata_and_rows(tmp_path: Path, form: str) -> None:
    folder = folder_of_pictures(tmp_path / "pictures", 2)
    rows = [{"file_name": "01.png", "text": "one"}, {"file_name": "00.png", "text": "naught"}]
    source: Any = folder
    if form == "csv":
        (folder / "metadata.csv").write_text("file_name,text\n01.png,one\n00.png,naught\n")
    elif form == "rows":
        source = [
            {"image": picture(1), "caption": "one"},
            {"image": {"bytes": (folder / "00.png").read_bytes()}, "caption": "naught"},
        ]
    else:
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = folder if form == "folder" else folder / "metadata.jsonl"
    found = read(source)
    assert [p.caption for p in found.pictures] == ["one", "naught"]
    assert np.array_equal(np.asarray(found.pictures[0].load()), np.asarray(fitted(picture(1), found.pictures[0].fit)))


def test_a_data_set_of_pictures(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"image": [picture(1), picture(2)], "text": ["one", "two"]}).cast_column(
        "image", datasets.Image()
    )
    found = read(made)
    assert [p.caption for p in found.pictures] == ["one", "two"]
    assert found.pictures[0].load().size == (32, 32)


def broken(folder: Path) -> Path:
    """A good picture, and one with each fault."""
    folder_of_pictures(folder, 1)
    picture(7).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:300])
    (folder / "text.png").write_text("no picture")
    picture(8, 200, 9).save(folder / "thin.png")
    picture(9).save(folder / "silent.png")
    picture(10).save(folder / "blank.png")
    (folder / "blank.txt").write_text("  \n")
    for name in ("cut", "text", "thin"):
        (folder / f"{name}.txt").write_text("words")
    return folder


def test_bad_pictures_are_named_and_counted(tmp_path: Path) -> None:
    folder = broken(tmp_path / "broken")
    with pytest.raises(DataError) as told:
        read(folder, bad_rows="stop")
    text = str(told.value)
    assert "3 of 6 pictures can't be used" in text
    for why, name in (
        ("a cut off picture", "cut.jpg"),
        ("no picture that can be read", "text.png"),
        ("tiny (200 × 9", "thin.png"),
    ):
        assert any(why in line and name in line for line in text.splitlines())
    assert "data.bad_rows to drop" in text


def test_bad_pictures_are_left_out_as_the_user_chose(tmp_path: Path) -> None:
    folder = broken(tmp_path / "broken")
    with pytest.raises(
        DataError, match=r"2 of 6 pictures .*\n.*2 × has no caption \(.*blank.png, .*silent.png\)\n.*diffusion.no_caption to drop"
    ):
        read(folder)
    found = read(folder, no_caption="drop")
    assert [Path(p.origin).name for p in found.pictures] == ["00.png"]
    assert found.total == 6
    assert sorted(Path(e.origin).name for e in found.errors) == ["blank.png", "cut.jpg", "silent.png", "text.png", "thin.png"]
    empty = read(folder, no_caption="empty")
    assert sorted(Path(p.origin).name for p in empty.pictures) == ["00.png", "blank.png", "silent.png"]
    assert [len(rows) for note, rows in empty.notes.items() if "without a caption" in note] == [2]


def test_forms_that_are_not_read_are_bad_pictures(tmp_path: Path) -> None:
    folder = folder_of_pictures(tmp_path / "pictures", 2)
    (folder / "phone.HEIC").write_bytes(b"x")
    (folder / "notes.txt").write_text("of the shoot")
    with pytest.raises(DataError, match=r"1 of 3 pictures .*\n.*\.heic isn't read: convert it to PNG or JPEG.*phone\.HEIC"):
        read(folder, bad_rows="stop")
    found = read(folder)
    assert len(found.pictures) == 2 and [Path(e.origin).name for e in found.errors] == ["phone.HEIC"]


def test_captions_of_another_encoding(tmp_path: Path) -> None:
    """What its byte order mark says is read; what is no text is one bad row, as the user chose."""
    folder = folder_of_pictures(tmp_path / "p", 3)
    (folder / "00.txt").write_bytes("ein Kätzchen".encode("utf-16"))
    (folder / "01.txt").write_bytes("ein\nKätzchen".encode("latin-1"))
    with pytest.raises(DataError, match=r"1 of 3 pictures .*\n.*the \.txt beside it can't be read \(2: .*byte 0xe4.*01\.png"):
        read(folder, bad_rows="stop")
    found = read(folder)
    assert found.pictures[0].caption == "ein Kätzchen" and len(found.pictures) == 2


def test_rows_of_metadata_with_faults_are_counted(tmp_path: Path) -> None:
    """A row without a file, NaN, half a character, a number; and a file whose captions have another name."""
    folder = folder_of_pictures(tmp_path / "p", 4)
    captions: list[Any] = ["a cat", 7, math.nan, "bad \ud83d", "no file", "None"]
    rows = [{"file_name": f"{i:02}.png", "text": text} for i, text in enumerate(captions)]
    rows[4]["file_name"], rows[5]["file_name"] = None, "00.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"NaN, a missing value, in 1 of 6 pictures.*\n.*column 'text' holds NaN"):
        read(folder)
    data = DataConfig(bad_rows="drop", nan_rows="drop")
    found = read_pictures(folder, data, CONFIG, step=8)
    assert [p.caption for p in found.pictures] == ["a cat", "7", "None"]
    reasons = sorted(error.reason for error in found.errors)
    assert reasons[0] == "column 'text' holds NaN" and reasons[2] == "names no picture"
    assert reasons[1] == "column 'text' holds half of a surrogate pair, which is no text"
    assert [len(rows) for note, rows in found.notes.items() if "NaN, null or None" in note] == [1]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"{i:02}.png", "txt": "x"}) for i in range(2)))
    with pytest.raises(DataError, match=r"no column of captions: expected text, caption, prompt, got file_name, txt\."):
        read(folder)
    assert len(read(folder, no_caption="empty").pictures) == 2
    assert read(folder, caption="txt").pictures[0].caption == "x"


def test_captions_that_are_cut_are_told(tmp_path: Path) -> None:
    folder = folder_of_pictures(tmp_path / "p", 3)
    (folder / "01.txt").write_text("a cat " * 200)
    task = model_of(pipeline("sd"), "sd")
    how: Any = {"step": 8, "seed": 0, "train": str(folder), "val": None}
    found = prepare(DataConfig(val_split=0), CONFIG, **how, caption_note=lambda caption: caption_note(task, caption))
    ((note, rows),) = ((note, rows) for note, rows in found.report.notes.items() if "longer" in note)
    assert note == "captions longer than text_encoder reads (12 tokens)" and rows.count == 1


def test_nothing_usable_and_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures there"):
        read(tmp_path / "empty")
    with pytest.raises(DataError, match="no file or folder"):
        read(str(tmp_path / "nowhere/"))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n')
    with pytest.raises(DataError, match=r"not the only picture can be used:\n.*no such file \(.*gone.png"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"no column 'captoin' \(did you mean 'caption'\?\)"):
        read([{"image": picture(0), "caption": "x"}], caption="captoin")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK", "I;16", "1"])
def test_pictures_of_every_mode(mode: str) -> None:
    """Transparent ones on white; 16 bits a pixel aren't cut off at 255."""
    if mode == "I;16":
        made = Image.fromarray(np.full((40, 40), 0x8080, np.uint16))
    elif mode in ("RGBA", "LA"):
        made = Image.new(mode, (40, 40), (0,) * len(mode))
    else:
        made = Image.new("RGB", (40, 40), (128, 128, 128)).convert(mode)
    target = io.BytesIO()
    made.save(target, "TIFF" if mode in ("CMYK", "I;16") else "PNG")
    found = read([{"image": target.getvalue(), "text": "x"}]).pictures[0].load()
    expected = {"RGBA": 255, "LA": 255, "1": None}.get(mode, 128)
    assert found.mode == "RGB"
    assert expected is None or abs(int(np.asarray(found)[3, 3, 0]) - expected) <= 2


def test_a_picture_stands_upright() -> None:
    made = picture(3, 60, 40)
    exif = made.getexif()
    exif[0x0112] = 6
    target = io.BytesIO()
    made.save(target, "JPEG", exif=exif)
    assert read([{"image": target.getvalue(), "text": "x"}]).pictures[0].original == Size(60, 40)


def test_a_file_that_changes_during_the_run_is_noticed(tmp_path: Path) -> None:
    folder = folder_of_pictures(tmp_path / "pictures", 1)
    found = read(folder).pictures[0]
    picture(99).save(folder / "00.png")
    with pytest.raises(DataError, match=r"00.png: its content is another"):
        found.load()


def test_buckets_cover_shapes_with_few_pixels_lost() -> None:
    sizes = buckets_of(512, step=64, max_aspect=2.0)
    assert Size(512, 512) in sizes
    assert all(s.height % 64 == 0 == s.width % 64 and s.pixels <= 512 * 512 for s in sizes)
    assert all(max(s.height, s.width) <= 2 * min(s.height, s.width) for s in sizes)
    assert nearest(sizes, 1000, 1000) == Size(512, 512)
    assert nearest(sizes, 900, 600) == Size(640, 384)
    assert nearest(sizes, 500, 3000) == Size(384, 640)  # the widest that max_aspect allows
    how = fit(Size(512, 512), 600, 900)
    assert (how.scaled, how.top, how.left) == (Size(512, 768), 0, 128)


def test_the_cache_is_by_content_model_and_size(tmp_path: Path) -> None:
    """Another file, model or resolution is another entry; the same is found again, whatever its path."""
    folder = folder_of_pictures(tmp_path / "pictures", 2)
    model = model_of(pipeline("sd"), "sd")
    first = read(folder).pictures
    encoded = Encoded(model, Cache(tmp_path / "cache"))
    told: list[tuple[str, int, int]] = []
    encoded.prepare(first, ["a", ""], lambda *args: told.append(args))
    assert told == [("latents", 1, 2), ("latents", 2, 2), ("captions", 1, 2), ("captions", 2, 2)]
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 4

    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "other.png").write_bytes((folder / "00.png").read_bytes())
    (tmp_path / "moved" / "other.txt").write_text("a")
    again = Encoded(model_of(pipeline("sd"), "sd"), Cache(tmp_path / "cache"))
    moved = read(tmp_path / "moved").pictures[0]
    assert torch.equal(again.latents(moved), encoded.latents(first[0]))
    assert torch.equal(again.condition("a")["text"], encoded.condition("a")["text"])
    assert sorted((tmp_path / "cache").rglob("*.safetensors")) == files

    other = model_of(pipeline("sd"), "sd")
    with torch.no_grad():
        next(other.vae.parameters()).view(-1)[0] += 1e-3
        next(other.frozen["text_encoder"].parameters()).view(-1)[0] += 1e-3
    changed = Encoded(other, Cache(tmp_path / "cache"))
    changed.latents(moved)
    changed.condition("a")
    larger = read(tmp_path / "moved", resolution=40).pictures[0]
    again.latents(larger)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 7
    assert identity(other.vae) != identity(model.vae)


def test_a_broken_file_of_the_cache_is_made_again(tmp_path: Path) -> None:
    found = read(folder_of_pictures(tmp_path / "pictures", 1)).pictures[0]
    model = model_of(pipeline("sd"), "sd")
    expected = Encoded(model, Cache(tmp_path / "cache")).latents(found)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.warns(UserWarning, match="a file of the cache can't be read"):
        assert torch.equal(Encoded(model, Cache(tmp_path / "cache")).latents(found), expected)
    written = file.read_bytes()
    file.write_bytes(written[:-8] + bytes(8))  # of the same length
    with pytest.warns(UserWarning, match="a file of the cache isn't what was written there"):
        assert torch.equal(Encoded(model, Cache(tmp_path / "cache")).latents(found), expected)
    assert file.read_bytes() == written


def test_a_cache_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    found = read(folder_of_pictures(tmp_path / "pictures", 1)).pictures[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/cache/.*: can't be written \(Not a directory\)\."):
        Encoded(model_of(pipeline("sd"), "sd"), Cache(tmp_path / "file" / "cache")).latents(found)


def test_a_picture_that_has_gone_or_changed_since_is_named(tmp_path: Path) -> None:
    first, second = read(folder_of_pictures(tmp_path / "pictures", 2)).pictures
    (tmp_path / "pictures" / "00.png").unlink()
    with pytest.raises(DataError, match=r"00\.png: no such file, though it was fine when the run began\. Put it back"):
        first.load()
    picture(40).save(tmp_path / "pictures" / "01.png")
    with pytest.raises(DataError, match=r"01\.png: its content is another than when the run began"):
        second.load()


def test_latents_are_the_vaes_means() -> None:
    model = model_of(pipeline("sd"), "sd")
    pixels = torch.rand(1, 3, 32, 40)
    with torch.no_grad():
        expected = model.vae.encode(pixels * 2 - 1).latent_dist.mean * model.vae.config.scaling_factor
    torch.testing.assert_close(model.latents(pixels), expected)
    assert model.pictures(expected).shape == pixels.shape


def test_a_resolution_that_cannot_be_had_is_said(tmp_path: Path) -> None:
    folder = folder_of_pictures(tmp_path / "pictures", 3)

    def facts(resolution: int, step: int, asked: int = 64) -> list[str]:
        config = DiffusionConfig(resolution=resolution, bucket_step=asked, min_side=16)
        return list(prepare(DataConfig(), config, step=step, seed=0, train=str(folder), val=None).report.lines())

    assert not [line for line in facts(128, 64) if "diffusion.resolution" in line]
    (small,) = [line for line in facts(33, 64) if "diffusion.resolution" in line]
    assert "resolution 33: sides are multiples of 64 (diffusion.bucket_step). Next to it: 64" in small
    (between,) = [line for line in facts(100, 16, asked=7) if "diffusion.resolution" in line]
    assert between.endswith("sides are multiples of 16 (what the model's latents need). Next to it: 96 and 112")


def test_pictures_without_a_file_are_told_apart_by_what_is_seen() -> None:
    """16 bits that differ above 255, and palettes of other colours."""
    bright, dark = (Image.fromarray(np.full((8, 8), value, dtype=np.uint16)) for value in (60000, 30000))
    assert opened(bright)[1] != opened(dark)[1]
    red, blue = Image.new("P", (8, 8)), Image.new("P", (8, 8))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert opened(red)[1] != opened(blue)[1]
    assert digest_of_pixels(red) != digest_of_pixels(blue)


def test_a_folder_below_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of_pictures(tmp_path / "p", 2)
    folder_of_pictures(tmp_path / "p" / "more", 2)
    with locked(Path("p/more")), pytest.raises(DataError, match=r"p/more: this folder can't be read \(Permission denied\)"):
        read(Path("p"))
    assert len(read(Path("p")).pictures) == 4
