"""What is pretrained on and probed in the experiments on shifts, their tables, and that they run."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from concat_ensemble import assemble, extract_features
from concat_ensemble.data.images import read_image
from concat_ensemble.data.labels import class_names, read_labels
from concat_ensemble.experiments import desk, shifts
from concat_ensemble.experiments.names import SHIFTS
from concat_ensemble.experiments.pictures import STYLES, add_marks, draw_in_style, read_digits
from concat_ensemble.experiments.shifts import EXPERIMENTS

DIGITS, _ = read_digits()


def pixels(split) -> np.ndarray:
    return np.stack([np.asarray(read_image(split, row)) for row in range(len(split))])


def in_8_bits(pictures: np.ndarray) -> list[bytes]:
    return [picture.tobytes() for picture in (pictures * 255).round().astype(np.uint8)]


def read_marks(pictures: np.ndarray) -> np.ndarray:
    """The mark of each picture (N, 10, 10) by its frame."""
    frames = pictures.copy()
    frames[:, 1:-1, 1:-1] = 0
    marks = add_marks(np.zeros((10, 8, 8), np.float32), np.arange(10)).reshape(10, -1)
    return (frames.reshape(len(frames), -1).astype(float) @ marks.T).argmax(1)


def test_names_are_those_of_the_command_line():
    assert tuple(EXPERIMENTS) == SHIFTS
    assert max(count + 44 + 30 for count in shifts.TAIL) == 174 == shifts.PRETRAINING + shifts.PROBE + shifts.TEST


def test_95_percent_of_the_marks_in_pretraining_agree_in_every_class():
    split = shifts.make_spurious(0).pretraining["train"]
    labels, marks = read_labels(split), read_marks(pixels(split))
    assert np.bincount(labels).tolist() == [72] * 10
    assert [int((marks[labels == c] == c).sum()) for c in range(10)] == [68] * 10


def test_marked_test_images_differ_in_the_mark_alone_and_the_heads_in_their_training_images():
    probings = shifts.make_spurious(1).probings
    assert tuple(each.title for each in probings) == shifts.HEADS
    without, with_it = probings
    agrees, reversed_, absent = pixels(without.data["test"]).astype(int).reshape(3, 480, 24, 24)
    for marked in (agrees, reversed_):
        assert (np.abs(marked - absent) > 2).mean() < 0.05
    labels = read_labels(without.data["test"]).reshape(3, -1)
    assert (labels == labels[0]).all() and np.bincount(labels[0]).tolist() == [48] * 10
    groups = without.columns["worst group"]
    assert len(groups) == 20 and sorted(np.concatenate(groups).tolist()) == list(range(960)), "no unmarked image"
    assert all(len(np.unique(labels.ravel()[rows])) == 1 for rows in groups)
    trained_on = [pixels(each.data["train"]).astype(int) for each in (without, with_it)]
    assert len(trained_on[0]) == 540 and (np.abs(trained_on[0] - trained_on[1]) > 2).mean() < 0.05


@pytest.mark.parametrize(("seed", "style"), enumerate(STYLES))
def test_a_held_out_style_is_not_trained_on_and_the_others_equally(seed, style):
    setting = shifts.make_domains(4 * 25 + seed, size=0.25)
    pictures = pixels(setting.pretraining["train"])
    assert np.bincount(read_labels(setting.pretraining["train"])).tolist() == [3 * 18] * 10
    kinds = {
        name: set(in_8_bits(draw_in_style(DIGITS, name, np.random.default_rng()))) for name in ("thick", "inverted")
    }
    styles = []
    for picture in pictures:
        if np.ptp(picture, axis=2).any():
            styles.append("colored")
        else:
            own = [name for name, known in kinds.items() if picture.tobytes() in known]
            styles.append(own[0] if own else "textured")
    assert {name: styles.count(name) for name in STYLES} == {name: 180 * (name != style) for name in STYLES}
    held_out, others, seen = setting.probings
    assert pixels(held_out.data["train"]).shape == (140, 24, 24, 3)
    assert held_out.data["test"]["image"][:] == others.data["test"]["image"][:] != seen.data["test"]["image"][:]
    assert others.data["train"]["image"][:] == seen.data["train"]["image"][:] != held_out.data["train"]["image"][:]


def test_class_frequencies_fall_from_100_to_1_and_the_probe_is_balanced():
    setting = shifts.make_long_tail(0)
    split = setting.pretraining["train"]
    assert np.bincount(read_labels(split)).tolist() == list(shifts.TAIL) == [100, 40, 16, 6, 3, 1]
    (probing,) = setting.probings
    assert np.bincount(read_labels(probing.data["train"])).tolist() == [30] * 10
    labels = read_labels(probing.data["test"])
    groups = {name: set(labels[rows].tolist()) for name, (rows,) in probing.columns.items()}
    frequent_first = [int(name) for name in class_names(split)]
    assert groups["head"] == set(frequent_first[:2]) and groups["tail"] == set(frequent_first[4:])
    assert groups["unseen"] == set(range(10)) - set(frequent_first)
    assert sorted(np.concatenate([rows for (rows,) in probing.columns.values()]).tolist()) == list(range(440))
    orders = {tuple(class_names(shifts.make_long_tail(seed).pretraining["train"])) for seed in range(4)}
    assert len(orders) == 4, "which classes are frequent is chance"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_seed_decides_everything(name):
    def images(seed):
        setting = EXPERIMENTS[name].make(seed, 0.1)
        data = [setting.pretraining, *(each.data for each in setting.probings)]
        return [split["image"][:] for each in data for split in each.values()]

    first = images(0)
    assert first == images(0)
    assert all(one != other for one, other in zip(first, images(1), strict=True))


def write_ensembles(backbone, folder: Path, shift: shifts.Shift, size: tuple[int, int, int]) -> None:
    for name in shift.trained:
        count = 1 if name == shifts.WIDE else int(name.removeprefix("cat"))
        members = [backbone(seed, pixels={"input_size": size}) for seed in range(count)]
        assemble(members).save_pretrained(folder / name)


def test_probing_gives_every_system_and_the_lowest_accuracy_of_several_sets(backbone, tmp_path):
    setting, shift = shifts.make_spurious(0, size=0.1), dataclasses.replace(EXPERIMENTS["spurious"], counts=(1, 2))
    write_ensembles(backbone, tmp_path, shift, (1, 24, 24))
    one_head = dataclasses.replace(setting, probings=setting.probings[1:])
    top1 = shifts.probe(shift, one_head, tmp_path, seed=0)
    columns = ("worst group", "mark agrees", "mark reversed", "no mark")
    assert list(top1) == [f"{shifts.HEADS[1]}: {column}" for column in columns]
    worst, agrees, reversed_, _ = top1.values()
    assert tuple(worst) == shift.systems == ("cat1", "cat2", "w2", "cat2 by PCA", "untrained members", "raw pixels")
    assert all(worst[system] <= min(agrees[system], reversed_[system]) for system in worst)


def test_one_network_is_the_mean_of_the_members_that_were_trained_in_full(backbone, tmp_path):
    setting, shift = shifts.make_domains(1, size=0.1), EXPERIMENTS["domains"]
    write_ensembles(backbone, tmp_path, shift, (3, 24, 24))
    one_head = dataclasses.replace(setting, probings=setting.probings[:1])
    (top1,) = shifts.probe(shift, one_head, tmp_path, seed=0).values()
    systems = ("cat1", "cat2", "cat4", "w2", "cat4 by PCA", "untrained members", "raw pixels")
    assert tuple(top1) == shift.systems == systems
    table = extract_features(assemble(tmp_path / "cat4"), one_head.probings[0].data, quiet=True)
    alone = [shifts.predict_correctly(table.members([k]), 0, standardize=True).mean() for k in range(4)]
    assert len(set(alone)) > 1 and top1["cat1"] == pytest.approx(np.mean(alone))
    assert top1["cat2"] == shifts.predict_correctly(table.members([0, 1]), 0, standardize=True).mean()


def test_a_table_has_a_column_for_each_part():
    values = {system: np.array([0.5, 0.6]) for system in EXPERIMENTS["spurious"].systems}
    shares = {"A: thick": values, "A: inverted": values | {"cat8": np.array([0.7, 0.82])}, "B: all": values}
    table = shifts.format_tables(shares)
    assert table.startswith("| A | thick | inverted |") and "| B | all |" in table
    assert "| cat8 minus cat1, paired | +0.0 [+0.0, +0.0] | +21.0 [+8.3, +33.7] |" in table
    assert "raw pixels minus" not in table and table.count("| raw pixels |") == 2


def test_a_file_of_other_settings_is_refused(tmp_path):
    content = {"asked": ["long-tail", [1, 8], 7, 3, 3], "top1": {}}
    (tmp_path / "seed-3.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"7, 3, 3.*2400, 600, 3.*name another --output"):
        shifts.measure_repeat("long-tail", desk.Setup("scattered_digits", "digits", tmp_path), 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIFTS)
def test_it_is_reproduced_end_to_end_and_once(script, tmp_path, name):
    command = [Path(sys.executable).with_name("concat-ensemble"), "reproduce", name, "--smoke", "--repeats", "2"]
    script(*command, "--output", tmp_path)
    page = (tmp_path / "smoke.md").read_text()
    networks = tmp_path / "smoke" / "networks" / name
    assert (networks / "table.md").read_text() in page and "**Not shown:**" in page
    assert (tmp_path / "smoke" / f"{name}.png").stat().st_size > 10_000
    assert not list((networks / "members").iterdir()), "the networks are deleted once they are measured"
    before = {path: path.stat().st_mtime_ns for path in networks.glob("*.json")}
    assert len(before) == 2
    (tmp_path / "smoke" / f"{name}.json").unlink()
    script(*command, "--output", tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in networks.glob("*.json")}
