"""Two adapters on Whisper tiny.en that hear the same whistles and write other words: trained in one pass, compared with the base.

    python examples/speech_recognition.py              # about a minute on two CPU cores; Whisper (71 MB) is fetched once
    python examples/speech_recognition.py --keep out/whistles

The recordings are made here, so that nothing else has to be had: tones that rise, fall or stay. With recordings of your own:

    lorabank train --task automatic-speech-recognition --model whisper-tiny.en --data recordings/ --output out/voice
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path

import numpy as np
import soundfile

import lorabank as lb
from lorabank import api
from lorabank.training.console import ConsoleListener

RATE = 16_000
WORDS = {"english": ("rising", "falling", "steady"), "german": ("steigend", "fallend", "gleich")}


def whistle(kind: int, number: int) -> np.ndarray:
    """Half a second that rises (0), falls (1) or stays (2), of a pitch and loudness of its own."""
    draw = np.random.default_rng(100 * kind + number)
    low = draw.uniform(500, 900)
    ends = ((low, 1.8 * low), (1.8 * low, low), (1.3 * low, 1.3 * low))[kind]
    pitch = np.linspace(*ends, round(draw.uniform(0.4, 0.6) * RATE))
    noise = draw.standard_normal(len(pitch)) * 0.01
    return (draw.uniform(0.2, 0.6) * np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + noise).astype(np.float32)


def make_recordings(folder: Path, numbers: range) -> None:
    """Recordings `KIND_NUMBER.wav`."""
    folder.mkdir(parents=True)
    for number in numbers:
        for kind in range(3):
            soundfile.write(folder / f"{kind}_{number}.wav", whistle(kind, number), RATE)


def write_table(path: Path, words: tuple[str, ...], numbers: range) -> str:
    """What an adapter is to write for each recording."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "transcription"])
        rows.writerows([f"recordings/{kind}_{number}.wav", words[kind]] for number in numbers for kind in range(3))
    return str(path)


def main() -> None:
    """Make recordings, train, transcribe new ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder for recordings and the run (default: a temporary one)")
    parser.add_argument("--model", default="whisper-tiny.en")
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.keep or Path(temporary)
        make_recordings(work / "recordings", range(16))
        make_recordings(work / "new", range(90, 92))
        console = ConsoleListener()
        try:
            lb.train(
                task="automatic-speech-recognition",
                model=args.model,
                output=str(work / "run"),
                adapters={name: {"data": write_table(work / f"{name}.csv", words, range(16))} for name, words in WORDS.items()},
                data={"val_split": 6},
                rank=8,
                learning_rate=2e-3,
                batch_size=4,
                max_steps=args.steps,
                speech={"window": 1.0},  # whistles are short: a thirtieth of the encoder's work
                eval={"every": args.steps // 2, "metrics": ["loss", "wer"], "best": "wer", "max_new_tokens": 12},
                listeners=[console],
            )
        finally:
            console.close()
        print(api.predict(work / "run", work / "new", work / "transcripts.jsonl"))
        for line in (work / "transcripts.jsonl").read_text(encoding="utf-8").splitlines():
            heard = json.loads(line)
            print(f"{heard['audio']:10s} base: {heard['base']:32.32s} english: {heard['english']:10s} german: {heard['german']}")


if __name__ == "__main__":
    main()
