"""Text embedders: unit vectors whose dot product says how near two texts are in meaning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .config import ModelError
from .registry import SOURCES, resolve_model
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

BATCH = 32
_Ids = NDArray[np.int64]
_ASSETS = Path(__file__).parent / "assets" / "minilm"
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")
_POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into unit vectors. ``id`` changes with the weights, so it can key stored vectors."""

    id: str
    dim: int
    max_tokens: int

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [n, dim], rows of norm 1 in the order of ``texts``; text past ``max_tokens`` is left out.

        No texts give shape (0, dim). Raises TypeError when ``texts`` is one string or holds anything that
        is not a string of valid Unicode (a lone surrogate is not).
        """
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before truncation, special tokens included.

        Raises TypeError as ``embed`` does.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of this model's token ids, special tokens left out. Raises ValueError for an unknown
        id.
        """
        ...


@runtime_checkable
class DifferentiableEmbedder(Embedder, Protocol):
    """An embedder that gradients can go through, down to the input embeddings."""

    def embed_from_inputs(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[n, dim], rows of norm 1, from ``inputs_embeds`` [n, t, hidden] and ``attention_mask`` [n, t] of 0
        and 1.

        Raises ValueError for shapes that do not fit, t above ``max_tokens``, or a row whose mask is all 0.
        """
        ...


class _Texts:
    """Tokenizer with and without truncation.

    Encodes one text at a time: the batch call would take every core.
    """

    def __init__(self, folder: Path, max_tokens: int, prepare: Callable[[str], str] = str) -> None:
        self._whole, self._cut = Tokenizer(folder).backend, Tokenizer(folder).backend
        for backend in (self._whole, self._cut):
            backend.no_truncation()
            backend.no_padding()
        self._cut.enable_truncation(max_tokens)
        self._prepare = prepare

    def decode(self, ids: Sequence[int]) -> str:
        size = self._whole.get_vocab_size(with_added_tokens=True)
        bad = next((i for i in ids if not 0 <= i < size), None)
        if bad is not None:
            raise ValueError(f"token ids must be in [0, {size}), got {bad}")
        return self._whole.decode(list(ids))

    def counts(self, texts: Sequence[str]) -> list[int]:
        return [len(self._whole.encode(self._prepare(text)).ids) for text in _checked(texts)]

    def batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], _Ids, _Ids]]:
        """Rows of ``texts``, their ids [b, t] padded right with 0, and mask [b, t]; texts of like length
        together.

        Equal lengths are ordered by their ids, so the batches do not depend on the order of ``texts``.
        """
        tokens = [self._cut.encode(self._prepare(text)).ids for text in _checked(texts)]
        order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), tokens[i]))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            # a tokenizer without special tokens gives nothing for "": one padding token stands in
            width = max(1, *(len(tokens[i]) for i in rows))
            ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
            for row, i in enumerate(rows):
                ids[row, : len(tokens[i])] = tokens[i]
                mask[row, : max(1, len(tokens[i]))] = 1
            yield rows, ids, mask


class MiniLMOnnxEmbedder:
    """all-MiniLM-L6-v2 on onnxruntime, from ``model.onnx`` in ``folder``; the tokenizer comes with Sharewell.

    ``threads`` is the number of cores one call may use; they do not spin between calls. Safe to call from
    several threads. A text's vector does not depend on the texts embedded with it. Raises ModelError when the
    file is missing or is not such a model, ValueError for ``threads`` below 1.
    """

    def __init__(self, folder: Path | str, threads: int = 1) -> None:
        import onnxruntime as ort

        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        path = Path(folder) / "model.onnx"
        if not path.is_file():
            raise ModelError(f"{folder} holds no model.onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library has a class per cause, all of them plain Exceptions
            raise ModelError(f"{path} cannot be read: {error}") from None
        self._inputs = {value.name for value in self._session.get_inputs()}
        output = self._session.get_outputs()[0]
        known = {"input_ids", "attention_mask", "token_type_ids"}
        width = output.shape[-1] if len(output.shape) == 3 else None
        if not {"input_ids", "attention_mask"} <= self._inputs <= known or not isinstance(width, int):
            raise ModelError(
                f"{path} must map input_ids and attention_mask to token vectors [n, t, dim]; "
                f"it has inputs {sorted(self._inputs)} and output {output.name} {output.shape}"
            )
        self._output = output.name
        self.dim: int = width
        self.max_tokens: int = 256
        self.id: str = f"minilm-onnx-{_digest([path, _ASSETS / 'tokenizer.json'])}"
        self._texts = _Texts(_ASSETS, self.max_tokens)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [n, dim], rows of norm 1; only the first 256 tokens count.

        Raises TypeError, see Embedder.
        """
        out = np.empty((len(texts), self.dim), np.float32)
        for rows, ids, mask in self._texts.batches(texts):
            feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            feed = {name: value for name, value in feed.items() if name in self._inputs}
            hidden = np.asarray(self._session.run([self._output], feed)[0], np.float32)  # [b, t, dim]
            total = np.einsum("btd,bt->bd", hidden, mask.astype(np.float32))
            # the mean's divisor cancels in the norm
            out[rows] = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)
        return out

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before truncation, [CLS] and [SEP] included. Raises TypeError, see Embedder."""
        return self._texts.counts(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids. Raises ValueError, see Embedder."""
        return self._texts.decode(ids)


