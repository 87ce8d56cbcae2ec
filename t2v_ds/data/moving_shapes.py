"""The embedded source: captioned clips of coloured shapes that move, drawn on the fly.

A clip is a pure function of (seed, index): attributes -> path -> frames and caption.

    (seed, index) -> Attributes (never a held-out combination) -> caption
                                                               -> frames [T, S, S, 3] uint8

One combination of (colour, shape, direction) in four is held out of training (`is_held_out`): every colour, shape,
direction and every pair of them is seen, the triple is not. A model that draws a held-out triple has composed it.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "yellow": (240, 215, 40),
    "green": (40, 180, 60),
    "cyan": (40, 205, 215),
    "blue": (45, 75, 230),
    "purple": (170, 50, 200),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y)
RADII = {"small": 0.15625, "large": 0.25}  # half the side of the bounding box, as a share of the frame's side
SPEEDS = {"slowly": 2, "quickly": 1}  # frames a step, times the fewest with which the way suffices
# The shades above and below a horizon; of low saturation, so that colour always belongs to the shape.
_LIGHT, _DARK = (236, 236, 228), (24, 24, 30)
BACKGROUNDS = {"light": (_LIGHT, _LIGHT), "dark": (_DARK, _DARK), "split": (_LIGHT, _DARK)}

# Steps a side in which a shape moves along its way, and tracks a side on which it may run: few enough that a small codebook
# knows every way in which an edge cuts a cell of 8 x 8 pixels (at 64 pixels a side), which is what decides how soon a small
# transformer can move a shape.
_GRID = 32
_TRACKS = 8
_SUPERSAMPLING = 4  # drawn this much larger, then averaged: smooth edges
_STREAM = 0x5A9E5  # keeps this module's random streams apart from others with the same seed


@dataclass(frozen=True)
class Attributes:
    """What a clip shows; each field is a word of its caption."""

    colour: str
    shape: str
    direction: str
    size: str
    speed: str
    background: str

    @property
    def held_out(self) -> bool:
        """Whether training never shows this combination."""
        return is_held_out(self.colour, self.shape, self.direction)


def is_held_out(colour: str, shape: str, direction: str) -> bool:
    """Whether (colour, shape, direction) is kept from training: one direction of each (colour, shape)."""
    return (list(COLOURS).index(colour) + SHAPES.index(shape)) % len(DIRECTIONS) == list(DIRECTIONS).index(direction)


def combinations(held_out: bool) -> list[tuple[str, str, str]]:
    """All (colour, shape, direction) that are held out, or all that are trained on, in a fixed order."""
    return [triple for triple in itertools.product(COLOURS, SHAPES, DIRECTIONS) if is_held_out(*triple) == held_out]


def held_out_combinations() -> list[dict[str, str]]:
    """The held-out combinations as they stand in the manifest."""
    return [dict(zip(("colour", "shape", "direction"), triple, strict=True)) for triple in combinations(held_out=True)]


def draw_clip(
    index: int, seed: int, size: int, min_frames: int, max_frames: int
) -> tuple[np.ndarray, list[int], str, dict[str, Any]]:
    """Draw training clip `index`.

    Returns:
        frames [T, size, size, 3] uint8 with min_frames <= T <= max_frames, the duration of each frame in
        milliseconds, the caption, and the attributes.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, _STREAM, index])))
    trained = combinations(held_out=False)
    colour, shape, direction = trained[int(rng.integers(len(trained)))]
    attributes = random_attributes(rng, colour, shape, direction)
    frames = draw(attributes, rng, size, min_frames, max_frames)
    duration = int(rng.choice([50, 60, 70, 80, 90, 100]))
    return frames, [duration] * len(frames), caption(attributes, rng), asdict(attributes)


def random_attributes(rng: np.random.Generator, colour: str, shape: str, direction: str) -> Attributes:
    """Attributes with the given colour, shape and direction and everything else drawn from `rng`."""
    return Attributes(
        colour,
        shape,
        direction,
        size=str(rng.choice(list(RADII))),
        speed=str(rng.choice(list(SPEEDS))),
        background=str(rng.choice(list(BACKGROUNDS))),
    )


