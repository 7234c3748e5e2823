"""A Space that is pushed to a Hub on loopback, loaded from there, and run without this package."""

import ast
import re
import socket
import subprocess
import sys
import time
from importlib.metadata import packages_distributions
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import PIL.Image
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from concat_ensemble import ConcatEnsembleConfig, predict_images
from concat_ensemble.modeling.configuration_concat_ensemble import PAYLOAD_FILES
from concat_ensemble.reporting.model_card import check_card, write_card
from concat_ensemble.reporting.space import GRADIO, space_files
from tests.clients import COMMAND, Client, ask_page
from tests.hub_server import TOKEN, HubServer

ROOT = Path(__file__).parents[2]
REPO = "me/shown"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


def started(*arguments):
    client = Client(*arguments)
    yield client
    assert TOKEN not in client.transcript
    client.process.kill()
    client.process.wait()


@pytest.fixture(scope="module")
def publisher(hub, tmp_path_factory):
    yield from started(hub, tmp_path_factory.mktemp("publisher") / "home", TOKEN, True)


@pytest.fixture(scope="module")
def visitor(hub, tmp_path_factory):
    """Without this package and without a token."""
    yield from started(hub, tmp_path_factory.mktemp("visitor") / "home", None, False)


@pytest.fixture(scope="module")
def headed(make_classifier, tmp_path_factory):
    """The folder of an ensemble with a head and a card."""
    folder = tmp_path_factory.mktemp("headed") / "shown"
    make_classifier(["cat", "<b>dog</b>", "emu"]).save_pretrained(folder)
    write_card(folder)
    return folder


@pytest.fixture(scope="module")
def pushed(hub, publisher, headed):
    return publisher.push(headed, REPO, "--space")


@pytest.fixture(scope="module")
def space(pushed, visitor, tmp_path_factory):
    """The Space as a visitor downloads it."""
    folder = tmp_path_factory.mktemp("space") / "files"
    visitor("from huggingface_hub import snapshot_download")
    visitor(f"snapshot_download({REPO!r}, repo_type='space', local_dir={str(folder)!r})")
    return folder


def test_the_hub_learns_how_to_run_it_and_what_it_shows(hub, pushed, space, headed):
    metadata = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert (metadata["sdk"], metadata["sdk_version"], metadata["app_file"]) == ("gradio", GRADIO, "app.py")
    assert metadata["models"] == [REPO] and metadata["title"] == "shown"
    license = yaml.safe_load((headed / "README.md").read_text().split("---")[1])["license"]
    assert metadata["license"] == license
    assert f'"{pushed["commit"]}"' in (space / "app.py").read_text() and pushed["space"] == REPO
    assert set(hub.files(REPO, kind="spaces")) == {
        ".gitattributes",
        *("README.md", "app.py", "image_page.py", "requirements.txt"),
    }


def test_the_card_links_it_and_keeps_the_link(hub, pushed, headed):
    address = f"https://huggingface.co/spaces/{REPO}"
    assert address in hub.read(REPO, "README.md").decode()
    check_card(headed)
    write_card(headed)
    assert address in (headed / "README.md").read_text()


def test_it_runs_without_the_package_and_predicts_what_the_ensemble_does(space, visitor, headed, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = visitor.environment | {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*visitor.python, "app.py"], cwd=space, env=environment, **pipes)
    try:
        address = wait_for(f"http://127.0.0.1:{port}", process)
        [opinion] = ask_page(address, tmp_path / "photo.png")
        (tmp_path / "text.png").write_text("no image")
        refusal = ask_page(address, tmp_path / "text.png")
    finally:
        process.kill()
        process.wait()
    expected = predict_images(headed, tmp_path / "photo.png", quiet=True)
    shares = dict(zip(expected.class_names, expected.probabilities[0].tolist(), strict=True))
    assert {one["label"]: one["score"] for one in opinion["classes"]} == pytest.approx(shares, abs=1e-5)
    assert refusal["error"].startswith("text.png cannot be read: ") and "/" not in refusal["error"]


def wait_for(address: str, process: subprocess.Popen, seconds: float = 300) -> str:
    """The address as soon as it answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        try:
            with urlopen(address):
                return address
        except URLError:
            time.sleep(0.5)
    raise AssertionError(f"{address} does not answer")


def test_another_push_shows_the_new_commit(hub, publisher, pushed, headed):
    (headed / "notes.txt").write_text("more")
    commit = publisher.push(headed, REPO, "--space", "--include", "notes.txt")["commit"]
    assert commit != pushed["commit"]
    assert f'"{commit}"' in hub.read(REPO, "app.py", kind="spaces").decode()


def test_what_it_cannot_show_is_refused_before_anything_is_sent(hub, publisher, folder, headed):
    for source, options, said in (
        (folder, [], "has no classification head"),
        (headed, ["--create-pr"], "leave out --create-pr"),
    ):
        words = ["push", str(source), "me/refused", "--space", *options]
        _, err, code = publisher.run(COMMAND.format(words=words))
        assert code == 2 and said in err and hub.repo("models", "me/refused") is None


def test_a_space_of_somebody_elses_making_stays(hub, publisher, headed):
    hub.create("spaces", "me/own", private=False)
    files = {"app.py": hub.store(b"print('my own')\n")}
    hub.write("spaces", "me/own", hub.repo("spaces", "me/own"), "refs/heads/main", files, "mine")
    _, err, code = publisher.run(COMMAND.format(words=["push", str(headed), "me/own", "--space"]))
    assert code == 2 and "has an app.py of its own" in err and hub.repo("models", "me/own") is None
    assert hub.read("me/own", "app.py", kind="spaces") == b"print('my own')\n"


def test_its_requirements_are_what_it_imports(headed):
    files = space_files(ConcatEnsembleConfig.from_pretrained(headed), REPO, "0" * 40)
    texts = [files["app.py"], *((ROOT / "modeling" / name).read_text() for name in PAYLOAD_FILES)]
    imported = set().union(*map(imported_modules, texts)) - {"image_page", *sys.stdlib_module_names}
    brought = packages_distributions()
    needed = {canonicalize_name(brought[name][0]) for name in imported}
    declared = {canonicalize_name(Requirement(line).name) for line in files["requirements.txt"].split()}
    assert needed <= declared and all(">=" in line for line in files["requirements.txt"].split())


def test_the_page_imports_nothing_of_the_package():
    text = (ROOT / "concat_ensemble/reporting/image_page.py").read_text()
    names = {name.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert names - set(sys.stdlib_module_names) == {"gradio", "collections.abc"}
    pinned = (ROOT / "constraints.txt").read_text()
    assert re.search(rf"^gradio=={re.escape(GRADIO)}$", pinned, re.MULTILINE), "the Space runs another Gradio"


def imported_modules(text: str) -> set[str]:
    """Top-level names of the modules that are imported with a file."""
    names = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names
