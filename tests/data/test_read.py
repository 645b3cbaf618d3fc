"""Every source gives its rows with their lines; what can't be read is an error that names file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorabank.config.train import DataConfig
from lorabank.data.files import READERS
from lorabank.data.read import check_source, read_rows
from lorabank.data.repository import splits_of
from lorabank.data.sources import sources_of
from lorabank.errors import DataError
from tests.data.locked import locked

ROWS = [{"mr": "name[The Eagle]", "ref": "The Eagle — a place,\nby the river."}, {"mr": "b", "ref": 'She said "yes"'}]


def write(path: Path, rows: list[dict[str, str]]) -> list[str]:
    """Write `rows` in the form of the suffix; returns the origins expected."""
    suffix = path.suffix
    if suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return [f"{path}:{n}" for n in (1, 2)]
    if suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        return [f"{path}:2", f"{path}:6"]
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return [f"row {n} of {path}" for n in (1, 2)]
    mark = "\t" if suffix == ".tsv" else ","
    lines = [mark.join(rows[0])] + [mark.join('"' + v.replace('"', '""') + '"' for v in row.values()) for row in rows]
    path.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    return [f"{path}:2", f"{path}:4"]  # the first record spans two lines


@pytest.mark.parametrize("suffix", READERS)
def test_every_reader(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    origins = write(path, ROWS)
    rows = read_rows(str(path))
    assert [dict(row.values) for row in rows] == ROWS
    assert [row.origin for row in rows] == origins
    assert len(read_rows(path, limit=1)) == 1


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", ROWS)
    write(tmp_path / "a.parquet", ROWS)
    (tmp_path / "README.md").write_text("no data")
    rows = read_rows(tmp_path)
    assert [Path(row.origin.split(" of ")[-1].split(":")[0]).name for row in rows] == ["a.parquet"] * 2 + ["b.csv"] * 2
    assert len(read_rows(tmp_path, limit=1)) == 2, "the first row of each file"


def test_files_of_a_folder_that_are_called_as_splits_are_read_by_what_they_are_for(tmp_path: Path) -> None:
    for name in ("e2e-train-00000-of-00002.csv", "e2e-train-00001-of-00002.csv", "e2e-test.csv"):
        write(tmp_path / name, ROWS)

    def read(role: str) -> set[str]:
        return {Path(row.origin.split(":")[0]).name for row in read_rows(tmp_path, role=role)}

    assert read("train") == {"e2e-train-00000-of-00002.csv", "e2e-train-00001-of-00002.csv"}, "test rows are never trained on"
    assert read("test") == {"e2e-test.csv"}
    write(tmp_path / "more.csv", ROWS)
    with pytest.raises(DataError, match=r"which of the splits more\.csv belongs to isn't clear"):
        read("train")
    (tmp_path / "more.csv").unlink()
    (tmp_path / "e2e-test.csv").rename(tmp_path / "e2e-dev.csv")
    assert read("val") == {"e2e-dev.csv"}
    with pytest.raises(DataError, match="none is for test"):
        read("test")
    for path in tmp_path.glob("*train*"):
        path.unlink()
    assert read("train") == {"e2e-dev.csv"}, "one split alone is no choice"


def test_objects(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    assert [dict(row.values) for row in read_rows(data)] == ROWS
    both = datasets.DatasetDict({"train": data, "validation": data.select([1])})
    assert len(read_rows(both)) == 2 and len(read_rows(both, role="val")) == 1
    assert read_rows(data.to_iterable_dataset(), limit=1)[0].values == ROWS[0]
    listed = read_rows(ROWS, role="val")
    assert listed[1].values == ROWS[1] and listed[1].origin == "row 2 of the val rows given"
    data.save_to_disk(tmp_path / "saved")
    assert [dict(row.values) for row in read_rows(tmp_path / "saved")] == ROWS
    with pytest.raises(DataError, match="splits x, y"):
        read_rows(datasets.DatasetDict({"x": data, "y": data}))


@pytest.mark.parametrize("source", [{"mr": ["a"]}, 7, ["text"], [["a"]]])
def test_objects_of_another_kind(source: object) -> None:
    with pytest.raises(DataError, match="expected"):
        read_rows(source)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_byte_order_marks(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = tmp_path / f"rows{suffix}"
    write(path, ROWS)
    path.write_bytes(path.read_bytes().decode("utf-8").encode(encoding))
    assert [dict(row.values) for row in read_rows(path)] == ROWS


def test_json_strings_may_hold_other_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "one\u2028two\x85"}\r\n\r\n{"text": "b"}'.encode())
    rows = read_rows(path)
    assert rows[0].values["text"] == "one\u2028two\x85"
    assert rows[1].origin == f"{path}:3"


def test_json_lines_under_another_name_and_a_data_key(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [row.origin for row in read_rows(path)] == [f"{path}:1", f"{path}:2"]
    path.write_text('{"data": [{"text": "a"}, {"text": "b"}]}')
    assert read_rows(path)[1].origin == f"row 2 of {path}"


def test_semicolons_where_the_header_has_no_comma(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("mr;ref\na, b;c\n")
    assert read_rows(path)[0].values == {"mr": "a, b", "ref": "c"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ":2: invalid JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', ":2: expected an object .* got list"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', ":2: expected utf-8 text, got the byte 0xe9"),
        ("a.jsonl", b"[" * 100_000, ":1: invalid JSON: nested too deeply"),
        ("a.json", b'[{"text": "a"},\n {"text": "b"}', ":2: invalid JSON"),
        ("a.json", b'[{"text": "a"},\n {"text": "b"]', ":2: invalid JSON"),
        ("a.json", b'[{"text": "a"}] more', ":1: invalid JSON: more text"),
        ("a.json", b"[\n3\n]", ":2: expected an object .* got int"),
        ("a.csv", b'mr,ref\na,b\n"a,b\nc,d\n', ":3: malformed CSV"),
        ("a.csv", b"mr,ref\na,b\na,b,c\n", ":3: expected 2 fields .* got 3"),
        ("a.csv", b"mr,mr\na,b\n", ":1: the header names 'mr' more than once"),
        ("a.csv", b"mr,ref\na,caf\xe9\n", ":2: expected utf-8"),
        ("a.parquet", b"PAR1 and then nothing", "not a readable Parquet file"),
        ("a.xlsx", b"", "got the suffix '.xlsx'"),
        ("a.jsonl", b"", "empty data set"),
        ("a.jsonl", b"\n \n", "empty data set"),
        ("a.json", b"[]", "empty data set"),
        ("a.csv", b"mr,ref\n", "empty data set"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_missing_files_name_the_closest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no file or folder .*trian.jsonl.*did you mean 'train.jsonl'"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"data files there: train.jsonl"):
        read_rows(tmp_path / "zzzzzzzzzz.csv")
    with pytest.raises(DataError, match=r"folder .* doesn't exist either"):
        read_rows(tmp_path / "no" / "train.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found nothing"):
        read_rows(tmp_path / "empty")


@pytest.mark.parametrize("name", ["~nosuchuser/x.jsonl", "a" * 300])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(DataError, match=r"^data.val: .* can't be a path here"):
        read_rows(name, role="val")
    with pytest.raises(DataError, match=r"^--data: .* can't be a path here"):
        check_source(name, place="--data")


def test_an_id_with_too_many_parts() -> None:
    with pytest.raises(DataError, match="name:config:split"):
        read_rows("org/name:config:split:more")


def test_an_id_that_can_not_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen: list[object] = []

    def load(*args: object, **kwargs: object) -> object:
        seen.append((args, kwargs))
        if len(seen) == 1:
            raise ConnectionError("no network")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    (tmp_path / "chats").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no file or folder 'chat' \(did you mean 'chats'\?\). For .* write 'chat::'"):
        read_rows("chat")
    assert seen == [], "a slip is told at once, without the hub"
    with pytest.raises(DataError, match=r"'chat::' is no file here.*no network"):
        read_rows("chat::")
    assert read_rows("org/chat:en:train")[0].origin == "row 1 of org/chat:en:train"
    assert seen[1] == (("org/chat", "en"), {"split": "train"})


@pytest.mark.parametrize("name", ["rows.jsnl", "rows", "rows.txt", "table.xlsx", "other.abc", "folder/rows.jsonlines"])
def test_what_looks_like_a_file_is_refused_without_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*args: object, **kwargs: object) -> object:
        raise AssertionError(args)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(DataError, match=rf"^data.val: no file or folder '{name}'") as caught:
        read_rows(name, role="val")
    assert ("did you mean 'rows.jsonl'" in str(caught.value)) == (name in ("rows", "rows.jsnl"))


@pytest.mark.parametrize("name", ["squad", "org/rows", "org/rows-v1.5", "org/common_11.0", "org/chat.v2", "org/wiki:20231101.en"])
def test_ids_aren_t_taken_for_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("rows.jsonl", "squad_runs", "org.txt"):
        (tmp_path / file).write_text("{}")
    check_source(name, place="--data")


@pytest.mark.parametrize("mode", [0, 0o444, 0o111])
def test_a_folder_that_may_not_be_read_is_named(mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    where = Path("rows")
    (where / "train").mkdir(parents=True)
    (where / "train" / "a.jsonl").write_text('{"text": "x"}\n')
    with locked(where, mode):
        for read in (
            lambda: read_rows("rows"),
            lambda: splits_of(where),
            lambda: sources_of(DataConfig(train="rows"), None, None),
        ):
            with pytest.raises(DataError, match=r"^rows: this folder can't be read \(Permission denied\)\. Allow it"):
                read()


def test_a_hint_at_a_name_needs_no_right_to_read_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows").mkdir()
    with locked(Path("rows"), 0o111), pytest.raises(DataError, match=r"no file or folder 'rows/gone\.jsonl'"):
        check_source("rows/gone.jsonl", place="data.train")
