"""Install the wheel of a folder into a new environment of each Python, and run the quick path there, offline: build an
ensemble of two tiny members, load it with transformers' AutoModel, and probe it on the digits.

    python tests/try_wheel.py dist 3.11 3.12 3.13

A Python that is not found is skipped, unless it is the only one. It is looked for on PATH and among pyenv's. An
environment takes about 6 GB and is removed in the end.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LOAD = """
import sys
import concat_ensemble
from transformers import AutoModel

assert concat_ensemble.__version__ == sys.argv[1], concat_ensemble.__version__
model = AutoModel.from_pretrained("two")
assert type(model) is concat_ensemble.ConcatEnsembleModel and len(model.members) == 2
print(f"Python {sys.version.split()[0]}: {model.config.num_features} features from {concat_ensemble.__file__}")
"""


def find_python(version: str) -> str | None:
    """The program of a Python such as 3.12, or None if there is none."""
    found = shutil.which(f"python{version}")
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for program in filter(None, [found, *map(str, pyenv)]):  # one of pyenv on PATH may be a stand-in that fails
        done = subprocess.run([program, "--version"], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.startswith(f"Python {version}."):
            return program
    return None


def try_wheel(wheel: Path, python: str, packages: Path | None) -> None:
    """Install the wheel, and run the quick path in an empty folder. Raises CalledProcessError where anything fails."""
    version = re.split("-", wheel.name)[1]
    with tempfile.TemporaryDirectory(prefix="try-wheel-") as folder:
        place = Path(folder, "place")
        place.mkdir()
        subprocess.run([python, "-m", "venv", f"{folder}/venv"], check=True)
        programs = Path(folder, "venv", "bin")
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        offline = environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{folder}/cache"}

        def run(program: str, *words: str, env: dict[str, str] = offline) -> None:
            subprocess.run([programs / program, *words], cwd=place, env=env, check=True)

        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if packages:
            (site,) = Path(folder, "venv").glob("lib/python*/site-packages")
            (site / "dependencies.pth").write_text(f"{packages.resolve()}\n")
            install.append("--no-deps")
        run("python", *install, str(wheel.resolve()), env=environment)
        run("concat-ensemble", "build", "random:test_vit", "random:test_resnet", "--output", "two")
        run("python", "-c", LOAD, version)
        run("concat-ensemble", "probe", "two", "--dataset", "digits", "--limit", "100", "--quiet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="has the wheel")
    parser.add_argument("versions", nargs="+", help="Pythons, such as 3.12")
    parser.add_argument("--packages", type=Path, help="site-packages with the dependencies, in place of downloads")
    options = parser.parse_args()
    (wheel,) = options.folder.glob("*.whl")
    pythons = {version: find_python(version) for version in options.versions}
    if not any(pythons.values()):
        parser.exit(2, f"no Python {' or '.join(options.versions)} is here.\n")
    for version, python in pythons.items():
        if python is None:
            print(f"Python {version} is not here; skipped.", flush=True)
            continue
        try:
            try_wheel(wheel, python, options.packages)
        except subprocess.CalledProcessError as error:
            parser.exit(2, f"{wheel.name} fails in Python {version}: {error}\n")
        print(f"{wheel.name} works in Python {version}.", flush=True)


if __name__ == "__main__":
    sys.exit(main())
