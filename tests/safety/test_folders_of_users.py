"""Nothing of a user's is lost when an ensemble is replaced, and nothing is published that was not asked for."""

import errno
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from concat_ensemble import assemble, extract_features, files
from concat_ensemble.commands.app import main
from concat_ensemble.data.loading import load_data
from concat_ensemble.features.extraction import shard_sizes
from concat_ensemble.hub import choose_files
from concat_ensemble.modeling.weights_concat_ensemble import INDEX_NAME, SHARD_NAME
from concat_ensemble.reporting.model_card import write_card
from concat_ensemble.studies.results import Results
from concat_ensemble.training.saving import replace_result
from tests.safety.conftest import contents

OF_THE_USER = {
    "notes.txt": "mine",
    "notes/deep/plan.md": "mine",
    ".git/HEAD": "ref: refs/heads/main",
    ".git/objects/ab/cdef": "blob",
    ".gitignore": "*.pt",
    ".env": "HF_TOKEN=mine",
    "optimizer.pt": "state",
    "own_code.py": "print('mine')",
    "model.py": "print('mine')",
    "results/why.txt": "mine",
    "figures/mine.png": "drawn by hand",
    ".eval_results/of-another-benchmark.yaml": "mine: 1",
    "checkpoint-5/member-00.safetensors": "weights",
    "checkpoint-5/config.json": "{}",
    "my-member-00.safetensors": "weights",
    "pytorch_model.bin": "pickle",
    "README.md.orig": "mine",
    "config.json.bak": "{}",
    "name with [brackets]* and ü": "mine",
    "-rf": "mine",
    "empty": "",
}


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def leftovers(place: Path) -> list[Path]:
    ends = (".tmp", ".replaced")
    return [path for path in place.rglob("*") if path.name.endswith(ends) or path.name.startswith(".saving-")]


