"""`summarization`."""

from lorabank.tasks.seq2seq.task import Summarization, kind_of

KIND = kind_of(Summarization)
