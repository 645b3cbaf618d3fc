"""`lorabank push` against a stand-in for a hub on this machine: what goes up, and that nothing does where something is wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lorabank.cli.main import main
from lorabank.errors import ConfigError, LorabankError, ModelError, OutputError
from lorabank.formats.adapter import Adapter
from lorabank.training.publish import Pushed, push

# huggingface_hub's own way of sending a file, which the HTTP library below it is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_a_token_for_tests"
BASE = "Qwen/Qwen3-0.6B"


class Hub(ThreadingHTTPServer):
    """A model hub: repositories, branches, files in commits. It speaks as much of the hub's protocol as an upload needs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {}
        self.branches: set[tuple[str, str]] = set()
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []
        """(repository, branch, files) of each commit."""
        self.blobs: dict[str, bytes] = {}
        """Large files by their sha256, before a commit names them."""
        self.requests: list[str] = []
        self.broken = ""
        """A path that answers 500."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment]

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def reply(self, status: int, body: Any = None) -> None:
        data = json.dumps(body or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        """What was sent, in one piece or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_GET(self) -> None:
        self.server.requests.append(f"GET {self.path}")
        repository = self.path.removeprefix("/api/models/").partition("?")[0]
        if repository in self.server.private:
            self.reply(200, {"id": repository, "private": self.server.private[repository]})
        else:
            self.reply(404, {"error": "Repository not found"})

    def do_PUT(self) -> None:
        data = self.body()
        self.server.requests.append(f"PUT {self.path}")
        sha256 = self.path.removeprefix("/blobs/")
        if hashlib.sha256(data).hexdigest() == sha256:
            self.server.blobs[sha256] = data
            self.reply(200)
        else:
            self.reply(422)

    def do_POST(self) -> None:
        body = self.body()
        self.server.requests.append(f"POST {self.path}")
        if self.path == self.server.broken:
            self.reply(500, {"error": "out of order"})
        elif self.path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            front = yaml.safe_load(content.split("---")[1])
            bad = [] if "/" in str(front.get("base_model")) and " " not in front["base_model"] else [{"message": "base_model"}]
            self.reply(400 if bad else 200, {"errors": bad, "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid username or password."})
        else:
            self.answer(body)

    def answer(self, body: bytes) -> None:
        hub = self.server
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            status = 409 if name in hub.private else 200
            hub.private.setdefault(name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
            self.reply(status, {"url": f"{hub.url}/{name}", "id": name, "name": name})
        elif found := re.fullmatch(r"/api/models/(.+)/branch/(.+)", self.path):
            hub.branches.add((found[1], found[2]))
            self.reply(201)
        elif re.fullmatch(r"/api/models/.+/preupload/.+", self.path):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
            self.reply(200, {"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in files]})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**item, "actions": {"upload": {"href": f"{hub.url}/blobs/{item['oid']}"}}} for item in objects]
            self.reply(200, {"transfer": "basic", "objects": actions})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", self.path):
            files: dict[str, bytes] = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
            hub.commits.append((found[1], found[2], files))
            self.reply(200, {"commitUrl": f"{hub.url}/{found[1]}/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None})
        else:
            self.reply(404, {"error": self.path})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files go the plain way, which this hub speaks
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(adapter_folder: Path) -> Path:
    """An adapter as a run leaves it: card, tokenizer, and a folder that isn't part of it."""
    (adapter_folder / "README.md").write_text(
        "---\nbase_model: here/base\nlicense: mit\ntags:\n- lora\n---\n\n# adapter\n\nA LoRA adapter for `here/base`.\n\n"
        '## Training\n\n| data | rows.jsonl |\n\n## Use\n\nlb.Adapter.load("path/to/adapter")\n'
    )
    (adapter_folder / "tokenizer.json").write_text("{}")
    (adapter_folder / "training_state.pt").write_text("x")
    (adapter_folder / "last").mkdir()
    (adapter_folder / "last" / "adapter_config.json").write_text("{}")
    return adapter_folder


def up(hub: Hub, folder: Path, repository: str = "me/formal", **options: Any) -> Pushed:
    return push(folder, repository, token=TOKEN, endpoint=hub.url, **{"base": BASE, **options})


def test_the_files_go_up_in_one_commit(hub: Hub, folder: Path) -> None:
    done = up(hub, folder)
    assert done.url == f"{hub.url}/me/formal/commit/1"
    ((repository, branch, files),) = hub.commits
    assert (repository, branch) == ("me/formal", "main")
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "lorabank.json", "tokenizer.json"}
    assert set(files) == set(done.files) == names
    assert files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert hub.private == {"me/formal": False}


def test_what_went_up_loads_again_and_names_its_base(hub: Hub, folder: Path, tmp_path: Path) -> None:
    up(hub, folder)
    down = tmp_path / "down"
    down.mkdir()
    for name, content in hub.commits[0][2].items():
        (down / name).write_bytes(content)
    adapter = Adapter.load(down)
    assert adapter.base_model == BASE
    before = Adapter.load(folder)
    assert before.base_model != BASE, "the folder itself is left as it was"
    for path, layer in before.layers.items():
        assert adapter.layers[path].A.equal(layer.A)
        assert adapter.layers[path].scaling == layer.scaling


def test_the_card_keeps_what_the_run_said_and_loads_from_there(hub: Hub, folder: Path) -> None:
    up(hub, folder, revision="v2")
    card = hub.commits[0][2]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["license"], front["tags"]) == (BASE, "mit", ["lora", "lorabank"])
    assert "| data | rows.jsonl |" in card
    assert f"A LoRA adapter for `{BASE}`." in card
    assert "path/to" not in card
    assert card.count("## Use") == 1
    assert 'folder = snapshot_download("me/formal", revision="v2")' in card
    assert 'PeftModel.from_pretrained(model, "me/formal", revision="v2")' in card
    assert f"vllm serve {BASE} --enable-lora --max-lora-rank 8 --lora-modules adapter=me/formal" in card


def test_a_folder_without_a_card_gets_one(hub: Hub, adapter_folder: Path) -> None:
    up(hub, adapter_folder)
    card = hub.commits[0][2]["README.md"].decode()
    assert card.startswith(f"---\nbase_model: {BASE}\n")
    assert "A LoRA adapter for `Qwen/Qwen3-0.6B`: 512 parameters in 4 layers." in card
    assert "| rank | 4 |" in card
    assert "| targets | `q_proj, v_proj` |" in card
    assert not (adapter_folder / "README.md").exists()


def test_only_files_that_are_named_go_up(hub: Hub, folder: Path) -> None:
    for name in ("notes.txt", "trainer_state.json", "optimizer.safetensors", "rows.jsonl", "secret.md", ".env"):
        (folder / name).write_text("mine")
    for name in ("LICENSE", "LICENSE.txt", "merges.txt", "chat_template.jinja"):
        (folder / name).write_text("yours")
    done = up(hub, folder)
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "lorabank.json", "tokenizer.json"}
    assert set(hub.commits[0][2]) == set(done.files) == names | {"LICENSE", "LICENSE.txt", "merges.txt", "chat_template.jinja"}
    stayed = ("last/", "notes.txt", "optimizer.safetensors", "rows.jsonl", "secret.md", "trainer_state.json", "training_state.pt")
    assert done.stayed == stayed


def test_what_follows_the_section_on_use_stays(hub: Hub, folder: Path) -> None:
    card = folder / "README.md"
    card.write_text(
        card.read_text() + "```sh\n## no heading\n```\n\n### More\n\n## Limits\n\nNot for maps.\n\n## Thanks\n\nTo you.\n"
    )
    up(hub, folder)
    text = hub.commits[0][2]["README.md"].decode()
    assert "path/to" not in text and "no heading" not in text and "### More" not in text
    assert text.endswith("```\n\n## Limits\n\nNot for maps.\n\n## Thanks\n\nTo you.\n")
    assert text.index("## Training") < text.index("## Use") < text.index("## Limits")


@pytest.mark.parametrize(
    ("named", "expected"),
    [(["here/base"], BASE), ([BASE, "other/base"], [BASE, "other/base"]), (["other/base", "a/b"], [BASE, "other/base", "a/b"])],
)
def test_a_card_with_a_list_of_bases(hub: Hub, folder: Path, named: list[str], expected: object) -> None:
    card = folder / "README.md"
    card.write_text(card.read_text().replace("base_model: here/base", f"base_model: {json.dumps(named)}"))
    up(hub, folder)
    text = hub.commits[0][2]["README.md"].decode()
    assert yaml.safe_load(text.split("---")[1])["base_model"] == expected
    assert (f"A LoRA adapter for `{BASE}`" in text) == (len(named) == 1)


def test_another_tools_file_is_told_how_to_become_a_folder(hub: Hub, tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    file = tmp_path / "a.safetensors"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}, file)
    with pytest.raises(LorabankError, match=r"lorabank convert .*a\.safetensors FOLDER --to peft"):
        up(hub, file)
    assert hub.requests == []


def test_private_and_a_branch(hub: Hub, folder: Path) -> None:
    up(hub, folder, private=True, revision="v2")
    assert hub.private == {"me/formal": True}
    assert hub.branches == {("me/formal", "v2")}
    assert hub.commits[0][:2] == ("me/formal", "v2")


def test_private_is_not_forgotten_where_the_repository_exists(hub: Hub, folder: Path) -> None:
    hub.private["me/formal"] = False
    with pytest.raises(OutputError, match=r"exists already and is public.*Nothing was uploaded"):
        up(hub, folder, private=True)
    assert hub.commits == []
    assert hub.blobs == {}
    up(hub, folder)
    assert len(hub.commits) == 1


def nan(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "lorabank.json").unlink()


def no_adapter(folder: Path) -> None:
    for file in folder.glob("*adapter*"):
        file.unlink()


def broken_card(folder: Path) -> None:
    (folder / "README.md").write_text("---\na: [\n---\n")


def latin_card(folder: Path) -> None:
    (folder / "README.md").write_bytes("# Café\n".encode("latin-1"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan, "holds NaN or infinity"),
        (no_adapter, "holds an adapter in a folder of its own: last"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "the adapter is incomplete"),
        (broken_card, r"README\.md: its front matter is no YAML"),
        (latin_card, r"README\.md: isn't UTF-8 \(byte 5\)"),
    ],
    ids=["nan", "no adapter", "incomplete", "a card that is no YAML", "a card in Latin-1"],
)
def test_a_folder_that_is_wrong_never_reaches_the_hub(hub: Hub, folder: Path, spoil: Any, message: str) -> None:
    spoil(folder)
    with pytest.raises(LorabankError, match=message):
        up(hub, folder)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"token": None}, ConfigError, r"no token.*hf auth login.*HF_TOKEN"),
        ({"repository": "formal"}, ConfigError, "expected OWNER/NAME"),
        ({"repository": "a/b/c"}, ConfigError, "expected OWNER/NAME"),
        ({"repository": "me/two words"}, ConfigError, "expected OWNER/NAME"),
        ({"base": None}, ModelError, r"is a path of this machine.*--base"),
    ],
)
def test_what_is_wrong_with_the_call_never_reaches_the_hub(
    hub: Hub, folder: Path, options: dict[str, Any], kind: type[LorabankError], message: str
) -> None:
    call: dict[str, Any] = {"repository": "me/formal", "token": TOKEN, "base": BASE, "endpoint": hub.url, **options}
    with pytest.raises(kind, match=message):
        push(folder, **call)
    assert hub.requests == []


