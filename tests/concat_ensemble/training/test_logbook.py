"""What people watch: lines, the CSV file, evaluations, the best weights, a tracker and the figure."""

import contextlib
import json
import subprocess
import sys

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import set_seed
from PIL import Image

from concat_ensemble.training.batches import Pixels
from concat_ensemble.training.evaluation import Evaluation, evaluate, predict_logits
from concat_ensemble.training.images import Images
from concat_ensemble.training.logbook import COLUMNS, cut_log, draw_curves, read_log
from concat_ensemble.training.loop import Loop, create_accelerator
from concat_ensemble.training.pretraining import Objective
from concat_ensemble.training.recipe import Recipe
from tests.concat_ensemble.training.conftest import SMALL

GREY = Pixels((1, 32, 32), (0.5,), (0.5,))
BASE = SMALL | {
    "total_steps": 10,
    "batch_size": 8,
    "checkpoint_every": 4,
    "evaluate_every": 5,
    "validation_size": 0.3,
    "log_every": 3,
}
MEASURED = ("images_per_second", "seconds")


class Recorder(GeneralTracker):
    """A tracker that remembers what it is told."""

    name, requires_logging_directory = "recorder", False

    def __init__(self):
        super().__init__()
        self.config, self.values = None, {}

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.values[step] = values


class Cut(Exception):
    """Stands for a kill within one process."""


@pytest.fixture
def train(tmp_path):
    """`train(folder, cut_at=None, accelerator=None, **changes)`: a training up to a part of a batch, or to its end.
    Returns the loop and the networks that it saves."""

    def train(folder="run", cut_at=None, accelerator=None, **changes):
        recipe, networks = Recipe(**BASE | changes), []
        for seed in range(recipe.members_per_process):
            set_seed(seed)
            networks.append(timm.create_model(recipe.architecture, num_classes=10, **recipe.model_args))
        images = Images(recipe, GREY)
        loop = Loop(
            accelerator or create_accelerator(recipe, cpu=True),
            recipe,
            networks,
            steps=10,
            folder=tmp_path / folder / "checkpoints",
            identity={},
            name="net",
            logs=[tmp_path / folder / f"net-{k}.csv" for k in range(len(networks))],
        )

        def batches(step, *place):
            for number, part in enumerate(images.batches(range(len(networks)), step, *place), step):
                if number == cut_at:
                    raise Cut
                yield part

        saved = []
        for _ in loop.run(
            batches, Objective(recipe), evaluate=lambda network: evaluate(network, images, loop.accelerator)
        ):
            saved = loop.networks_to_save()
        loop.finish()
        return loop, saved

    return train


def rows(file) -> list[dict]:
    """Rows of a log without what is timed."""
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in read_log(file)]


