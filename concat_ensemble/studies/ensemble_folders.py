"""The folder of a new ensemble: whether it may be written, and how it takes the place of an earlier one, of which it
keeps what is not ours."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

from concat_ensemble.console import errors
from concat_ensemble.errors import argument
from concat_ensemble.files import replace_folder
from concat_ensemble.modeling.configuration_concat_ensemble import PAYLOAD_FILES, ConcatEnsembleConfig
from concat_ensemble.modeling.weights_concat_ensemble import INDEX_NAME, SHARD_NAME
from concat_ensemble.studies.outputs import check_parent
from concat_ensemble.studies.provenance import members_sha256
from concat_ensemble.studies.results import RESULTS, Results

WRITTEN_BY = "<!-- Written by `concat-ensemble card`"  # marks a card and a LICENSE.md of ours
MODEL_FILES = {"config.json", "preprocessor_config.json", INDEX_NAME, *PAYLOAD_FILES}
TRAINING_FIGURE = "figures/training.png"  # the members' training curves
MEASURED = ("results/*.json", "selection/*.json", "selection/*.png", "overlap/*.json")  # with an ensemble's members


def check_folder(path: Path, overwrite: bool) -> None:
    """Raise ValueError where a new ensemble's folder cannot be written, or may not take the place of what is there,
    and OSError for a link where a file of the ensemble would be written."""
    output, replace = argument("output"), argument("overwrite", True)
    if path.is_file():
        raise ValueError(f"{path} is a file; name a folder with {output}.")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"{path} holds something already; add {replace} or name another {output}.")
        if not (path / INDEX_NAME).is_file():
            reason = f"something other than an ensemble, which {replace} does not delete"
            raise ValueError(f"{path} holds {reason}; name another {output}.")
        if (path / "adapter_config.json").exists():
            problem = f"{path} holds an adapter, which new members would be loaded with"
            raise ValueError(f"{problem}; name another {output}.")
        for file in path.iterdir():
            if file.is_symlink() and (file.name in MODEL_FILES or SHARD_NAME.fullmatch(file.name)):
                raise OSError(f"{file} is a link to {file.readlink()}; remove it, or name another {output}.")
    check_parent(path.resolve())


def replace_ensemble(
    path: Path, save: Callable[[Path], None], write_card: Callable[[Path], str | None], *, quiet: bool = False
) -> None:
    """Save an ensemble and its card into a new folder, which takes the place of `path` in one step.

    Model files of an ensemble that is there are replaced. What was measured with the very same weights stays; with
    others, it would be false beside the new ones, so it goes to `results.old`, `selection.old` and `overlap.old`, and
    its figures go. All other files stay as they are. Unless `quiet`, stderr says what was put aside, also by
    `write_card`, which returns a sentence on that.
    """
    moved: dict[str, str] = {}
    stale: set[str] = set()
    with replace_folder(path, lambda name: name in stale or bool(SHARD_NAME.fullmatch(name))) as folder:
        save(folder)
        if path.is_dir():
            moved, figures = _carry_over(path, folder)
            stale = {*moved, *figures, *_carry_training_figure(path, folder)}
        note = write_card(folder)
    notes = [f"{path / name} was measured with other weights and is now {path / new}" for name, new in moved.items()]
    for line in [*notes, *filter(None, [note])]:
        if not quiet:
            errors.print(line, soft_wrap=True)


def free_name(path: Path, *folders: Path) -> str:
    """The name of `path`, or with -2, -3, ... one that no file in these folders has."""
    names = itertools.chain([path.name], (f"{path.stem}-{number}{path.suffix}" for number in itertools.count(2)))
    return next(name for name in names if not any((folder / name).exists() for folder in folders))


def _carry_over(old: Path, new: Path) -> tuple[dict[str, str], set[str]]:
    """Copy the measurements and the licence of an ensemble's folder that concern the new one, and other measurements
    under another name. Returns the old and new names of these, and which figures and licence are not needed."""
    hashes, moved, stale = _read_hashes(new), {}, set()
    same = _read_hashes(old) == hashes
    for file in sorted(file for pattern in MEASURED for file in old.glob(pattern)):
        room, name = file.parent.name, file.relative_to(old).as_posix()
        if not _is_plain(file) or file.parent.is_symlink():
            continue
        if is_measured_on(file, hashes) if room == RESULTS else same:
            if not (new / name).exists():
                _copy(file, new / name)
            continue
        aside = new / f"{room}.old"
        moved[name] = f"{aside.name}/{free_name(file, aside, old / aside.name)}"
        _copy(file, new / moved[name])
        if room == RESULTS:
            stale |= set(card_files(file.stem))
    license = old / "LICENSE.md"
    if _is_plain(license):
        if WRITTEN_BY in license.read_text(errors="replace"):
            stale.add(license.name)
        else:
            _copy(license, new / license.name)
    for room in ("results", "figures", ".eval_results", "selection", "overlap"):
        files = {file.relative_to(old).as_posix() for file in old.glob(f"{room}/*")}
        if files and files <= {*moved, *stale}:
            stale.add(room)
    return moved, stale


def _carry_training_figure(old: Path, new: Path) -> list[str]:
    """Copy the members' training curves if the new ensemble has the same members; else return their name, as stale."""
    figure, target = old / TRAINING_FIGURE, new / TRAINING_FIGURE
    if _read_hashes(old) != _read_hashes(new):
        return [TRAINING_FIGURE]
    if _is_plain(figure) and not figure.parent.is_symlink() and not target.exists():
        _copy(figure, target)
    return []


def card_files(stem: str) -> list[str]:
    """What a card shows and tells the Hub of the results with this name."""
    figures = [f"figures/{stem}{kind}.png" for kind in ("", ".recall", ".confusion")]
    return [*figures, f".eval_results/{stem}.yaml"]


def _is_plain(file: Path) -> bool:
    """Whether it is a file: neither a link nor a pipe, which might never end."""
    return file.is_file() and not file.is_symlink()


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    shutil.copy2(file, target)


def _read_hashes(folder: Path) -> list[str] | None:
    try:
        return members_sha256(ConcatEnsembleConfig.from_pretrained(folder))
    except (OSError, ValueError):  # an ensemble that is broken, or from elsewhere
        return None


def is_measured_on(file: Path, hashes: list[str] | None) -> bool:
    """Whether a file holds results of members with these hashes of their weights."""
    try:
        return _is_plain(file) and Results.load(file).members_sha256 == hashes
    except (OSError, ValueError):
        return False
