"""The documentation keeps its word: its Python runs, its YAML and command lines are parsed, its tables equal the code's."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import lorabank
from lorabank.cli.main import COMMANDS, RAW, build_parser
from lorabank.cli.parser import with_dashes
from lorabank.config.aliases import ALIASES
from lorabank.config.flags import parse_train_arguments
from lorabank.config.parse import config_from_dict, load_config
from lorabank.config.tasks import TASK_SECTIONS
from lorabank.config.train import AdapterRun, DataConfig, EvalConfig, SaveConfig, TrainConfig
from lorabank.config.translate import PLACES
from lorabank.errors import LorabankError
from tests.docs.pages import PAGES, ROOT, anchors, blocks, cells, code, commands, links
from tests.training.tiny import tiny_model, tiny_tokenizer

DOCS = ROOT / "docs"
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
WITH_YAML = [page for page in PAGES if blocks(page, "yaml")]
WITH_COMMANDS = [page for page in PAGES if commands(page)]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _run(block_text: str, file: str, line: int, namespace: dict[str, Any]) -> None:
    tree = ast.parse(block_text, filename=file)
    ast.increment_lineno(tree, line - 1)  # an error names the line of the page
    exec(compile(tree, file, "exec"), namespace)  # noqa: S102  (our own pages are the input; that they run is the test)


@pytest.mark.filterwarnings("ignore:.*rank .* is above what layer")  # the tiny model is narrow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=_name)
def test_python_runs(page: Path, folder: Path) -> None:
    namespace: dict[str, Any] = {
        "lb": lorabank,
        "model": tiny_model(),
        "another_model": tiny_model(seed=1),
        "tokenizer": tiny_tokenizer(),
        "batch": dict(tiny_tokenizer()(["one", "two", "six"], return_tensors="pt")),
    }
    for block in blocks(page, "python"):
        title = re.match(r"# (\w+\.py)\n", block.text)
        if title:
            (folder / title[1]).write_text(block.text, encoding="utf-8")
        _run(block.text, str(page), block.line, namespace)


@pytest.mark.parametrize("page", WITH_YAML, ids=_name)
def test_yaml_is_a_configuration(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        (tmp_path / "run.yaml").write_text(block.text, encoding="utf-8")
        config, _ = load_config(tmp_path / "run.yaml")
        assert config.model
        assert config.data.train or all(run.data for run in config.adapters.values())


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=_name)
def test_command_lines_are_understood(page: Path, folder: Path) -> None:
    for words in commands(page):
        assert words[0] in COMMANDS, words
        if words[0] in RAW:
            rest = [word for word in words[1:] if word != "--list-settings"]
            for flag in ("--count", "--pictures"):  # preview's own
                if words[0] == "preview" and flag in rest:
                    del rest[rest.index(flag) : rest.index(flag) + 2]
            assert parse_train_arguments(rest).config.model
        else:
            args, extra = build_parser().parse_known_args(with_dashes(words))
            assert not extra, words
            assert args.name == words[0]


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:lorabank|tests|examples|benchmarks|docs|studies)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_pages_are_short(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
    assert [line for line in lines if len(line) > 145 and not line.startswith("|")] == [], (
        "a table's row can't be broken, a line can"
    )


def test_settings_lists_every_setting_with_its_default(tmp_path: Path) -> None:
    import yaml

    text = blocks(DOCS / "settings.md", "yaml")[0].text
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    config, notes = load_config(tmp_path / "run.yaml")
    assert notes == []
    assert config == TrainConfig(model="Qwen/Qwen3-0.6B", output="out/support", data=DataConfig(train="chat.jsonl"))
    tree = yaml.safe_load(text)
    kinds = {"data": DataConfig, "defaults": AdapterRun, "eval": EvalConfig, "save": SaveConfig}
    assert {field.name for field in fields(TrainConfig)} - set(TASK_SECTIONS) == set(tree)
    for section, kind in kinds.items():
        assert {field.name for field in fields(kind)} == set(tree[section]), section


@pytest.mark.parametrize("section", TASK_SECTIONS)
def test_a_page_lists_every_setting_of_a_task_with_its_default(section: str) -> None:
    import yaml

    every = [yaml.safe_load(block.text) for page in sorted(DOCS.glob("*.md")) for block in blocks(page, "yaml")]
    (found,) = [tree[section] for tree in every if isinstance(tree, dict) and section in tree]
    kind = TASK_SECTIONS[section]
    assert set(found) == {field.name for field in fields(kind)}
    config, _ = config_from_dict({"model": "x", section: found})
    assert getattr(config, section) == kind()


def test_coming_from_has_every_key_and_its_meaning() -> None:
    shown: dict[str, str] = {}
    for theirs, ours, *_ in (row for row in cells(DOCS / "coming-from.md") if len(row) == 3 and code(row[0])):
        shown |= dict.fromkeys(code(theirs), code(ours)[0])
    expected = {}
    for key, alias in ALIASES.items():
        section, _, name = alias.to.partition(".")
        name = {"beta1": "betas[0]", "beta2": "betas[1]"}.get(name, name)
        expected[key] = name if section == "adapter" else PLACES[section] + name
    assert shown == expected


def test_the_error_tree_is_the_codes() -> None:
    tree = blocks(DOCS / "errors.md", "text")[0].text
    shown = dict(re.findall(r"[├└]── (\w+)\s+\((\w+)\)", tree))
    named = [kind for kind in LorabankError.__subclasses__() if kind.__module__ == "lorabank.errors"]
    real = {kind.__name__: kind.__mro__[2].__name__ for kind in named}
    assert shown == real


def test_what_is_no_block_is_no_block() -> None:
    """A fence of a language that nobody looks at would be code that nobody runs."""
    for page in PAGES:
        fences = re.findall(r"^```(\w*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(fences[::2]) <= {"python", "yaml", "bash", "text", ""}, page
        assert set(fences[1::2]) <= {""}, page
