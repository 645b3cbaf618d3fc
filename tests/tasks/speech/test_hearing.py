"""Features, the encoder over shorter windows, the loss, and text drawn under several routes at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import lorabank as lb
from lorabank.config.speech import SpeechConfig
from lorabank.engine.engine import Engine
from lorabank.tasks.speech.hearing import Hearing, heard
from lorabank.tasks.speech.teaching import label_tensors, transcript_loss
from lorabank.tasks.speech.tokens import speech_tokens
from lorabank.tasks.speech.transcribe import Heard, Manner, cuts, moved, transcribe
from lorabank.tasks.speech.transcripts import Segment
from tests.tasks.speech.test_prepare import prepared
from tests.tasks.speech.tiny import RATE, WINDOW_S, tiny_whisper, tone, two_tones

CPU = torch.device("cpu")


def test_a_rows_features_are_those_of_transformers_and_its_own() -> None:
    model, processor = tiny_whisper()
    hearing = Hearing(processor.feature_extractor, model, WINDOW_S)
    sounds = [tone(0.5, 300), tone(2.0, 900), tone(1.1, 600)]
    features = hearing.features(sounds, CPU)
    assert features.shape == (3, 8, 200)
    alone = torch.cat([hearing.features([sound], CPU) for sound in sounds])
    assert torch.equal(features, alone)
    theirs = processor.feature_extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_features
    assert torch.allclose(features, theirs, atol=1e-5)
    assert torch.equal(hearing.features([np.concatenate([sounds[1], sounds[0]])], CPU), features[1:2])  # cut to the window


def test_features_are_kept_while_there_is_room(tmp_path: Any) -> None:
    model, processor = tiny_whisper()
    rows = prepared(str(two_tones(tmp_path, 3))).train
    hearing = Hearing(processor.feature_extractor, model, WINDOW_S, kept_bytes=2 * 8 * 200 * 4)
    sounds = [(row.digest, row.samples) for row in rows]
    first, second = hearing.remembered(sounds, CPU), hearing.remembered(sounds[::-1], CPU)
    assert torch.equal(first, hearing.features([row.samples() for row in rows], CPU))
    assert torch.equal(second, first.flip(0))
    asked: list[str] = []
    noted = [(row.digest, lambda row=row: asked.append(row.name) or row.samples()) for row in rows]
    hearing.remembered(noted, CPU)
    assert asked == ["2.wav"]  # there was room for two


def test_a_shorter_window_is_the_encoder_with_fewer_positions() -> None:
    model, processor = tiny_whisper()
    hearing = Hearing(processor.feature_extractor, model, 0.5)
    assert (hearing.frames, hearing.window) == (50, 0.5)
    features = hearing.features([tone(0.4, 300)], CPU)
    shorter, _ = tiny_whisper()
    shorter.model.encoder.embed_positions.weight.data = model.model.encoder.embed_positions.weight.data[:25]
    shorter.model.encoder.embed_positions.num_embeddings = shorter.config.max_source_positions = 25
    with torch.no_grad():
        assert torch.equal(heard(model, features), shorter.model.encoder(features).last_hidden_state)
        whole = torch.randn(1, 8, 200)
        assert torch.equal(heard(model, whole), model.model.encoder(whole).last_hidden_state)


@pytest.mark.parametrize("adapted_head", [False, True])
def test_the_loss_is_transformers_own(tmp_path: Any, adapted_head: bool) -> None:
    model, processor = tiny_whisper()
    tokens = speech_tokens(processor.tokenizer, model, SpeechConfig())
    rows = prepared(str(two_tones(tmp_path, 3))).train
    features = Hearing(processor.feature_extractor, model, WINDOW_S).features([row.samples() for row in rows], CPU)
    labels, targets = label_tensors(rows, tokens.end, tokens.longest)
    expected = []
    for i, row in enumerate(rows):
        ids = torch.tensor([row.labels])
        said = ids[:, 1:].clone()
        said[:, : row.prefix - 1] = -100
        with torch.no_grad():
            mean = model(input_features=features[i : i + 1], decoder_input_ids=ids[:, :-1], labels=said).loss
        expected.append(float(mean) * row.tokens)
    bank = lb.attach(model)
    bank.add("a", lb.AdapterConfig(rank=2, targets=["q", "proj_out"] if adapted_head else ["q"]))
    with bank.route("a"):
        found = transcript_loss(model, {"input_features": features, **labels}, targets)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def jobs_for(routes: list[Any], *, timestamps: bool = False, language: str | None = None) -> list[Heard]:
    sounds = [tone(0.4 + 0.3 * i, 300 + 200 * i) for i in range(3)]
    return [
        Heard(samples=lambda s=s: s, seconds=len(s) / RATE, route=route, language=language, timestamps=timestamps)
        for s in sounds
        for route in routes
    ]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("timestamps", [False, True])
def test_routes_in_one_batch_hear_as_each_alone(beams: int, timestamps: bool) -> None:
    model, processor = tiny_whisper()
    hearing = Hearing(processor.feature_extractor, model, WINDOW_S)
    tokens = speech_tokens(processor.tokenizer, model, SpeechConfig())
    manner = Manner(beams=beams, max_new_tokens=8, batch_size=4)
    bank = lb.attach(model)
    for name in ("a", "b"):
        bank.add(name, lb.AdapterConfig(rank=2))
        with torch.no_grad():
            torch.manual_seed(len(name) + ord(name))
            for leaf in bank.parameters(name):
                leaf.copy_(torch.randn_like(leaf))
    engine = Engine(bank)
    told: list[tuple[int, int]] = []
    mixed = transcribe(
        engine, hearing, tokens, jobs_for([lb.BASE, "a", "b"], timestamps=timestamps), manner, lambda *at: told.append(at)
    )
    alone = [
        transcribe(engine, hearing, tokens, jobs_for([route], timestamps=timestamps), manner, lambda *at: None)
        for route in (lb.BASE, "a", "b")
    ]
    assert mixed == [alone[i % 3][i // 3] for i in range(9)]
    assert len({str(part) for part in alone}) == 3  # the adapters do something
    assert told[-1] == (9, 9)
    bank.detach()
    features = hearing.features([tone(0.4, 300)], CPU)
    more = {"num_beams": beams, "max_new_tokens": 8, "return_timestamps": timestamps}
    ids = model.generate(features, force_unique_generate_call=True, return_dict_in_generate=True, **more).sequences[0]
    assert mixed[0] == tokens.segments(ids.tolist())


def test_each_row_is_told_its_language() -> None:
    model, processor = tiny_whisper(multilingual=True, seed=3)
    hearing = Hearing(processor.feature_extractor, model, WINDOW_S)
    tokens = speech_tokens(processor.tokenizer, model, SpeechConfig(language="de"))
    model.generation_config.suppress_tokens = list(range(tokens.start, len(processor.tokenizer)))  # letters alone
    engine, manner = Engine(lb.attach(model)), Manner(max_new_tokens=8, batch_size=8)

    def heard_in(*languages: str) -> list[list[Segment]]:
        samples = tone(0.5, 300)
        jobs = [Heard(samples=lambda: samples, seconds=0.5, route=lb.BASE, language=each, timestamps=False) for each in languages]
        return transcribe(engine, hearing, tokens, jobs, manner, lambda *at: None)

    german, english = heard_in("german"), heard_in("en")
    assert german != english
    assert heard_in("en", "german", "en") == [*english, *german, *english]


def test_long_recordings_are_cut_where_they_are_quiet() -> None:
    quiet = np.zeros(RATE // 2, np.float32)
    samples = np.concatenate([tone(1.2, 300), quiet, tone(1.0, 400), quiet, tone(1.5, 500)])
    found = cuts(samples, RATE, 2.0)
    assert found[0][0] == 0
    assert found[-1][1] == len(samples) / RATE
    assert [a for a, _ in found[1:]] == [b for _, b in found[:-1]]
    assert all(end - start <= 2.0 for start, end in found)
    assert all(np.abs(samples[round(end * RATE) - 800 : round(end * RATE) + 800]).max() == 0 for _, end in found[:2])
    assert cuts(samples[:RATE], RATE, 2.0) == [(0.0, 1.0)]
    assert len(cuts(tone(60.0, 300), RATE, 2.0)) >= 30


def test_a_windows_times_are_those_of_the_recording() -> None:
    segments = [Segment("a", 0.0, 1.0), Segment("b", 1.5, 2.4), Segment("c")]
    assert moved(segments, 10.0, 12.0) == [Segment("a", 10.0, 11.0), Segment("b", 11.5, 12.0), Segment("c")]
