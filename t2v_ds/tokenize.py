"""Raw shards + tokenizer [+ text encoder] -> token shards: every clip and every caption is encoded once.

    raw shard i -> frames   -> codes uint16 [T, h, w]        -> token shard i (a shard that is whole is not made again)
                -> captions -> text vectors fp16 [n, width] -^
    all shards  -> manifest with the ids of tokenizer and text encoder;  the tokenizer itself is kept beside them
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from t2v_ds.config import TokenizeConfig, parse_part
from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.manifest import MANIFEST, Manifest, ShardInfo, StoredText
from t2v_ds.data.shards import TEXT_DTYPE, count_truncated, index_path, load_shard_info, read_index, token_members, write_shard
from t2v_ds.errors import ConfigError, DataError
from t2v_ds.files import create_once, remove_temporaries
from t2v_ds.models.facade import TOKENIZER_FOLDER, Tokenizer, load_tokenizer, require_same_tokenizer
from t2v_ds.models.text import BATCH, TextEncoder, build_text_encoder

logger = logging.getLogger(__name__)

CLAIM = ".tokenize.json"  # of what an unfinished folder is made


def tokenize(config: TokenizeConfig) -> Manifest | None:
    """Encode every clip of `config.data` with the tokenizer of `config.tokenizer`, and its caption with `config.text`, into `config.out`.

    Killed at any instant and called again, it goes on with the first shard that is not whole. Several processes, each with another
    `config.part`, share the work; whichever makes the last shard writes the manifest, so that there is none while one is missing.

    Returns:
        The manifest; None where shards of other parts are still missing.

    Raises:
        ConfigError: a folder is not given, the image sizes differ, or the text encoder cannot be had.
        DataError, CheckpointError: damaged input, or `out` holds what another tokenizer or text encoder made, or other data.
    """
    for flag, value in (("--data", config.data), ("--tokenizer", config.tokenizer), ("--out", config.out)):
        if not value:
            raise ConfigError(f"{flag} is not given; name a folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(config.tokenizer, device, config.precision)
    tokenizer.batch = config.batch_frames
    text = build_text_encoder(config.text, device) if config.text.encoder else None
    stored = StoredText(text.identity(), config.text, text.width) if text else None
    out = Path(config.out)
    with ShardDataset(config.data, "raw") as dataset:
        size = tokenizer.model.config.image_size
        if dataset.manifest.image_size != size:
            raise ConfigError(
                f"{config.data} holds frames of {dataset.manifest.image_size} pixels, but tokenizer {config.tokenizer} takes {size}: "
                f"prepare the data with image_size={size}"
            )
        _claim(out, tokenizer, dataset, config, stored.identity if stored else "")
        if (out / MANIFEST).is_file():
            _finish(out)
            logger.info("%s is tokenized already", out)
            return Manifest.load(out, "tokens")
        _encode_shards(dataset, tokenizer, text, out, parse_part(config.part))
        paths = [_token_path(out, shard) for shard in dataset.shards]
        missing = sum(not _is_whole(path) for path in paths)
        if missing:
            logger.info("part %s is done; %d of %d shards of other parts are missing", config.part, missing, len(paths))
            if text:
                text.log_truncated()
            return None
        shards = [load_shard_info(path) for path in paths]
        model = tokenizer.model.config
        manifest = Manifest.build(
            "tokens", shards, image_size=size, grid_size=model.grid_size, codebook_size=model.quantizer.codebook_size,
            tokenizer_id=tokenizer.tokenizer_id, source=_source(dataset), settings={"precision": config.precision},
            **(stored.describe(_truncated(paths)) if stored else {}),
        )  # fmt: skip
        create_once(out / MANIFEST, manifest.to_bytes())  # two parts may both find that they were the last
        _finish(out)
        return manifest


def _truncated(paths: list[Path]) -> int:
    """Clips whose captions have more tokens than are stored; said in the log."""
    clips = [clip for path in paths for clip in read_index(path, "tokens")[0]["clips"]]
    count = count_truncated(clips)
    if count:
        logger.warning("%d of %d captions are longer than text.tokens: their ends are not stored", count, len(clips))
    return count


def _finish(out: Path) -> None:
    """Remove what only an unfinished folder needs; other parts that still run have nothing left to write."""
    (out / CLAIM).unlink(missing_ok=True)
    remove_temporaries(out)


def _source(dataset: ShardDataset) -> dict[str, object]:
    return {"raw_digest": dataset.digest, "raw_source": dataset.manifest.source}


def _claim(out: Path, tokenizer: Tokenizer, dataset: ShardDataset, config: TokenizeConfig, text_identity: str) -> None:
    """Keep the tokenizer with its codes; refuse a folder that holds other codes or other text vectors."""
    manifest = Manifest.load(out, "tokens") if (out / MANIFEST).is_file() else None
    inner = out / TOKENIZER_FOLDER
    if (inner / "config.json").is_file():
        require_same_tokenizer(load_tokenizer(inner).tokenizer_id, f"what {out} holds", tokenizer.tokenizer_id, config.tokenizer)
    else:
        tokenizer.export_beside(out)
    asked = {"raw_digest": dataset.digest, "precision": config.precision, "text_identity": text_identity}
    claim = out / CLAIM
    if manifest is not None:
        found = {"raw_digest": manifest.source.get("raw_digest"), "precision": manifest.settings.get("precision")}
        found["text_identity"] = manifest.text_identity
    elif claim.is_file():
        found = json.loads(claim.read_bytes())
    elif any(out.glob("tokens-*.tar")) and not (out / MANIFEST).is_file():  # another part may have finished just now
        raise DataError(f"{out} holds shards but neither {MANIFEST} nor {CLAIM}: choose another --out, or remove it")
    elif create_once(claim, json.dumps(asked).encode()):
        return
    else:  # another part was faster
        found = json.loads(claim.read_bytes())
    if found.get("raw_digest") != asked["raw_digest"]:
        raise DataError(f"{out} holds the codes of other data than {config.data}: choose another --out, or remove it")
    if found.get("precision") != asked["precision"]:
        raise DataError(f"{out} was made with precision={found.get('precision')}: choose another --out than for {config.precision}")
    stored = found.get("text_identity", "")  # not in a claim of before vectors could be stored
    if stored != text_identity:
        of = [f"the text vectors of {identity}" if identity else "no text vectors" for identity in (stored, text_identity)]
        raise DataError(f"{out} holds {of[0]}, this run would store {of[1]}: give text.* as before, or choose another --out")


def _token_path(out: Path, shard: ShardInfo) -> Path:
    return out / shard.name.replace("raw-", "tokens-")


def _is_whole(path: Path) -> bool:
    return index_path(path).is_file() and path.is_file()


def _encode_shards(dataset: ShardDataset, tokenizer: Tokenizer, text: TextEncoder | None, out: Path, part: slice) -> None:
    mine = list(zip(dataset.shards, dataset.shard_ranges, strict=True))[part]
    with tqdm(total=sum(len(clips) for _, clips in mine), desc="tokenize", unit="clip", dynamic_ncols=True) as progress:
        for shard, clips in mine:
            path = _token_path(out, shard)
            if _is_whole(path):
                progress.update(len(clips))
            else:
                write_shard(path, _samples(dataset, tokenizer, text, clips, progress), shard.chunk)


def _samples(
    dataset: ShardDataset, tokenizer: Tokenizer, text: TextEncoder | None, clips: range, progress: tqdm[Any]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for first in range(clips.start, clips.stop, BATCH):
        numbers = np.arange(first, min(first + BATCH, clips.stop))
        for i, (vectors, is_cut) in zip(numbers.tolist(), _embed(text, dataset.captions(numbers)), strict=True):
            clip = dataset.read(i)
            codes = tokenizer.encode(clip["frames"].copy())
            yield clip["key"], token_members(codes, clip["caption"], clip["durations_ms"], clip["provenance"], vectors, is_cut)
            progress.update()


def _embed(text: TextEncoder | None, captions: list[str]) -> list[tuple[np.ndarray | None, bool]]:
    """What is stored of captions, fp16 [n, width] each, and whether they have more tokens than that; nothing without an encoder.

    Raises:
        ConfigError: the encoder's numbers are beyond those of fp16.
    """
    if text is None:
        return [(None, False)] * len(captions)
    stored: list[tuple[np.ndarray | None, bool]] = []
    for vectors, is_cut in text.embed(captions):
        with np.errstate(over="ignore"):
            half = vectors.numpy().astype(TEXT_DTYPE)
        if not np.isfinite(half).all():
            largest = float(vectors.abs().max())
            raise ConfigError(f"setting 'text.encoder' names {text.identity()}, whose vectors reach {largest:g}; allowed: 65504 (fp16)")
        stored.append((half, is_cut))
    return stored
