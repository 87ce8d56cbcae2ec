"""Every setting of the product, as typed dataclasses; `config_loader.load_config` fills them.

A stage has one dataclass (`PrepareConfig`, `VQVAERunConfig`, ...). A value out of range is an error that names the key
and what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from t2v_ds.errors import ConfigError


def require(condition: bool, key: str, found: object, allowed: str) -> None:
    """Raise `ConfigError` naming `key`, the value found and what is allowed, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"setting '{key}' is {found!r}; allowed: {allowed}")


def parse_part(part: str) -> slice:
    """Which of a list of pieces of work are mine: "2/10" is every tenth, from the second on; an empty part is all."""
    number, _, parts = part.partition("/")
    fits = not part or (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts))
    require(fits, "part", part, "PART/PARTS, such as 2/10, or nothing")
    return slice(int(number) - 1, None, int(parts)) if part else slice(None)


@dataclass
class DownloadConfig:
    """How clips named by URL are fetched."""

    timeout_s: float = 20.0  # seconds without a byte before an attempt is given up
    total_s: float = 120.0  # seconds for one GIF, all attempts together; a server that drips bytes is given up then
    retries: int = 3  # further attempts after the first; waits that the server asks for (Retry-After) do not count
    max_bytes: int = 32 * 2**20  # a larger GIF is rejected while it downloads
    threads: int = 32  # downloads at a time, in each part
    per_host: float = 0.0  # requests a second to one host, in each part; 0: as many as the threads make
    ahead: int = 2048  # rows fetched ahead of the oldest unfinished one, so that a slow link holds up nothing else; costs disk
    allow_private: bool = False  # allow addresses of private networks and this machine

    def __post_init__(self) -> None:
        require(self.timeout_s > 0, "download.timeout_s", self.timeout_s, "> 0 seconds")
        require(self.total_s > 0, "download.total_s", self.total_s, "> 0 seconds")
        require(self.retries >= 0, "download.retries", self.retries, ">= 0")
        require(self.max_bytes > 0, "download.max_bytes", self.max_bytes, "> 0 bytes")
        require(1 <= self.threads <= 1024, "download.threads", self.threads, "1 to 1024")
        require(self.per_host >= 0, "download.per_host", self.per_host, ">= 0 requests a second")
        require(self.ahead >= 1, "download.ahead", self.ahead, ">= 1 rows")


@dataclass
class FilterConfig:
    """Which clips teach nothing; levels are those of a colour channel, 0 to 255, measured on means of about 32 x 32 cells."""

    flat_below: float = 8.0  # levels: rejected if no frame has two cells that differ by this much; 0: none
    still_below: float = 8.0  # levels: rejected if no cell changes by this much between any two frames; 0: none
    duplicates: str = "same_caption"  # rejected: "same_caption": frames and caption of an earlier clip; "any_caption": frames; "keep": none
    near_duplicate_below: float = 0.0  # levels: rejected if four frames of 8 x 8 pixels differ by less from an earlier clip's; 0: none

    def __post_init__(self) -> None:
        for name in ("flat_below", "still_below", "near_duplicate_below"):
            require(0 <= getattr(self, name) <= 256, f"filters.{name}", getattr(self, name), "0 to 256 levels")
        allowed = ("same_caption", "any_caption", "keep")
        require(self.duplicates in allowed, "filters.duplicates", self.duplicates, ", ".join(f"'{one}'" for one in allowed))


