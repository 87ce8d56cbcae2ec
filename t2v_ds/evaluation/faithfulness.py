"""Does a clip show what its caption says? A program, not a network, reads colour, shape and direction off the frames.

    frames [T, S, S, 3] -> mask of the shape a frame (its pixels are saturated, the background's are not)
                        -> colour: nearest reference colour of the masked pixels, voted over frames
                        -> shape: best overlap with ideal outlines of the mask's area and centre, summed over frames
                        -> direction: the way its centre goes from the first frames to the last

It is made for the embedded source (`data/moving_shapes.py`) and is checked on true clips before it judges any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from t2v_ds.data.moving_shapes import COLOURS, DIRECTIONS, SHAPES, combinations, draw, random_attributes, shape_mask

UNSEEN = 10**6  # clips from this number on were never in a training set
_SATURATED = 70  # largest minus smallest channel; backgrounds stay below 30, shapes above 160
_UNIT_AREA = {"circle": np.pi, "square": 4.0, "triangle": 2.0}  # at radius 1
_SMALLEST_AREA = 0.008  # of the frame; the smallest shape covers 0.03
_LARGEST_AREA = 0.5  # of the frame; the largest shape covers 0.14, and coloured noise everything


@dataclass(frozen=True)
class Reading:
    """What the program sees in a clip; None where it sees nothing that it can name."""

    colour: str | None
    shape: str | None
    direction: str | None


def read_clip(frames: np.ndarray) -> Reading:
    """Read colour, shape and direction off frames [T, S, S, 3] uint8."""
    colours: Counter[str] = Counter()
    shapes = np.zeros(len(SHAPES))
    centres: list[tuple[int, float, float]] = []
    for t, frame in enumerate(frames):
        channels = frame.astype(np.int16)
        mask = channels.max(axis=-1) - channels.min(axis=-1) > _SATURATED
        if not _SMALLEST_AREA <= mask.mean() <= _LARGEST_AREA:
            continue
        ys, xs = np.nonzero(mask)
        centres.append((t, float(np.median(xs)), float(np.median(ys))))
        colours[_nearest_colour(channels[mask])] += 1
        shapes += _shape_overlaps(mask)
    if len(centres) < max(2, len(frames) // 2):
        return Reading(None, None, None)
    return Reading(colours.most_common(1)[0][0], SHAPES[int(shapes.argmax())], _direction(centres, frames.shape[1]))


def _nearest_colour(pixels: np.ndarray) -> str:
    median = np.median(pixels, axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(median - COLOURS[name]).sum()))


def _shape_overlaps(mask: np.ndarray) -> np.ndarray:
    """Overlap (intersection over union) of the mask with each of SHAPES at the mask's own area and centre of mass: [3]."""
    ys, xs = np.nonzero(mask)
    area, x, y = len(xs), xs.mean() + 0.5, ys.mean() + 0.5
    overlaps = []
    for shape in SHAPES:
        radius = float(np.sqrt(area / _UNIT_AREA[shape]))
        # A triangle's centre of mass lies a third of its radius below the middle of its box.
        ideal = shape_mask(shape, (x, y - radius / 3 if shape == "triangle" else y), radius, mask.shape[0])
        overlaps.append((ideal & mask).sum() / (ideal | mask).sum())
    return np.array(overlaps)


