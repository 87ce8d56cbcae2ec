"""The clips that are measured: real ones, as frames or as what their codes decode to, and drawn ones.

    token shards (+ the raw shards that they were made of) -> ClipSet: codes, captions, frames by number
    prompts -> pieces of drawn clips, a file each, so that an interrupted run goes on   -> Drawn
    clips -> describe -> features, looks, motion, stillness
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from t2v_ds.config import FilterConfig, SamplingConfig
from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.fingerprint import check_content
from t2v_ds.data.gif import RejectedClip
from t2v_ds.data.manifest import Manifest
from t2v_ds.errors import DataError
from t2v_ds.evaluation.extractors import BATCH, Extractor
from t2v_ds.evaluation.likeness import PerceptualSpace
from t2v_ds.evaluation.work import load_arrays, save_arrays
from t2v_ds.models.facade import Generator, Tokenizer, require_same_tokenizer

PIECE = 32  # clips a file; decides their random streams, so that no setting does
STILL = FilterConfig(flat_below=0)  # a still is what `t2v prepare` rejects as one


@dataclass
class ClipSet:
    """Token shards, with the raw shards that they were made of where those are given."""

    tokens: ShardDataset
    raw: ShardDataset | None
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def frames_are(self) -> str:
        """What `frames` gives, in words."""
        return "frames of the raw shards" if self.raw else "what the codes decode to"

    @cached_property
    def _raw_numbers(self) -> dict[str, int]:
        return {} if self.raw is None else {self.raw.key(i): i for i in range(len(self.raw))}

    def captions(self, numbers: np.ndarray) -> list[str]:
        """Captions of clips."""
        return self.tokens.captions(numbers)

    def frames(self, i: int) -> np.ndarray:
        """Frames of clip `i`: uint8 [T, H, W, 3]."""
        if self.raw is None:
            return self.tokenizer.decode(self.tokens.read(i)["codes"])
        key = self.tokens.key(i)
        if key not in self._raw_numbers:
            raise DataError(f"{self.raw.folder} has no clip {key}, which {self.tokens.folder} has")
        return np.array(self.raw.read(self._raw_numbers[key])["frames"])

    def clips(self, numbers: Iterable[int], what: str) -> Iterator[np.ndarray]:
        """Frames of many clips, with a bar that says `what` they are."""
        every = list(numbers)
        for i in tqdm(every, desc=what, unit="clip", dynamic_ncols=True):
            yield self.frames(int(i))

    def close(self) -> None:
        """Close the shards."""
        for dataset in (self.tokens, self.raw):
            if dataset is not None:
                dataset.close()


def open_sets(folders: Sequence[str], raw: Sequence[str], generator: Generator) -> list[ClipSet]:
    """Open folders of token shards, each with its own of the `raw` folders, if that is among them.

    Raises:
        DataError: a folder is missing, empty or damaged, or a raw folder is none that the token shards were made of.
        CheckpointError: the codes are of another tokenizer than the generator's (names both ids).
    """
    sets, unused = [], {folder: ShardDataset(folder, "raw") for folder in raw if _clips_in(folder, "raw")}
    for folder in folders:
        _clips_in(folder, "tokens")
        tokens = ShardDataset(folder, "tokens")
        needed = generator.tokenizer.tokenizer_id
        require_same_tokenizer(needed, "the generator", tokens.manifest.tokenizer_id, f"that of {folder}")
        digest = tokens.manifest.source.get("raw_digest")
        own = next((name for name, dataset in unused.items() if dataset.digest == digest), None)
        sets.append(ClipSet(tokens, unused.pop(own) if own is not None else None, generator.tokenizer))
    if unused:
        raise DataError(f"--raw names {next(iter(unused))}, of which {' and '.join(folders)} were not made; give the raw shards of those")
    return sets


def _clips_in(folder: str, kind: str) -> int:
    clips = Manifest.load(folder, kind).total_clips
    if not clips:
        raise DataError(f"{folder} holds no clips")
    return clips


def spread(count: int, total: int) -> np.ndarray:
    """`count` numbers (or all) evenly spread over 0..total - 1: int64, in order."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))