@dataclass
class PrepareConfig:
    """Source -> raw shards."""

    source: str = "moving-shapes"  # a folder of GIFs, a TSV of `url TAB caption`, or moving-shapes
    out: str = ""
    captions: str = ""  # TSV (`file TAB caption`) for a folder of GIFs; empty: captions.tsv in or beside it, else file names
    image_size: int = 128  # pixels, square
    min_frames: int = 15
    max_frames: int = 40
    require_trailer: bool = True  # false: also take GIFs without the last byte, as browsers do; one cut between two frames looks alike
    chunk_clips: int = 10_000
    shard_clips: int = 250
    compression: str = "none"  # "zstd": raw shards take less disk (a fourth at 128 pixels), and reading them some time more
    clips: int = 2_000  # how many clips moving-shapes draws
    limit: int = 0  # use only the first rows of the source; 0: all
    workers: int = 0  # processes; 0: one a core
    part: str = ""  # "2/10": only load every tenth block of rows, from the second on; a run without it then writes the shards
    seed: int = 0
    report: bool = False  # also write report.md and contact_sheet.png; of a finished folder, do only that
    filters: FilterConfig = field(default_factory=FilterConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)

    def __post_init__(self) -> None:
        require(bool(self.source), "source", self.source, "a folder of GIFs, a TSV of `url TAB caption`, or moving-shapes")
        require(self.seed >= 0, "seed", self.seed, ">= 0")
        require(8 <= self.image_size <= 1024, "image_size", self.image_size, "8 to 1024 pixels")
        require(self.min_frames >= 1, "min_frames", self.min_frames, ">= 1")
        require(self.min_frames <= self.max_frames, "max_frames", self.max_frames, f">= min_frames ({self.min_frames})")
        require(self.max_frames <= 10_000, "max_frames", self.max_frames, "<= 10000")
        require(self.chunk_clips >= 1, "chunk_clips", self.chunk_clips, ">= 1")
        require(self.shard_clips >= 1, "shard_clips", self.shard_clips, ">= 1")
        require(self.compression in ("none", "zstd"), "compression", self.compression, "'none' or 'zstd'")
        require(self.clips >= 1, "clips", self.clips, ">= 1")
        require(self.limit >= 0, "limit", self.limit, ">= 0")
        require(self.workers >= 0, "workers", self.workers, ">= 0")
        parse_part(self.part)


@dataclass
class QuantizerConfig:
    """The codebook and how it learns."""

    codebook_size: int = 1024
    codebook_dim: int = 256
    learning: str = "ema"  # "ema": fp32 buffers moved by statistics; "gradient": a parameter moved by the codebook loss
    warmup_steps: int = 0  # steps in which latents pass unquantized, before the codebook is set from data
    decay: float = 0.99  # of the moving averages
    dead_below: float = 0.03  # a code used less than this fraction of the mean use is dead
    revive_every: int = 20  # steps between revivals of dead codes; 0: never
    diversity_temperature: float = 0.1  # of the soft assignments, in units of the codebook's variance

    def __post_init__(self) -> None:
        require(2 <= self.codebook_size <= 65_536, "quantizer.codebook_size", self.codebook_size, "2 to 65536")
        require(1 <= self.codebook_dim <= 1024, "quantizer.codebook_dim", self.codebook_dim, "1 to 1024")
        require(self.learning in ("ema", "gradient"), "quantizer.learning", self.learning, "'ema' or 'gradient'")
        require(self.warmup_steps >= 0, "quantizer.warmup_steps", self.warmup_steps, ">= 0")
        require(0 < self.decay < 1, "quantizer.decay", self.decay, "between 0 and 1")
        require(0 <= self.dead_below < 1, "quantizer.dead_below", self.dead_below, "0 to below 1")
        require(self.revive_every >= 0, "quantizer.revive_every", self.revive_every, ">= 0")
        require(self.diversity_temperature > 0, "quantizer.diversity_temperature", self.diversity_temperature, "> 0")


@dataclass
class VQVAEConfig:
    """The residual VQ-VAE; the defaults are the spec size (128 -> 32 x 32 latents)."""

    image_size: int = 128
    stem_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2)  # one halving of the resolution each
    residual_blocks: tuple[int, ...] = (1, 2)  # at each resolution, in the encoder and in the decoder
    norm_groups: int = 16
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    patch_encoder: bool = False  # encode each code's own pixels alone: no residual blocks in the encoder, no overlapping convolutions

    def __post_init__(self) -> None:
        levels = len(self.channel_multipliers)
        require(levels >= 1, "model.channel_multipliers", self.channel_multipliers, "at least one entry")
        require(min(self.channel_multipliers) >= 1, "model.channel_multipliers", self.channel_multipliers, "entries >= 1")
        blocks = self.residual_blocks
        allowed = f"{levels} entries >= 0, one for each of channel_multipliers"
        require(len(blocks) == levels and min(blocks) >= 0, "model.residual_blocks", blocks, allowed)
        require(
            self.image_size % self.downsampling == 0 and self.image_size >= self.downsampling,
            "model.image_size",
            self.image_size,
            f"a multiple of {self.downsampling} (channel_multipliers halves it {levels} times)",
        )
        require(self.norm_groups >= 1, "model.norm_groups", self.norm_groups, ">= 1")
        require(
            self.stem_channels >= 1 and self.stem_channels % self.norm_groups == 0,
            "model.stem_channels",
            self.stem_channels,
            f"a multiple of norm_groups ({self.norm_groups})",
        )

    @property
    def downsampling(self) -> int:
        """Pixels a side that one code stands for."""
        return 2 ** len(self.channel_multipliers)

    @property
    def grid_size(self) -> int:
        """Codes a side of a frame."""
        return self.image_size // self.downsampling


