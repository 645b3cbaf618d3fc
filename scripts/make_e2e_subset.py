"""Make examples/data/e2e_*.jsonl from the E2E NLG Challenge's CSV files (columns `mr`, `ref`).

    python scripts/make_e2e_subset.py devset.csv testset_w_refs.csv --out examples/data

Meaning representations (MRs) are ordered by the SHA-256 of their text, so the same input always gives the same files. Training
and validation come from the first file, split by MR; test from the second. Rows of one MR stand together, one reference a row.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

VAL_MRS = 40
TEST_MRS = 40
TRAIN_REFERENCES = 2
EVAL_REFERENCES = 6
"""Most references kept for an MR."""

Groups = list[tuple[str, list[str]]]


def read_groups(path: Path) -> Groups:
    """(mr, its different references in the file's order), the MRs ordered by the hash of their text."""
    groups: dict[str, list[str]] = {}
    with path.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            references = groups.setdefault(row["mr"].strip(), [])
            reference = row["ref"].strip()
            if reference and reference not in references:
                references.append(reference)
    return sorted(groups.items(), key=lambda item: hashlib.sha256(item[0].encode()).hexdigest())


def write_rows(path: Path, groups: Iterable[tuple[str, list[str]]], most: int) -> None:
    """One JSON object a line: mr, ref."""
    rows = [{"mr": mr, "ref": reference} for mr, references in groups for reference in references[:most]]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows, {len({row['mr'] for row in rows})} MRs, {path.stat().st_size // 1024} KB")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the E2E subset that ships with lorabank.")
    parser.add_argument("dev", type=Path, help="devset.csv: training and validation rows")
    parser.add_argument("test", type=Path, help="testset_w_refs.csv: test rows")
    parser.add_argument("--out", type=Path, default=Path("examples/data"), help="folder to write into (default: examples/data)")
    args = parser.parse_args()
    dev, test = read_groups(args.dev), read_groups(args.test)
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows(args.out / "e2e_val.jsonl", dev[:VAL_MRS], EVAL_REFERENCES)
    write_rows(args.out / "e2e_train.jsonl", dev[VAL_MRS:], TRAIN_REFERENCES)
    write_rows(args.out / "e2e_test.jsonl", test[:TEST_MRS], EVAL_REFERENCES)


if __name__ == "__main__":
    main()
