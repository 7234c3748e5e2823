"""What a CUDA device does with this package, beside what one would run without it. `make gpu` runs it.

    .venv/bin/python tests/benchmarks/gpu.py --output runs/gpu                # all parts, each in a process of its own
    .venv/bin/python tests/benchmarks/gpu.py --small --parts probes           # small sizes; on the CPU without a GPU

Writes gpu.json and gpu.md (one table) to the output folder after each part, so that a part that fails costs only
itself. Each row names what was measured, our value, that of the peer in the same run, and ours / peer; medians of
--repeats alternating runs. The parts:

- training: one step of ResNet-50 at 224 pixels, in bf16 and channels_last, in our loop and in a loop with the calls of
  timm's train.py, compiled or not; and two networks in one pass beside one after the other.
- extraction: `extract_features` of JPEGs of 256 pixels through a ResNet-50 beside a bare loop with the same workers;
  and what the loader and the forward pass give by themselves.
- probes, probes_cpu: `LinearProbe` and `RidgeProbe` on 200,000 x 2,048 features of 1,000 classes. The peer is torch's
  L-BFGS on the same objective on the same device, stopped where it is within 1e-6 of the solution of ours.
- forward: ensembles of four in each way to run them, beside the loop over their members.
"""

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

PARTS = ("training", "extraction", "probes", "probes_cpu", "forward")
SECONDS = {"training": 240, "extraction": 150, "probes": 150, "probes_cpu": 240, "forward": 280}  # a part may take
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Row:
    """One line of the table. `ratio` is ours / peer."""

    part: str
    case: str
    unit: str
    ours: float
    peer: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return None if self.peer is None else self.ours / self.peer


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable, *arguments, times: int = 1) -> float:
    """Seconds of one of `times` calls that follow each other."""
    wait()
    started = time.perf_counter()
    for _ in range(times):
        call(*arguments)
    wait()
    return (time.perf_counter() - started) / times


# --- training --------------------------------------------------------------------------------------------------------


def our_steps(
    architecture: str, pixels: list[torch.Tensor], labels: torch.Tensor, steps: int, compiled: bool
) -> float:
    """Seconds of a step of our loop, for as many networks as there are views."""
    import timm
    from accelerate.state import AcceleratorState
    from torch.nn.functional import cross_entropy

    from concat_ensemble.training.batches import Batch
    from concat_ensemble.training.loop import Loop, create_accelerator
    from concat_ensemble.training.recipe import Recipe

    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = Recipe(
        dataset="none",
        architecture=architecture,
        input_size=list(pixels[0].shape[1:]),
        total_steps=2 * steps,
        members=[1],
        batch_size=len(labels),
        mixed_precision="bf16",
        compile=compiled,
        checkpoint_every=10**6,
    )
    with tempfile.TemporaryDirectory() as folder:
        networks = [timm.create_model(architecture, num_classes=1000) for _ in pixels]
        accelerator = create_accelerator(recipe, DEVICE.type == "cpu")
        loop = Loop(
            accelerator, recipe, networks, steps=2 * steps, folder=Path(folder) / "state", identity={}, name="gpu"
        )
        batch = Batch(list(range(len(labels))), [(view, labels) for view in pixels], share=1.0)
        ends = []
        for _ in loop.run(
            lambda *_: itertools.repeat(batch),
            lambda network, images, classes: cross_entropy(network(images), classes),
            stops=[steps],
        ):
            wait()
            ends.append(time.perf_counter())
        loop.finish()
    return (ends[1] - ends[0]) / steps


