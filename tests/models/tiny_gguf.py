"""A tiny Llama-like GGUF file with random blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

LAYERS, HIDDEN, INNER, HEADS, KV, VOCAB = 2, 64, 96, 4, 2, 261
DIM = HIDDEN // HEADS


def write_gguf(path: Path, kind: str = "Q4_1", architecture: str = "llama") -> dict[str, np.ndarray]:
    """A tiny random Llama in llama.cpp's own order of rows; the float32 values that its blocks stand for."""
    import gguf

    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(DIM)
    writer.add_vocab_size(VOCAB)
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "he", "hel"]
    assert len(tokens) == VOCAB
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
    writer.add_token_merges(["h e", "he l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    shapes = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (HIDDEN,),
            f"blk.{i}.ffn_norm": (HIDDEN,),
            f"blk.{i}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k": (KV * DIM, HIDDEN),
            f"blk.{i}.attn_v": (KV * DIM, HIDDEN),
            f"blk.{i}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_gate": (INNER, HIDDEN),
            f"blk.{i}.ffn_up": (INNER, HIDDEN),
            f"blk.{i}.ffn_down": (HIDDEN, INNER),
        }
    meant: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        value = rng.normal(0, 0.3, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name + ".weight", value)
            meant[name] = value
            continue
        used = "Q8_0" if name == "token_embd" else kind
        type_ = gguf.GGMLQuantizationType[used]
        data = value if used == "F32" else gguf.quants.quantize(value, type_)
        writer.add_tensor(name + ".weight", data, raw_dtype=type_)
        meant[name] = gguf.quants.dequantize(data, type_) if used != "F32" else value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant
