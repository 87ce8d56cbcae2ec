"""What TensorBoard's own reader finds in the files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from t2v_ds.training.monitor import Monitor


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def test_scalars_images_and_clips_arrive(tmp_path: Path) -> None:
    picture = np.zeros((8, 12, 3), dtype=np.uint8)
    picture[2, 3] = (255, 0, 9)
    frames = [Image.fromarray(np.full((5, 6, 3), 40 * i, dtype=np.uint8)) for i in range(4)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=80)
    monitor = Monitor(tmp_path, 0, 0)
    monitor.scalars({"loss/l1": 0.5, "performance/clips_per_second": 7.0}, 3)
    monitor.image("grid", picture, 3)
    monitor.clip("clip", buffer.getvalue(), 3)
    with pytest.raises(ValueError, match="not the bytes of a GIF"):
        monitor.clip("clip", b"\x89PNG", 3)
    monitor.close()
    events = read(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss/l1")] == [(3, 0.5)]
    (image,) = events.Images("grid")
    assert (np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")) == picture).all()
    (clip,) = events.Images("clip")
    assert (clip.width, clip.height, clip.encoded_image_string) == (6, 5, buffer.getvalue())
    assert Image.open(io.BytesIO(clip.encoded_image_string)).n_frames == 4


def test_a_resumed_run_has_no_zigzag(tmp_path: Path) -> None:
    for resumed, steps, value in ((0, range(1, 9), 1.0), (4, range(5, 11), 2.0)):
        monitor = Monitor(tmp_path, 0, resumed)
        for step in steps:
            monitor.scalars({"loss": value}, step)
        monitor.close()
    found = [(event.step, event.value) for event in read(tmp_path).Scalars("loss")]
    assert found == [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 11)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "none", 1, 0)
    monitor.scalars({"loss": 1.0}, 1)
    monitor.image("grid", np.zeros((4, 4, 3), dtype=np.uint8), 1)
    monitor.clip("clip", b"GIF89a", 1)
    monitor.flush()
    monitor.close()
    assert not (tmp_path / "none").exists()