def caption(attributes: Attributes, rng: np.random.Generator | None = None) -> str:
    """The caption of a clip; with `rng`, size, speed and background are each left out now and then."""

    def keep(probability: float) -> bool:
        return rng is None or bool(rng.random() < probability)

    size = f"{attributes.size} " if keep(0.7) else ""
    speed = f" {attributes.speed}" if keep(0.7) else ""
    background = f" on a {attributes.background} background" if keep(0.6) else ""
    return f"a {size}{attributes.colour} {attributes.shape} moves {attributes.direction}{speed}{background}"


def draw(attributes: Attributes, rng: np.random.Generator, size: int, min_frames: int, max_frames: int) -> np.ndarray:
    """Draw a clip of these attributes: frames [T, size, size, 3] uint8, T drawn uniformly from min_frames to max_frames.

    The shape moves evenly, step after step of the grid, and stays inside the frame.
    """
    length = int(rng.integers(min_frames, max_frames + 1))
    radius = RADII[attributes.size]
    way = int((1 - 2 * radius) * _GRID)  # steps from touching one edge to touching the other
    frames_a_step = max(1, -(-(length - 1) // way)) * SPEEDS[attributes.speed]
    along = np.array(DIRECTIONS[attributes.direction], dtype=np.float64)
    axis = int(np.abs(along).argmax())
    # Across the direction of travel: on any track on which the shape is inside.
    first_track, last_track = int(np.ceil(radius * _TRACKS)), int((1 - radius) * _TRACKS)
    start = np.full(2, rng.integers(first_track, last_track + 1) / _TRACKS)
    first = radius + rng.integers(way - (length - 1) // frames_a_step + 1) / _GRID
    start[axis] = first if along[axis] > 0 else 1 - first
    canvas = _background(attributes, rng, size * _SUPERSAMPLING)
    frames = np.empty((length, size, size, 3), dtype=np.uint8)
    for t in range(length):
        image = canvas.copy()
        _draw_shape(image, attributes, start + along * (t // frames_a_step) / _GRID, radius)
        frames[t] = np.asarray(image.reduce(_SUPERSAMPLING))
    return frames


def shape_mask(shape: str, centre: tuple[float, float], radius: float, size: int) -> np.ndarray:
    """The ideal outline of `shape`: bool [size, size]; centre (x, y) and radius in pixels."""
    image = Image.new("L", (size * _SUPERSAMPLING,) * 2)
    polygon = _outline(shape, np.array(centre) / size, radius / size, size * _SUPERSAMPLING)
    draw_on = ImageDraw.Draw(image)
    if shape == "circle":
        draw_on.ellipse(polygon, fill=255)
    else:
        draw_on.polygon(polygon, fill=255)
    return np.asarray(image.reduce(_SUPERSAMPLING)) >= 128


def _outline(shape: str, centre: np.ndarray, radius: float, pixels: int) -> list[tuple[float, float]]:
    """Points of the outline (for a circle: the two corners of its box) in pixels."""
    x, y = (float(c) * pixels for c in centre)
    r = radius * pixels
    if shape == "circle":
        return [(x - r, y - r), (x + r, y + r)]
    if shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    return [(x, y - r), (x + r, y + r), (x - r, y + r)]


def _draw_shape(image: Image.Image, attributes: Attributes, centre: np.ndarray, radius: float) -> None:
    draw_on = ImageDraw.Draw(image)
    points = _outline(attributes.shape, centre, radius, image.width)
    fill = COLOURS[attributes.colour]
    if attributes.shape == "circle":
        draw_on.ellipse(points, fill=fill)
    else:
        draw_on.polygon(points, fill=fill)


def _background(attributes: Attributes, rng: np.random.Generator, pixels: int) -> Image.Image:
    """The shade above a random horizon, and the one below it."""
    above, below = BACKGROUNDS[attributes.background]
    down = (np.arange(pixels) + 0.5) / pixels  # [S] in 0..1
    column = np.where(down[:, None] < int(rng.integers(3, 6)) / 8, above, below)  # [S, 3]
    return Image.fromarray(np.repeat(column[:, None], pixels, axis=1).astype(np.uint8))
