"""Processes that run code which a test sends, as a user with the package or without it would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

from tests.hub_server import HubServer

# Runs the code that it receives, in one namespace, and answers with the output and the error.
CLIENT = """
import contextlib, io, json, sys, traceback
names, answers = {"json": json}, sys.stdout
for line in sys.stdin:
    out, err, failed = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exec(json.loads(line), names)
        except SystemExit as stop:
            failed = stop.code or None
        except Exception:
            failed = traceback.format_exc()
    print(json.dumps([out.getvalue(), err.getvalue(), failed]), file=answers, flush=True)
"""
COMMAND = "import sys; from concat_ensemble.commands.app import main; sys.argv = ['concat-ensemble', *{words}]; main()"


class Client:
    """A process with an empty cache that finds the Hub by `HF_ENDPOINT`."""

    def __init__(self, hub: HubServer, home: Path, token: str | None, package: bool):
        home.mkdir()
        self.home = home
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= hub.environment | {"HF_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_TOKEN": token} if token else {}
        options = []
        if not package:  # -S leaves out the editable install; the dependencies come by path
            environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
            options = ["-S"]
        self.python, self.environment = [sys.executable, *options], environment
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([*self.python, "-c", CLIENT], cwd=home, env=environment, **pipes)
        self.transcript = ""

    def send(self, code: str) -> None:
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def run(self, code: str) -> tuple[str, str, str | int | None]:
        """Stdout, stderr, and the error or exit code if any."""
        self.send(code)
        return self.answer()

    def answer(self) -> tuple[str, str, str | int | None]:
        answer = json.loads(self.process.stdout.readline())
        self.transcript += "".join(map(str, answer))
        return answer

    def __call__(self, *lines: str) -> str:
        """Run code that must not fail, and return what it prints."""
        out, err, failed = self.run("\n".join(lines))
        assert failed is None, f"{err}{failed}"
        return out

    def ask(self, expression: str):
        return json.loads(self(f"print(json.dumps({expression}))"))

    def push(self, folder: Path, repo: str, *options: str) -> dict:
        return json.loads(self(COMMAND.format(words=["push", str(folder), repo, "--json", *options])))


def ask_page(address: str, image: Path) -> list | dict:
    """What a page of `concat-ensemble app`, or of a Space, answers to a program that uploads an image: the documented
    HTTP calls of Gradio."""
    boundary = "--of-the-tests"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{image.name}"\r\n\r\n'
    body = head.encode() + image.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    [path] = _read_json(Request(f"{address}/gradio_api/upload", body, kind))
    file = {"path": path, "orig_name": image.name, "meta": {"_type": "gradio.FileData"}}
    call, kind = f"{address}/gradio_api/call/predict", {"Content-Type": "application/json"}
    event = _read_json(Request(call, json.dumps({"data": [file]}).encode(), kind))["event_id"]
    with urlopen(f"{call}/{event}") as stream:
        lines = [line.decode().strip() for line in stream]
    assert "event: complete" in lines, lines
    _, answer = json.loads(lines[lines.index("event: complete") + 1].removeprefix("data: "))
    return answer


def _read_json(request: Request):
    with urlopen(request) as answer:
        return json.load(answer)
