"""The cards in model_cards/ are those that their results give."""

import shutil
from pathlib import Path

import pytest

from concat_ensemble.reporting.card_index import index_text
from concat_ensemble.reporting.model_card import check_card, write_card

CARDS = Path(__file__).parents[1] / "model_cards"
FOLDERS = sorted(path.parent for path in CARDS.glob("*/config.json"))


def test_there_are_cards():
    assert len(FOLDERS) >= 3


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_card_is_what_its_results_give_byte_for_byte(folder, tmp_path):
    again = tmp_path / folder.name
    shutil.copytree(folder, again, ignore=shutil.ignore_patterns("*.md", "*.png"))
    write_card(again)
    check_card(folder)
    for path in [*folder.rglob("*.md"), *folder.rglob("*.json")]:
        assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes(), path.name
    figures = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    assert figures == {str(path.relative_to(again)) for path in again.rglob("*.png")}


def test_the_index_lists_all_of_them():
    assert (CARDS / "README.md").read_text() == index_text(CARDS)


def test_they_contain_no_path_of_a_machine():
    for path in [*CARDS.rglob("*.md"), *CARDS.rglob("*.json")]:
        assert not any(start in path.read_text() for start in ("/home/", "/root/", "/tmp/", "/Users/")), path