@dataclass
class LossConfig:
    """Weights of the VQ-VAE's losses; 0 switches a loss off and costs nothing."""

    l1: float = 1.0
    codebook: float = 1.0  # used only when quantizer.learning is "gradient"
    commitment: float = 0.25
    ssim: float = 0.2
    perceptual: float = 0.1
    lab: float = 0.1
    diversity: float = 0.01
    perceptual_network: str = "vgg16"  # "vgg16" or "squeezenet"
    perceptual_weights: str = "imagenet"  # "imagenet", "random", or the path of a state dict

    def __post_init__(self) -> None:
        for name in ("l1", "codebook", "commitment", "ssim", "perceptual", "lab", "diversity"):
            require(getattr(self, name) >= 0, f"losses.{name}", getattr(self, name), ">= 0")
        networks = ("vgg16", "squeezenet")
        require(self.perceptual_network in networks, "losses.perceptual_network", self.perceptual_network, " or ".join(networks))


@dataclass
class TrainConfig:
    """One optimisation, whatever the model."""

    steps: int = 0  # optimizer steps; 0: as many as `epochs` takes
    epochs: float = 1.0  # passes over the data
    batch: int = 8  # clips an optimizer step, over all ranks
    micro_batch: int = 0  # clips a forward pass on one rank; 0: batch / ranks, with no accumulation
    optimizer: str = "adamw"  # "adamw", or "muon" for the matrices of the transformer's layers and AdamW for the rest (ZeRO stage 0 only)
    learning_rate: float = 3e-4
    min_learning_rate: float = 0.0
    warmup_steps: int = 100
    schedule: str = "cosine"  # "cosine" or "constant" after the warm-up
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.01
    gradient_clip: float = 1.0  # largest gradient norm; 0: no clipping
    precision: str = "bf16"  # "bf16" (autocast, fp32 weights) or "fp32"
    sequence_parallel: int = 1  # ranks that share each clip, with equal parts of every frame's rows (the transformer only)
    compile: bool = False  # torch.compile the model: a slow first step, then faster ones on GPUs
    ds_config: str = "zero1"  # a name in ds_configs/ (zero0 .. zero3, zero3_offload) or the path of a DeepSpeed JSON file
    save_every: int = 500  # optimizer steps
    keep_checkpoints: int = 2
    log_every: int = 10
    visual_every: int = 250  # reconstruction grids or generated clips in TensorBoard; 0: only at the end
    data_threads: int = 1
    shard_window: int = 0  # shards that are read from at a time, in random order; 0: all. For data on slow or remote disks
    watchdog_s: float = 1800.0  # a step that takes longer ends the run with the name of the rank; 0: off

    def __post_init__(self) -> None:
        require(self.steps >= 0, "train.steps", self.steps, ">= 0")
        require(self.epochs > 0, "train.epochs", self.epochs, "> 0")
        require(self.batch >= 1, "train.batch", self.batch, ">= 1")
        require(self.micro_batch >= 0, "train.micro_batch", self.micro_batch, ">= 0")
        require(self.optimizer in ("adamw", "muon"), "train.optimizer", self.optimizer, "'adamw' or 'muon'")
        require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "> 0")
        floor = self.min_learning_rate
        require(0 <= floor <= self.learning_rate, "train.min_learning_rate", self.min_learning_rate, "0 to learning_rate")
        require(self.warmup_steps >= 0, "train.warmup_steps", self.warmup_steps, ">= 0")
        require(self.schedule in ("cosine", "constant"), "train.schedule", self.schedule, "'cosine' or 'constant'")
        require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "train.betas", self.betas, "two numbers in [0, 1)")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, ">= 0")
        require(self.gradient_clip >= 0, "train.gradient_clip", self.gradient_clip, ">= 0")
        require(self.sequence_parallel >= 1, "train.sequence_parallel", self.sequence_parallel, ">= 1")
        require(self.precision in ("bf16", "fp32"), "train.precision", self.precision, "'bf16' or 'fp32'")
        require(self.save_every >= 1, "train.save_every", self.save_every, ">= 1")
        require(self.keep_checkpoints >= 1, "train.keep_checkpoints", self.keep_checkpoints, ">= 1")
        require(self.log_every >= 1, "train.log_every", self.log_every, ">= 1")
        require(self.visual_every >= 0, "train.visual_every", self.visual_every, ">= 0")
        require(self.data_threads >= 0, "train.data_threads", self.data_threads, ">= 0")
        require(self.shard_window >= 0, "train.shard_window", self.shard_window, ">= 0")
        require(self.watchdog_s >= 0, "train.watchdog_s", self.watchdog_s, ">= 0")


