"""A dataset of four channels through the commands: build, probe, card, verify, predict."""

import csv
import io
import json

import numpy as np
import PIL.Image
import pytest
import timm
import torch

from concat_ensemble import assemble

TINY = {
    "channels": (8, 8, 16, 16),
    "stem_width": 8,
    "pretrained_cfg_overlay": {"input_size": (3, 32, 32), "crop_pct": 1.0},
}


@pytest.fixture
def bands(tmp_path):
    """A folder of TIFFs of four pages with 16 bits: classes differ in near infrared alone."""
    rng = np.random.default_rng(0)
    for number in range(120):
        kind = number % 2
        pages = rng.integers(0, 20_000, (4, 12, 14))
        pages[3, :, 7 * kind : 7 * kind + 7] += 30_000  # bright on the left or on the right
        images = [PIL.Image.fromarray(page.astype(np.uint16)) for page in pages]
        folder = tmp_path / "bands" / ("bare", "grown")[kind]
        folder.mkdir(parents=True, exist_ok=True)
        images[0].save(folder / f"{number}.tif", save_all=True, append_images=images[1:])
    return tmp_path / "bands"


def test_an_ensemble_of_rgb_and_four_channels_is_probed_verified_and_predicts(bands, run, tmp_path):
    torch.manual_seed(0)
    rgb = assemble(timm.create_model("resnet10t", **TINY), channels=[0, 1, 2])
    four = timm.create_model("resnet10t", in_chans=4, **TINY)
    assemble([rgb, four]).save_pretrained("mixed")
    code, out, err = run("probe", "mixed", "--dataset", f"imagefolder:{bands}", "--save-head", "--json", "--quiet")
    assert code == 0, err
    rows = [(row["kind"], row["name"], row["runs"][0]["metrics"]["top1"]) for row in json.loads(out)["rows"]]
    alone, scores = [score for kind, _, score in rows if kind == "member"], {name: score for _, name, score in rows}
    assert alone[0] < 0.7 and alone[1] > 0.9 and scores["raw pixels"] > 0.9, scores
    assert {"untrained members", "majority class"} <= set(scores)
    code, out, err = run("card", "mixed")
    card = (tmp_path / "mixed" / "README.md").read_text()
    assert code == 0 and "| 4x32x32 (channels 0, 1, 2, 3) |" in card and "| 3x32x32 (channels 0, 1, 2) |" in card
    code, out, err = run("verify", "mixed", "--dataset", f"imagefolder:{bands}")
    assert code == 0, out + err
    code, out, err = run("predict", "mixed", bands, "--quiet")
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO(out)))
    correct = sum(row["file"].startswith(row["predicted"]) for row in rows)
    assert len(rows) == 120 and correct > 110


def test_a_picture_with_too_few_channels_is_named(bands, run, tmp_path):
    assemble(timm.create_model("resnet10t", in_chans=4, **TINY)).save_pretrained("four")
    PIL.Image.new("RGB", (9, 9)).save(bands / "bare" / "rgb.png")
    code, _, err = run("probe", "four", "--dataset", f"imagefolder:{bands}", "--quiet")
    assert code == 2
    assert "rgb.png): it has 3 channels, and members see channels up to number 3" in " ".join(err.split())


def test_build_sets_channels_mean_and_std(run, tmp_path):
    words = ["random:resnet10t", "--channels", "2,1,0", "--mean", "0.1,0.2,0.3", "--std", "1,1,0.5", "--output", "bgr"]
    code, out, err = run("build", *words)
    assert code == 0 and "3x176x176" in out, err
    assert "3x176x176 (channels 2, 1, 0)" in (tmp_path / "bgr" / "README.md").read_text()
    (member,) = json.loads((tmp_path / "bgr" / "config.json").read_text())["members"]
    seen = {key: member["preprocessing"][key] for key in ("channels", "mean", "std", "image_mode")}
    assert seen == {"channels": [2, 1, 0], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 0.5], "image_mode": "channels"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--channels", "red"], "--channels red: give numbers with commas between them"),
        (["--channels", "0,1"], "channels=[0, 1] must be 3 numbers"),
        (["--mean", "0.1;0.2"], "--mean 0.1;0.2: give numbers"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(run, words, message):
    code, _, err = run("build", "random:resnet10t", *words, "--output", "bgr")
    assert code == 2 and message in " ".join(err.split())
