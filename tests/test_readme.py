"""The README's Python runs as it stands, and its commands name things that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from concat_ensemble.command_line import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch):
    """In order, in one namespace, with the demo's folder made by its smoke run's own scripts."""
    monkeypatch.chdir(tmp_path)
    train = ["training/pretrain_members.py", "training/recipes/scattered_digits_timecat.yaml", "--cpu", "--smoke"]
    command = [sys.executable, *train, "--output", str(tmp_path / "runs" / "demo")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    namespace = {"image": Image.new("RGB", (40, 30), "teal")}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["features"].shape == (1, 256)


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines() if line])
def test_commands_exist(line):
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif words[0] == "concat-ensemble":
        if words[1] == "reproduce":  # its options are its script's, which tests/training runs
            return
        shown = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        assert all(word in shown.stdout for word in words if word.startswith("--"))
    elif words[0] == "accelerate":
        assert all((ROOT / word).is_file() for word in words if "/" in word)
    else:
        assert line == "pip install ."
