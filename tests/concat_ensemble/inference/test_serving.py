"""The page in a real browser, which asks nobody but this computer, and the command that serves it."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import PIL.Image
import pytest

from concat_ensemble import predict_images
from concat_ensemble.data.options import DatasetOptions, ExtractionOptions
from concat_ensemble.inference.explorer import load_explorer
from concat_ensemble.inference.serving import require_gradio, serve_page
from concat_ensemble.reporting.image_page import build_page
from tests.browser import CHROMIUM, Browser
from tests.clients import ask_page

MARKUP = "<img src=x onerror=document.title='owned'>"
TEMPLATES = "${document.title='owned'} {{this}}"
NAMES = ["class a", MARKUP, TEMPLATES]
REPORT = "<!doctype html><title>r</title><h1>Ensembles compared</h1><script>parent.document.title = 'owned'</script>"


@pytest.fixture(scope="module")
def photographs(class_folders):
    return class_folders(NAMES)


@pytest.fixture(scope="module")
def served(make_classifier, tmp_path_factory):
    """The folder of an ensemble whose classes have dangerous names."""
    folder = tmp_path_factory.mktemp("served") / "headed"
    make_classifier(NAMES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(served, photographs):
    """Where its page is; the title and the dataset have dangerous names, too."""
    dataset = DatasetOptions(name=f"imagefolder:{photographs}")
    require_gradio()
    explorer = load_explorer(str(served), dataset, ExtractionOptions(quiet=True))
    page = build_page(explorer.answer, title=MARKUP, notes=[*explorer.notes, TEMPLATES], report=REPORT)
    started = queue.Queue()
    threading.Thread(target=serve_page, args=(page, "127.0.0.1", 0, started.put), daemon=True).start()
    return started.get(timeout=120)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def show(browser, address, photo, **view) -> None:
    browser.open(address, **view)
    browser.wait_for("!!document.querySelector('input[type=file]')")
    browser.drop("input[type=file]", photo)
    browser.wait_for("document.querySelectorAll('.ce-card').length === 3")


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, False), (390, True)])
def test_a_dropped_image_shows_classes_members_and_neighbors(width, dark, browser, address, photographs):
    show(browser, address, photographs / "class a" / "0.png", width=width, dark=dark)
    if folder := os.environ.get("SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"page-{width}-{'dark' if dark else 'light'}.png")
    titles = browser.run("[...document.querySelectorAll('.ce-card h2')].map(head => head.innerText)")
    assert titles == ["Ensemble", "Member 0", "Member 1"]
    shown = browser.run("[...document.querySelectorAll('.ce-card:first-child .ce-name')].map(name => name.innerText)")
    assert sorted(shown) == sorted(NAMES), "names are text"
    shares = browser.run(
        "[...document.querySelectorAll('.ce-first .ce-share')].map(share => parseFloat(share.innerText))"
    )
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares, reverse=True)
    images = "[...document.querySelectorAll('.ce-nearest img')]"
    assert browser.run(f"{images}.length") == 15
    browser.wait_for(f"{images}.every(image => image.complete && image.naturalWidth > 0)")
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"
    assert browser.run("document.title") == MARKUP and browser.run("document.querySelector('h1').innerText") == MARKUP
    assert browser.run("document.querySelectorAll('img[src=x]').length") == 0 and not browser.messages


def test_an_image_that_cannot_be_read_is_an_error_on_the_page(browser, address, bad_images, tmp_path):
    for name in ("bomb.png", "text.png"):
        (tmp_path / name).write_bytes(bad_images[name]["bytes"])
        browser.open(address, width=1200)
        browser.wait_for("!!document.querySelector('input[type=file]')")
        browser.drop("input[type=file]", tmp_path / name)
        said = browser.wait_for("document.querySelector('[role=alert].ce-error')?.innerText")
        assert said.startswith(name) and "Traceback" not in said


def test_results_are_in_a_frame_that_cannot_reach_the_page(browser, address):
    browser.open(address, width=390)
    browser.wait_for("!!document.querySelector('[role=tab]')")
    browser.run("[...document.querySelectorAll('[role=tab]')].find(tab => tab.innerText.includes('Results')).click()")
    browser.wait_for("document.querySelector('.ce-report')?.offsetHeight > 300")
    assert browser.run("document.querySelector('.ce-report').sandbox.value") == "allow-scripts"
    assert browser.run("document.querySelector('.ce-report').srcdoc") == REPORT
    assert browser.run("document.title") == MARKUP


def test_the_browser_has_asked_this_computer_alone(browser, address):
    asked = {urlsplit(url).netloc for url in browser.requests if urlsplit(url).scheme not in ("data", "blob", "about")}
    assert asked == {urlsplit(address).netloc}


def test_programs_get_the_same_numbers(address, served, photographs, bad_images, tmp_path):
    photo = photographs / "class a" / "0.png"
    ensemble, *members = ask_page(address, photo)
    expected = predict_images(served, photo, quiet=True)
    shares = dict(zip(expected.class_names, expected.probabilities[0].tolist(), strict=True))
    assert {one["label"]: one["score"] for one in ensemble["classes"]} == pytest.approx(shares, abs=1e-5)
    assert [member["name"] for member in members] == ["Member 0", "Member 1"] and len(ensemble["nearest"]) == 5
    (tmp_path / "bomb.png").write_bytes(bad_images["bomb.png"]["bytes"])
    assert "bomb.png cannot be read" in ask_page(address, tmp_path / "bomb.png")["error"]


def test_a_program_cannot_name_a_file_of_this_computer(address, photographs):
    file = {"path": str(photographs / "class a" / "0.png"), "meta": {"_type": "gradio.FileData"}}
    body, kind = json.dumps({"data": [file]}).encode(), {"Content-Type": "application/json"}
    with urlopen(Request(f"{address}/gradio_api/call/predict", body, kind)) as answer:
        event = json.load(answer)["event_id"]
    with urlopen(f"{address}/gradio_api/call/predict/{event}") as stream:
        text = stream.read().decode()
    assert "event: error" in text and '"score"' not in text


def test_the_command_prints_its_address_and_ends_by_ctrl_c(saved, tmp_path):
    words = ["app", str(saved), "--port", "0"]
    program = "import sys; from concat_ensemble.commands.app import main; main()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    uploads = tmp_path / "uploads"
    environment = os.environ | {"GRADIO_TEMP_DIR": str(uploads)}
    process = subprocess.Popen([sys.executable, "-c", program, *words], cwd=tmp_path, env=environment, **pipes)
    try:
        line = process.stdout.readline()
        address = re.match(r"(http://127\.0\.0\.1:\d+) shows .*; Ctrl-C ends it", line)[1]
        with urlopen(address) as answer:
            page = answer.read().decode()
        assert "googleapis" not in page and "cdnjs" not in page
        PIL.Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
        [ensemble] = ask_page(address, tmp_path / "red.png")
        assert {one["label"] for one in ensemble["classes"]} == {"cat", "dog", "emu"}
        assert [path for path in uploads.rglob("*") if path.is_file()]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0 and out == "" and err.strip() == "ended"
    assert not [path for path in uploads.rglob("*") if path.is_file()], "what was uploaded is still there"


def test_a_mistake_is_one_line(folder, saved, refused):
    refused(["app", folder], "no classification head", "--save-head", "--dataset")
    refused(["app", saved, "--limit", "5"], "--limit", "must come with a dataset", "--dataset")
    refused(["app", "nowhere"], "nowhere")


def test_a_port_that_is_taken_is_named(address, saved, refused):
    port = urlsplit(address).port
    refused(["app", saved, "--port", port], f"--port {port}", "another --port")
