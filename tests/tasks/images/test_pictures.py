"""Any file that is a picture becomes upright RGB; any other says in words what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorabank.data.row import RowError
from lorabank.tasks.decoding import as_rgb
from lorabank.tasks.images.pictures import as_picture, open_picture
from tests.tasks.images.made import as_bytes, picture


def levels(image: Image.Image) -> list[list[int]]:
    """Of the first row."""
    return np.asarray(image)[0].tolist()


def test_every_mode_becomes_rgb() -> None:
    red = Image.new("RGB", (4, 3), (255, 0, 0))
    assert levels(as_rgb(red.convert("P")))[0] == [255, 0, 0]
    assert levels(as_rgb(red.convert("CMYK")))[0] == [255, 0, 0]
    assert levels(as_rgb(Image.new("L", (4, 3), 77)))[0] == [77] * 3
    assert levels(as_rgb(Image.new("1", (4, 3), 1)))[0] == [255] * 3
    assert levels(as_rgb(red.convert("YCbCr")))[0][0] > 250
    for mode in ("L", "P", "CMYK", "LA", "RGBA", "1", "I", "F", "I;16", "YCbCr", "HSV", "LAB"):
        found = as_rgb(Image.new(mode, (4, 3)))
        assert (found.mode, found.size) == ("RGB", (4, 3)), mode


def test_what_is_transparent_is_white() -> None:
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (10, 20, 30, 255))
    assert levels(as_rgb(half)) == [[255, 255, 255], [10, 20, 30]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 0
    assert levels(open_picture(as_bytes(palette))[0]) == [[255, 255, 255], [50, 60, 70]]


def test_16_bits_are_scaled_and_not_cut() -> None:
    deep = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    assert [level[0] for level in levels(open_picture(as_bytes(deep))[0])] == [0, 128, 255]
    assert [level[0] for level in levels(as_rgb(Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))))] == [0, 128, 255]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_white_of_deep_greys_is_that_of_the_bits_they_fill(bits: int) -> None:
    white = 2**bits - 1
    deep = Image.fromarray(np.array([[0, white // 2 + 1, white]], dtype=np.uint16))
    assert [level[0] for level in levels(open_picture(as_bytes(deep))[0])] == [0, 128, 255]
    wide = Image.fromarray(np.array([[0, white // 2 + 1, white]], dtype=np.int32))
    assert [level[0] for level in levels(as_rgb(wide))] == [0, 128, 255]


def test_the_white_of_deep_greys_is_not_taken_lower_than_the_usual_bits() -> None:
    dim = Image.fromarray(np.array([[0, 1100]], dtype=np.uint16))
    assert levels(as_rgb(dim))[1][0] == round(1100 * 255 / 4095)
    beyond = Image.fromarray(np.array([[0, 100_000, 200_000]], dtype=np.int32))
    assert [level[0] for level in levels(as_rgb(beyond))] == [0, 128, 255]


def test_a_cameras_note_turns_it() -> None:
    image = Image.new("RGB", (6, 4), (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    from io import BytesIO

    stream = BytesIO()
    image.save(stream, "PNG", exif=exif)
    turned, _ = open_picture(stream.getvalue())
    assert turned.size == (4, 6)
    assert np.asarray(turned)[0, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "an empty file"),
        (b"no picture at all", "no picture that can be read"),
        (as_bytes(picture("red", 1, (90, 90)), "JPEG")[:900], "a cut off picture"),
        (as_bytes(picture("red", 1, (90, 90)))[:3000], "a (cut off|damaged) picture"),
        (as_bytes(picture("red", 1))[:60] + bytes(200), "damaged|no picture that can be read"),
    ],
)
def test_a_damaged_file_says_how(data: bytes, why: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=why):
        open_picture(data)
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(RowError, match=why):
        open_picture(tmp_path / "x.png")


def test_what_is_no_picture_or_too_small_says_so(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="no such file"):
        open_picture(tmp_path / "gone.png")
    with pytest.raises(RowError, match="a folder where a picture was expected"):
        open_picture(tmp_path)
    with pytest.raises(RowError, match="smaller than 8 pixels a side"):
        open_picture(as_bytes(picture("red", 1, (30, 7))), min_size=8)
    for value, why in ((None, "cell is empty"), (" ", "cell is empty"), (3, "a int where"), ({"bytes": None}, "a dict where")):
        with pytest.raises(RowError, match=why):
            as_picture(value, None)
    with pytest.raises(RowError, match="an array of float64"):
        as_picture(np.zeros((4, 4, 3)), None)


def test_a_picture_of_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_bytes(picture("red", 1, (90, 90)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(RowError, match="more pixels than Pillow takes for safe"):
        open_picture(data)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a\0b.png", "a name that no file can have"),
        ("x\ud83d.png", "a name that no file can have"),
        ("iVBORw0KGgo" * 900, "can't be read: File name too long"),
        ("~no such user/1.png", "no such file"),
        ("gone.png", "no such file"),
    ],
)
def test_a_name_that_no_file_has_is_a_bad_row(name: str, why: str, tmp_path: Path) -> None:
    for folder in (tmp_path, None):
        with pytest.raises(RowError, match=f"^{why}$"):
            open_picture(as_picture(name, folder))


def test_a_tilde_begins_a_users_home_or_a_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert as_picture("~/a.png", tmp_path) == tmp_path / "home" / "a.png"
    picture("red", 1).save(tmp_path / "~draft 1.png")
    assert open_picture(as_picture("~draft 1.png", tmp_path))[0].size == picture("red", 1).size


def test_paths_are_relative_to_their_table_and_content_has_one_digest(tmp_path: Path) -> None:
    image = picture("blue", 3)
    (tmp_path / "a.png").write_bytes(as_bytes(image))
    assert as_picture("a.png", tmp_path) == tmp_path / "a.png"
    by_path, by_bytes = (
        open_picture(p)[1] for p in (as_picture("a.png", tmp_path), as_picture({"bytes": as_bytes(image)}, None))
    )
    assert by_path == by_bytes
    array = as_picture(np.asarray(image), None)
    assert np.array_equal(np.asarray(open_picture(array)[0]), np.asarray(image))