def timm_steps(architecture: str, pixels: torch.Tensor, labels: torch.Tensor, steps: int, compiled: bool) -> float:
    """Seconds of a step with the calls of timm's train.py: --amp --amp-dtype bfloat16 --channels-last --opt adamw."""
    import timm
    from timm.optim import create_optimizer_v2

    network = timm.create_model(architecture, num_classes=1000).to(DEVICE).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(network, opt="adamw", lr=2e-3, weight_decay=0.05)
    run = torch.compile(network) if compiled else network
    loss_function = nn.CrossEntropyLoss()

    def step():
        images = pixels.to(DEVICE, non_blocking=True).contiguous(memory_format=torch.channels_last)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = loss_function(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    network.train()
    seconds(step, times=steps)
    return seconds(step, times=steps)


def training(small: bool, repeats: int) -> Iterator[Row]:
    architecture, images, size, steps = ("test_resnet", 4, 32, 2) if small else ("resnet50", 256, 224, 20)
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(images, 3, size, size, generator=generator) for _ in range(2)]
    labels = torch.randint(1000, (images,), generator=generator).to(DEVICE)
    views = [view.to(DEVICE).contiguous(memory_format=torch.channels_last) for view in views]
    case = f"{architecture}, batch {images}, bf16, channels_last"
    for compiled in (False, True) if DEVICE.type == "cuda" else (False,):
        ours, peer, together = [], [], []
        for _ in range(repeats if not compiled else 2):
            peer.append(timm_steps(architecture, views[0], labels, steps, compiled))
            ours.append(our_steps(architecture, views[:1], labels, steps, compiled))
            if not compiled:
                together.append(our_steps(architecture, views, labels, steps, compiled))
        name = f"{case}{', compiled' if compiled else ''}"
        yield Row("training", f"{name}: beside timm's step", "images/s", images / median(ours), images / median(peer))
        if together:
            note = "two networks in one pass, beside one after the other"
            yield Row("training", name, "images/s", 2 * images / median(together), images / median(ours), note)
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
        yield Row("training", f"{case}: peak memory, two networks", "GB", peak)


# --- extraction ------------------------------------------------------------------------------------------------------


def extraction(small: bool, repeats: int) -> Iterator[Row]:
    from extraction import ImageBatches, photographs
    from torch.utils.data import DataLoader

    from concat_ensemble import ConcatEnsembleImageProcessor, assemble, extract_features

    number, batch_size, architecture = (16, 8, "test_resnet") if small else (6144, 256, "resnet50")
    workers = 2 if small else max(2, (os.cpu_count() or 2) - 1)
    model, dataset = assemble(f"random:{architecture}"), photographs(number)
    processor = ConcatEnsembleImageProcessor.from_config(model.config)
    backbone = copy.deepcopy(model.members["0"]).eval().to(DEVICE, memory_format=torch.channels_last)
    batches = ImageBatches(dataset, processor, batch_size)

    def load() -> Iterator[torch.Tensor]:
        return iter(DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=DEVICE.type == "cuda"))

    def bare(compute: torch.dtype) -> None:
        with torch.inference_mode(), torch.autocast(DEVICE.type, compute, enabled=compute != torch.float32):
            torch.cat([backbone(pixels.to(DEVICE, non_blocking=True)).float().cpu() for pixels in load()])

    def ours(compute: torch.dtype) -> None:
        with tempfile.TemporaryDirectory() as store:
            extract_features(
                model,
                dataset,
                store=Path(store),
                batch_size=batch_size,
                num_workers=workers,
                compute=compute,
                quiet=True,
            )

    pixels = next(load()).to(DEVICE)
    case = f"{architecture}, {number:,} JPEGs, {workers} workers"
    loader = median(seconds(lambda: [None for _ in load()]) for _ in range(repeats))
    yield Row("extraction", f"{case}: loader alone", "images/s", number / loader)
    for compute in (torch.float32, torch.bfloat16):
        name = str(compute).removeprefix("torch.")
        with torch.inference_mode(), torch.autocast(DEVICE.type, compute, enabled=compute != torch.float32):
            backbone(pixels)
            forward = seconds(backbone, pixels, times=2 if small else 20) / len(pixels)
        times: dict[str, list[float]] = {"ours": [], "bare": []}
        for _ in range(repeats):
            times["bare"].append(seconds(bare, compute))
            times["ours"].append(seconds(ours, compute))
        our, peer = median(times["ours"]), median(times["bare"])
        yield Row("extraction", f"{case}, {name}: forward pass alone", "images/s", 1 / forward)
        note = f"forward pass {100 * forward * number / our:.0f}%, loader {100 * loader / our:.0f}% of our time"
        yield Row("extraction", f"{case}, {name}: beside a bare loop", "images/s", number / our, number / peer, note)


# --- probes ----------------------------------------------------------------------------------------------------------


