"""Parts of error messages, from Python and on a command line."""

import huggingface_hub.constants
import pytest

from concat_ensemble.data.loading import load_data
from concat_ensemble.errors import argument, describe_error, first_line, name_options, option_name
from concat_ensemble.files import describe_missing_folder, is_hub_id


@pytest.mark.parametrize(
    ("name", "value", "in_python", "on_a_command_line"),
    [
        ("test_size", 50.0, "test_size=50.0", "--test-size 50"),
        ("limit", 0, "limit=0", "--limit 0"),
        ("classes", [3, "eleven"], "classes=[3, 'eleven']", "--classes 3,eleven"),
        ("train_split", "train[:80%]", "train_split='train[:80%]'", "--train-split 'train[:80%]'"),
        ("skip_bad", True, "skip_bad=True", "--skip-bad"),
        ("model_arg", {"img_size": 384}, "model_arg={'img_size': 384}", "--model-arg img_size=384"),
    ],
)
def test_an_argument_is_named_as_the_user_wrote_it(name, value, in_python, on_a_command_line):
    assert (argument(name), argument(name, value)) == (name, in_python)
    with name_options(option_name):
        assert argument(name) == option_name(name) and argument(name, value) == on_a_command_line
    assert argument(name, value) == in_python


def test_an_argument_without_an_option_is_named_in_words():
    with name_options({"name": "--dataset"}.get):
        assert argument("name", "digits") == "--dataset digits"
        assert argument("validation_size", 0.2) == "validation size 0.2"


def test_an_error_within_a_command_ends_its_names():
    with pytest.raises(ValueError, match=r"^--limit 0 must be at least 1"), name_options(option_name):
        load_data("digits", limit=0)
    with pytest.raises(ValueError, match=r"^limit=0 must be at least 1"):
        load_data("digits", limit=0)


def caught(call) -> OSError:
    with pytest.raises(OSError) as error:
        call()
    return error.value


def test_errors_of_the_system_are_in_words(tmp_path):
    missing = tmp_path / "nowhere.json"
    (tmp_path / "file").write_text("")
    for call in (missing.read_text, missing.stat, missing.unlink, lambda: list(missing.iterdir())):
        assert describe_error(caught(call)) == f"no such file: {missing}"
    assert describe_error(caught(lambda: missing.rename(tmp_path / "x"))) == f"no such file: {missing} -> {tmp_path}/x"
    assert describe_error(caught(tmp_path.read_text)) == f"is a directory: {tmp_path}"
    assert first_line(caught((tmp_path / "file" / "x").mkdir)) == f"not a directory: {tmp_path}/file/x"
    assert describe_error(OSError("our own words")) == "our own words"
    assert describe_error(FileNotFoundError("No such file or directory: x")) == "no such file: x"
    assert describe_error(OSError(2, "Failed to open 'x'. Detail: [errno 2] No such file or directory")) == (
        "Failed to open 'x'. Detail: no such file"
    )


@pytest.mark.parametrize("variable", ["HF_ASSETS_CACHE", "HF_HUB_CACHE", "HF_XET_CACHE"])
def test_a_cache_that_cannot_be_written_names_its_variable(variable, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    monkeypatch.setattr(huggingface_hub.constants, variable, str(cache))
    remedy = f"; set {variable}, or HF_HOME for all caches, to a folder that can be written"
    for folder in (cache, cache / "models--me--pair"):
        assert describe_error(caught(folder.mkdir)) == f"not a directory: {folder}{remedy}"
    beside = tmp_path / "file" / "other"
    assert describe_error(caught(beside.mkdir)) == f"not a directory: {beside}"


def test_a_file_that_is_missing_in_a_cache_is_only_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert describe_error(caught((tmp_path / "x").read_text)) == f"no such file: {tmp_path}/x"


def test_a_missing_folder_is_named_with_one_of_a_similar_name(tmp_path):
    (tmp_path / "two-resnets").mkdir()
    (tmp_path / "two-resnet.txt").write_text("")
    assert describe_missing_folder(tmp_path / "two-resnet").endswith(f"; did you mean {tmp_path / 'two-resnets'}?")
    assert describe_missing_folder("nowhere/at/all") == "no such folder: nowhere/at/all."


@pytest.mark.parametrize("name", ["me/pair", "me/pair.v2@main"])
def test_names_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name)
    (tmp_path / name).mkdir(parents=True)
    assert not is_hub_id(name)


@pytest.mark.parametrize("name", ["pair", "./pair", "../pair", "/pair", "~/pair", "a/b/c", ""])
def test_paths_are_no_names_on_the_hub(name):
    assert not is_hub_id(name)
