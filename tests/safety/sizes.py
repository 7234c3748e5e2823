"""The peak memory and the seconds that each attack of `size_attacks` takes, in a process of its own.

    python tests/safety/sizes.py             all of them, beside what importing the package takes
    python tests/safety/sizes.py --list      their names
    python tests/safety/sizes.py NAME ...    these, or those whose name holds one of these words

Exits with 1 if one takes 2 GB or 60 seconds of the processor, or ends in anything but one line of an error and exit
code 2.
"""

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.safety.size_attacks import ATTACKS, Attack, make_ensemble  # noqa: E402

MEMORY, SECONDS = 2000, 60  # MB, and seconds of the processor, which a busy machine hardly changes
WAIT = 300  # seconds until a process is killed that only waits, or whose machine is busy
# What a process may take before it fails, so that this machine goes on; and as much on disk.
ADDRESS_SPACE, FILE_SIZE = 8 << 30, 4 << 30
LINE = 1000  # characters of an error
BASELINE = "import concat_ensemble, torch, timm"
RUN = """
from concat_ensemble.commands import app

def run(**options):
{code}

app.app = run
app.main()
"""


class Outcome(NamedTuple):
    name: str
    size: int  # bytes on disk
    text: str
    memory: float  # MB
    seconds: float
    is_kept: bool


class Ended(NamedTuple):
    code: int | None  # None if it was killed
    lines: list[str]  # on stderr
    memory: float
    seconds: float


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))


def run(arguments: list[str], folder: Path) -> Ended:
    """Run Python in a folder, with the package, and without the network. This process must stay small: what it takes
    counts as its child's."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / ".cache")}
    environment |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    deadline = time.monotonic() + WAIT
    with (folder / ".stderr").open("w+b") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            preexec_fn=limit,
            start_new_session=True,
        )
        pid, status, usage = 0, 0, None
        while not pid:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if not pid and time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                pid, status, usage = os.wait4(process.pid, 0)
            time.sleep(0 if pid else 0.02)
        process.returncode = os.waitstatus_to_exitcode(status)  # nothing is left to wait for
        errors.seek(0)
        lines = errors.read(1 << 20).decode(errors="replace").strip().splitlines()
    code = None if process.returncode in (-signal.SIGKILL, -signal.SIGXCPU) else process.returncode
    return Ended(code, lines, usage.ru_maxrss * 1024 / 1e6, usage.ru_utime + usage.ru_stime)


def describe(attack: Attack, ended: Ended) -> tuple[str, bool]:
    """How it ended, and whether that is allowed."""
    last = ended.lines[-1] if ended.lines else ""
    if ended.code is None:
        return "killed: it takes too long", False
    if ended.code == 0:
        return "succeeded", attack.is_allowed
    is_line = ended.code == 2 and len(ended.lines) == 1 and last.startswith("error: ") and len(last) <= LINE
    if ended.code == 2 and not is_line:
        return f"{len(ended.lines)} lines, the last of {len(last):,} characters: {last[:200]}", False
    return (last, True) if is_line else (f"exit code {ended.code}: {last}", False)


def attack_it(attack: Attack, ensemble: Path) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="sizes-") as place:
        folder = Path(place)
        if attack.needs_ensemble:
            shutil.copytree(ensemble, folder / "pair")
        before = time.time_ns()
        time.sleep(0.02)
        made = run([__file__, "--make", attack.name], folder)
        if made.code != 0:
            return Outcome(attack.name, 0, f"it cannot be made: {made.lines[-1:]}", made.memory, made.seconds, False)
        files = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
        size = sum(path.stat().st_size for path in files if path.stat().st_mtime_ns > before)
        program = RUN.format(code=textwrap.indent(attack.code.strip(), "    "))
        words = ["-m", "concat_ensemble.commands.app", *attack.words] if attack.words else ["-c", program]
        ended = run(words, folder)
    text, is_allowed = describe(attack, ended)
    is_kept = is_allowed and ended.memory < MEMORY and ended.seconds < SECONDS
    return Outcome(attack.name, size, text, ended.memory, ended.seconds, is_kept)


def print_row(name, size, memory, seconds, text) -> None:
    sys.stdout.write(f"{name:<56} {size:>13} {memory:>7} {seconds:>5}  {text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="parts of the attacks' names")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        (make_ensemble if options.make == "ensemble" else ATTACKS[options.make].make)()
        return 0
    chosen = [
        attack
        for name, attack in ATTACKS.items()
        if not options.words or any(word == name or (word in name and word not in ATTACKS) for word in options.words)
    ]
    if options.list:
        sys.stdout.write("".join(f"{attack.name}\n" for attack in chosen))
        return 0
    return attack_all(chosen)


def attack_all(attacks: list[Attack]) -> int:
    with tempfile.TemporaryDirectory(prefix="sizes-") as place:
        if any(attack.needs_ensemble for attack in attacks):
            made = run([__file__, "--make", "ensemble"], Path(place))
            if made.code != 0:
                raise SystemExit(f"the ensemble cannot be made: {made.lines[-1:]}")
        print_row("attack", "bytes on disk", "MB", "s", "outcome")
        if len(attacks) == len(ATTACKS):
            base = run(["-c", BASELINE], Path(place))
            print_row(BASELINE, 0, f"{base.memory:.0f}", f"{base.seconds:.0f}", "for comparison")
        outcomes = []
        for attack in attacks:
            outcome = attack_it(attack, Path(place, "pair"))
            outcomes.append(outcome)
            text = outcome.text if outcome.is_kept else f"FAILED {outcome.text}"
            memory, seconds = f"{outcome.memory:.0f}", f"{outcome.seconds:.0f}"
            print_row(outcome.name, f"{outcome.size:,}", memory, seconds, textwrap.shorten(text, 110))
    failed = [outcome for outcome in outcomes if not outcome.is_kept]
    most, longest = max(o.memory for o in outcomes), max(o.seconds for o in outcomes)
    sys.stdout.write(
        f"{len(outcomes)} attacks, {len(failed)} failed; at most {most:,.0f} MB of {MEMORY:,} and {longest:.0f} s of "
        f"{SECONDS}\n"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
