"""Models: weights, tokenizers, chat templates, embedders, and the decoder interface that runs them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import ChatTemplate, TemplateError
    from .checkpoint import Checkpoint, GroupQuantized, export_hf, load_transformers
    from .config import ModelConfig, ModelError
    from .decoder import Decoder, WholeDecoder
    from .embedder import (
        DifferentiableEmbedder,
        Embedder,
        MiniLMOnnxEmbedder,
        SentenceTransformersFolder,
        load_embedder,
    )
    from .fused import FusedDecoder, TiledPool, supports
    from .interface_decoder import InterfaceDecoder
    from .library_text import python_text
    from .lora import AdapterError, LoraAdapter, load_peft_adapter
    from .registry import SOURCES, Source, cache_root, cached, resolve_model
    from .rope import inverse_frequencies
    from .shipped import shipped_manifest, shipped_models
    from .stock import TAKEN_APART, StockDecoder, load_stock_decoder
    from .tokenizer import IncrementalDetokenizer, Tokenizer

# Public names and the file that has them: importing the room takes no torch until a name needs it.
_HOME = {
    "ChatTemplate": "chat",
    "TemplateError": "chat",
    "Checkpoint": "checkpoint",
    "GroupQuantized": "checkpoint",
    "export_hf": "checkpoint",
    "load_transformers": "checkpoint",
    "ModelConfig": "config",
    "ModelError": "config",
    "Decoder": "decoder",
    "WholeDecoder": "decoder",
    "DifferentiableEmbedder": "embedder",
    "Embedder": "embedder",
    "MiniLMOnnxEmbedder": "embedder",
    "SentenceTransformersFolder": "embedder",
    "load_embedder": "embedder",
    "FusedDecoder": "fused",
    "TiledPool": "fused",
    "supports": "fused",
    "InterfaceDecoder": "interface_decoder",
    "AdapterError": "lora",
    "LoraAdapter": "lora",
    "load_peft_adapter": "lora",
    "python_text": "library_text",
    "SOURCES": "registry",
    "Source": "registry",
    "cache_root": "registry",
    "cached": "registry",
    "resolve_model": "registry",
    "inverse_frequencies": "rope",
    "shipped_manifest": "shipped",
    "shipped_models": "shipped",
    "StockDecoder": "stock",
    "TAKEN_APART": "stock",
    "load_stock_decoder": "stock",
    "IncrementalDetokenizer": "tokenizer",
    "Tokenizer": "tokenizer",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