def lbfgs_seconds(X: torch.Tensor, y: torch.Tensor, l2_strength: float, objective: float, limit: float):
    """Seconds until torch's L-BFGS is within 1e-6 of `objective`, and how near it came. X: standardized."""
    from torch.nn.functional import cross_entropy

    weight = torch.zeros(X.shape[1], int(y.max()) + 1, device=DEVICE, requires_grad=True)
    bias = torch.zeros(weight.shape[1], device=DEVICE, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=10, history_size=10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = cross_entropy(X @ weight + bias, y) + l2_strength / 2 * weight.square().sum()
        value.backward()
        return value

    wait()
    started, gap = time.perf_counter(), float("inf")
    while gap > 1e-6 and time.perf_counter() - started < limit:
        optimizer.step(closure)
        with torch.no_grad():
            value = cross_entropy(X @ weight + bias, y) + l2_strength / 2 * weight.square().sum()
        gap = value.item() / objective - 1
    return time.perf_counter() - started, gap


def features(n: int, d: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n,), generator=generator)
    y[:classes] = torch.arange(classes)
    means = torch.randn(classes, d, generator=generator)
    X = torch.randn(n, d, generator=generator).mul_(3).add_(means[y])
    return X.numpy(), y.numpy()


def probes(small: bool, repeats: int) -> Iterator[Row]:
    from concat_ensemble import LinearProbe, RidgeProbe

    n, d, classes = (2_000, 64, 10) if small else (200_000, 2_048, 1_000)
    X, y = features(n, d, classes)
    case, part = f"{n:,} x {d:,}, {classes:,} classes", "probes" if DEVICE.type == "cuda" or small else "probes_cpu"
    on = "GPU" if DEVICE.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    warm = (X[:2000], y[:2000] % 10)
    LinearProbe().fit(*warm)
    RidgeProbe().fit(*warm)
    runs = repeats if DEVICE.type == "cuda" else 1
    ridge = median(seconds(lambda: RidgeProbe().fit(X, y)) for _ in range(runs))
    yield Row(part, f"RidgeProbe, default strengths, {case}, {on}", "s", ridge)
    probe = LinearProbe(l2_strengths=[1e-3])
    one = median(seconds(lambda: probe.fit(X, y)) for _ in range(runs))
    if DEVICE.type == "cpu" and not small:
        yield Row(part, f"LinearProbe, one strength, {case}, {on}", "s", one)
        return
    standardized = torch.from_numpy((X - probe.mean_) / probe.scale_).float().to(DEVICE)
    labels = torch.from_numpy(y).to(DEVICE)
    coef, intercept = (torch.as_tensor(a, device=DEVICE, dtype=torch.float32) for a in (probe.coef_, probe.intercept_))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(standardized @ coef.T + intercept, labels)
        objective = (loss + 1e-3 / 2 * coef.square().sum()).item()
    peer, gap = lbfgs_seconds(standardized, labels, 1e-3, objective, limit=60)
    del standardized
    note = f"{probe.n_iter_} Newton steps; peer: torch L-BFGS on the device's rows, {gap:+.0e} from our objective"
    yield Row(part, f"LinearProbe, one strength, {case}, {on}", "s", one, peer, note)
    path = seconds(lambda: LinearProbe().fit(X, y))
    yield Row(part, f"LinearProbe, default strengths and refit, {case}, {on}", "s", path)


# --- forward ---------------------------------------------------------------------------------------------------------


def forward_ways(model) -> Iterator[tuple[str, Callable]]:
    """Each way to run an ensemble, made when it is asked for."""
    members = list(model.members.values())
    yield "model", lambda pixels: model(pixels).pooler_output
    folded = (
        copy.deepcopy(model).fold_batchnorm()
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        else model
    )
    yield "folded", lambda pixels: folded(pixels).pooler_output
    if DEVICE.type == "cuda":
        streams = [torch.cuda.Stream() for _ in members]

        def on_streams(pixels):
            now, parts = torch.cuda.current_stream(), []
            for stream, member in zip(streams, members, strict=True):
                stream.wait_stream(now)
                with torch.cuda.stream(stream):
                    parts.append(member(pixels))
            for stream in streams:
                now.wait_stream(stream)
            return torch.cat(parts, 1)

        yield "streams", on_streams
    from torch.func import functional_call, stack_module_state, vmap

    parameters, buffers = stack_module_state(members)
    skeleton = copy.deepcopy(members[0]).to("meta")

    def one(parameter, buffer, pixels):
        return functional_call(skeleton, (parameter, buffer), (pixels,))

    stacked = vmap(one, in_dims=(0, 0, None))
    yield "vmap", lambda pixels: stacked(parameters, buffers, pixels).transpose(0, 1).flatten(1)
    if DEVICE.type == "cuda":
        compiled = torch.compile(folded)
        yield "folded, compiled", lambda pixels: compiled(pixels).pooler_output
        graphs = torch.compile(folded, mode="reduce-overhead")
        yield "folded, compiled, CUDA graphs", lambda pixels: graphs(pixels).pooler_output.clone()


