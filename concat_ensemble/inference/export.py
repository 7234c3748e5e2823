"""An ensemble as one file that runs without this package: ONNX, or a program of `torch.export`.

Both take `pixel_values` as the ensemble's image processor makes them, in batches of any size, and return the model's
outputs as a tuple: (pooler_output,), or with a head (logits, pooler_output).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from concat_ensemble.errors import first_line
from concat_ensemble.files import check_regular_files, folder_beside, give_usual_access
from concat_ensemble.modeling.configuration_concat_ensemble import ConcatEnsembleConfig
from concat_ensemble.modeling.modeling_concat_ensemble import (
    ConcatEnsembleForImageClassification,
    ConcatEnsembleModel,
    ConcatEnsemblePreTrainedModel,
)

TOLERANCE = 1e-4  # relative to the largest output, or to 1 if that is smaller
TRACED_BATCH, CHECKED_BATCHES = 2, (1, 5)  # numbers of images
DYNAMIC_SHAPES = {"pixel_values": {0: torch.export.Dim("batch")}}

Run = Callable[[torch.Tensor], "list[torch.Tensor] | tuple[torch.Tensor, ...]"]
Write = Callable[["_TupleModel", torch.Tensor, Path], None]


def load_for_export(folder: str | os.PathLike) -> ConcatEnsemblePreTrainedModel:
    """The ensemble that was saved in `folder`, in float32, with its head if it has one. Raises ValueError when the
    folder holds no ensemble."""
    check_regular_files(Path(folder))
    exists = Path(folder, "config.json").is_file()
    config = ConcatEnsembleConfig.from_pretrained(folder) if exists else ConcatEnsembleConfig()
    if not config.members:
        remedy = "make one with concat-ensemble build"
        raise ValueError(f"{folder} holds no ensemble (no members in config.json); {remedy}.")
    has_head = ConcatEnsembleForImageClassification.__name__ in (config.architectures or ())
    model_class = ConcatEnsembleForImageClassification if has_head else ConcatEnsembleModel
    model: Any = model_class.from_pretrained(folder, config=config, dtype=torch.float32)
    return model


def export_onnx(model: ConcatEnsemblePreTrainedModel, path: str | os.PathLike, *, check: bool = True) -> Path:
    """Write an ensemble as an ONNX file, with its weights inside or, from 1.5 GB on, beside it as `<name>.data`. The
    file's metadata hold the configuration as JSON, with each member's preprocessing and the names of the classes.

    Args:
        model: An ensemble with or without a head, on the CPU, in evaluation mode and float32.
        path: File to write. An old file stays until the new one is checked.
        check: Whether to compare ONNX Runtime's outputs with PyTorch's, on random batches of other sizes than the one
            that is traced.

    Raises:
        ValueError: if the extra `export` is not installed, for a model in another state or that cannot be exported,
            and for outputs further than 1e-4 from PyTorch's, relative to the largest.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise ValueError(f"ONNX needs more ({error}); pip install 'concat-ensemble[export]'.") from error

    def write(module: _TupleModel, pixels: torch.Tensor, file: Path) -> None:
        names = ["logits", "pooler_output"][-len(module(pixels)) :]
        options: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": names, "verbose": False}
        try:
            program: Any = torch.onnx.export(module, (pixels,), dynamic_shapes=DYNAMIC_SHAPES, **options)
        except torch.onnx.errors.OnnxExporterError as error:
            raise ValueError(f"this ensemble has no ONNX form: {first_line(error)}") from error
        for node in program.model.graph:
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names the folders of this machine
        config = json.loads(model.config.to_json_string(use_diff=False))
        config.pop("_name_or_path", None)  # where it was loaded from
        program.model.metadata_props["config"] = json.dumps(config)
        program.save(file)

    def load(file: Path) -> Run:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda pixels: [torch.from_numpy(out) for out in session.run(None, {"pixel_values": pixels.numpy()})]

    return _export(model, Path(path), write, load, check=check)


def export_program(model: ConcatEnsemblePreTrainedModel, path: str | os.PathLike, *, check: bool = True) -> Path:
    """Write an ensemble as a program that `torch.export.load(path).module()` runs, with PyTorch alone. AOTInductor can
    compile it further. Arguments and errors are those of `export_onnx`, without the extra.
    """

    def write(module: _TupleModel, pixels: torch.Tensor, file: Path) -> None:
        try:
            program = torch.export.export(module, (pixels,), dynamic_shapes=DYNAMIC_SHAPES)
        except RuntimeError as error:
            raise ValueError(f"torch.export cannot take this ensemble: {first_line(error)}") from error
        for part in program.graph_module.modules():
            for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # names the folders of this machine
        torch.export.save(program, file)

    return _export(model, Path(path), write, lambda file: torch.export.load(file).module(), check=check)


class _TupleModel(nn.Module):
    """The model as a function of `pixel_values` alone that returns a tuple: an output class would have to be
    importable where the file is read."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.model(pixel_values, return_dict=False)


@torch.no_grad()
def _export(
    model: ConcatEnsemblePreTrainedModel, path: Path, write: Write, load: Callable[[Path], Run], *, check: bool
) -> Path:
    """Write into a folder beside `path`, check what was written, and move it to its place."""
    _check_model(model)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file.")
    module, generator = _TupleModel(model).eval(), torch.Generator().manual_seed(0)
    shape = model.config.pixel_shape
    with folder_beside(path) as folder:
        aside = folder / path.name
        write(module, torch.rand(TRACED_BATCH, *shape, generator=generator), aside)
        if check:
            run = load(aside)
            for images in CHECKED_BATCHES:
                _check_outputs(run, module, torch.rand(images, *shape, generator=generator))
        give_usual_access(folder)
        for file in sorted(folder.iterdir(), reverse=True):  # `<name>.data` first, since the other refers to it
            file.replace(path.with_name(file.name))
    return path


def _check_model(model: ConcatEnsemblePreTrainedModel) -> None:
    if model.training:
        raise ValueError("the model is in training mode; call eval() before exporting it.")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        state = f"{model.dtype} on {model.device}"
        raise ValueError(f"the model is {state}; export it in float32 from the CPU: model.float().cpu().")


def _check_outputs(run: Run, module: nn.Module, pixels: torch.Tensor) -> None:
    for output, expected in zip(run(pixels), module(pixels), strict=True):
        distance, limit = (output - expected).abs().max(), TOLERANCE * expected.abs().max().clamp(min=1)
        if not distance <= limit:
            raise ValueError(f"the exported model is {distance:.1e} from PyTorch's outputs, more than {limit:.1e}.")
