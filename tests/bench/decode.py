"""Time decoding GIFs and resizing their frames against other libraries, per second of CPU time, and count what each gets wrong.

    .venv/bin/python -m tests.bench.decode [--source FOLDER] [--clips 60] [--size 128] [--repeats 5]

    cases of tests/gif_cases.py -> each way, at the original size -> cases whose frames are all within a level of a browser's
    the same file cut at many bytes -> each way -> how often frames are missing, and nothing says so
    GIFs of a folder, or drawn ones -> rounds: all GIFs by every way, one way after another -> medians

One thread each. Clips are those of 15 to 40 frames that are whole; all bytes are in memory. What is not installed is named and left out.
Most libraries have no page: where they give RGBA it is put on white here, as a user would.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from t2v_ds.data.gif import RejectedClip, decode_gif, encode_gif
from t2v_ds.data.moving_shapes import draw_clip
from tests.gif_cases import cases, cut_cases
from tests.gif_ways import decoding_by

# Frames [T, H, W, 3] uint8 of a file, resized to size x size, or with None as they are.
Way = Callable[[bytes, int | None], np.ndarray]


def ours(data: bytes, size: int | None) -> np.ndarray:
    return decode_gif(data, 10_000, size=size).frames


def on_white(frames: np.ndarray) -> np.ndarray:
    """RGBA [..., 4], where a GIF's alpha is all or nothing, -> RGB on white."""
    nothing = frames[..., 3] == 0
    rgb = frames[..., :3]
    if nothing.any():
        rgb[nothing] = 255
    return rgb


def pillow() -> Way:
    from PIL import Image, ImageSequence

    def decode(data: bytes, size: int | None) -> np.ndarray:
        frames = []
        with Image.open(io.BytesIO(data)) as image:
            for frame in ImageSequence.Iterator(image):
                page = Image.new("RGB", image.size, "white")
                rgba = frame.convert("RGBA")
                page.paste(rgba, mask=rgba)
                frames.append(np.asarray(page if size is None else page.resize((size, size), Image.Resampling.BILINEAR)))
        return np.stack(frames)

    return decode


def resized(frames: torch.Tensor, size: int | None) -> np.ndarray:
    """[T, 3, H, W] of any strides, by torch's bilinear filter with antialiasing: of those that do not alias, the fastest at hand."""
    if size is not None:
        frames = torch.nn.functional.interpolate(frames, (size, size), mode="bilinear", antialias=True)
    return frames.permute(0, 2, 3, 1).numpy()


def pyav() -> Way:
    import av

    def decode(data: bytes, size: int | None) -> np.ndarray:
        with av.open(io.BytesIO(data), format="gif") as container:
            container.streams.video[0].codec_context.thread_count = 1
            frames = [frame.to_ndarray(format="rgba") for frame in container.decode(video=0)]
        return resized(torch.from_numpy(on_white(np.stack(frames))).permute(0, 3, 1, 2), size)

    return decode


def torchcodec() -> Way:
    from torchcodec.decoders import VideoDecoder

    def decode(data: bytes, size: int | None) -> np.ndarray:
        decoder = VideoDecoder(data, num_ffmpeg_threads=1)
        return resized(decoder[:], size)

    return decode


def torchvision() -> Way:
    from torchvision.io import decode_gif as decode_by_torchvision

    def decode(data: bytes, size: int | None) -> np.ndarray:
        frames = decode_by_torchvision(torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()))
        return resized(frames if frames.dim() == 4 else frames[None], size)

    return decode


OURS = "t2v_ds, compiled"
MAKERS: dict[str, Callable[[], Way]] = {
    OURS: lambda: ours,
    "t2v_ds, Pillow's way": lambda: ours,
    "Pillow, RGBA over white": pillow,
    "torchcodec": torchcodec,
    "PyAV": pyav,
    "torchvision.io.decode_gif": torchvision,
}