def test_the_hub_refuses_the_token(hub: Hub, folder: Path) -> None:
    with pytest.raises(OutputError, match=r"refused me/formal \(.*401.*token may write there"):
        push(folder, "me/formal", token="hf_another", base=BASE, endpoint=hub.url)
    assert hub.commits == []


def test_the_hub_is_out_of_order_or_not_there(hub: Hub, folder: Path) -> None:
    hub.broken = "/api/models/me/formal/commit/main"
    with pytest.raises(OutputError, match="Nothing was committed"):
        up(hub, folder)
    with pytest.raises(OutputError, match="Nothing was committed"):
        push(folder, "me/formal", token=TOKEN, base=BASE, endpoint="http://127.0.0.1:9")
    assert hub.commits == []


def test_our_own_name_of_a_base_becomes_the_hubs(hub: Hub, folder: Path) -> None:
    up(hub, folder, base="smollm2-135m-instruct")
    settings = json.loads(hub.commits[0][2]["adapter_config.json"])
    assert settings["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_command(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # read from HF_ENDPOINT when the library is imported
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["push", str(folder), "me/formal", "--base", BASE, "--private"]) == 0
    out = capsys.readouterr().out
    assert "pushed: 5 files (README.md, adapter_config.json" in out
    assert "not uploaded: last/, training_state.pt\n" in out
    assert f"{hub.url}/me/formal/commit/1" in out
    assert hub.private == {"me/formal": True}
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    assert main(["push", str(folder), "me/formal", "--base", BASE]) == 2
    assert "no token for the hub" in capsys.readouterr().err
    assert len(hub.commits) == 1
