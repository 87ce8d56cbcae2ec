"""Raw shards + tokenizer -> token shards: every clip is encoded once.

    raw shard i -> frames -> codes uint16 [T, h, w] -> token shard i (a shard that is whole is not made again)
    all shards  -> manifest with the tokenizer's id;  the tokenizer itself is kept beside them
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from t2v_ds.config import TokenizeConfig
from t2v_ds.data.manifest import MANIFEST, Manifest, ShardInfo
from t2v_ds.data.shards import ShardDataset, index_path, load_shard_info, token_members, write_shard
from t2v_ds.errors import ConfigError, DataError
from t2v_ds.models.facade import TOKENIZER_FOLDER, Tokenizer, load_tokenizer, require_same_tokenizer

logger = logging.getLogger(__name__)


def tokenize(config: TokenizeConfig) -> Manifest:
    """Encode every clip of `config.data` with the tokenizer of `config.tokenizer` into `config.out`.

    Killed at any instant and called again, it goes on with the first shard that is not whole.

    Raises:
        ConfigError: a folder is not given, or the image sizes differ.
        DataError, CheckpointError: damaged input, or `out` holds the codes of another tokenizer or other data.
    """
    for flag, value in (("--data", config.data), ("--tokenizer", config.tokenizer), ("--out", config.out)):
        if not value:
            raise ConfigError(f"{flag} is not given; name a folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(config.tokenizer, device, config.precision)
    tokenizer.batch = config.batch_frames
    out = Path(config.out)
    with ShardDataset(config.data, "raw") as dataset:
        size = tokenizer.model.config.image_size
        if dataset.manifest.image_size != size:
            raise ConfigError(
                f"{config.data} holds frames of {dataset.manifest.image_size} pixels, but tokenizer {config.tokenizer} takes {size}: "
                f"prepare the data with image_size={size}"
            )
        _claim(out, tokenizer, dataset, config)
        if (out / MANIFEST).is_file():
            logger.info("%s is tokenized already", out)
            return Manifest.load(out, "tokens")
        shards = _encode_shards(dataset, tokenizer, out)
        model = tokenizer.model.config
        manifest = Manifest.build(
            "tokens", shards, image_size=size, grid_size=model.grid_size, codebook_size=model.quantizer.codebook_size,
            tokenizer_id=tokenizer.tokenizer_id, source=_source(dataset), settings={"precision": config.precision},
        )  # fmt: skip
        manifest.save(out)
        return manifest


def _source(dataset: ShardDataset) -> dict[str, object]:
    return {"raw_digest": dataset.digest, "raw_source": dataset.manifest.source}


def _claim(out: Path, tokenizer: Tokenizer, dataset: ShardDataset, config: TokenizeConfig) -> None:
    """Keep the tokenizer with its codes; refuse a folder that holds other codes."""
    inner = out / TOKENIZER_FOLDER
    if (inner / "config.json").is_file():
        require_same_tokenizer(load_tokenizer(inner).tokenizer_id, f"what {out} holds", tokenizer.tokenizer_id, config.tokenizer)
    else:
        tokenizer.export_beside(out)
    if (out / MANIFEST).is_file():
        made_of = Manifest.load(out, "tokens").source.get("raw_digest")
        if made_of != dataset.digest:
            raise DataError(f"{out} holds the codes of other data than {config.data}: choose another --out, or remove it")


def _encode_shards(dataset: ShardDataset, tokenizer: Tokenizer, out: Path) -> list[ShardInfo]:
    shards = []
    with tqdm(total=len(dataset), desc="tokenize", unit="clip", dynamic_ncols=True) as progress:
        for shard, clips in zip(dataset.shards, dataset.shard_ranges, strict=True):
            path = out / shard.name.replace("raw-", "tokens-")
            if index_path(path).is_file() and path.is_file():
                shards.append(load_shard_info(path))
                progress.update(len(clips))
                continue
            shards.append(write_shard(path, _samples(dataset, tokenizer, clips, progress), shard.chunk))
    return shards


def _samples(dataset: ShardDataset, tokenizer: Tokenizer, clips: range, progress: tqdm[Any]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for i in clips:
        clip = dataset.read(i)
        codes = tokenizer.encode(clip["frames"].copy())
        yield clip["key"], token_members(codes, clip["caption"], clip["durations_ms"], clip["provenance"])
        progress.update()
