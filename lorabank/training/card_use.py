"""A card's section on use: a command of lorabank, its bank in Python, PEFT or diffusers, vLLM. Each runs as it stands."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lorabank.config.tasks import DEFAULT_TASK
from lorabank.training.serving import vllm_line

COMMANDS: Mapping[str, str] = {
    DEFAULT_TASK: "chat {place}",
    "text-classification": "predict {place} --data rows.jsonl --output labels.jsonl",
    "summarization": "predict {place} --data rows.jsonl --output written.jsonl",
    "translation": "predict {place} --data rows.jsonl --output written.jsonl",
    "text2text-generation": "predict {place} --data rows.jsonl --output written.jsonl",
    "image-classification": "predict {place} --data pictures/ --output labels.jsonl",
    "object-detection": "predict {place} --data pictures/ --output found/",
    "automatic-speech-recognition": "predict {place} --data recordings/ --output transcripts.jsonl",
    "text-to-speech": "predict {place} --data texts.txt --output said/",
    "text-to-image": "predict {place} --prompt 'a caption' --output drawn/",
}
"""Task → the command that uses an adapter by itself."""
MODEL_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""transformers' class by PEFT's task type; else that of language models."""
TASK_CLASSES: Mapping[str, str | None] = {
    "image-classification": "AutoModelForImageClassification",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
    "object-detection": "AutoModelForObjectDetection",
    "text-to-speech": "SpeechT5ForTextToSpeech",
    "text-to-image": None,
}
"""The same by task, where PEFT has no type for it; None: PEFT doesn't load it by itself."""
SERVED = (DEFAULT_TASK, "text-classification")
"""Tasks whose adapters vLLM may read."""
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
LITE, TIMM = "efficientnet-lite0", "timm:"
"""Bases of pictures that aren't transformers'."""


def how_to_load(
    name: str,
    base_model: str,
    rank: int,
    *,
    patterns: bool,
    unserved: str | None,
    repository: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
    num_labels: int | None = None,
    task: str = DEFAULT_TASK,
    files: Collection[str] = (),
    head: str | None = None,
) -> str:
    """The section on use: lorabank, PEFT or diffusers, vLLM.

    repository: where it lies on a hub; None: in a folder, `path/to/NAME`. unserved: why vLLM can't read it. task_type: PEFT's, by
    which the model's class is known. num_labels: of a classifier's head. task: the pipeline's name. files: names in the adapter's
    folder, among which may be kohya's or diffusers' form. head: module of a model that isn't transformers' with a head in full.
    """
    if task not in SERVED:
        unserved = f"adapters for {task} were never checked there"
    at = f', revision="{revision}"' if repository and revision else ""
    blocks = []
    if base_model and task in COMMANDS:
        told = f" --revision {revision}" if revision else ""
        place = f'"$(hf download {repository}{told} --quiet)"' if repository else f"path/to/{name}"
        blocks.append(f"```sh\n# lorabank: rows of your own\nlorabank {COMMANDS[task].format(place=place)}\n```")
    if task == "text-to-image":
        blocks += _diffusers(name, base_model, repository, at, files)
    else:
        blocks += _in_python(name, base_model, repository, at, _loaded(base_model, task, task_type, num_labels), head)
    if not base_model:
        return "\n\n".join(blocks)
    if unserved is None:
        version = " (0.32 or newer: rank and alpha differ between layers)" if patterns else ""
        line = vllm_line(base_model, {name: repository or f"path/to/{name}"}, rank)
        blocks.append(f"```sh\n# vLLM{version}\n{line}\n```")
    else:
        blocks.append(f"vLLM can't read this adapter rightly as it is: {unserved}.")
    return "\n\n".join(blocks)


def _loaded(base_model: str, task: str, task_type: str | None, num_labels: int | None) -> tuple[str, str]:
    """(import, value) of the base as an object; both '' where its name isn't known."""
    if not base_model:
        return "", ""
    if task == "image-classification" and base_model == LITE:
        return "from lorabank.models.efficientnet_lite import efficientnet_lite", "efficientnet_lite()"
    if task == "image-classification" and base_model.startswith(TIMM):
        return "import timm", f'timm.create_model("{base_model.removeprefix(TIMM)}", pretrained=True)'
    model_class = TASK_CLASSES.get(task) or MODEL_CLASSES.get(task_type or "", "AutoModelForCausalLM")
    labels = "" if num_labels is None else f", num_labels={num_labels}, ignore_mismatched_sizes=True"
    return f"from transformers import {model_class}", f'{model_class}.from_pretrained("{base_model}"{labels})'


def _in_python(
    name: str, base_model: str, repository: str | None, at: str, loaded: tuple[str, str], head: str | None
) -> list[str]:
    """A bank, and PEFT where the base is transformers'."""
    needed, value = loaded
    place, fetch = f'"path/to/{name}"', ""
    if repository:
        place = "folder"
        fetch = f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repository}"{at})\n'
    model = f"model = {value}\n" if value else ""
    first = f"{needed}\n" if needed else ""
    attached = "model" if head is None else f'model, head="{head}"'
    blocks = [
        f"```python\n# lorabank: beside other adapters in one pass\nimport lorabank as lb\n{first}{fetch}\n{model}"
        f'bank = lb.attach({attached})\nbank.load("{name}", lb.Adapter.load({place}))\nbank.use("{name}")\n```'
    ]
    if base_model and needed.startswith("from transformers"):
        location = f'"{repository}"{at}' if repository else place
        blocks.append(
            f"```python\n# PEFT\nfrom peft import PeftModel\n{needed}\n\nmodel = {value}\n"
            f"model = PeftModel.from_pretrained(model, {location})\n```"
        )
    return blocks


def _diffusers(name: str, base_model: str, repository: str | None, at: str, files: Collection[str]) -> list[str]:
    """diffusers' pipeline with the adapter, from a file of diffusers' or kohya's form; PEFT's is converted first."""
    kohya = f"{name}.safetensors"
    file = DIFFUSERS_FILE if DIFFUSERS_FILE in files else kohya if kohya in files else None
    pipeline = base_model or "BASE"
    if file is None:
        source = f'"$(hf download {repository} --quiet)"' if repository else f"path/to/{name}"
        blocks = [
            f"```sh\n# for diffusers (or --to kohya, for other tools)\nlorabank convert {source} converted --to diffusers\n```"
        ]
        where, file = '"converted"', DIFFUSERS_FILE
    else:
        blocks, where = [], f'"{repository}"{at}' if repository else f'"path/to/{name}"'
    return [
        *blocks,
        f"```python\n# diffusers\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{pipeline}")\n'
        f'pipe.load_lora_weights({where}, weight_name="{file}")\npicture = pipe("a caption").images[0]\n```',
    ]