def test_lines_rows_and_figure_of_two_networks(train, tmp_path, capsys):
    train(members_per_process=2, members=[2])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 5 + 2 * 2 and all(len(line) <= 100 for line in lines)
    assert lines[0].startswith("net-0: step 3/10 (30%), loss ") and lines[1].startswith(
        "net-1: step 3/10 (30%), loss "
    )
    assert " images/s, ETA 0:00:" in lines[0] and ", lr " in lines[0]
    held_out = [line for line in lines if "held-out" in line]
    assert held_out[0].startswith("net-0: step 5/10, held-out top-1 ") and ", top-5 " in held_out[0]
    for k in range(2):
        file = tmp_path / "run" / f"net-{k}.csv"
        assert file.read_text().splitlines()[0] == ",".join(COLUMNS)
        log = read_log(file)
        assert [row["step"] for row in log] == [3, 5, 6, 9, 10], "one row a step, also where both are due"
        assert [row["step"] for row in log if "eval_loss" in row] == [5, 10]
        assert all(0 <= row["eval_top1"] <= row["eval_top5"] <= 1 for row in log if "eval_top1" in row)
        assert all(row["images_per_second"] > 0 for row in log)
    draw_curves([tmp_path / "run" / f"net-{k}.csv" for k in range(2)], tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width >= 700
    draw_curves([tmp_path / "no.csv"], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_an_interrupted_training_writes_the_same_rows(train, tmp_path):
    train("whole")
    for cut_at in (2, 7):  # before and after the first checkpoint, which is in the middle of an interval
        with contextlib.suppress(Cut):
            train(cut_at=cut_at)
    file = tmp_path / "run" / "net-0.csv"
    assert [row["step"] for row in read_log(file)] == [3, 5, 6]
    with file.open("a") as opened:
        opened.write("9,1.2")  # a kill while a line is written
    train()
    assert rows(file) == rows(tmp_path / "whole" / "net-0.csv")


@pytest.mark.parametrize("rest", ["", "9,1.", "9,1.5,1,1,1,,,\n", "nan\n", "x,y,z\n", "\x00\x00\n"])
def test_a_log_is_cut_after_the_step_of_the_checkpoint(rest, tmp_path):
    file, kept = tmp_path / "a.csv", f"{','.join(COLUMNS)}\n3,0.10,0.1,9,9,,,\n6,0.2,0.1,9,9,1.0,0.5,\n"
    file.write_text(kept + rest)
    cut_log(file, 6)
    assert file.read_text() == kept
    cut_log(file, 0)
    assert file.read_text() == ""


def test_no_log_without_log_every(train, tmp_path, capsys):
    train(log_every=0, evaluate_every=0, validation_size=0.01)
    assert not list(tmp_path.rglob("*.csv")) and not capsys.readouterr().out


def test_evaluation_is_that_of_plain_torch_and_leaves_the_random_numbers(train):
    (loop, (network,)) = train()
    images = Images(Recipe(**BASE), GREY)
    state = torch.get_rng_state()
    result = evaluate(network, images, loop.accelerator)
    assert torch.equal(torch.get_rng_state(), state)
    logits = torch.from_numpy(predict_logits(network, images, "validation", loop.accelerator))
    labels = torch.as_tensor(images.labels("validation"))
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.top1 == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert result.top5 == pytest.approx((logits.topk(5).indices == labels[:, None]).any(1).double().mean().item())
    few = Recipe(**BASE | {"classes": [0, 1, 2, 3, 4]})
    small = timm.create_model("resnet10t", num_classes=5, **few.model_args)
    assert evaluate(small, Images(few, GREY), loop.accelerator).top5 is None


@pytest.mark.parametrize("metric", [pytest.param("top1", marks=pytest.mark.slow), "loss"])
def test_the_best_weights_are_saved_also_after_an_interruption(metric, train, tmp_path):
    changes = {"save_best": metric, "evaluate_every": 2, "learning_rate": 0.02}
    loop, (whole,) = train("whole", **changes)
    log = [row for row in read_log(tmp_path / "whole" / "net-0.csv") if "eval_loss" in row]
    best = min(log, key=lambda row: row["eval_loss"] if metric == "loss" else -row["eval_top1"])
    selected = loop.best.describe(0)["selected"]
    assert selected["step"] == best["step"] and selected[metric] == best[f"eval_{metric}"]
    assert evaluate(whole, Images(Recipe(**BASE), GREY), loop.accelerator).loss == pytest.approx(best["eval_loss"])
    with pytest.raises(Cut):
        train(cut_at=7, **changes)
    again, (resumed,) = train(**changes)
    assert again.best.describe(0) == loop.best.describe(0)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())
    assert not list(tmp_path.rglob("*.safetensors")), "they are deleted with the checkpoints"


def test_equal_evaluations_count_once():
    one = Evaluation(1.0, 0.5)
    assert one.improves_on(None, "top1") and not one.improves_on(Evaluation(2.0, 0.5), "top1")
    assert one.improves_on(Evaluation(2.0, 0.5), "loss")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate_every": 0, "validation_size": 0.01}, "save_best=loss needs evaluate_every=N"),
        ({"members": [], "snapshots": 2}, "snapshots=2 needs save_best=null"),
        ({"save_best": "top2"}, "save_best='top2' must be"),
        ({"log_every": -1}, "log_every=-1 must be"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**BASE | {"save_best": "loss"} | changes)


def test_a_tracker_gets_settings_and_curves_and_a_resumed_run_its_id(train, tmp_path):
    first, second = Recorder(), Recorder()
    with pytest.raises(Cut):
        train(accelerator=Accelerator(cpu=True, log_with=first), cut_at=7)
    run_id = first.config["run_id"]
    assert first.config["learning_rate"] == 2e-3 and json.loads(first.config["input_size"]) == [1, 32, 32]
    assert set(first.values) == {3, 5, 6} and set(first.values[5]) >= {"loss", "top1/0", "top5/0", "eval_loss/0"}
    loop, _ = train(accelerator=Accelerator(cpu=True, log_with=second))
    assert loop.logbook.run_id == run_id and second.config is None, "the run of the checkpoint goes on"
    assert set(second.values) == {5, 6, 9, 10} and second.values[6] | first.values[6] == second.values[6] | {
        "images_per_second": first.values[6]["images_per_second"]
    }


@pytest.mark.slow  # it imports everything in a process of its own
def test_matplotlib_is_not_loaded_before_a_training():
    modules = "pretraining", "finetuning", "distillation"
    program = (
        f"import sys; from concat_ensemble.training import {', '.join(modules)}; print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
