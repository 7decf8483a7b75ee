"""ONNX: one file of standard operators for recordings of any length, its int8 variant, and running both."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import Backbone, LiquidTADConfig
from .model import LevelOutput, TADModel

# All that a liquid detector needs, in the default domain.
LIQUID_OPERATORS = frozenset(
    ("Add", "Concat", "Conv", "LayerNormalization", "MaxPool", "Mul", "Relu", "Sigmoid", "Slice", "Tanh")
) | {"Transpose"}
METADATA_KEY = "sharewell_tad"
OPSET = 17  # the first with LayerNormalization


class _Graph(nn.Module):
    """Levels side by side: one tensor of logits and one of offsets."""

    def __init__(self, model: TADModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.model.levels(features, mask)
        return torch.cat([level[0] for level in levels], 2), torch.cat([level[1] for level in levels], 2)


def export_onnx(model: TADModel, path: str | Path, *, tolerance: float = 1e-4) -> Path:
    """Write ``model`` as ONNX and check it with onnxruntime at two lengths.

    Inputs ``features`` [1, c_in, rows] and ``mask`` [1, 1, rows], rows any multiple of the last stride;
    outputs ``logits`` [1, n_cls, points] and ``offsets`` [1, 2, points], the levels one after the other. The
    file carries the config, so that :class:`OnnxDetector` needs nothing else. Raises ValueError for a
    backbone whose graph depends on the length (actionformer), RuntimeError when onnxruntime differs by more
    than ``tolerance``.
    """
    if model.backbone == "actionformer":
        raise ValueError(
            "backbone must be liquid or maxpool: chunks of attention fix the length of the graph"
        )
    import onnx

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    frozen = model.frozen().cpu().float()
    rows = 4 * model.config.strides[-1]
    example = torch.zeros(1, model.config.c_in, rows), torch.ones(1, 1, rows)
    with warnings.catch_warnings():
        # torch's newer exporter needs another package and writes Shape and Reshape for dynamic lengths.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Graph(frozen).eval(),
            example,
            str(path),
            input_names=["features", "mask"],
            output_names=["logits", "offsets"],
            dynamic_axes={
                "features": {2: "rows"},
                "mask": {2: "rows"},
                "logits": {2: "points"},
                "offsets": {2: "points"},
            },
            opset_version=OPSET,
            dynamo=False,
        )
    graph = onnx.load(str(path))
    _inline_constants(graph.graph)
    entry = graph.metadata_props.add()
    entry.key = METADATA_KEY
    entry.value = json.dumps({"config": model.config.to_dict(), "backbone": model.backbone})
    onnx.checker.check_model(graph)
    onnx.save(graph, str(path))
    _check(frozen, path, tolerance)
    return path


def _inline_constants(graph: Any) -> None:
    """Constants become initializers, and what an Identity copies is used directly: the exporter writes equal
    weights once, with copies that some runtimes and the quantizer do not see through."""
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.op_type == "Constant":
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        elif node.op_type == "Identity":
            source = str(node.input[0])
            renamed[node.output[0]] = renamed.get(source, source)
        else:
            kept.append(node)
    for node in kept:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    del graph.node[:]
    graph.node.extend(kept)


def _check(model: TADModel, path: Path, tolerance: float) -> None:
    detector = OnnxDetector(path)
    generator = torch.Generator().manual_seed(0)
    for multiple in (2, 9):
        rows = multiple * model.config.strides[-1]
        features = torch.randn(1, model.config.c_in, rows, generator=generator)
        mask = torch.ones(1, 1, rows)
        mask[:, :, rows - 1 :] = 0
        difference = largest_difference(model.infer(features, mask), detector.infer(features, mask))
        if not difference <= tolerance:
            path.unlink()
            raise RuntimeError(f"the exported graph differs by {difference:.2g}, more than {tolerance:.2g}")


def largest_difference(a: list[LevelOutput], b: list[LevelOutput]) -> float:
    """Largest absolute difference of any logit or offset."""
    return max(
        float((getattr(x, name) - getattr(y, name)).abs().max())
        for x, y in zip(a, b, strict=True)
        for name in ("logits", "offsets")
    )


def operators(path: str | Path) -> dict[str, int]:
    """How often each operator occurs; those outside the default domain as ``domain.name``."""
    import onnx

    counted: dict[str, int] = {}
    for node in onnx.load(str(path)).graph.node:
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        counted[name] = counted.get(name, 0) + 1
    return dict(sorted(counted.items()))


class OnnxDetector:
    """An exported detector run by onnxruntime; :func:`predict` takes it in place of a TADModel.

    ``threads``: of onnxruntime (None: its default). Raises FileNotFoundError, or ValueError naming the file
    for ONNX that was not exported here.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        import onnxruntime

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist")
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has no common base for what it raises at loading
            raise ValueError(f"{path} cannot be read as ONNX: {error}") from None
        metadata = self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if metadata is None:
            raise ValueError(f"{path} is no detector that was exported here: it has no {METADATA_KEY}")
        values: dict[str, Any] = json.loads(metadata)
        self.config = LiquidTADConfig.from_dict(values["config"])
        self.backbone: Backbone = values["backbone"]

    def infer(self, features: Tensor, mask: Tensor) -> list[LevelOutput]:
        """As :meth:`TADModel.infer`, batch of one."""
        inputs = {"features": features.float().numpy(), "mask": mask.float().numpy()}
        logits, offsets = (torch.from_numpy(out) for out in self.session.run(["logits", "offsets"], inputs))
        sizes = [features.shape[2] // stride for stride in self.config.strides]
        masks = [mask[:, :, ::stride] for stride in self.config.strides]
        return [
            LevelOutput(*parts)
            for parts in zip(logits.split(sizes, 2), offsets.split(sizes, 2), masks, strict=True)
        ]


def quantize_onnx(
    path: str | Path, out: str | Path, calibration: Iterable[np.ndarray], *, rows: int = 256
) -> Path:
    """Write the int8 variant of an exported detector: weights per channel, activations by what is seen on
    ``calibration``, feature arrays [rows, c_in]. The convolutions of the heads that give the outputs stay in
    float, as does everything that is no convolution. Raises ValueError without calibration data.
    """
    from onnxruntime import quantization

    detector = OnnxDetector(path, threads=1)
    last = detector.config.strides[-1]
    rows = max(last, rows // last * last)

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.arrays = list(calibration)
            self.read = 0

        def get_next(self) -> Any:
            if self.read == len(self.arrays):
                return None
            part = np.asarray(self.arrays[self.read][:rows], np.float32)
            self.read += 1
            features = np.zeros((1, detector.config.c_in, rows), np.float32)
            mask = np.zeros((1, 1, rows), np.float32)
            features[0, :, : len(part)] = part.T
            mask[0, 0, : len(part)] = 1
            return {"features": features, "mask": mask}

    reader = Reader()
    if not reader.arrays:
        raise ValueError("calibration must hold at least one feature array, got none")
    import onnx

    convolutions = [node for node in onnx.load(str(path)).graph.node if node.op_type == "Conv"]
    last_ones = [node.name for node in convolutions if "/out/" in node.name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_static(
            str(path),
            str(out),
            reader,
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            nodes_to_exclude=last_ones,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    return Path(out)
