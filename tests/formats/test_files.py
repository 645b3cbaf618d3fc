from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import load_file

from lorabank.errors import AdapterFileError, OutputError
from lorabank.formats.files import first_non_finite, read_header, read_tensors, write_files, write_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.ones(3, dtype=torch.bfloat16) / 3,
    "scalar": torch.tensor(1.5, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
    "strided": torch.arange(12.0).reshape(3, 4).t(),
}


def forge(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def f32(begin: int, end: int, shape: list[int]) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS, {"format": "pt", "é": "ü"})
    theirs = load_file(tmp_path / "x.safetensors")
    ours, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt", "é": "ü"}
    for name, value in TENSORS.items():
        for found in (theirs[name], ours[name]):
            assert found.dtype == value.dtype
            assert torch.equal(found, value)


def test_trap14_equal_content_gives_equal_bytes_in_any_order(tmp_path: Path) -> None:
    metadata = {str(i): str(i) for i in range(20)}
    write_tensors(tmp_path / "1", TENSORS, metadata)
    write_tensors(tmp_path / "2", dict(reversed(TENSORS.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_truncated_files(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterFileError, match="truncated"):
        read_tensors(path)


def test_every_flipped_header_bit_is_an_error_or_leaves_a_valid_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(2, 3)}, {})
    good = path.read_bytes()
    size = len(good) - 24
    refused = 0
    for position in range(size):
        bad = bytearray(good)
        bad[position] ^= 0x10
        path.write_bytes(bad)
        try:
            found, _ = read_tensors(path)
        except AdapterFileError:
            refused += 1
        else:
            assert [value.numel() for value in found.values()] == [6]  # only the name changed, or the space after the header
    assert refused > size // 2


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_header_lengths_that_lie(tmp_path: Path, length: int) -> None:
    path = forge(tmp_path / "x.safetensors", {"a": f32(0, 4, [1])}, b"\0" * 4, length=length)
    with pytest.raises(AdapterFileError, match="header"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": f32(0, 8, [2]), "b": f32(4, 12, [2])}, 12, "overlap"),
        ({"a": f32(0, 4, [1]), "b": f32(8, 12, [1])}, 12, "gap"),
        ({"a": f32(0, 8, [1])}, 8, "needs 4 bytes"),
        ({"a": f32(8, 0, [2])}, 8, "needs 8 bytes"),
        ({"a": f32(0, 4, [1])}, 9, "holds 9"),
        ({"a": f32(0, 4, [-1])}, 4, "impossible shape"),
        ({"a": f32(0, 0, [0, 2**63])}, 0, "impossible shape of 2 dimensions"),
        ({"a": f32(0, 0, [2**62, 0, 2**62])}, 0, "impossible shape of 3 dimensions"),
        ({"a": f32(0, 4, [1] * 70)}, 4, "impossible shape of 70 dimensions"),
        ({"a": f32(0, 2**62, [2**60])}, 4, "needs 4611686018427387904 bytes and it holds 4|holds 4"),
        ({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, 4, "F33"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, 4, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "lacks"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}, 4, "impossible offsets"),
        ({"__metadata__": {"format": 3}}, 0, "metadata"),
        ([], 0, "no JSON object"),
        (b'{"a": ', 0, "JSON"),
        (b"\xff\xfe{}", 0, "JSON"),
        (b"[" * 100_000, 0, "JSON"),
        (
            b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
            0,
            "twice",
        ),
    ],
)
def test_forged_headers(tmp_path: Path, header: object, data: int, says: str) -> None:
    with pytest.raises(AdapterFileError, match=says):
        read_tensors(forge(tmp_path / "x.safetensors", header, b"\0" * data))


def test_pickles_are_refused_by_name_and_by_content(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "adapter.bin")
    torch.save({"a": torch.ones(1)}, tmp_path / "renamed.safetensors")
    (tmp_path / "old.safetensors").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    (tmp_path / "gguf.safetensors").write_bytes(b"GGUF" + b"\0" * 40)
    for name in ("adapter.bin", "renamed.safetensors", "old.safetensors"):
        with pytest.raises(AdapterFileError, match="pickled") as caught:
            read_header(tmp_path / name)
        assert "safetensors.torch.save_file" in str(caught.value)
    with pytest.raises(AdapterFileError, match="GGUF"):
        read_header(tmp_path / "gguf.safetensors")


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    text = json.dumps({"a": f32(0, 4, [1])}).encode()
    path = forge(tmp_path / "x.safetensors", text + b" " * (0x0280 - len(text)), b"\0" * 4)
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert list(read_tensors(path)[0]) == ["a"]


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    assert first_non_finite({"a": torch.ones(2), "n": torch.tensor([1])}) is None
    assert first_non_finite({"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")])}) == "b"


def full(file: BinaryIO) -> None:
    file.write(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_every_old_file_and_leaves_no_rest(tmp_path: Path) -> None:
    write_files(tmp_path, {"one": b"old", "two": b"old"})
    with pytest.raises(OutputError, match="disk is full"):
        write_files(tmp_path, {"one": b"new", "two": full})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"one": b"old", "two": b"old"}


def test_a_full_disk_leaves_no_new_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="disk is full"):
        write_files(tmp_path / "new", {"one": full})
    assert not (tmp_path / "new").exists()


def test_an_interrupt_keeps_the_old_file(tmp_path: Path) -> None:
    def interrupted(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    write_files(tmp_path, {"one": b"old"})
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, {"one": interrupted})
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="can't be written"):
        write_files(tmp_path / "file" / "sub", {"one": b"x"})


def test_a_dtype_that_has_no_name_in_the_format(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="complex64"):
        write_tensors(tmp_path / "x", {"z": torch.ones(1, dtype=torch.complex64)}, {})


def test_text_that_is_no_utf_8_is_written_escaped(tmp_path: Path) -> None:
    """As JSON would have it, so that a file's name never costs what was computed."""
    name = os.fsdecode(b"\xe4.png")
    write_files(tmp_path, {"a.json": json.dumps({"file": name, "ü": 1}, ensure_ascii=False), "b.txt": "ü"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"file": name, "ü": 1}
    assert (tmp_path / "b.txt").read_bytes() == "ü".encode()
