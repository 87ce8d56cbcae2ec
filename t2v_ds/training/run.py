"""The two training stages: data folder -> stream + objective -> the step loop -> model folder.

raw shards   -> frames of random clips           -> VQVAEObjective       -> tokenizer
token shards -> codes + captions as text vectors -> TransformerObjective -> generator

Text vectors are those that lie in the token shards; where there are none, a text encoder makes them while the transformer trains.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2v_ds.config import TextConfig, TransformerRunConfig, VQVAERunConfig, require
from t2v_ds.config_loader import to_dict
from t2v_ds.data.collate import frames_batch, pad_text
from t2v_ds.data.dataset import Buffer, ShardDataset
from t2v_ds.data.manifest import Manifest
from t2v_ds.data.order import Order
from t2v_ds.data.remote import CachedFolder, LocalFolder, open_folder
from t2v_ds.data.stream import ClipStream, Places, random_frames, whole_codes
from t2v_ds.data.subset import Selection, balanced, split
from t2v_ds.errors import ConfigError
from t2v_ds.models.exported import CONFIG_FILE, WEIGHTS_FILE, load_state
from t2v_ds.models.facade import TOKENIZER_FOLDER, Tokenizer, load_tokenizer, require_same_tokenizer
from t2v_ds.models.text import StoredTextEncoder, TextEncoder, build_text_encoder
from t2v_ds.training.distributed import connect
from t2v_ds.training.ds_config import accumulation_steps
from t2v_ds.training.loop import seed_generators, total_steps, train
from t2v_ds.training.model_card import write_model_card
from t2v_ds.training.objectives import Clips, TransformerObjective, VQVAEObjective
from t2v_ds.training.sequence_parallel import Ulysses
from t2v_ds.training.variation import join, lookalikes, vary

logger = logging.getLogger(__name__)

EXAMPLES = 16  # frames in the reconstruction grid
PROMPTS = 4  # captions of the data drawn in TensorBoard when none are given


def train_vqvae(config: VQVAERunConfig) -> dict[str, float]:
    """Train the VQ-VAE of `config` to the end, or go on where an earlier call stopped; every rank calls.

    Returns:
        The last logged metrics.

    Raises:
        UserError: see `loop.train`, `ShardDataset` and `VQVAELosses`.
    """
    _require_folders(config.data, config.out)
    shared = config.train.sequence_parallel
    require(shared == 1, "train.sequence_parallel", shared, "1 for the tokenizer, whose frames are small")
    collectives = connect()
    with ShardDataset(_opened(config), "raw", config.chunk) as dataset:
        require_image_size(config, dataset.manifest)
        clips = training_clips(dataset, config)
        start = load_tokenizer(config.start) if config.start else None
        steps, warmup = total_steps(config.train, len(clips)), config.model.quantizer.warmup_steps
        if warmup >= steps and start is None:
            raise ConfigError(
                f"setting 'model.quantizer.warmup_steps' is {warmup}, but the run has {steps} steps and would never quantize: "
                "allowed: fewer than the steps (train.steps, train.epochs)"
            )
        micro, _ = accumulation_steps(config.train, collectives.world_size)
        seed_generators(config.seed, 0, 0)  # the same start on all ranks
        objective = VQVAEObjective(config, collectives, _examples(dataset))
        settings = _settings(config)
        if start is not None:
            _start_from(objective, start, config)
            settings["start"] = start.tokenizer_id  # wherever it lies
        stream = ClipStream(
            clips, config.train.batch, collectives.rank, collectives.world_size, config.seed, config.train.data_threads,
            random_frames(config.frames_per_clip), micro, _order(clips, config),
        )  # fmt: skip
        with stream:
            metrics = train(
                objective, stream, config.train, Path(config.out), config.seed, settings, frames_batch,
                accept_new_data=config.accept_new_data, description="vqvae",
            )  # fmt: skip
        if collectives.rank == 0:
            write_model_card(Path(config.out), "tokenizer", objective.parameters_trained, settings, metrics, dataset.manifest)
        return metrics


def _opened(config: VQVAERunConfig | TransformerRunConfig) -> LocalFolder | CachedFolder:
    return open_folder(config.data, config.cache.folder, config.cache.max_bytes, config.cache.retries)


def _tokenizer_of(data: LocalFolder | CachedFolder) -> Path:
    """The tokenizer that lies beside token shards, on this machine."""
    if isinstance(data, CachedFolder):
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            data.fetch(f"{TOKENIZER_FOLDER}/{name}")
    return data.folder / TOKENIZER_FOLDER


def _order(clips: ShardDataset | Selection, config: VQVAERunConfig | TransformerRunConfig) -> Order:
    """The order of a run's samples."""
    window, buckets = config.train.shard_window, config.length_buckets if isinstance(config, TransformerRunConfig) else 0
    return Order(
        len(clips), config.seed, window=window, shards=clips.shard_ranges if window else (),
        buckets=buckets, lengths=clips.lengths, batch=config.train.batch,
    )  # fmt: skip


def training_clips(dataset: ShardDataset, config: VQVAERunConfig) -> ShardDataset | Selection:
    """The clips of a data set that a run trains on."""
    if not config.held_out and not config.balance:
        return dataset
    numbers, _ = split(dataset, config.held_out)
    if config.balance:
        chunks = np.concatenate([np.full(len(part), shard.chunk) for shard, part in zip(dataset.shards, dataset.shard_ranges, strict=True)])
        numbers = balanced([numbers[chunks[numbers] == chunk] for chunk in np.unique(chunks[numbers])])
    return Selection(dataset, numbers)


def _start_from(objective: VQVAEObjective, start: Tokenizer, config: VQVAERunConfig) -> None:
    """Put a tokenizer's weights and codebook in the place of the random ones.

    Raises:
        ConfigError: it is another model.
    """
    found, wanted = to_dict(start.model.config), to_dict(config.model)
    for settings in (found, wanted):
        for name in ("warmup_steps", "decay", "dead_below", "revive_every", "diversity_temperature"):  # how it learns
            settings["quantizer"].pop(name)
    different = [name for name in found if found[name] != wanted[name]]
    if different:
        name = different[0]
        raise ConfigError(
            f"setting 'model.{name}' is {wanted[name]!r}, but tokenizer {config.start}, from which to start, has {found[name]!r}: "
            "they must be equal"
        )
    load_state(objective.model, start.model.state_dict(), config.start)