@pytest.fixture
def run(monkeypatch, capsys, world):
    """`run(*words)`: what a command prints on stderr; it must not fail."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["concat-ensemble", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        error = capsys.readouterr().err
        assert not stop.value.code, error
        assert not leftovers(world)
        return error

    return run


@pytest.fixture(scope="session")
def other(backbone, tmp_path_factory):
    """An ensemble of one member, with other weights than those of `made`."""
    path = tmp_path_factory.mktemp("other") / "one"
    member = assemble([backbone])
    with torch.no_grad():
        next(member.parameters()).add_(1)
    member.save_pretrained(path)
    return path


# --- replacing an ensemble -------------------------------------------------------------------------------------------


def test_build_overwrite_replaces_what_is_ours_and_keeps_the_rest(folder, other, run):
    write(folder, OF_THE_USER)
    (folder / "data").symlink_to(folder.parent.parent / "outside")
    (folder / "key").symlink_to(folder.parent.parent / "outside/precious.txt")
    (folder / "broken").symlink_to("nowhere")
    (folder / "empty-folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "script.sh").write_text("mine")
    (folder / "script.sh").chmod(0o750)
    folder.chmod(0o750)
    numbers = {name: (folder / name).stat().st_ino for name in OF_THE_USER}
    run("build", other, "--output", "pair", "--overwrite")
    for name, text in OF_THE_USER.items():
        assert (folder / name).read_text() == text, name
        assert (folder / name).stat().st_ino == numbers[name], f"{name} is the same file, not a copy"
    assert (folder / "data").is_symlink() and (folder / "key").is_symlink() and (folder / "broken").is_symlink()
    assert (folder / "empty-folder").is_dir() and stat.S_ISFIFO((folder / "pipe").stat().st_mode)
    assert stat.S_IMODE((folder / "script.sh").stat().st_mode) == 0o750
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert len(AutoModel.from_pretrained(folder).config.members) == 1
    assert [path.name for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name)] == ["member-00.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["pair"]


def test_what_was_measured_on_other_weights_is_put_aside_and_never_lost(folder, other, made, run):
    write_card(folder)
    write(folder, {"selection/digits.json": "{}", "selection/digits.png": "x", "overlap/digits.json": "{}"})
    write(folder, {".eval_results/digits.yaml": "x", "results/torn.json": "{"})
    assert "Top-1" in (folder / "README.md").read_text()
    said = run("build", other, "--output", "pair", "--overwrite")
    assert "pair/results/digits.json was measured with other weights and is now pair/results.old/digits.json" in said
    moved = {"results.old/digits.json", "results.old/torn.json", "selection.old/digits.json"}
    moved |= {"selection.old/digits.png", "overlap.old/digits.json"}
    assert moved <= set(contents(folder))
    for stale in ("results", "figures", ".eval_results", "selection", "overlap"):
        assert not (folder / stale).exists()
    assert "No accuracy was measured" in (folder / "README.md").read_text()
    run("card", "pair", "--check")
    write(folder, {"results/digits.json": "another one"})
    run("build", made, "--output", "pair", "--overwrite", "--quiet")
    assert (folder / "results.old/digits-2.json").read_text() == "another one"
    assert Results.load(folder / "results.old/digits.json")["pair"].mean == 0.5


def test_what_was_measured_on_the_same_weights_stays_on_the_card(folder, made, run):
    write_card(folder)
    write(folder, {"selection/digits.json": "{}"})
    before = (folder / "results/digits.json").read_bytes()
    assert run("build", made, "--output", "pair", "--overwrite") == ""
    assert (folder / "results/digits.json").read_bytes() == before and (folder / "selection/digits.json").is_file()
    assert (folder / "figures/digits.png").is_file() and "digits" in (folder / "README.md").read_text()
    run("card", "pair", "--check")


@pytest.mark.parametrize("text", ["# My ensemble\n\nMy words.\n", "", "---\nlicense: mit\n---\n", "\ufeff# Mine"])
def test_a_readme_that_is_not_our_card_stays(text, folder, other, run):
    (folder / "README.md").write_text(text)
    assert "is your own and stays" in run("build", other, "--output", "pair", "--overwrite")
    assert (folder / "README.md").read_text() == text


def test_sections_and_title_of_a_user_stay_on_the_card(folder, other, run):
    write_card(folder, "me/pair")
    card = folder / "README.md"
    card.write_text(card.read_text() + "\n## How I use it\n\nMy words.\n")
    assert "README.old" not in run("build", other, "--output", "pair", "--overwrite")
    assert "# me/pair\n" in card.read_text() and "## How I use it\n\nMy words.\n" in card.read_text()
    assert "README.old.md" not in contents(folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("as one model", "as my favourite model"),
        lambda text: text.replace("---\n", "---\nbad: [\n", 1),
        lambda text: text + "\nMy words, without a heading.\n",
    ],
)
def test_a_card_with_other_edits_is_kept_beside_the_new_one(edit, folder, other, run):
    write_card(folder)
    card = folder / "README.md"
    write(folder, {"README.old.md": "from before", "README.md": edit(card.read_text())})
    edited = card.read_text()
    assert "pair/README.old-2.md" in run("build", other, "--output", "pair", "--overwrite")
    assert (folder / "README.old.md").read_text() == "from before"
    assert (folder / "README.old-2.md").read_text() == edited
    run("card", "pair", "--check")


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_licence_is_replaced_only_if_it_is_ours(is_ours, folder, made, run):
    write_card(folder)
    license = folder / "LICENSE.md"
    assert license.is_file(), "the members state no licence"
    if not is_ours:
        license.write_text("my terms")
    run("build", made, "--output", "pair", "--overwrite", "--license", "mit")
    assert (not license.exists()) if is_ours else license.read_text() == "my terms"


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "member-00.safetensors", "modeling_concat_ensemble.py"])
def test_a_link_in_the_place_of_a_file_of_ours_is_refused(name, folder, other, refused):
    target = folder.parent.parent / "outside" / name if name != INDEX_NAME else folder / "index.json"
    if name == INDEX_NAME:
        (folder / name).rename(target)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    refused("build", other, "--output", "pair", "--overwrite", said="is a link to")


@pytest.mark.parametrize("name", ["preprocessor_config.json", "config.json", "member-00.safetensors"])
def test_a_folder_in_the_place_of_a_file_of_ours_is_refused(name, folder, other, refused):
    (folder / name).unlink()
    write(folder, {f"{name}/mine.txt": "mine"})
    refused("build", other, "--output", "pair", "--overwrite", said=f"{name} is where a file is written")


def test_an_adapter_is_not_left_to_other_members(folder, other, refused):
    write(folder, {"adapter_config.json": "{}"})
    refused("build", other, "--output", "pair", "--overwrite", said="holds an adapter")


def test_an_output_that_is_a_link_to_an_ensemble_is_replaced_behind_it(folder, other, run):
    write(folder, OF_THE_USER)
    (folder.parent / "link").symlink_to("pair")
    run("build", other, "--output", "link", "--overwrite")
    assert (folder.parent / "link").is_symlink() and (folder / "notes.txt").read_text() == "mine"
    assert len(AutoModel.from_pretrained(folder).config.members) == 1


def test_where_no_hard_links_can_be_made_files_are_copied(folder, other, run, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "not permitted")

    write(folder, OF_THE_USER)
    monkeypatch.setattr(os, "link", refuse)  # as on exFAT
    run("build", other, "--output", "pair", "--overwrite")
    assert {name: (folder / name).read_text() for name in OF_THE_USER} == OF_THE_USER


def test_a_disk_that_is_mounted_in_the_folder_is_refused_and_stays(folder, other, refused, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    write(folder, OF_THE_USER)
    monkeypatch.setattr(os, "link", refuse)
    refused("build", other, "--output", "pair", "--overwrite", said="cross-device")


def test_where_folders_cannot_be_swapped_they_are_renamed(folder, other, run, monkeypatch):
    write(folder, OF_THE_USER)
    monkeypatch.setattr(files, "RENAME_EXCHANGE", 1 << 20)  # a flag that no system knows
    run("build", other, "--output", "pair", "--overwrite")
    assert {name: (folder / name).read_text() for name in OF_THE_USER} == OF_THE_USER


def test_a_kill_between_two_renames_is_mended_by_the_next_run(folder, other, run):
    write(folder, OF_THE_USER)
    folder.rename(folder.with_name(".pair.replaced"))
    write(folder.parent, {".pair.tmp/config.json": "half"})
    run("build", other, "--output", "pair", "--overwrite")
    assert {name: (folder / name).read_text() for name in OF_THE_USER} == OF_THE_USER
    assert [path.name for path in folder.parent.iterdir()] == ["pair"]


def test_a_training_keeps_files_of_the_user_and_hidden_ones_beside(world):
    write(world, {"run/member-0/notes.txt": "mine", "run/.member-0.notes/x": "mine", "run/member-0/config.json": "{}"})
    with replace_result(world / "run/member-0", {"seed": 0}) as aside:
        write(aside, {"config.json": '{"new": 1}'})
    assert (world / "run/member-0/notes.txt").read_text() == (world / "run/.member-0.notes/x").read_text() == "mine"
    assert (world / "run/member-0/config.json").read_text() == '{"new": 1}'


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("results", ["probe", "pair", "--dataset", "digits", "--limit", "12"]),
        ("selection", ["select", "pair", "--dataset", "digits", "--limit", "12"]),
        (".eval_results", ["card", "pair"]),
    ],
)
def test_nothing_is_written_through_a_link_among_the_folders_of_an_ensemble(name, words, folder, refused):
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).symlink_to(folder.parent.parent / "outside")
    refused(*words, said=f"{name} is a link to")


# --- access ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027, 0o077])
def test_files_have_the_access_that_the_umask_gives(umask, folder, other, run, world):
    before = os.umask(umask)
    try:
        model = AutoModel.from_pretrained(folder)
        model.save_pretrained(world / "saved")
        run("build", "pair", "--output", "built")
        run("build", other, "--output", "built", "--overwrite")
        run("card", "built")
        extract_features(model, load_data("digits", classes=[0, 1], limit=12), store=world / "store", quiet=True)
        with replace_result(world / "result", {}) as aside:
            shutil.copy(other / "member-00.safetensors", aside)
    finally:
        os.umask(before)
    written = [path for name in ("saved", "built", "store", "result") for path in (world / name).rglob("*")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in written if path.name != ".lock"}
    assert len(modes) > 20 and any(path.suffix == ".safetensors" for path in modes)
    for path, mode in modes.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, f"{path} has {mode:o}"


# --- publishing ------------------------------------------------------------------------------------------------------

PRIVATE_KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nabc"
NEVER_ASKED_FOR = [
    *OF_THE_USER,
    "id_rsa",
    "id_ed25519.pub",
    "token.txt",
    "server.pem",
    "results/private.json",
    "results/table.html",
    "figures/private.png",
    "selection/digits.json",
    "results.old/digits.json",
    "member-07.safetensors",
    "model.safetensors",
    "wandb/run.log",
    "data/patients.csv",
    "predictions.csv",
    ".eval_results/private.yaml",
    "x.tmp",
]


@pytest.fixture(scope="module")
def carded(made, tmp_path_factory):
    folder = shutil.copytree(made, tmp_path_factory.mktemp("carded") / "pair")
    write_card(folder)
    write(folder, dict.fromkeys(NEVER_ASKED_FOR, "mine"))
    return folder


def test_what_is_ours_is_published(carded):
    assert set(choose_files(carded)[0]) == {
        "config.json",
        "preprocessor_config.json",
        INDEX_NAME,
        "member-00.safetensors",
        "member-01.safetensors",
        *(f"{part}_concat_ensemble.py" for part in ("configuration", "image_processing", "modeling", "weights")),
        "README.md",
        "LICENSE.md",
        "results/digits.json",
        "figures/digits.png",
    }


@pytest.mark.parametrize("name", NEVER_ASKED_FOR)
def test_a_file_that_nobody_asked_for_stays_and_is_named(name, carded):
    published, others = choose_files(carded)
    assert name not in published
    assert name in others or any(part.startswith(".") for part in name.split("/")), "hidden files are not named"


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["notes.txt"], ["notes.txt"]),
        (["notes/*"], ["notes/deep/plan.md"]),
        (["notes/"], ["notes/deep/plan.md"]),
        (["*.csv"], ["data/patients.csv", "predictions.csv"]),
        (["*.csv", "-rf"], ["data/patients.csv", "predictions.csv", "-rf"]),
        ([".gitignore"], [".gitignore"]),
        (["token.txt"], ["token.txt"]),
    ],
)
def test_include_names_more(patterns, names, carded):
    assert set(choose_files(carded, patterns)[0]) - set(choose_files(carded)[0]) == set(names)


@pytest.mark.parametrize("pattern", ["*", "**", "**/*", "*rsa*", "i?_rsa", "[a-z]*", "*.*"])
def test_no_pattern_takes_keys_tokens_or_hidden_files(pattern, carded):
    try:
        published = choose_files(carded, [pattern])[0]
    except ValueError as error:
        assert "give its whole name" in str(error)
    else:
        secret = {"id_rsa", "id_ed25519.pub", "token.txt", "server.pem", ".env", ".git/HEAD", ".gitignore"}
        assert not secret & set(published)


@pytest.mark.parametrize(
    "content",
    [
        PRIVATE_KEY,
        "-----BEGIN PRIVATE KEY-----",
        "x" * 70_000 + "\nexport HF_TOKEN=hf_" + "aB3" * 12,
        "ghp_" + "a1" * 18,
        "aws_access_key_id = AKIA" + "A" * 16,
    ],
)
@pytest.mark.parametrize("name", ["notes.md", "README.md"])
def test_a_key_or_token_inside_a_file_is_refused(name, content, folder, refused):
    write(folder, {name: content})
    refused("push", "pair", "me/x", "--include", name, said="holds a private key or an access token")


@pytest.mark.parametrize("shard", ["token.txt", "id_rsa", "notes.safetensors", "../outside/precious.txt", ".env"])
def test_an_index_that_names_other_files_publishes_none(shard, folder, refused):
    write(folder, {"token.txt": "mine", "id_rsa": "mine", "notes.safetensors": "mine", ".env": "mine"})
    index = folder / INDEX_NAME
    index.write_text(index.read_text().replace('"member-01.safetensors"', f'"{shard}"'))
    refused("push", "pair", "me/x", said="is no name of a file of weights")


@pytest.mark.parametrize(
    "name", ["notes", "results/digits.json", ".eval_results", "figures", ".eval_results/digits.yaml"]
)
def test_links_are_not_followed(name, folder, refused):
    target = folder.parent.parent / "outside"
    path = folder / name
    path.unlink() if path.is_file() else path.parent.mkdir(exist_ok=True)
    path.symlink_to(target if "." not in path.name[1:] else target / "precious.txt")
    refused("push", "pair", "me/x", "--include", "*", said="is a link")


def test_results_of_other_weights_are_not_published(folder, other):
    shutil.copy(folder / "results/digits.json", other.parent / "digits.json")
    write(folder, {"figures/digits.png": "x", "README.md": "mine"})
    results = folder / "results/digits.json"
    results.write_text(results.read_text().replace(Results.load(results).members_sha256[0], "0" * 64))
    published, others = choose_files(folder)
    assert "results/digits.json" in others and "figures/digits.png" in others and "README.md" in published


def test_a_model_in_memory_takes_no_foreign_file_or_link_along(folder, tmp_path):
    from concat_ensemble.modeling.weights_concat_ensemble import copy_card

    write_card(folder)
    write(folder, {"results/id_rsa": PRIVATE_KEY, "figures/notes.txt": "mine", ".eval_results/key": "mine"})
    (folder / "results/link.json").symlink_to(tmp_path / "outside/precious.txt")
    AutoModel.from_pretrained(folder).save_pretrained(folder.parent / "saved")
    assert copy_card(folder, folder.parent / "saved")
    copied = set(contents(folder.parent / "saved"))
    assert {"results/digits.json", "figures/digits.png", "README.md"} <= copied
    assert not copied & {"results/id_rsa", "figures/notes.txt", ".eval_results/key", "results/link.json"}


# --- what Ctrl-C leaves of an extraction -----------------------------------------------------------------------------


def test_the_first_files_are_small_and_the_features_do_not_depend_on_them(made, tmp_path, monkeypatch):
    assert shard_sizes(1000, 0, 64) == [64, 64, 128, 256, 488]
    assert shard_sizes(1500, 0, 512) == [512, 512, 476] and shard_sizes(100, 0, 1) == [32, 32, 36]
    assert shard_sizes(744, 256, 64) == [256, 488], "as a run that was not stopped goes on from there"
    from concat_ensemble.features import extraction

    model, data = AutoModel.from_pretrained(made), load_data("digits", limit=60)
    tables = []
    for first, most in [(32, 512), (1, 512), (7, 21), (512, 512)]:
        monkeypatch.setattr(extraction, "FIRST_SHARD", first)
        monkeypatch.setattr(extraction, "SHARD_IMAGES", most)
        store = tmp_path / f"{first}-{most}"
        tables.append(extract_features(model, data, store=store, batch_size=7, quiet=True)["train"].features)
    assert all((tables[0] == table).all() for table in tables)


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_ctrl_c_keeps_every_batch_that_was_computed(batches, made, tmp_path, monkeypatch):
    from concat_ensemble.features import extraction

    model, data = AutoModel.from_pretrained(made), load_data("digits", limit=60)
    expected = extract_features(model, data, store=tmp_path / "whole", batch_size=8, quiet=True)
    forward, calls = extraction._Run._forward, []

    def stop(*args):
        calls.append(1)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(extraction._Run, "_forward", stop)
        with pytest.raises(KeyboardInterrupt):
            extract_features(model, data, store=tmp_path / "cut", batch_size=8, quiet=True)
    again = extract_features(model, data, store=tmp_path / "cut", batch_size=8, quiet=True)
    assert again.extracted == expected.extracted - 8 * batches
    assert all((again[split].features == expected[split].features).all() for split in again)
