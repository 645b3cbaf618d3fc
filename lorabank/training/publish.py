"""`push`: an adapter folder to a model hub, in one commit, after everything that could be wrong with it was looked at.

What goes up is a copy: its card says how to load it from there, and its base is named as others can load it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorabank.errors import AdapterFileError, ConfigError, MissingExtraError, ModelError, OutputError, first_line
from lorabank.formats.adapter import Adapter
from lorabank.formats.detect import load_adapter
from lorabank.formats.peft import CONFIG_FILE, OWN_FILE, TENSORS_FILE, load_peft
from lorabank.models.names import SMOLLM2, is_hub_id
from lorabank.training.cards import card_for_hub

CARD = "README.md"
UPLOADED = (
    *(CONFIG_FILE, TENSORS_FILE, OWN_FILE, CARD),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
"""Names of the files that go up: the adapter, its card, tokenizers and chat templates as transformers has them, and `LICENSE*`.
A list of what may go, since a folder may hold anything: rows, notes, an optimizer's state."""
LICENSE = "LICENSE"
HUB_IDS: Mapping[str, str] = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Where models that lorabank has names of its own for lie on the hub."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What went up."""

    url: str
    """Of the commit."""
    files: tuple[str, ...]
    stayed: tuple[str, ...]
    """What else the folder holds, folders with a `/`; hidden files aren't named."""


def push(
    folder: str | Path,
    repository: str,
    *,
    token: str | None,
    private: bool = False,
    revision: str | None = None,
    base: str | None = None,
    endpoint: str | None = None,
) -> Pushed:
    """Upload an adapter folder to `repository` (`owner/name`, made if missing) as one commit.

    token: of an account that may write there. revision: a branch, made if missing; None: the main one. base: the hub id of the
    base model; None: what the adapter names. endpoint: another hub's address.
    Raises AdapterFileError (no adapter, NaN), ModelError (a base that others can't load), ConfigError (repository's name, no
    token), OutputError (the hub refused, or can't be reached); nothing is uploaded then.
    """
    check_repository(repository)
    folder = Path(folder)
    adapter = _adapter(folder)
    base_model = base_on_hub(base or adapter.base_model, str(folder))
    if not token:
        raise ConfigError(
            "push: no token for the hub. Run `hf auth login`, or set HF_TOKEN to a token that may write. Nothing was uploaded."
        )
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        files = stage(folder, copy, adapter, base_model=base_model, repository=repository, revision=revision)
        url = _upload(copy, repository, token=token, private=private, revision=revision, endpoint=endpoint)
    return Pushed(url=url, files=files, stayed=staying(folder))


def check_repository(repository: str) -> None:
    """Raise ConfigError unless this can be a repository's name with its owner's."""
    if repository.count("/") != 1 or not is_hub_id(repository):
        raise ConfigError(f"push: {repository!r} is no repository: expected OWNER/NAME, such as me/formal")


def base_on_hub(name: str | None, where: str) -> str:
    """The base's hub id. Raises ModelError for what only this machine has."""
    if not name:
        raise ModelError(f"{where}: the adapter doesn't name its base model. Name the base's hub id with --base.")
    found = HUB_IDS.get(name.lower(), name)
    if not is_hub_id(found) or Path(found).exists():
        raise ModelError(
            f"{where}: its base model {name!r} is a path of this machine, which nobody else can load. Name the base's hub id "
            "with --base."
        )
    return found


def stage(
    folder: Path, copy: Path, adapter: Adapter, *, base_model: str, repository: str, revision: str | None = None
) -> tuple[str, ...]:
    """Fill `copy` with what goes up; returns the names."""
    for file in sorted(folder.iterdir()):
        if _goes_up(file):
            shutil.copyfile(file, copy / file.name)
    settings = json.loads((copy / CONFIG_FILE).read_text("utf-8"))
    if settings.get("base_model_name_or_path") != base_model:
        text = json.dumps({**settings, "base_model_name_or_path": base_model}, indent=2, sort_keys=True)
        (copy / CONFIG_FILE).write_text(text + "\n", "utf-8")
    card = copy / CARD
    text = _text(card, folder) if card.is_file() else None
    name = folder.resolve().name
    card.write_text(
        card_for_hub(
            text,
            adapter,
            name,
            base_model=base_model,
            repository=repository,
            revision=revision,
            files=[path.name for path in folder.iterdir()],
        ),
        encoding="utf-8",
    )
    return tuple(sorted(file.name for file in copy.iterdir()))


def staying(folder: Path) -> tuple[str, ...]:
    """Names of what isn't uploaded, folders with a `/` at the end; without hidden files."""
    others = (item for item in sorted(folder.iterdir()) if not _goes_up(item) and not item.name.startswith("."))
    return tuple(f"{item.name}/" if item.is_dir() else item.name for item in others)


def _goes_up(file: Path) -> bool:
    return file.is_file() and (file.name in UPLOADED or file.name.startswith(LICENSE))


def _text(card: Path, folder: Path) -> str:
    try:
        return card.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterFileError(
            f"{folder / CARD}: isn't UTF-8 (byte {error.start}). Save it as UTF-8, or delete the file. Nothing was uploaded."
        ) from error


def _adapter(folder: Path) -> Adapter:
    if folder.is_dir() and (folder / CONFIG_FILE).is_file():
        return load_peft(folder)
    load_adapter(folder)  # says what it is instead, and the way out, where it can't be read at all
    raise AdapterFileError(
        f"{folder}: an adapter, and not PEFT's folder, which hubs expect. Make one first: lorabank convert {folder} "
        "FOLDER --to peft"
    )


def _upload(folder: Path, repository: str, *, token: str, private: bool, revision: str | None, endpoint: str | None) -> str:
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError as error:
        raise MissingExtraError("push needs 'huggingface_hub', which isn't installed: pip install huggingface_hub") from error
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise OutputError(
                f"push: {repository} exists already and is public, and --private was asked for. Make it private on the hub "
                "first, or choose another name. Nothing was uploaded."
            )
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        # upload_folder would make several commits of a large folder
        files = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file)) for file in sorted(folder.iterdir())]
        commit = api.create_commit(repository, files, commit_message="LoRA adapter, pushed by lorabank", revision=revision)
    except OutputError:
        raise
    except Exception as error:  # the hub client's transport errors have another class in each of its major versions
        first = first_line(error)
        raise OutputError(
            f"push: the hub at {api.endpoint} refused {repository} ({first}). Nothing was committed. Check the name, and that "
            "the token may write there (`hf auth whoami`)."
        ) from error
    return str(commit.commit_url)