class SentenceTransformersFolder:
    """A sentence-transformers model folder on transformers and torch, float32 on the CPU, weights frozen.

    Reads ``modules.json`` (a transformer, a pooling, an optional normalisation; vectors are normalised either
    way), the pooling's ``config.json``, and the default prompt, which goes before every text. Never downloads
    and never runs code from the folder. ``model`` is the transformers module; its input embeddings feed
    ``embed_from_inputs``. Raises ModelError for a missing or unreadable file, another module, or an
    encoder-decoder.
    """

    def __init__(self, path: Path | str) -> None:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ModelError(f"{folder} is not a folder")
        pooling, body = "1_Pooling", folder
        for module in _json(folder / "modules.json", []):
            kind = str(module.get("type", "")).rpartition(".")[2]
            if kind == "Pooling":
                pooling = module.get("path") or ""
            elif kind == "Transformer":
                body = folder / (module.get("path") or "")
            elif kind != "Normalize":
                raise ModelError(f"{folder / 'modules.json'}: module {kind!r} is not supported")
        self._modes, include_prompt = _pooling(folder / pooling / "config.json")
        config = _json(body / "config.json")
        if config.get("is_encoder_decoder"):
            raise ModelError(f"{body / 'config.json'}: encoder-decoder models are not supported")
        settings = _json(body / "sentence_bert_config.json", {})
        prompts = _json(folder / "config_sentence_transformers.json", {})
        prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name") or "", "")
        if prompt and not include_prompt:
            raise ModelError(f"{folder}: a pooling that leaves out the prompt is not supported")
        lower = bool(settings.get("do_lower_case"))
        positions = config.get("max_position_embeddings")
        if positions and config.get("model_type") in _OFFSET_POSITIONS:
            positions -= int(config.get("pad_token_id", 1)) + 1  # these models count positions from there
        tokenizer = _json(body / "tokenizer_config.json", {})
        limits = [settings.get("max_seq_length"), tokenizer.get("model_max_length"), positions]
        self.max_tokens: int = int(min((n for n in limits if n), default=512))

        def prepare(text: str) -> str:  # as sentence-transformers does
            text = (prompt + text).strip()
            return text.lower() if lower else text

        self._texts = _Texts(body, self.max_tokens, prepare)

        from transformers import AutoModel

        try:
            self.model: Any = AutoModel.from_pretrained(body, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # OSError, ValueError and the errors of the weight formats
            raise ModelError(f"{body} cannot be loaded: {error}") from None
        self.model.float().eval().requires_grad_(False)
        self._hidden = int(self.model.get_input_embeddings().weight.shape[1])
        self.dim: int = int(self.model.config.hidden_size) * len(self._modes)
        weights = [p for p in body.iterdir() if p.suffix in (".safetensors", ".bin", ".json")]
        pools = folder / pooling / "config.json"
        self.id: str = f"{folder.resolve().name}-{_digest([*sorted(weights), pools])}"

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [n, dim], rows of norm 1; text past ``max_tokens`` is left out.

        Raises TypeError, see Embedder.
        """
        import torch

        out = np.empty((len(texts), self.dim), np.float32)
        with torch.inference_mode():
            for rows, ids, mask in self._texts.batches(texts):
                tensor = torch.from_numpy(mask)
                states = self.model(input_ids=torch.from_numpy(ids), attention_mask=tensor).last_hidden_state
                out[rows] = self._pool(states, tensor).numpy()
        return out

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before truncation, special tokens and prompt included.

        Raises TypeError, see Embedder.
        """
        return self._texts.counts(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids. Raises ValueError, see Embedder."""
        return self._texts.decode(ids)

    def embed_from_inputs(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[n, dim], rows of norm 1, from token embeddings [n, t, hidden] and a mask [n, t] of 0 and 1.

        Gradients reach ``inputs_embeds``. Position embeddings are added here; special tokens and prompt are
        not. Raises ValueError for shapes that do not fit, t above ``max_tokens``, or a row whose mask is all
        0.
        """
        shape = tuple(inputs_embeds.shape)
        if len(shape) != 3 or shape[2] != self._hidden or tuple(attention_mask.shape) != shape[:2]:
            raise ValueError(
                f"inputs_embeds must be [n, t, {self._hidden}] with attention_mask [n, t], "
                f"got {shape} and {tuple(attention_mask.shape)}"
            )
        if shape[1] > self.max_tokens:
            raise ValueError(f"inputs_embeds may have at most {self.max_tokens} tokens, got {shape[1]}")
        if not bool(attention_mask.bool().any(dim=1).all()):
            raise ValueError("attention_mask must have a 1 in every row")
        mask = attention_mask.long()
        return self._pool(
            self.model(inputs_embeds=inputs_embeds, attention_mask=mask).last_hidden_state, mask
        )

    def _pool(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token states [n, t, hidden] and mask [n, t] to unit vectors [n, dim]."""
        import torch

        keep = mask.to(states.dtype).unsqueeze(-1)
        count, parts = keep.sum(1), []
        rows, place = torch.arange(len(states)), torch.arange(states.shape[1])
        for mode in self._modes:
            if mode == "cls":
                parts.append(states[rows, mask.argmax(1)])
            elif mode == "lasttoken":
                parts.append(states[rows, (mask * (place + 1)).argmax(1)])
            elif mode == "max":
                parts.append(states.masked_fill(keep == 0, float("-inf")).amax(1))
            elif mode == "weightedmean":
                weight = keep * (place + 1).to(states.dtype).view(1, -1, 1)
                parts.append((states * weight).sum(1) / weight.sum(1))
            else:
                parts.append((states * keep).sum(1) / (count if mode == "mean" else count.sqrt()))
        return torch.nn.functional.normalize(torch.cat(parts, dim=1), dim=1)


def load_embedder(name_or_path: str = "minilm", threads: int = 1) -> Embedder:
    """The embedder of a registered name or of a model folder. A name may download once; a folder never does.

    A folder with ``modules.json`` or ``config.json`` is a SentenceTransformersFolder, one with only
    ``model.onnx`` a MiniLMOnnxEmbedder. ``threads`` holds for the latter; torch's threads are set for the
    whole process, so they are left alone. Raises ModelError for an unknown name or folder, ValueError for
    ``threads`` below 1.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    source = SOURCES.get(name_or_path)
    if source is not None and source.kind == "gguf" and not Path(name_or_path).is_dir():
        raise ModelError(
            f"model {name_or_path!r} is not an embedder; use minilm or the path of a model folder"
        )
    folder = resolve_model(name_or_path)
    described = (folder / "modules.json").exists() or (folder / "config.json").exists()
    if not described and (folder / "model.onnx").exists():
        return MiniLMOnnxEmbedder(folder, threads)
    return SentenceTransformersFolder(folder)


def _checked(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of strings, got one string")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}] must be a string, got {type(text).__name__}")
    return texts


def _json(path: Path, default: Any = None) -> Any:
    """The parsed file; ``default`` when it is missing and a default is given. Raises ModelError."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if default is None:
            raise ModelError(f"{path} is missing") from None
        return default
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    wanted = list if isinstance(default, list) else dict
    if not isinstance(value, wanted):
        raise ModelError(f"{path} must hold a JSON {'array' if wanted is list else 'object'}")
    return value


def _pooling(path: Path) -> tuple[list[str], bool]:
    """Modes of a pooling config, in the order their vectors are joined, and whether a prompt is pooled."""
    config = _json(path)
    named = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens": "weightedmean",
        "pooling_mode_lasttoken": "lasttoken",
    }
    modes = [mode for key, mode in named.items() if config.get(key)]
    given = config.get("pooling_mode")
    if given:
        modes = [given] if isinstance(given, str) else list(given)
    if not modes or not set(modes) <= set(_POOLINGS):
        raise ModelError(f"{path}: pooling must be of {', '.join(_POOLINGS)}; got {modes}")
    return modes, bool(config.get("include_prompt", True))


def _digest(paths: Sequence[Path]) -> str:
    """First 12 hex digits of the sha256 of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:12]