@dataclass
class CacheConfig:
    """Where shards that lie at a URL (s3://, gs://, https://, ...) are kept while they are used."""

    folder: str = ""  # on a disk of this machine; all processes may share it
    max_bytes: int = 2**40  # the shards in it; the longest unused go first
    retries: int = 5  # further attempts for a file after the first

    def __post_init__(self) -> None:
        require(self.max_bytes > 0, "cache.max_bytes", self.max_bytes, "> 0 bytes")
        require(self.retries >= 0, "cache.retries", self.retries, ">= 0")


@dataclass
class VQVAERunConfig:
    """Raw shards -> tokenizer."""

    data: str = ""
    out: str = ""
    accept_new_data: bool = False  # where the data has changed since the run was stopped, begin the epoch anew on what is there now
    chunk: int = -1  # train on this chunk only; -1: on all
    start: str = ""  # folder of a tokenizer to start from; empty: random weights
    held_out: float = 0.0  # share of the clips kept from training, to measure on
    balance: bool = False  # show every chunk's clips equally often, however many they are
    frames_per_clip: int = 4  # random frames of each clip in a step
    seed: int = 0
    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, ">= 0")
        require(self.chunk >= -1, "chunk", self.chunk, "a chunk's index, or -1 for all")
        require(0 <= self.held_out < 1, "held_out", self.held_out, "0 to below 1")
        require(self.frames_per_clip >= 1, "frames_per_clip", self.frames_per_clip, ">= 1")
        require(self.train.optimizer == "adamw", "train.optimizer", self.train.optimizer, "'adamw' for the tokenizer")


@dataclass
class MergeConfig:
    """Threads, each trained on a chunk -> one tokenizer. What is not given here is as the threads had it."""

    threads: tuple[str, ...] = ()
    data: str = ""
    out: str = ""
    allow_missing: bool = False  # merge although some chunks have no finished thread
    compare: tuple[str, ...] = ()  # further tokenizers to measure beside
    steps: int = 0  # of the cumulative training; 0: as many as `epochs` takes
    epochs: float = 1.0
    batch: int = 0  # clips a step over all ranks; 0: the threads'
    micro_batch: int = 0
    learning_rate: float = 0.0  # 0: the threads'
    ds_config: str = ""  # empty: the threads'
    save_every: int = 500
    measured_clips: int = 32  # held-out clips a chunk in the report

    def __post_init__(self) -> None:
        require(self.steps >= 0, "steps", self.steps, ">= 0")
        require(self.epochs > 0, "epochs", self.epochs, "> 0")
        require(self.batch >= 0, "batch", self.batch, ">= 0")
        require(self.micro_batch >= 0, "micro_batch", self.micro_batch, ">= 0")
        require(self.learning_rate >= 0, "learning_rate", self.learning_rate, ">= 0")
        require(self.save_every >= 1, "save_every", self.save_every, ">= 1")
        require(self.measured_clips >= 1, "measured_clips", self.measured_clips, ">= 1")


@dataclass
class TextConfig:
    """The frozen text encoder."""

    encoder: str = "hashing"  # "hashing" (built in), "minilm" (by pip), or a Hugging Face name or folder; empty: as stored with the codes
    tokens: int = 16  # longest caption in tokens; longer ones are cut, and the number cut is logged
    width: int = 128  # of the hashing encoder; ignored for others

    def __post_init__(self) -> None:
        require(1 <= self.tokens <= 1024, "text.tokens", self.tokens, "1 to 1024")
        require(1 <= self.width <= 8192, "text.width", self.width, "1 to 8192")


# Sizes of transformers by name; `docs/transformer.md` has their parameters. A setting that is given wins over its preset's.
PRESETS: dict[str, dict[str, int]] = {
    "demo": {"width": 256, "layers": 4, "heads": 4, "kv_heads": 4},
    "30m": {"width": 512, "layers": 8, "heads": 8, "kv_heads": 8},
    "90m": {"width": 768, "layers": 12, "heads": 12, "kv_heads": 4},
    "300m": {"width": 1024, "layers": 24, "heads": 16, "kv_heads": 4},
    "650m": {"width": 1536, "layers": 24, "heads": 24, "kv_heads": 8},
    "1.3b": {"width": 2048, "layers": 28, "heads": 32, "kv_heads": 8},
}


