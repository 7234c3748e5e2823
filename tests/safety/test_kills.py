"""Killed or stopped by Ctrl-C at any moment, a command leaves nothing half-written, and the same command finishes.

A process imports the libraries once and forks one for each command, which is killed at one of its own writes to the
disk (by number, so that a test that passed once passes again) or, in the slow tests, at random moments.
"""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.clients import Client
from tests.hub_server import TOKEN, HubServer
from tests.safety.conftest import contents

# Runs a command in a forked process, which gets a signal after some writes or seconds. Returns its exit code (negative
# for a signal), what it printed, the number of its writes and its seconds.
FORKED = """
import os, signal, sys, time
from pathlib import Path
import matplotlib.font_manager
from huggingface_hub.utils import _cache_assets
from concat_ensemble.commands.app import main
from concat_ensemble import hub
from concat_ensemble.inference import export
from concat_ensemble.reporting import model_card
from concat_ensemble.studies import ensembles, select_study
from concat_ensemble.commands import push, build, card, select

def forked(place, words, number, writes=None, seconds=None, store=None):
    _cache_assets.HF_ASSETS_CACHE = store
    log = place + "-log"
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        run(place, words, number, writes, log)
    ended = 0
    while seconds is not None and not ended and time.monotonic() < started + seconds:
        time.sleep(0.002)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        if seconds is not None:
            os.kill(pid, number)
        status = os.waitpid(pid, 0)[1]
    took = time.monotonic() - started
    counted = os.path.getsize(log + "-writes") if os.path.exists(log + "-writes") else 0
    return [os.waitstatus_to_exitcode(status), Path(log).read_text(), counted, took]

def run(place, words, number, writes, log):
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(place)
        count(place, number, writes, os.open(log + "-writes", os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
        sys.argv = ["concat-ensemble", *words]
        main()
    except SystemExit as stop:
        code = stop.code or 0
    except KeyboardInterrupt:
        code = 130
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

def count(place, number, writes, counter):
    done = [0]
    changes = ("os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "os.chmod", "shutil.copyfile")
    def hook(event, args):
        is_write = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not is_write and event not in changes:
            return
        paths = [os.path.abspath(os.fsdecode(arg)) for arg in args if isinstance(arg, (str, bytes))]
        if not any(path.startswith(place) for path in paths):
            return
        done[0] += 1
        os.write(counter, b".")
        if done[0] == writes:
            os.kill(os.getpid(), number)
    sys.addaudithook(hook)
"""
REPO = "me/pair"
WORDS = {
    "new": ["build", "pair", "pair", "--output", "new"],
    "build": ["build", "pair", "pair", "--output", "built", "--overwrite"],
    "card": ["card", "pair"],
    "select": ["select", "pair", "--dataset", "digits", "--classes", "0-1", "--limit", "24", "--output", "chosen"],
    "push": ["push", "pair", REPO],
}
OUTPUT = {"new": "new", "build": "built", "select": "chosen"}  # folders that are replaced in one step


