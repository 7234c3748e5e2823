"""`training/slurm.sh` with stand-ins for SLURM's commands, which refuse options that the manual does not have."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training" / "slurm.sh"
# From the manual pages of SLURM 23.11: scancel(1) has no --steps.
SCANCEL = "account batch clusters ctld full help hurry interactive me name nodelist partition qos quiet reservation "
SCANCEL += "sibling signal state usage user verbose version wckey"
STUBS = {
    "scancel": f"""
for word in "$@"; do
    case $word in
        --*) name=${{word%%=*}}; case " {SCANCEL} " in *" ${{name#--}} "*) ;;
             *) echo "scancel: unrecognized option '$name'" >&2; exit 1 ;; esac ;;
    esac
done
[ "$*" = "--signal=TERM $SLURM_JOB_ID" ] || exit 1
echo scancel "$@" >> "$LOG"
kill -TERM $(cat "$STEP")  # the processes of the steps, not the batch script
""",
    "scontrol": """
echo scontrol "$@" >> "$LOG"
case "$1 $2" in
    "show hostnames") seq -f '127.0.0.%g' 1 "$SLURM_NNODES" ;;
    "requeue $SLURM_JOB_ID") ;;
    *) exit 1 ;;
esac
""",
    "srun": """
case $1 in -*) echo "srun: unexpected option $1" >&2; exit 1 ;; esac
processes=
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node SLURM_STEP_NUM_TASKS=$SLURM_NNODES "$@" &
    processes="$processes $!"
done
echo "$processes" > "$STEP"
highest=0
for process in $processes; do wait "$process"; code=$?; [ $code -gt $highest ] && highest=$code; done
exit $highest
""",
    "accelerate": """
printf '%s\\n' "$@" > "$WORDS-$SLURM_NODEID"
case $TRAINING in
    ends) exit 0 ;;
    fails) exit 3 ;;
    ends-late) trap 'exit 0' TERM ;;
    *) trap 'sleep 0.3; echo saved >> "$LOG"; exit 1' TERM ;;
esac
touch "$READY"
while :; do sleep 0.02; done
""",
}


class Cluster:
    """A folder with SLURM's commands, and what they were called with."""

    def __init__(self, folder: Path, real: bool = False):
        self.folder = folder
        commands = folder / "commands"
        commands.mkdir()
        for name, text in STUBS.items():
            if name == "accelerate" and real:
                continue
            (commands / name).write_text(f"#!/bin/bash\n{text}")
            (commands / name).chmod(0o755)
        (commands / "python").symlink_to(sys.executable if real else "/bin/false")
        self.log, self.ready = folder / "log", folder / "ready"
        places = {"LOG": self.log, "STEP": folder / "step", "WORDS": folder / "words", "READY": self.ready}
        path = os.pathsep.join(map(str, (commands, Path(sys.executable).parent, os.environ["PATH"])))
        job = {"SLURM_JOB_ID": str(4_000_000 + os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
        self.environment = os.environ | {name: str(place) for name, place in places.items()} | job | {"PATH": path}

    def start(self, *words: str, **variables: str) -> subprocess.Popen:
        self.log.write_text("")
        environment = self.environment | {"SLURM_GPUS_ON_NODE": "4"} | variables
        return subprocess.Popen(["bash", SCRIPT, *words], cwd=ROOT, env=environment)

    def calls(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if not line.startswith("scontrol show")]

    def launch_options(self, node: int) -> argparse.Namespace:
        """What accelerate understands on one machine."""
        command, *words = (self.folder / f"words-{node}").read_text().splitlines()
        assert command == "launch"
        return launch_command_parser().parse_args(words)


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def wait_until(happens, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.02)


def wait_after_the_limit(cluster, job) -> int:
    """Send the signal of the time limit, as soon as the training runs. Return the exit code of the job."""
    wait_until(cluster.ready.exists)
    time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    return job.wait(30)


def test_at_the_time_limit_it_saves_and_then_requeues_once(cluster):
    job = cluster.start("recipe.yaml", TRAINING="trains")
    assert wait_after_the_limit(cluster, job) == 0
    number = cluster.environment["SLURM_JOB_ID"]
    assert cluster.calls() == [f"scancel --signal=TERM {number}", "saved", "saved", f"scontrol requeue {number}"]


@pytest.mark.parametrize(("training", "code"), [("ends", 0), ("fails", 3)])
def test_a_job_that_ends_before_the_limit_is_not_requeued(cluster, training, code):
    assert cluster.start("recipe.yaml", TRAINING=training).wait(30) == code
    assert cluster.calls() == []


def test_a_job_that_is_finished_at_the_limit_is_not_requeued(cluster):
    job = cluster.start("recipe.yaml", TRAINING="ends-late")
    assert wait_after_the_limit(cluster, job) == 0
    assert [call.split()[0] for call in cluster.calls()] == ["scancel"]


def test_accelerate_gets_the_machines_and_the_arguments_as_they_were_given(cluster):
    given = ["my recipe.yaml", "--parallelism", "members", "--members", "[1, 4]", "--model-args", "{in_chans: 1}"]
    assert cluster.start(*given, TRAINING="ends").wait(30) == 0
    for node in range(2):
        options = cluster.launch_options(node)
        assert (options.num_machines, options.machine_rank, options.num_processes) == (2, node, 8)
        assert options.main_process_ip == "127.0.0.1" and 20_000 <= options.main_process_port < 40_000
        assert options.multi_gpu and options.mixed_precision is None and options.dynamo_backend in (None, "no")
        assert options.training_script == "training/pretrain_members.py" and options.training_script_args == given


def test_without_gpus_each_machine_has_one_process(cluster):
    variables = {"TRAINING": "ends", "SLURM_GPUS_ON_NODE": ""}
    assert cluster.start("recipe.yaml", **variables).wait(30) == 0
    assert cluster.launch_options(1).num_processes == 2


def test_a_single_process_has_no_launcher(cluster):
    """accelerate launch would refuse --multi_gpu, and without it end before the training that it started."""
    variables = {"TRAINING": "ends", "SLURM_GPUS_ON_NODE": "1", "SLURM_NNODES": "1"}
    assert cluster.start("recipe.yaml", **variables).wait(30) == 1, "the python of these tests is `false`"
    assert not list(cluster.folder.glob("words-*"))


def test_it_is_clean_for_shellcheck():
    command = shutil.which("shellcheck")
    if command is None:
        pytest.skip("shellcheck is not here")
    subprocess.run([command, SCRIPT], check=True)


@pytest.mark.slow
def test_a_real_training_on_two_machines_continues_after_the_limit(tmp_path):
    cluster = Cluster(tmp_path, real=True)
    recipe = ["training/recipes/scattered_digits_timecat.yaml", "--cpu", "--parallelism", "members", "--limit", "100"]
    recipe += ["--members", "[2]", "--total-steps", "3000", "--snapshots", "0", "--wide-steps", "0"]
    recipe += ["--batch-size", "16", "--checkpoint-every", "50", "--output", str(tmp_path / "out")]
    variables = {"SLURM_GPUS_ON_NODE": "1", "OMP_NUM_THREADS": "1"}
    job = cluster.start(*recipe, **variables)
    wait_until(lambda: list(tmp_path.glob("out/checkpoints/*/step-*")), 300)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(300) == 0
    assert [call.split()[:2] for call in cluster.calls()][-1] == ["scontrol", "requeue"]
    assert cluster.start(*recipe, **variables).wait(300) == 0
    assert cluster.calls() == [] and (tmp_path / "out" / "cat2" / "config.json").is_file()
