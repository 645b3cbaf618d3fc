"""`text2text-generation`, `summarization`, `translation`: encoder-decoders that read a text and write another."""

from lorabank.tasks.seq2seq.task import Text2Text, kind_of

KIND = kind_of(Text2Text)