def two_spreads(count: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of numbers below `total` without a common one: `count` numbers, and as many more as there are up to `count`."""
    both = spread(2 * count, total)
    if len(both) < 2 * count:  # all of them
        first = both[spread(count, len(both))]
        return first, np.setdiff1d(both, first)
    return both[0::2], both[1::2]


class Drawn(Sequence[np.ndarray]):
    """Drawn clips in files of `PIECE`, of which one is in memory."""

    def __init__(self, paths: list[Path], count: int) -> None:
        self._paths, self._count = paths, count
        self._number, self._piece = -1, dict[str, np.ndarray]()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]
        if not 0 <= i < self._count:
            raise IndexError(i)
        number, place = divmod(i, PIECE)
        if number != self._number:
            self._number, self._piece = number, load_arrays(self._paths[number])
        return self._piece[str(place)]


def draw_clips(
    generator: Generator, prompts: Sequence[str], sampling: SamplingConfig, stream: int, folder: Path, batch: int, what: str
) -> Drawn:
    """Draw a clip for each prompt; pieces that lie in `folder` already are not drawn again.

    Args:
        generator: loaded.
        prompts: one a clip.
        sampling: how codes are drawn; the seed of each piece is made of its seed, `stream` and the piece's number.
        stream: of random numbers; draws of the same prompts with another are other draws.
        folder: where the pieces are kept.
        batch: prompts drawn at once.
        what: the clips are, for the bar and the files' names.
    """
    paths = []
    with tqdm(total=len(prompts), desc=what, unit="clip", dynamic_ncols=True) as bar:
        for piece in range(-(-len(prompts) // PIECE)):
            some = prompts[piece * PIECE : (piece + 1) * PIECE]
            paths.append(folder / f"{what.replace(' ', '_')}-{piece:05d}.npz")
            if not paths[-1].is_file():
                seed = int(np.random.SeedSequence([sampling.seed, stream, piece]).generate_state(1)[0])
                clips = generator.generate(some, dataclasses.replace(sampling, seed=seed), batch=batch)
                save_arrays(paths[-1], {str(i): clip for i, clip in enumerate(clips)})
            bar.update(len(some))
    return Drawn(paths, len(prompts))


def motion(clip: np.ndarray) -> float:
    """Mean absolute difference of successive frames of a clip uint8 [T, H, W, 3], in levels of 0 to 255; 0 for one frame."""
    if len(clip) < 2:
        return 0.0
    return float(np.mean([np.abs(b.astype(np.int16) - a).mean() for a, b in itertools.pairwise(clip)]))


def is_still(clip: np.ndarray) -> bool:
    """Whether nothing moves in a clip uint8 [T, H, W, 3], by the rule of `t2v prepare` (`filters.still_below`)."""
    try:
        check_content(clip, STILL)
    except RejectedClip:
        return True
    return False


def describe(clips: Iterable[np.ndarray], extractor: Extractor, space: PerceptualSpace | None = None) -> dict[str, np.ndarray]:
    """Everything that is measured of clips, in one pass over them.

    Returns:
        "features" fp64 [N, D], "looks" fp32 [N, P] (of `space`; left out without one), "motion" fp64 [N], "still" bool [N],
        "lengths" int64 [N].
    """
    features, looks, moves, stills, lengths = [], [], [], [], []
    every = iter(clips)
    while some := list(itertools.islice(every, BATCH)):
        features.append(extractor.features(some))
        moves += [motion(clip) for clip in some]
        stills += [is_still(clip) for clip in some]
        lengths += [len(clip) for clip in some]
        if space is not None:
            looks.append(space.looks(some))
    found = {"features": np.concatenate(features), "motion": np.array(moves), "still": np.array(stills), "lengths": np.array(lengths)}
    return {**found, "looks": np.concatenate(looks)} if space is not None else found
