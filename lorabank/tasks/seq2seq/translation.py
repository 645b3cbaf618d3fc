"""`translation`."""

from lorabank.tasks.seq2seq.task import Translation, kind_of

KIND = kind_of(Translation)
