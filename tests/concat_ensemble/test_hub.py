"""Publishing and loading through the real client, each in a process of its own, by way of a Hub on loopback."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from concat_ensemble import ConcatEnsembleModel, assemble
from concat_ensemble.model_card import write_card
from tests.hub_server import TOKEN, HubServer

# Runs what it is sent, in one namespace, and answers with what that printed, or with its error.
CLIENT = """
import contextlib, io, json, sys, traceback
names, answers = {}, sys.stdout
for line in sys.stdin:
    said, failed = io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            exec(json.loads(line), names)
        except SystemExit as stop:
            failed = stop.code or None
        except Exception:
            failed = traceback.format_exc()
    print(json.dumps([said.getvalue(), failed]), file=answers, flush=True)
"""
COMMAND = "import sys; from concat_ensemble.command_line import main; sys.argv = ['concat-ensemble', *{words}]; main()"


class Client:
    """A process that knows the Hub by `HF_ENDPOINT` alone, with an empty cache."""

    def __init__(self, hub: HubServer, home: Path, token: str | None, package: bool):
        home.mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= hub.environment | {"HF_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_TOKEN": token} if token else {}
        options = []
        if not package:  # -S leaves out the editable install; the dependencies come by path
            environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
            options = ["-S"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, *options, "-c", CLIENT], cwd=home, env=environment, **pipes)
        self.heard = ""

    def send(self, code: str) -> None:
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def run(self, code: str) -> tuple[str, str | int | None]:
        self.send(code)
        said, failed = json.loads(self.process.stdout.readline())
        self.heard += f"{said}{failed}"
        return said, failed

    def __call__(self, code: str):
        """What the code prints, as JSON; it must not fail."""
        said, failed = self.run(code)
        assert failed is None, f"{said}{failed}"
        return json.loads(said.splitlines()[-1]) if said else None

    def command(self, *words):
        return self(COMMAND.format(words=list(map(str, words))))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub"), part_size=8_000) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """`client(token, package)`: one process for all tests that ask for the same; `fresh` for one of its own."""
    started = {}

    def client(token=TOKEN, package=True, fresh=False) -> Client:
        key = object() if fresh else (token, package)
        if key not in started:
            started[key] = Client(hub, tmp_path_factory.mktemp("client") / "home", token, package)
        return started[key]

    yield client
    for made in started.values():
        assert TOKEN not in made.heard
        made.process.kill()
        made.process.wait()


@pytest.fixture(scope="module")
def publisher(client):
    return client()


@pytest.fixture(scope="module")
def visitor(client):
    """Without this package and without a token."""
    visitor = client(token=None, package=False)
    visitor("import importlib.util; assert importlib.util.find_spec('concat_ensemble') is None")
    return visitor


@pytest.fixture
def grown(backbone, folder, study):
    """`folder` in small shards with a card and a result, and beside it the same ensemble with another member."""
    pair = ConcatEnsembleModel.from_pretrained(folder)
    pair.save_pretrained(folder, max_shard_size=10_000)
    (folder / "results").mkdir()
    hashes = [member["provenance"]["weights_sha256"] for member in pair.config.members]
    study(hashes=hashes, **{"pair": [0.9], "raw pixels": [0.5]}).save(folder / "results" / "digits.json")
    write_card(folder)
    triple = assemble([folder, backbone(2)])
    triple.save_pretrained(folder.with_name("triple"), max_shard_size=10_000)
    write_card(folder.with_name("triple"))
    return folder, folder.with_name("triple")


def test_smoke(publisher, hub, grown):
    pair, triple = grown
    print(sorted((p.name, p.stat().st_size) for p in pair.rglob("*")))
    print(publisher.command("push", pair, "me/pair", "--json"))
    print(hub.files("me/pair").keys(), len(hub.uploads))
    print(publisher.command("push", pair, "me/pair", "--json"))
    print(hub.commits("me/pair"))
    print([r for r in hub.requests])