class Places:
    """Copies of a folder with `pair`, which has results and no card, and `built`, an ensemble with files of a user."""

    def __init__(self, hub: HubServer, client: Client, start: Path):
        self.hub, self.client, self.start, self.number, self.undisturbed = hub, client, start, 0, {}

    def run(self, place: Path, command: str, number: int = 0, **moment) -> tuple[int, str, int, float]:
        moment |= {"store": str(place.with_name(f"{place.name}-store"))}
        return self.client.ask(f"forked({str(place)!r}, {WORDS[command]!r}, {int(number)}, **{moment!r})")

    def new(self) -> Path:
        self.number += 1
        (self.hub.folder / "repos" / "models--me--pair.json").unlink(missing_ok=True)
        return shutil.copytree(self.start, self.start.with_name(f"place-{self.number}"))

    def measure(self, command: str) -> tuple[dict, int, float]:
        """What the command leaves if nothing stops it, the number of its writes and its seconds."""
        if command not in self.undisturbed:
            place = self.new()
            code, said, writes, seconds = self.run(place, command)
            assert code == 0, said
            self.undisturbed[command] = self.state(place), writes, seconds
            assert writes > 10 and self.state(place) != self.state(self.start)
        return self.undisturbed[command]

    def state(self, place: Path) -> dict:
        """The files in a folder, and those of its repo."""
        files = self.hub.files(REPO) if self.hub.repo("models", REPO) and self.hub.commits(REPO) else {}
        return contents(place) | {f"hub/{name}": self.hub.read(REPO, name) for name in files}

    def stop(self, command: str, number: int, **moment) -> bool:
        """Stop the command, check that nothing is half-written, and let it finish. Returns whether it was stopped."""
        after, _, _ = self.measure(command)
        place = self.new()
        before = self.state(place)
        code, said, _, _ = self.run(place, command, number, **moment)
        assert code == 0 or code == (-number if number == signal.SIGKILL else 130), said
        if code == 130:
            assert "Traceback" not in said and "stopped; the same command goes on" in said, said
        stopped, is_whole = self.state(place), True
        check_whole(stopped, before, after)
        for folder in filter(None, [OUTPUT.get(command), "hub"]):
            is_whole = pick(stopped, folder).keys() == pick(after, folder).keys()
            assert is_whole or pick(stopped, folder) == pick(before, folder), f"{folder} is half-written"
        code, said, *_ = self.run(place, command)
        finished = code == 2 and is_whole and "holds something already" in said
        assert code == 0 or finished, said
        last = self.state(place)
        left = {name for name in last.keys() - after.keys() if not finished or not is_temporary(name)}
        assert not left and not after.keys() - last.keys(), "something was left over, or is missing"
        check_whole(last, after, after)
        return stopped != after


def is_temporary(name: str) -> bool:
    return any(part.startswith(".") and part.endswith((".tmp", ".replaced")) for part in name.split("/"))


def pick(state: dict, folder: str) -> dict:
    return {name: content for name, content in state.items() if name.split("/")[0] == folder}


def check_whole(state: dict, before: dict, after: dict) -> None:
    """Each file is as before, as afterwards, or, where it has times and so differs in each run, at least whole."""
    for name, content in state.items():
        if is_temporary(name) or content in (before.get(name), after.get(name)):
            continue
        assert name in after, f"{name} is neither of before nor of afterwards"
        if name.endswith(".json"):
            json.loads(content)
        elif name.endswith(".png"):
            assert content.endswith(b"IEND\xaeB`\x82"), f"{name} is cut"
        else:
            assert name.endswith("README.md") and content.count(b"\n") == after[name].count(b"\n"), name


@pytest.fixture(scope="module")
def places(made, tmp_path_factory):
    base = tmp_path_factory.mktemp("kills")
    start = base / "start"
    shutil.copytree(made, start / "pair")
    shutil.copytree(made, start / "built", ignore=shutil.ignore_patterns("results"))
    for name in ("built/notes.txt", "built/.git/HEAD", "built/results/why.txt", "pair/notes.txt"):
        (start / name).parent.mkdir(exist_ok=True)
        (start / name).write_text("mine")
    (base / "hub").mkdir()
    with HubServer(base / "hub") as hub:
        client = Client(hub, base / "home", TOKEN, package=True)
        try:
            client(FORKED)
            yield Places(hub, client, start)
        finally:
            client.process.kill()
            client.process.wait()


MOMENTS = [(0.6, signal.SIGINT), (0.97, signal.SIGKILL), (0.2, signal.SIGKILL)]  # of all writes


@pytest.mark.parametrize(("command", "moments"), [("build", 3), ("card", 3), ("select", 1), ("push", 3)])
def test_a_kill_at_some_writes_leaves_nothing_half_written(command, moments, places):
    _, writes, _ = places.measure(command)
    for share, number in MOMENTS[:moments]:
        places.stop(command, number, writes=max(1, round(share * writes)))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("command", WORDS)
def test_a_kill_at_each_write_leaves_nothing_half_written(command, number, places):
    _, writes, _ = places.measure(command)
    for write in range(1, writes + 1, 3 if command == "select" else 1):
        places.stop(command, number, writes=write)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("command", WORDS)
def test_twenty_kills_at_random_moments_leave_nothing_half_written(command, number, places):
    rng, (_, _, seconds) = random.Random(f"{command} {number}"), places.measure(command)
    hits = sum(places.stop(command, number, seconds=rng.uniform(0, seconds)) for _ in range(20))
    print(f"{command}, {number.name}: {hits} of 20 runs were stopped")
    assert hits >= 5
