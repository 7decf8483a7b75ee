"""Facts about the embedders: the real MiniLM on onnxruntime, and small random folders on torch."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from sharewell.models import embedder as module
from sharewell.models.config import ModelError
from sharewell.models.embedder import (
    DifferentiableEmbedder,
    Embedder,
    MiniLMOnnxEmbedder,
    SentenceTransformersFolder,
    load_embedder,
)
from sharewell.models.registry import resolve_model

ASSETS = Path(module.__file__).parent / "assets" / "minilm"
TEXTS = [
    "How do I reset my password?",
    "I forgot my password, how can I change it?",
    "A man is eating food.",
    "Someone is having a meal.",
    "Interest rates rose by half a percent.",
]
# Dot products of TEXTS under the float32 all-MiniLM-L6-v2 weights with transformers' own tokenizer.
FLOAT32 = np.array(
    [
        [1.0, 0.894, -0.001, -0.070, -0.022],
        [0.894, 1.0, -0.035, -0.083, -0.051],
        [-0.001, -0.035, 1.0, 0.689, -0.038],
        [-0.070, -0.083, 0.689, 1.0, -0.051],
        [-0.022, -0.051, -0.038, -0.051, 1.0],
    ]
)
MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "sqrt": "pooling_mode_mean_sqrt_len_tokens",
    "weighted": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}


@pytest.fixture(scope="module")
def minilm() -> MiniLMOnnxEmbedder:
    return MiniLMOnnxEmbedder(resolve_model("minilm", progress=False))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("network used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def small_folder(folder: Path, *modes: str, max_tokens: int = 16) -> Path:
    """A sentence-transformers folder of a random two-layer BERT, 32 wide, with the shipped tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((ASSETS / "tokenizer.json").read_bytes())
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_tokens}))
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    chosen = {key: mode in (modes or ("mean",)) for mode, key in MODES.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(chosen))
    return folder


