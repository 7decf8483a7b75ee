"""The shape of a model, read from a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FUSABLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class ModelError(ValueError):
    """A model folder that cannot be used; the message says what is wrong and where."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes are counts of elements; ``context_length`` in tokens; ``rope_theta`` the base of the rotary
    frequencies.
    """

    architecture: str
    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    hidden_act: str = "silu"
    layer_types: tuple[str, ...] = ()
    extra_bias: bool = False

    @property
    def fusable(self) -> bool:
        """True for Llama-, Qwen2/3- and Mistral-like decoders, whose layers the fused decoder knows."""
        return self.not_fusable is None

    @property
    def not_fusable(self) -> str | None:
        """Why the fused decoder does not know these layers, or None."""
        scaling = (
            (self.rope_scaling or {}).get("rope_type") or (self.rope_scaling or {}).get("type") or "default"
        )
        if self.architecture not in FUSABLE:
            return f"architecture {self.architecture} is not Llama-, Qwen2/3- or Mistral-like"
        if self.hidden_act != "silu":
            return f"hidden_act must be silu, got {self.hidden_act}"
        if scaling not in ("default", "linear", "llama3"):
            return f"rope scaling type must be default, linear or llama3, got {scaling}"
        if self.extra_bias:
            return "its output or feed-forward projections have a bias"
        if self.mixed_attention:
            return f"its layers mix kinds of attention ({', '.join(sorted(set(self.layer_types)))})"
        return None

    @property
    def mixed_attention(self) -> bool:
        """True when layers differ in their kind of attention, or have a kind other than full and sliding."""
        return len(set(self.layer_types)) > 1 or bool(
            set(self.layer_types) - {"full_attention", "sliding_attention"}
        )

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys (or values) in one layer."""
        return self.n_kv_heads * self.head_dim

    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every projection of a Llama-like layer."""
        attention, hidden, inner = self.n_heads * self.head_dim, self.hidden_size, self.intermediate_size
        return {
            "q_proj": (attention, hidden),
            "k_proj": (self.kv_width, hidden),
            "v_proj": (self.kv_width, hidden),
            "o_proj": (hidden, attention),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }

    @classmethod
    def from_folder(cls, folder: Path | str) -> ModelConfig:
        """Read ``config.json`` (and ``generation_config.json`` for the end tokens). Raises ModelError."""
        folder = Path(folder)
        raw = _read_json(folder / "config.json", required=True)
        generation = _read_json(folder / "generation_config.json", required=False)
        return cls.from_raw(raw, generation, str(folder / "config.json"))

    @classmethod
    def from_raw(
        cls, raw: Mapping[str, Any], generation: Mapping[str, Any], where: str = "the configuration"
    ) -> ModelConfig:
        """The same from dictionaries (``model.config.to_dict()``). Raises ModelError naming ``where``."""
        architecture = (raw.get("architectures") or ["unknown"])[0]

        def need(*names: str) -> Any:
            for name in names:
                if raw.get(name) is not None:
                    return raw[name]
            raise ModelError(f"{where}: field {names[0]!r} is missing")

        hidden = int(need("hidden_size", "n_embd", "d_model"))
        heads = int(need("num_attention_heads", "n_head"))
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        theta = float(rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
        scaled = rope if (rope.get("rope_type") or rope.get("type") or "default") != "default" else None
        eos = generation.get("eos_token_id", raw.get("eos_token_id"))
        eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)
        layers = int(need("num_hidden_layers", "n_layer"))
        window = raw.get("sliding_window")
        if not raw.get("use_sliding_window", architecture == "MistralForCausalLM"):
            window = None
        kinds = tuple(raw.get("layer_types") or ())
        if window and not kinds and architecture.startswith("Qwen"):
            first = int(raw.get("max_window_layers") or 0)
            kinds = ("full_attention",) * min(first, layers) + ("sliding_attention",) * max(0, layers - first)
        if kinds and "sliding_attention" not in kinds:
            window = None
        bias = bool(raw.get("attention_bias", architecture == "Qwen2ForCausalLM"))
        return cls(
            architecture=architecture,
            n_layers=layers,
            hidden_size=hidden,
            intermediate_size=int(raw.get("intermediate_size") or raw.get("n_inner") or 4 * hidden),
            n_heads=heads,
            n_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            vocab_size=int(need("vocab_size")),
            context_length=int(raw.get("max_position_embeddings") or raw.get("n_positions") or 2048),
            rope_theta=theta,
            rope_scaling=scaled,
            rms_norm_eps=float(raw.get("rms_norm_eps") or 1e-6),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bias or architecture == "Qwen2ForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            sliding_window=int(window) if window else None,
            eos_token_ids=eos_ids,
            bos_token_id=raw.get("bos_token_id"),
            hidden_act=str(raw.get("hidden_act") or "silu"),
            layer_types=kinds,
            extra_bias=(bias and architecture != "Qwen2ForCausalLM") or bool(raw.get("mlp_bias")),
        )


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if required:
            raise ModelError(f"{path.parent} is not a model folder: {path.name} is missing") from None
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