def _examples(dataset: ShardDataset) -> np.ndarray:
    """The middle frames of clips spread over the data: uint8 [N, H, W, 3]."""
    numbers = np.unique(np.linspace(0, len(dataset) - 1, EXAMPLES).astype(int))
    clips = [dataset.read(int(i))["frames"] for i in numbers]
    return np.stack([clip[len(clip) // 2] for clip in clips])


def train_transformer(config: TransformerRunConfig) -> dict[str, float]:
    """Train the transformer of `config` to the end, or go on where an earlier call stopped; every rank calls.

    Returns:
        The last logged metrics.

    Raises:
        CheckpointError: the tokenizer is not the one that made the token shards (names both ids), or `config.out` has another
            tokenizer's run where it is to be kept.
        ConfigError: nor is the text encoder, where they hold text vectors (names both ids).
        UserError: see `loop.train` and `ShardDataset`.
    """
    _require_folders(config.data, config.out)
    collectives = connect()
    data = _opened(config)
    with ShardDataset(data, "tokens") as dataset:
        folder = config.tokenizer or str(_tokenizer_of(data))
        tokenizer = load_tokenizer(folder)
        tokenizer.require_place_beside(Path(config.out))  # now, and not when the trained model is to be written
        require_same_tokenizer(dataset.manifest.tokenizer_id, f"data {config.data}", tokenizer.tokenizer_id, folder)
        text, settings_of_text = _text_encoder(config, dataset)
        config = dataclasses.replace(config, model=_fit_model(config, dataset, text.width), text=settings_of_text)
        seed_generators(config.seed, 0, 0)
        prompts = config.sample_prompts or tuple(dataset.captions(_shown(dataset)))
        objective = TransformerObjective(config, tokenizer, text, _clips(dataset), prompts)
        micro, _ = accumulation_steps(config.train, collectives.world_size)
        alike = lookalikes(tokenizer.model.quantizer.codebook) if config.context_confusion else None
        shared = config.train.sequence_parallel  # ranks, one after another, that are handed the same clips
        if shared > 1:
            objective.model.parallel = Ulysses(collectives, shared, config.model)
        stream = ClipStream(
            dataset, config.train.batch, collectives.rank // shared, collectives.world_size // shared, config.seed,
            config.train.data_threads, _Vary(config, alike), micro, _order(dataset, config),
        )  # fmt: skip

        def collate(batch: dict[str, Any]) -> dict[str, Any]:
            if "captions" not in batch:
                return batch
            vectors, mask = text.encode(batch.pop("captions"))
            return {**batch, "text": vectors, "mask": mask}

        with stream:
            settings = _settings(config)
            settings["tokenizer_id"] = tokenizer.tokenizer_id  # new data may be accepted, but no codes that mean something else
            metrics = train(
                objective, stream, config.train, Path(config.out), config.seed, settings, collate,
                accept_new_data=config.accept_new_data, description="transformer",
            )  # fmt: skip
        text.log_truncated()
        if collectives.rank == 0:
            write_model_card(Path(config.out), "generator", objective.parameters_trained, settings, metrics, dataset.manifest)
        return metrics


def _shown(dataset: ShardDataset) -> np.ndarray:
    """Numbers of the clips whose captions are drawn in TensorBoard."""
    return np.arange(min(PROMPTS, len(dataset)))


def _text_encoder(config: TransformerRunConfig, dataset: ShardDataset) -> tuple[TextEncoder, TextConfig]:
    """The text encoder of a run, and its settings: those that `config` names, else those of the stored vectors.

    Raises:
        ConfigError: none are named or stored, or both are and differ.
    """
    stored = dataset.stored_text
    if stored is None:
        if not config.text.encoder:
            raise ConfigError(
                f"setting 'text.encoder' is empty, but {config.data} holds no text vectors: "
                "name an encoder, such as text.encoder=hashing, or tokenize again with one"
            )
        return build_text_encoder(config.text), config.text
    if not config.text.encoder and not config.sample_prompts:  # then no encoder need be at hand
        _tell_stored(dataset, stored.identity)
        numbers = _shown(dataset)
        vectors = {dataset.caption(i): torch.from_numpy(dataset.read(i)["text"]).float() for i in numbers.tolist()}
        return StoredTextEncoder(stored.identity, stored.settings.tokens, stored.width, vectors), stored.settings
    settings = config.text if config.text.encoder else stored.settings
    text = build_text_encoder(settings)
    if text.identity() != stored.identity:
        as_stored, as_here = (" ".join(f"text.{key}={value}" for key, value in to_dict(one).items()) for one in (stored.settings, settings))
        raise ConfigError(
            f"{config.data} holds the text vectors of {stored.identity}, but this run's text encoder is {text.identity()}: "
            f"set {as_stored} and have the same files, or text.encoder= (empty) to use what is stored, or tokenize again with {as_here}"
        )
    _tell_stored(dataset, stored.identity)
    return text, settings


def _tell_stored(dataset: ShardDataset, identity: str) -> None:
    logger.info("captions are the stored text vectors of %s; %d of them are cut", identity, dataset.manifest.text_truncated)


class _Vary:
    """A load function that makes of clips what a step trains on: see `variation.vary`."""

    def __init__(self, config: TransformerRunConfig, alike: np.ndarray | None = None) -> None:
        self.config, self.alike = config, alike

    def __call__(self, dataset: Any, places: Places, buffer: Buffer) -> dict[str, Any]:
        """See `stream.Load`.

        Returns:
            What `variation.join` returns, and "text", "mask" as `pad_text` has them, or "captions" where no text vectors are stored.
        """
        batch = whole_codes(dataset, places, buffer)
        clips = np.split(batch["codes"], np.cumsum(batch["lengths"])[:-1])
        samples = [vary(codes, rng, self.config, self.alike) for codes, rng in zip(clips, places.rngs(), strict=True)]
        has_caption = np.array([one.has_caption for one in samples])
        return {**join(samples), **_captions(dataset, places.numbers, has_caption, buffer)}


def _captions(dataset: Any, numbers: np.ndarray, is_kept: np.ndarray, buffer: Buffer) -> dict[str, Any]:
    """What a load function returns of the captions of clips (int64 [B]), of which only some are kept (bool [B]); see `_Vary`."""
    if dataset.stored_text is None:
        return {"captions": [caption if kept else "" for caption, kept in zip(dataset.captions(numbers), is_kept, strict=True)]}
    vectors = dataset.read_text(numbers[is_kept], buffer.beside)
    lengths = np.where(is_kept, dataset.text_lengths[numbers], 0)
    return pad_text(vectors, lengths, dataset.stored_text.settings.tokens)


def _fit_model(config: TransformerRunConfig, dataset: ShardDataset, text_width: int) -> Any:
    """The model's settings with what the data decides filled in.

    Raises:
        ConfigError: the data has longer clips than `model.max_frames`.
    """
    manifest, longest = dataset.manifest, int(dataset.lengths.max())
    if longest > config.model.max_frames:
        raise ConfigError(
            f"setting 'model.max_frames' is {config.model.max_frames}, but {config.data} holds clips of {longest} frames: "
            f"set model.max_frames={longest}, or prepare shorter clips"
        )
    return dataclasses.replace(
        config.model, grid_size=manifest.grid_size, codebook_size=manifest.codebook_size, text_width=text_width
    )  # fmt: skip


def _clips(dataset: ShardDataset) -> Clips:
    """Bounds of the lengths, and the usual duration of a frame."""
    some = np.unique(np.linspace(0, len(dataset) - 1, 256).astype(int))
    durations = [duration for i in some for duration in dataset.read(int(i))["durations_ms"]]
    return Clips(int(dataset.lengths.min()), int(dataset.lengths.max()), max(20, int(np.median(durations))))


def require_image_size(config: VQVAERunConfig, manifest: Manifest) -> None:
    """Raise ConfigError unless the model takes frames of the data's size."""
    if manifest.image_size != config.model.image_size:
        raise ConfigError(
            f"setting 'model.image_size' is {config.model.image_size}, but {config.data} holds frames of "
            f"{manifest.image_size} pixels: set model.image_size={manifest.image_size}, or prepare the data again"
        )


def _require_folders(data: str, out: str) -> None:
    for flag, value in (("--data", data), ("--out", out)):
        if not value:
            raise ConfigError(f"{flag} is not given; name a folder")


def _settings(config: VQVAERunConfig | TransformerRunConfig) -> dict[str, Any]:
    """The run's settings as they are kept with it, without where it lies."""
    settings = to_dict(config)
    # A moved folder is the same run; the data's digest and the tokenizer's id are compared on resume.
    for name in ("out", "data", "accept_new_data", "cache", "tokenizer"):
        settings.pop(name, None)
    return settings