def test_shipped_tokenizer_is_the_one_in_the_manifest() -> None:
    entry = tomllib.loads((ASSETS / "manifest.toml").read_text("utf-8"))["tokenizer"]
    assert hashlib.sha256((ASSETS / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    assert entry["licence"] == "Apache-2.0"


def test_tokens_are_those_of_bert_uncased(minilm: MiniLMOnnxEmbedder) -> None:
    _, ids, mask = next(minilm._texts.batches(["Hello, WORLD!"]))
    assert ids.tolist() == [[101, 7592, 1010, 2088, 999, 102]]
    assert mask.tolist() == [[1] * 6]


def test_minilm_meets_the_protocol(minilm: MiniLMOnnxEmbedder) -> None:
    assert isinstance(minilm, Embedder)
    assert not isinstance(minilm, DifferentiableEmbedder)
    assert (minilm.dim, minilm.max_tokens) == (384, 256)


def test_similarities_are_near_those_of_the_float32_model(minilm: MiniLMOnnxEmbedder) -> None:
    vectors = minilm.embed(TEXTS)
    assert np.abs(vectors @ vectors.T - FLOAT32).max() < 0.02


def test_paraphrases_are_nearer_than_unrelated_texts(minilm: MiniLMOnnxEmbedder) -> None:
    near = minilm.embed(TEXTS) @ minilm.embed(TEXTS).T
    np.fill_diagonal(near, -1)
    assert near.argmax(axis=1)[:4].tolist() == [1, 0, 3, 2]


def test_vectors_have_unit_norm(minilm: MiniLMOnnxEmbedder) -> None:
    vectors = minilm.embed([*TEXTS, "", "   ", "東京", "x" * 5000])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_batch_order_and_company_do_not_matter(minilm: MiniLMOnnxEmbedder) -> None:
    texts = [*TEXTS, "", *(" ".join(TEXTS[: 1 + i % 5]) + str(i) for i in range(40))]  # more than one batch
    order = np.random.default_rng(0).permutation(len(texts))
    vectors = minilm.embed(texts)
    np.testing.assert_allclose(minilm.embed([texts[i] for i in order]), vectors[order], atol=1e-3)
    np.testing.assert_allclose(np.concatenate([minilm.embed([t]) for t in texts[:8]]), vectors[:8], atol=1e-3)


def test_no_texts_and_the_empty_text(minilm: MiniLMOnnxEmbedder) -> None:
    assert minilm.embed([]).shape == (0, 384)
    assert minilm.embed([]).dtype == np.float32
    assert minilm.count_tokens([]) == []
    assert np.isfinite(minilm.embed([""])).all()
    assert minilm.count_tokens([""]) == [2]


def test_text_past_the_limit_is_left_out(minilm: MiniLMOnnxEmbedder) -> None:
    longest, longer, shorter = "word " * 254, "word " * 254 + "password " * 100, "word " * 252 + "password"
    assert minilm.count_tokens([longest, longer]) == [256, 356]
    vectors = minilm.embed([longest, longer, shorter])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    assert np.abs(vectors[0] - vectors[2]).max() > 1e-3


def test_threads_change_speed_only(minilm: MiniLMOnnxEmbedder) -> None:
    two = load_embedder(threads=2)
    assert two.id == minilm.id
    np.testing.assert_allclose(two.embed(TEXTS), minilm.embed(TEXTS), atol=1e-4)


def test_a_pulled_model_needs_no_network(minilm: MiniLMOnnxEmbedder, no_network: None) -> None:
    assert load_embedder("minilm").embed(["a"]).shape == (1, 384)


@pytest.mark.parametrize("texts", ["one string", [1], ["a", None], ["\ud800"]])
def test_what_is_no_text_is_refused(minilm: MiniLMOnnxEmbedder, texts: list[str]) -> None:
    with pytest.raises(TypeError):
        minilm.embed(texts)
    with pytest.raises(TypeError):
        minilm.count_tokens(texts)


def test_unusable_onnx_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.onnx"):
        MiniLMOnnxEmbedder(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot be read"):
        MiniLMOnnxEmbedder(tmp_path)
    with pytest.raises(ValueError, match="threads"):
        MiniLMOnnxEmbedder(tmp_path, threads=0)


def test_load_embedder_refuses_what_is_no_embedder(tmp_path: Path) -> None:
    for name in ("smollm2", "no-such-model", str(tmp_path)):
        with pytest.raises(ModelError):
            load_embedder(name)


def test_folder_meets_the_protocol_without_network(tmp_path: Path, no_network: None) -> None:
    found = load_embedder(str(small_folder(tmp_path / "m")))
    assert isinstance(found, SentenceTransformersFolder)
    assert isinstance(found, DifferentiableEmbedder)
    assert (found.dim, found.max_tokens) == (32, 16)
    assert found.embed([]).shape == (0, 32)
    vectors = found.embed([*TEXTS, "", "word " * 14, "word " * 99])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[-1], vectors[-2], atol=1e-5)
    assert found.count_tokens(["", "word " * 99]) == [2, 101]
    np.testing.assert_allclose(found.embed(TEXTS[::-1])[::-1], vectors[:5], atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_pooling_modes(tmp_path: Path, mode: str) -> None:
    found = SentenceTransformersFolder(small_folder(tmp_path / "m", mode))
    _, ids, _ = next(found._texts.batches(TEXTS[:1]))
    states = found.model(input_ids=torch.from_numpy(ids)).last_hidden_state[0].numpy()
    place = np.arange(1, len(states) + 1)[:, None]
    expected = {
        "cls": states[0],
        "max": states.max(0),
        "mean": states.mean(0),
        "sqrt": states.sum(0) / len(states) ** 0.5,
        "weighted": (states * place).sum(0) / place.sum(),
        "last": states[-1],
    }[mode]
    # embedded beside a longer text, so that there is padding to leave out
    given = found.embed([TEXTS[0], TEXTS[1]])[0]
    np.testing.assert_allclose(given, expected / np.linalg.norm(expected), atol=1e-5)


def test_joined_pooling_modes(tmp_path: Path) -> None:
    found = SentenceTransformersFolder(small_folder(tmp_path / "m", "mean", "cls"))
    assert found.dim == 64
    assert found.embed(TEXTS).shape == (5, 64)


def test_embedding_from_inputs_equals_embedding_and_has_gradients(tmp_path: Path) -> None:
    found = SentenceTransformersFolder(small_folder(tmp_path / "m"))
    rows, ids, mask = next(found._texts.batches(TEXTS))
    inputs = found.model.get_input_embeddings()(torch.from_numpy(ids)).detach().requires_grad_()
    vectors = found.embed_from_inputs(inputs, torch.from_numpy(mask))
    np.testing.assert_allclose(vectors.detach().numpy(), found.embed(TEXTS)[rows], atol=1e-5)
    (vectors[0] @ vectors[1]).backward()
    assert inputs.grad is not None
    size = inputs.grad.abs().sum(-1)
    assert (size[:2][torch.from_numpy(mask[:2]) == 1] > 0).all()
    assert (size[:2][torch.from_numpy(mask[:2]) == 0] == 0).all()
    assert all(p.grad is None for p in found.model.parameters())


def test_inputs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    found = SentenceTransformersFolder(small_folder(tmp_path / "m"))
    for inputs, mask in (
        (torch.zeros(1, 3, 31), torch.ones(1, 3)),
        (torch.zeros(1, 3, 32), torch.ones(1, 4)),
        (torch.zeros(1, 17, 32), torch.ones(1, 17)),
        (torch.zeros(2, 3, 32), torch.tensor([[1, 1, 1], [0, 0, 0]])),
    ):
        with pytest.raises(ValueError):
            found.embed_from_inputs(inputs, mask)


def test_default_prompt_goes_before_the_text(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "m")
    plain = SentenceTransformersFolder(folder)
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    prompted = SentenceTransformersFolder(folder)
    np.testing.assert_allclose(prompted.embed(["a"]), plain.embed(["query: a"]), atol=1e-6)
    assert prompted.count_tokens(["a"]) == plain.count_tokens(["query: a"])


def test_id_follows_the_weights(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "m")
    first = SentenceTransformersFolder(folder).id
    assert SentenceTransformersFolder(folder).id == first
    model = BertModel.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(folder)
    assert SentenceTransformersFolder(folder).id != first


@pytest.mark.parametrize(
    "missing", ["config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json"]
)
def test_incomplete_folders_are_refused(tmp_path: Path, missing: str) -> None:
    folder = small_folder(tmp_path / "m")
    (folder / missing).unlink()
    with pytest.raises(ModelError):
        SentenceTransformersFolder(folder)


def test_modules_that_would_be_left_out_are_refused(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "m")
    listed = json.loads((folder / "modules.json").read_text())
    listed.append({"path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ModelError, match="Dense"):
        SentenceTransformersFolder(folder)
    with pytest.raises(ModelError, match="not a folder"):
        SentenceTransformersFolder(tmp_path / "absent")
