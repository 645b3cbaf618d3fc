"""`text-to-speech`: text in, speech out, for SpeechT5."""

from lorabank.tasks.synthesis.task import KIND as KIND
