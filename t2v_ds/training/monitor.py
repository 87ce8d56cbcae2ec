"""TensorBoard: scalars, images and animated clips, written by rank 0."""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


class Monitor:
    """Writes event files into `folder`; every method does nothing on ranks other than 0."""

    def __init__(self, folder: Path, rank: int, resume_step: int) -> None:
        """Open the writer.

        Args:
            folder: where the event files go.
            rank: of this process.
            resume_step: the last step that is kept; TensorBoard drops what an earlier run wrote beyond it, so that the
                curves of a resumed run show no zigzag.
        """
        self._writer: Any = None
        if rank == 0:
            # Imported here: it takes over a second, and only rank 0 needs it.
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            logging.getLogger("tensorboard").setLevel(logging.ERROR)
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write each value under its name."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def image(self, tag: str, image: npt.NDArray[np.uint8], step: int) -> None:
        """Write a picture: uint8 [H, W, 3]."""
        if self._writer is not None:
            self._writer.add_image(tag, image, step, dataformats="HWC")

    def clip(self, tag: str, gif: bytes, step: int) -> None:
        """Write an animated GIF's bytes as they are; TensorBoard's image page plays them."""
        if self._writer is None:
            return
        if gif[:3] != b"GIF":
            raise ValueError(f"{tag}: not the bytes of a GIF")
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = struct.unpack("<HH", gif[6:10])
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)

    def flush(self) -> None:
        """Bring everything written so far to disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close; further calls do nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
