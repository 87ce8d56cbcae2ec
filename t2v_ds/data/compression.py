"""Frames <-> a zstd file in which each can be found and read alone.

    .npy file -> its header, then frame by frame, each a zstd frame of its own (RFC 8878) -> joined: KEY.frames.npy.zst

Zstd frames that stand one behind another are one zstd file, so `zstd -d` gives the .npy file back. What a frame has in common with the one
before is not used: a few frames are read far more often than clips.
"""

from __future__ import annotations

import io

import zstandard

LEVEL = 3
_CHUNK = 2**20  # bytes decompressed at a time


def compress_frames(array: bytes, head: int, count: int) -> tuple[bytes, list[int]]:
    """Compress a .npy file of `count` frames behind a header of `head` bytes; returns it and the compressed size of each frame."""
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    size = (len(array) - head) // count if count else 0
    frames = [compressor.compress(array[head + t * size : head + (t + 1) * size]) for t in range(count)]
    return compressor.compress(array[:head]) + b"".join(frames), [len(frame) for frame in frames]


def decompress(data: bytes, most: int) -> bytes:
    """What a zstd file of any number of zstd frames holds; of one that is cut, what is left, so that sizes must be compared.

    Raises:
        ValueError: it is no zstd file, or holds more than `most` bytes.
    """
    parts: list[bytes] = []
    left = most
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True) as reader:
            while part := bytes(reader.read(min(left + 1, _CHUNK))):
                parts.append(part)
                left -= len(part)
                if left < 0:
                    raise ValueError(f"it holds more than {most} bytes")
    except zstandard.ZstdError as error:
        raise ValueError(f"it cannot be decompressed ({error})") from error
    return b"".join(parts)