@dataclass
class StoredTextConfig(TextConfig):
    """The text encoder whose vectors of the captions lie in token shards."""

    encoder: str = ""  # whose vectors are stored with the codes: "hashing", "minilm", or a Hugging Face name or folder; empty: none are


GRID_SIZE = 32  # codes a side, until the data says


@dataclass
class TransformerConfig:
    """The transformer; the defaults are the spec size."""

    preset: str = ""  # "demo", "30m", "90m", "300m", "650m" or "1.3b": width, layers, heads and kv_heads where they are not given
    width: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 0  # heads of keys and values, each shared by heads / kv_heads queries; 0: as many as heads
    mlp_ratio: float = 2.67  # hidden units of the gated MLP, in widths
    dropout: float = 0.0
    max_frames: int = 40
    decoding: str = "token"  # "token": one position after another; "frame": whole frames, each in a few passes
    attention: str = "full"  # "full"; "window": the last frames; "factorised": layers within the frame and along time take turns
    window_frames: int = 4  # that attention "window" sees, the frame itself included
    conditioning: str = "prefix"  # "prefix": words stand before the frames; "cross": every layer looks at the words apart
    group: int = 1  # each position carries group x group codes
    head_ratio: int = 0  # hidden units of the head's MLPs, in widths; 0: single layers, enough where group is 1
    neighbourhood: int = 3  # positions are fed the codes this far around: in the frame before, and in what is known of their own; 0: off
    learned_positions: bool = True  # learned embeddings of the place in the frame and of the frame's number
    rotary: bool = True  # queries and keys turned by (time, row, column)
    tied_head: bool = False  # logits are compared with the embeddings of the codes
    last_frame: bool = False  # can be given the last frame of a clip (see train's last_frame_share), and so draw loops
    activation_checkpointing: bool = False  # keep only the input of each layer, and compute it again in the backward pass
    loss_tile: int = 0  # positions whose logits exist at a time; 0: all
    grid_size: int = GRID_SIZE  # taken from the token shards, whatever is given
    codebook_size: int = 1024  # taken from the token shards, whatever is given
    text_width: int = 0  # taken from the text encoder, whatever is given

    def __post_init__(self) -> None:
        self._check_sizes()
        for name, allowed in (
            ("decoding", ("token", "frame")),
            ("attention", ("full", "factorised", "window")),
            ("conditioning", ("prefix", "cross")),
        ):
            value = getattr(self, name)
            require(value in allowed, f"model.{name}", value, ", ".join(f"'{one}'" for one in allowed))
        require(self.attention != "factorised" or self.layers >= 2, "model.layers", self.layers, ">= 2 with attention 'factorised'")
        require(self.window_frames >= 1, "model.window_frames", self.window_frames, ">= 1")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "0 to below 1")
        require(self.max_frames >= 1, "model.max_frames", self.max_frames, ">= 1")
        require(self.group >= 1, "model.group", self.group, ">= 1")
        require(0 <= self.head_ratio <= 16, "model.head_ratio", self.head_ratio, "0 to 16")
        known = self.text_width > 0 or self.grid_size != GRID_SIZE  # else the data's grid, which is filled in with the width, is to come
        fits = not known or self.grid_size % self.group == 0
        require(fits, "model.group", self.group, f"a divisor of the grid ({self.grid_size} codes a side)")
        side = self.neighbourhood
        require(side == 0 or (side > 0 and side % 2 == 1), "model.neighbourhood", side, "0 or an odd number")
        require(self.loss_tile >= 0, "model.loss_tile", self.loss_tile, ">= 0 positions")

    def _check_sizes(self) -> None:
        require(not self.preset or self.preset in PRESETS, "model.preset", self.preset, ", ".join(f"'{name}'" for name in PRESETS))
        require(self.width >= 1 and self.heads >= 1, "model.width", self.width, ">= 1")
        require(self.width % self.heads == 0, "model.heads", self.heads, f"a divisor of width ({self.width})")
        require(self.width // self.heads % 2 == 0, "model.heads", self.heads, f"one that leaves an even width a head (width {self.width})")
        self.kv_heads = self.kv_heads or self.heads
        shared = self.kv_heads >= 1 and self.heads % self.kv_heads == 0
        require(shared, "model.kv_heads", self.kv_heads, f"a divisor of heads ({self.heads})")
        require(self.layers >= 1, "model.layers", self.layers, ">= 1")
        require(self.mlp_ratio > 0, "model.mlp_ratio", self.mlp_ratio, "> 0")

    @property
    def side(self) -> int:
        """Positions a side of a frame."""
        return self.grid_size // self.group

    @property
    def positions(self) -> int:
        """Positions of a frame."""
        return self.side**2

    @property
    def slots(self) -> int:
        """Codes of a position."""
        return self.group**2

    def layer_attention(self, layer: int) -> str:
        """What a layer attends to: "full", "window", "spatial" (its frame) or "temporal" (its place in the frames so far)."""
        if self.attention != "factorised":
            return self.attention
        return "temporal" if layer % 2 else "spatial"


@dataclass
class TransformerRunConfig:
    """Token shards -> generator."""

    data: str = ""
    out: str = ""
    accept_new_data: bool = False  # where the data has changed since the run was stopped, begin the epoch anew on what is there now
    tokenizer: str = ""  # empty: the one kept with the token shards
    seed: int = 0
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for guidance
    excerpt_share: float = 0.0  # share of samples that are a short excerpt of a clip: cheap practice in drawing and moving
    excerpt_frames: int = 4
    mask: str = "frame"  # decoding "frame": order of positions: another in each "frame", or the same in all of a clip, a "tube"
    context_noise: float = 0.0  # up to this share of the codes that the model is fed are replaced by random ones, against drift
    context_confusion: float = 0.0  # the same by codes that look alike, the mistakes of sampling; with both, a clip has one or the other
    last_frame_share: float = 0.0  # share of whole clips whose last frame is given (needs model.last_frame)
    z_loss: float = 1.0e-4  # weight of log(sum(exp(logits)))^2, which keeps logits from growing
    length_buckets: int = 0  # steps whose clips are sorted by length and dealt out again, so that less is padded; 0: off
    sample_prompts: tuple[str, ...] = ()  # shown in TensorBoard; empty: captions of the data
    model: TransformerConfig = field(default_factory=TransformerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, ">= 0")
        require(0 <= self.excerpt_share < 1, "excerpt_share", self.excerpt_share, "0 to below 1")
        require(self.excerpt_frames >= 1, "excerpt_frames", self.excerpt_frames, ">= 1")
        require(0 <= self.caption_dropout < 1, "caption_dropout", self.caption_dropout, "0 to below 1")
        require(self.length_buckets >= 0, "length_buckets", self.length_buckets, ">= 0")
        require(self.mask in ("tube", "frame"), "mask", self.mask, "'tube' or 'frame'")
        masks = self.model.decoding == "frame" or self.mask == "frame"
        require(masks, "mask", self.mask, "'frame', as there are no passes unless model.decoding=frame")
        for name in ("context_noise", "context_confusion"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        allowed = "above 0, up to 1, as model.last_frame=true" if self.model.last_frame else "0, unless model.last_frame=true"
        fits = 0 < self.last_frame_share <= 1 if self.model.last_frame else self.last_frame_share == 0
        require(fits, "last_frame_share", self.last_frame_share, allowed)
        require(self.z_loss >= 0, "z_loss", self.z_loss, ">= 0")

    @property
    def replaces_context(self) -> bool:
        """Whether the model is fed other codes than those that it is to tell."""
        return self.context_noise > 0 or self.context_confusion > 0


@dataclass
class TokenizeConfig:
    """Raw shards + tokenizer -> token shards."""

    data: str = ""
    tokenizer: str = ""
    out: str = ""
    part: str = ""  # "2/10": only every tenth shard, from the second on, beside nine others; whichever ends last writes the manifest
    batch_frames: int = 64  # frames encoded at once
    precision: str = "fp32"  # "bf16" or "fp32"
    text: StoredTextConfig = field(default_factory=StoredTextConfig)

    def __post_init__(self) -> None:
        parse_part(self.part)
        require(self.batch_frames >= 1, "batch_frames", self.batch_frames, ">= 1")
        require(self.precision in ("bf16", "fp32"), "precision", self.precision, "'bf16' or 'fp32'")


@dataclass
class SamplingConfig:
    """How codes are drawn from the transformer."""

    temperature: float = 1.0  # 0: always the likeliest code
    top_k: int = 0  # 0: all codes
    top_p: float = 0.97  # 1: all codes. Low values lose what is rare at every position, such as where a shape begins
    guidance: float = 1.2  # classifier-free guidance scale; 1: off
    guidance_schedule: str = "constant"  # "frames": falls to 1 at the last frame; "passes": rises from 1 within each frame
    frames: int = 0  # exact number of frames; 0: until the model ends the clip
    passes: int = 8  # decoding "frame": in so many passes a frame is drawn; as many as it has positions: one by one
    unmask: str = "random"  # decoding "frame": which positions a pass keeps: "random" ones, or those of which the model is most "confident"
    loop: bool = False  # end on the first frame (of models trained with last_frame_share)
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, ">= 0")
        require(self.temperature >= 0, "temperature", self.temperature, ">= 0 (0: always the likeliest code)")
        require(self.top_k >= 0, "top_k", self.top_k, ">= 0")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        require(self.guidance >= 0, "guidance", self.guidance, ">= 0")
        require(self.frames >= 0, "frames", self.frames, ">= 0")
        require(self.passes >= 1, "passes", self.passes, ">= 1")
        for name, values in (("guidance_schedule", ("constant", "frames", "passes")), ("unmask", ("random", "confident"))):
            require(getattr(self, name) in values, name, getattr(self, name), ", ".join(f"'{value}'" for value in values))


@dataclass
class IndexConfig:
    """A folder of tars that others wrote, or of which some are damaged -> index, manifest and a list of the bad clips."""

    data: str = ""
    tokenizer: str = ""  # of codes: the folder of the tokenizer that made them
    text: StoredTextConfig = field(default_factory=StoredTextConfig)
    max_bad_share: float = 0.01  # of the clips, and of the bytes; more is an error
    accept_cut: bool = False  # go on with what is left of shards that end early, though nobody knows how many clips are lost
    again: bool = False  # index a folder that has a manifest, and leave out the clips whose checksums differ
    chunk_clips: int = 10_000  # a shard belongs to the chunk of its first clip

    def __post_init__(self) -> None:
        require(0 <= self.max_bad_share <= 1, "max_bad_share", self.max_bad_share, "0 to 1")
        require(self.chunk_clips >= 1, "chunk_clips", self.chunk_clips, ">= 1")


@dataclass
class VerifyConfig:
    """A folder of shards that is read to its last byte."""

    data: str = ""  # written by t2v prepare, tokenize or index


@dataclass
class FVDConfig:
    """How sets of clips are compared by the features that a network sees in them."""

    weights: str = ""  # file of the network; empty: r3d_18 with fixed random weights, a stand-in whose figures compare only with each other
    architecture: str = "torchscript"  # what the file holds: "torchscript" (a program, such as I3D's), or a state dict of "r3d_18" or "s3d"
    frames: int = 16  # of each clip, from its first on; of a shorter clip the last one is repeated

    def __post_init__(self) -> None:
        allowed = ("torchscript", "r3d_18", "s3d")
        require(self.architecture in allowed, "fvd.architecture", self.architecture, ", ".join(f"'{one}'" for one in allowed))
        named = bool(self.weights) or self.architecture == "torchscript"
        require(named, "fvd.architecture", self.architecture, "only beside fvd.weights, the file of its state dict")
        require(2 <= self.frames <= 10_000, "fvd.frames", self.frames, "2 to 10000")


@dataclass
class PerceptualConfig:
    """How alike two clips look."""

    weights: str = ""  # "imagenet", "random", or the path of a state dict; empty: frames of 16 x 16 pixels are compared, without a network
    network: str = "squeezenet"  # that the weights belong to: "vgg16" or "squeezenet"

    def __post_init__(self) -> None:
        require(self.network in ("vgg16", "squeezenet"), "perceptual.network", self.network, "'vgg16' or 'squeezenet'")


@dataclass
class PlanConfig:
    """What a training run takes, found before it is started. The run's own settings are given beside these."""

    gpus: int = 1  # of the run, one process each
    memory: float = 0.0  # GiB of each; 0: what the accelerator has (cpu: this machine's, divided by the processes)
    accelerator: str = "h100"  # h100, h100-pcie, h200, b200, a100, a100-40gb, l40s, l4, rtx4090, or cpu
    peak_tflops: float = 0.0  # of each, in the run's precision, dense matrices; 0: of the accelerator's data sheet
    mfu: float = 0.4  # share of the peak that is reached; what checkpointing computes again counts as reached
    measure: bool = False  # run a step of two layers on this machine, and tell the time from that
    overhead: float = -1.0  # GiB of each that no tensor holds; -1: 1.5 on a GPU, 0.8 on a CPU
    clips: int = 0  # of the data, for the length of the run; 0: those of --data
    frames: float = 0.0  # of a clip on average; 0: those of --data, or the longest
    longest: int = 0  # frames of the longest clip; 0: of --data, or model.max_frames
    text_width: int = 0  # of a Hugging Face text encoder's vectors, such as 768; not needed for "hashing"

    def __post_init__(self) -> None:
        require(self.gpus >= 1, "gpus", self.gpus, ">= 1")
        require(self.memory >= 0, "memory", self.memory, ">= 0 GiB")
        require(self.peak_tflops >= 0, "peak_tflops", self.peak_tflops, ">= 0 TFLOP/s")
        require(0 < self.mfu <= 1, "mfu", self.mfu, "above 0, up to 1")
        require(self.overhead >= 0 or self.overhead == -1, "overhead", self.overhead, ">= 0 GiB, or -1")
        require(self.clips >= 0, "clips", self.clips, ">= 0")
        require(self.frames == 0 or self.frames >= 1, "frames", self.frames, ">= 1, or 0")
        require(self.longest >= 0, "longest", self.longest, ">= 0")
        require(self.longest == 0 or self.frames <= self.longest, "frames", self.frames, f"up to longest ({self.longest})")
        require(0 <= self.text_width <= 8192, "text_width", self.text_width, "0 to 8192")


@dataclass
class EvaluateConfig:
    """Generator + token shards -> a report of what it has learned."""

    model: str = ""
    data: str = ""
    validation: str = ""  # token shards that it was not trained on; empty: what is measured on clips is measured on those of `data`
    raw: tuple[str, ...] = ()  # raw shards that the token shards were made of; without them real clips are what the codes decode to
    tokenizer: str = ""  # empty: the one kept with the model
    out: str = ""
    again: bool = False  # measure anew, whatever report, or part of one, the folder holds
    clips: int = 256  # drawn for captions of the data, and as many real ones: for FVD, motion and likeness
    prompts_from: str = "validation"  # whose captions are drawn: "validation" (of `data`, where it is not given) or "training"
    loss_clips: int = 1024  # that the loss is measured on, of each set; 0: all
    training_clips: int = 1000  # that drawn clips are compared with; those whose captions are drawn are always among them
    second_draws: int = 32  # captions that are drawn with another seed, too; 0: none
    shape_prompts: int = 144  # for data of moving-shapes: clips whose colour, shape and direction are checked; 0: none
    sheet_clips: int = 8  # in the contact sheet
    batch: int = 32  # clips computed at once; changes no figure beyond rounding
    precision: str = "fp32"  # "bf16" or "fp32"
    fvd: FVDConfig = field(default_factory=FVDConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require(self.clips >= 2, "clips", self.clips, ">= 2")
        choices = ("validation", "training")
        require(self.prompts_from in choices, "prompts_from", self.prompts_from, "'validation' or 'training'")
        require(self.loss_clips >= 0, "loss_clips", self.loss_clips, ">= 0")
        require(self.training_clips >= 2, "training_clips", self.training_clips, ">= 2")
        require(self.second_draws == 0 or self.second_draws >= 2, "second_draws", self.second_draws, "0 or >= 2")
        require(self.shape_prompts == 0 or self.shape_prompts >= 2, "shape_prompts", self.shape_prompts, "0 or >= 2")
        require(self.sheet_clips >= 1, "sheet_clips", self.sheet_clips, ">= 1")
        require(self.batch >= 1, "batch", self.batch, ">= 1")
        require(self.precision in ("bf16", "fp32"), "precision", self.precision, "'bf16' or 'fp32'")


@dataclass
class DemoEvaluationConfig:
    """How the demo measures its generator."""

    prompts: int = 144  # half of them held-out combinations
    batch: int = 72
    reconstruction_clips: int = 64
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require(self.prompts >= 2, "evaluate.prompts", self.prompts, ">= 2")
        require(self.batch >= 1, "evaluate.batch", self.batch, ">= 1")


@dataclass
class DemoConfig:
    """Every stage in order, at a size that a laptop finishes in minutes."""

    out: str = "runs/demo"
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    vqvae: VQVAERunConfig = field(default_factory=VQVAERunConfig)
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    transformer: TransformerRunConfig = field(default_factory=TransformerRunConfig)
    evaluate: DemoEvaluationConfig = field(default_factory=DemoEvaluationConfig)
    prompts: tuple[str, ...] = ("a large red circle moves right slowly",)  # what the demo draws at its end

    def __post_init__(self) -> None:
        given = bool(self.prompts) and all(map(str.strip, self.prompts))
        require(given, "prompts", self.prompts, "one or more captions, none of them empty")