def by(name: str, way: Way, data: bytes, size: int | None) -> np.ndarray:
    """Decode in a way, with the switch that ours needs."""
    if way is not ours:
        return way(data, size)
    with decoding_by("compiled" if name == OURS else "pillow"):
        return way(data, size)


def right_cases(name: str, way: Way) -> tuple[int, int, list[str]]:
    """How many cases are right, of how many, and the names of the others."""
    wrong, count = [], 0
    for case in cases():
        count += 1
        expected = case.draw()
        try:
            # Ours is told that a file is whole where its trailer is missing; others have no such argument.
            if way is ours and not case.end:
                with decoding_by("compiled" if name == OURS else "pillow"):
                    frames = decode_gif(case.encode(), 100, require_trailer=False).frames
            else:
                frames = by(name, way, case.encode(), None)
            if frames.shape != expected.shape or np.abs(frames.astype(int) - expected).max() > 1:
                wrong.append(case.name)
        except Exception as error:  # whatever a library raises on a file that browsers show
            wrong.append(f"{case.name} ({type(error).__name__})")
    return count - len(wrong), count, wrong


def silent_losses(name: str, way: Way) -> tuple[int, int]:
    """How often a file that is cut gives fewer or other frames and no error, of how many."""
    cuts = [data for data, _ in cut_cases()]
    whole = by(name, way, cuts[-1] + b";", None)
    lost = 0
    for data in cuts:
        try:
            frames = by(name, way, data, None)
        except Exception:  # said so
            continue
        lost += frames.shape != whole.shape or not np.array_equal(frames, whole)
    return lost, len(cuts)


def clips(source: Path | None, count: int) -> list[bytes]:
    """GIFs to time with."""
    if source is None:
        drawn = (draw_clip(index, 0, 192, 15, 40) for index in range(count))
        return [encode_gif(clip[0], [80] * len(clip[0])) for clip in drawn]
    files = sorted(source.rglob("*.gif"))
    return [data for data, _ in zip(whole_clips(files[:: max(1, len(files) // (4 * count))]), range(count), strict=False)]


def whole_clips(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        data = path.read_bytes()
        try:
            decode_gif(data, 40, size=1, min_frames=15)
        except RejectedClip:
            continue
        yield data


def rate(name: str, way: Way, gifs: list[bytes], size: int) -> float:
    """Clips per second of CPU time."""
    start = time.process_time()
    for data in gifs:
        by(name, way, data, size)
    return len(gifs) / (time.process_time() - start)


def main() -> None:
    """Count, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path)
    for name, default in (("clips", 60), ("size", 128), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    ways: dict[str, Way] = {}
    missing: list[str] = []
    for name, make in MAKERS.items():
        try:
            ways[name] = make()
        except (ImportError, RuntimeError, OSError) as error:  # torchcodec raises where FFmpeg's libraries are missing
            missing.append(f"Left out: {name} ({' '.join(str(error).split())[:100]})")
    gifs = clips(flags.source, flags.clips)
    if not gifs:
        parser.error(f"{flags.source} holds no GIF of 15 to 40 frames")
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(flags.repeats):
        for name, way in ways.items():
            rates[name].append(rate(name, way, gifs, flags.size))
    fastest = statistics.median(rates[OURS])
    print(f"{len(gifs)} clips, {sum(map(len, gifs)) / 2**20:.1f} MiB, to {flags.size} x {flags.size}; median of {flags.repeats}\n")
    print(f"| way | clips/s of CPU | {OURS}: so many times faster | cases right | silent losses on cut files |")
    print("|---|---:|---:|---:|---:|")
    notes = []
    for name, way in ways.items():
        right, of, wrong = right_cases(name, way)
        lost, cut = silent_losses(name, way)
        median = statistics.median(rates[name])
        print(f"| {name} | {median:.0f} | {fastest / median:.2f} | {right}/{of} | {lost} of {cut} |")
        notes += [f"{name}, wrong: {', '.join(wrong)}"] * bool(wrong)
    print("", *missing, *notes, sep="\n")


if __name__ == "__main__":
    main()
