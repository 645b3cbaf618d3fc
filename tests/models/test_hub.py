"""Hub ids, against a small server that answers as the hub does, and without any network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

LOCATE = """
import sys
from lorabank.errors import ModelError
from lorabank.models.load import locate
try:
    print("found", locate(sys.argv[1]))
except ModelError as error:
    print(error)
"""
SHA = "0" * 40
FILES = {"owner/pickled": ["config.json", "pytorch_model.bin"], "owner/adapter": ["adapter_config.json", "adapter_model.bin"]}


class Hub(BaseHTTPRequestHandler):
    """Three repositories: one with pickles only, one with an adapter, one that is gated; all others don't exist."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").split("?")[0]
        if name in FILES:
            siblings = [{"rfilename": file} for file in FILES[name]]
            self._answer(200, {"id": name, "sha": SHA, "siblings": siblings})
        elif name == "owner/gated":
            self._answer(403, {"error": "gated"}, code="GatedRepo")
        else:
            self._answer(404, {"error": "Repository not found"}, code="RepoNotFound")

    def _answer(self, status: int, body: dict[str, object], code: str | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def look_for(name: str, home: Path, **environment: str) -> str:
    """What a fresh process says of a name; the hub client reads its settings once, when it is imported."""
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy") and not key.startswith("HF_")}
    command = [sys.executable, "-c", LOCATE, name]
    environment = kept | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/pickled", "'owner/pickled': pytorch_model.bin is a pickle"),
        ("owner/adapter", "'owner/adapter': this is a LoRA adapter, not a model"),
        ("owner/gated", "accept terms first"),
        ("owner/nothing", "no such model on the hub, and no such folder here. Check the spelling"),
        ("smollm2-135m-instrct", "(did you mean 'smollm2-135m-instruct'?)"),
    ],
)
def test_the_hub_is_asked_before_anything_is_downloaded(name: str, message: str, endpoint: str, tmp_path: Path) -> None:
    said = look_for(name, tmp_path, HF_ENDPOINT=endpoint)
    assert message in said
    assert "\n" not in said


def test_without_a_network_the_hubs_cache_is_used(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--model"
    snapshot = repository / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    (snapshot / "config.json").write_text("{}")
    assert look_for("owner/model", tmp_path, HF_HUB_OFFLINE="1") == f"found {snapshot}"


def test_without_a_network_and_without_a_copy(tmp_path: Path) -> None:
    said = look_for("owner/model", tmp_path, HF_HUB_OFFLINE="1")
    assert "the hub can't be reached" in said
    assert "smollm2-135m-instruct" in said