def forward(small: bool, repeats: int) -> Iterator[Row]:
    from concat_ensemble import assemble

    architectures, batches = (
        (("test_resnet", "test_vit"), (2,))
        if small
        else (
            ("vit_small_patch16_224", "resnet50"),
            (1, 128),
        )
    )
    for architecture, dtype in itertools.product(architectures, (torch.bfloat16,)):
        model = assemble([f"random:{architecture}"] * (2 if small else 4)).to(DEVICE, dtype)
        model = model.eval().to(memory_format=torch.channels_last)
        members = list(model.members.values())

        def loop(pixels, members=members):
            return torch.cat([member(pixels) for member in members], 1)

        for images in batches:
            torch.compiler.reset()
            pixels = torch.randn(images, *model.config.pixel_shape, generator=torch.Generator().manual_seed(0))
            pixels = pixels.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
            times = 1 if small else 20
            name = f"{len(members)} x {architecture}, batch {images}, {str(dtype).removeprefix('torch.')}"
            with torch.inference_mode():
                wanted = loop(pixels)
                for way, run in forward_ways(model):
                    try:
                        started = time.perf_counter()
                        got = run(pixels)
                        wait()
                        first = time.perf_counter() - started
                    except Exception as error:
                        yield Row(
                            "forward", f"{name}: {way}", "ms", float("nan"), None, str(error).split("\n")[0][:90]
                        )
                        continue
                    far = ((got - wanted).abs().max() / wanted.abs().max()).item()
                    seconds(run, pixels, times=3)
                    seconds(loop, pixels, times=3)
                    ours, peer = [], []
                    for _ in range(repeats):
                        peer.append(seconds(loop, pixels, times=times))
                        ours.append(seconds(run, pixels, times=times))
                    note = f"first call {first:.1f} s, differs by {far:.0e}"
                    yield Row("forward", f"{name}: {way}", "ms", 1e3 * median(ours), 1e3 * median(peer), note)


# --- all of them -----------------------------------------------------------------------------------------------------


def run_part(part: str, small: bool, repeats: int, path: Path) -> None:
    """Append the part's rows to a file of JSON lines."""
    measure = {"training": training, "extraction": extraction, "forward": forward}.get(part, probes)
    with path.open("a") as file:
        for row in measure(small, repeats):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            print(f"  {row.case}: {row.ours:,.4g} {row.unit}; peer {row.peer}; {row.note}", flush=True)


def machine() -> str:
    import timm
    import transformers

    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU, the CPU in its place"
    versions = f"torch {torch.__version__}, timm {timm.__version__}, transformers {transformers.__version__}"
    return f"{name}; {os.cpu_count()} CPU cores; Python {sys.version.split()[0]}, {versions}"


def markdown(rows: list[Row], failures: list[str], where: str) -> str:
    """The table, with its machine above it."""
    lines = [where, "", "| part | what | unit | ours | peer | ours / peer | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        peer, ratio = ("", "") if row.peer is None else (f"{row.peer:,.4g}", f"{row.ratio:.2f}")
        lines.append(f"| {row.part} | {row.case} | {row.unit} | {row.ours:,.4g} | {peer} | {ratio} | {row.note} |")
    return "\n".join([*lines, "", *failures, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # a part's own process writes here
    options = parser.parse_args()
    if options.rows:
        run_part(options.parts[0], options.small, options.repeats, options.rows)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    path, failures, where = options.output / "rows.jsonl", [], machine()
    path.unlink(missing_ok=True)
    print(where, flush=True)
    for part in options.parts:
        started = time.perf_counter()
        command = [sys.executable, __file__, "--parts", part, "--repeats", str(options.repeats), "--rows", str(path)]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if part == "probes_cpu" else {})
        print(f"{part}:", flush=True)
        try:
            subprocess.run(command + ["--small"] * options.small, env=environment, check=True, timeout=SECONDS[part])
        except (subprocess.SubprocessError, OSError) as error:
            failures.append(
                f"{part}: {'ran out of time' if isinstance(error, subprocess.TimeoutExpired) else 'failed'}"
            )
        print(f"  took {time.perf_counter() - started:.0f} s", flush=True)
        rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
        report = {"machine": where, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows], "failed": failures}
        (options.output / "gpu.json").write_text(json.dumps(report, indent=1))
        (options.output / "gpu.md").write_text(markdown(rows, failures, where))
    sys.exit(f"{'; '.join(failures)}" if failures else 0)


if __name__ == "__main__":
    main()