def _direction(centres: list[tuple[int, float, float]], size: int) -> str | None:
    """The axis and sign along which the centre moves most between the first and the last third."""
    third = max(1, len(centres) // 3)
    path = np.array(centres)
    move = np.median(path[-third:, 1:], axis=0) - np.median(path[:third, 1:], axis=0)
    if np.abs(move).max() < 0.03 * size:
        return None
    axis = int(np.abs(move).argmax())
    for name, along in DIRECTIONS.items():
        if along[axis] != 0 and np.sign(along[axis]) == np.sign(move[axis]):
            return name
    return None  # pragma: no cover - the four directions cover both signs of both axes


def accuracy(readings: Sequence[Reading], wanted: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    """Share of clips read as wanted: {'colour', 'shape', 'direction', 'all'} in 0..1; wanted = (colour, shape, direction)."""
    names = ("colour", "shape", "direction")
    right = np.array([[getattr(r, n) == w[i] for i, n in enumerate(names)] for r, w in zip(readings, wanted, strict=True)])
    result = {name: float(right[:, i].mean()) for i, name in enumerate(names)}
    result["all"] = float(right.all(axis=1).mean())
    return result


Prompted = tuple[str, str, str, bool]  # colour, shape, direction, held out


def choose_prompts(count: int) -> list[Prompted]:
    """Combinations to draw, spread evenly: the first half seen in training, the second half held out."""
    chosen: list[Prompted] = []
    for held_out, number in ((False, count - count // 2), (True, count // 2)):
        triples = combinations(held_out)
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(triples))
        chosen += [(*triples[order[i % len(triples)]], held_out) for i in range(number)]
    return chosen


def prompt_of(prompted: Prompted) -> str:
    """The plainest caption of a combination."""
    colour, shape, direction, _ = prompted
    return f"a {colour} {shape} moves {direction}"


# Words that no caption of the source holds, for what its captions say.
OTHER_WORDS = {
    "red": "crimson", "yellow": "golden", "green": "emerald", "cyan": "turquoise", "blue": "navy", "purple": "violet",
    "circle": "disc", "square": "box", "triangle": "pyramid",
    "left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards",
}  # fmt: skip


def paraphrase_of(prompted: Prompted) -> str:
    """The same in words that were never trained on: only an encoder that knows what words mean can tell.

    >>> paraphrase_of(("red", "circle", "right", False))
    'a crimson disc drifts to the right'
    """
    colour, shape, direction = (OTHER_WORDS[word] for word in prompted[:3])
    return f"a {colour} {shape} drifts {direction}"


def true_clips(prompted: list[Prompted], seed: int, size: int, min_frames: int, max_frames: int) -> list[np.ndarray]:
    """Clips as the source draws them for the same combinations, to check the program that judges."""
    clips = []
    for number, (colour, shape, direction, _) in enumerate(prompted):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, UNSEEN, number])))
        clips.append(draw(random_attributes(rng, colour, shape, direction), rng, size, min_frames, max_frames))
    return clips


def judge(prompted: list[Prompted], drawn: list[np.ndarray], true: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Accuracy of colour, shape and direction: seen, held out, and for reference true clips with their own and with shuffled captions."""
    wanted = [one[:3] for one in prompted]
    readings, references = [read_clip(clip) for clip in drawn], [read_clip(clip) for clip in true]
    order = np.random.Generator(np.random.PCG64(1)).permutation(len(wanted))
    shuffled = np.empty_like(order)
    shuffled[order] = np.roll(order, 1)  # in one ring: none keeps its own
    seen = [i for i, one in enumerate(prompted) if not one[3]]
    held_out = [i for i, one in enumerate(prompted) if one[3]]
    return {
        "seen": accuracy([readings[i] for i in seen], [wanted[i] for i in seen]),
        "held out": accuracy([readings[i] for i in held_out], [wanted[i] for i in held_out]),
        "true clips": accuracy(references, wanted),
        "true clips, shuffled captions": accuracy(references, [wanted[i] for i in shuffled]),
    }


HOW_READ = "A program (not a network) reads colour, shape and direction off the frames. The held-out combinations were never trained on."


def faithfulness_table(rows: Iterable[str]) -> list[str]:
    """Rows of clips, beside what guessing would give, as a Markdown table."""
    head = ["| clips | colour | shape | direction | all three |", "|---|---:|---:|---:|---:|"]
    return [*head, *rows, "| chance | 16.7 % | 33.3 % | 25.0 % | 1.4 % |"]
