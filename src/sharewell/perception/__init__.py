"""Perception: what happens when in long videos and sensor streams, found with small models.

``tad/`` holds the detector (model, training, evaluation, export), ``video/`` what turns a video file into
feature rows and detections into something to look at.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tad.annotations import (
        Annotation,
        AnnotationError,
        VideoRecord,
        predictions_document,
        read_annotations,
        read_label_csv,
        read_predictions,
        write_json,
    )
    from .tad.checkpoint import checkpoint_extra, load_checkpoint, save_checkpoint
    from .tad.config import DecodeConfig, LiquidTADConfig
    from .tad.cost import Cost, count_cost
    from .tad.dataset import FeatureDataset, FeatureFolder
    from .tad.decay import SharedDecay
    from .tad.decode import Detection, FeatureMeta, fuse_video_scores, predict
    from .tad.evaluate import MapResult, evaluate_map, mean_average_precision
    from .tad.export import OnnxDetector, export_onnx, quantize_onnx
    from .tad.liquid import LiquidBlock
    from .tad.model import TADModel
    from .tad.nms import soft_nms_1d
    from .tad.recipes import Recipe
    from .tad.schedule import TrainConfig
    from .tad.timescales import TimeConstants, plot_time_constants, time_constants
    from .tad.trainer import FitResult, TrainingAborted, evaluate_dataset, fit, predict_dataset
    from .video.decode import DecodeStats, SampledFrame, Sampling, VideoInfo, probe, sample_frames
    from .video.detect import VideoDetector, VideoResult, detect
    from .video.digits import DigitClip, render_clip, render_folder
    from .video.errors import VideoDecodeError
    from .video.extraction import ExtractionReport, extract_folder, find_sources
    from .video.extractor import FeatureExtractor, StreamingExtractor, TorchExtractor
    from .video.extractors import load_extractor
    from .video.features import ExtractorSettings, FeatureGrid, Features
    from .video.labels import LabelReport, convert_labels
    from .video.stream import StreamConfig, StreamDetector

# Public names and the file that has them: torch loads only when a name needs it.
_HOME = {
    "Annotation": "tad.annotations",
    "AnnotationError": "tad.annotations",
    "VideoRecord": "tad.annotations",
    "predictions_document": "tad.annotations",
    "read_annotations": "tad.annotations",
    "read_label_csv": "tad.annotations",
    "read_predictions": "tad.annotations",
    "write_json": "tad.annotations",
    "checkpoint_extra": "tad.checkpoint",
    "load_checkpoint": "tad.checkpoint",
    "save_checkpoint": "tad.checkpoint",
    "DecodeConfig": "tad.config",
    "LiquidTADConfig": "tad.config",
    "Cost": "tad.cost",
    "count_cost": "tad.cost",
    "FeatureDataset": "tad.dataset",
    "FeatureFolder": "tad.dataset",
    "SharedDecay": "tad.decay",
    "Detection": "tad.decode",
    "FeatureMeta": "tad.decode",
    "fuse_video_scores": "tad.decode",
    "predict": "tad.decode",
    "MapResult": "tad.evaluate",
    "evaluate_map": "tad.evaluate",
    "mean_average_precision": "tad.evaluate",
    "OnnxDetector": "tad.export",
    "export_onnx": "tad.export",
    "quantize_onnx": "tad.export",
    "LiquidBlock": "tad.liquid",
    "TADModel": "tad.model",
    "soft_nms_1d": "tad.nms",
    "Recipe": "tad.recipes",
    "TimeConstants": "tad.timescales",
    "plot_time_constants": "tad.timescales",
    "time_constants": "tad.timescales",
    "FitResult": "tad.trainer",
    "TrainConfig": "tad.schedule",
    "TrainingAborted": "tad.trainer",
    "evaluate_dataset": "tad.trainer",
    "fit": "tad.trainer",
    "predict_dataset": "tad.trainer",
    "DecodeStats": "video.decode",
    "SampledFrame": "video.decode",
    "Sampling": "video.decode",
    "VideoInfo": "video.decode",
    "probe": "video.decode",
    "sample_frames": "video.decode",
    "VideoDetector": "video.detect",
    "VideoResult": "video.detect",
    "detect": "video.detect",
    "DigitClip": "video.digits",
    "render_clip": "video.digits",
    "render_folder": "video.digits",
    "VideoDecodeError": "video.errors",
    "ExtractionReport": "video.extraction",
    "extract_folder": "video.extraction",
    "find_sources": "video.extraction",
    "FeatureExtractor": "video.extractor",
    "StreamingExtractor": "video.extractor",
    "TorchExtractor": "video.extractor",
    "load_extractor": "video.extractors",
    "ExtractorSettings": "video.features",
    "FeatureGrid": "video.features",
    "Features": "video.features",
    "LabelReport": "video.labels",
    "convert_labels": "video.labels",
    "StreamConfig": "video.stream",
    "StreamDetector": "video.stream",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
