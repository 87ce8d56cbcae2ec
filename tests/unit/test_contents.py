"""What changed in a data set since a position in it was saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from t2v_ds.data.contents import Contents, contents, describe_change
from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.manifest import Manifest
from t2v_ds.data.order import Order
from t2v_ds.data.shards import token_members, write_shard
from t2v_ds.data.stream import ClipStream
from t2v_ds.data.subset import Selection
from t2v_ds.errors import DataError

SHARDS = {"a.tar": [3, "1"], "b.tar": [3, "2"]}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({**SHARDS, "c.tar": [4, "3"]}, "shards were added: c.tar (4 clips)"),
        ({"b.tar": [3, "2"]}, "shards were removed: a.tar (3 clips)"),
        ({"a.tar": [3, "1"], "b.tar": [3, "9"]}, "shards were changed: b.tar (3 clips)"),
        ({"a.tar": (2, "9"), "b.tar": (3, "2")}, "shards were changed: a.tar (2 clips, were 3)"),
        ({"b.tar": [3, "2"], "a.tar": [3, "1"]}, "the shards are the same, but in another order, or other clips of them are used"),
        (
            {**SHARDS, **{f"{i}.tar": [1, "4"] for i in range(5)}},
            "shards were added: 0.tar (1 clips), 1.tar (1 clips), 2.tar (1 clips) and 2 more",
        ),
    ],
)
def test_the_change_is_named(now: Contents, said: str) -> None:
    assert describe_change(SHARDS, now) == said


def write(folder: Path, shards: Sequence[Sequence[int]]) -> ShardDataset:
    """Shards of these clips."""
    folder.mkdir()
    infos = []
    for number, clips in enumerate(shards):
        members = [(f"k{clip}", token_members(np.full((1, 2, 2), clip), "", [50], {})) for clip in clips]
        infos.append(write_shard(folder / f"tokens-{number:05d}.tar", members))
    Manifest.build("tokens", infos, grid_size=2, codebook_size=65536, tokenizer_id="t").save(folder)
    return ShardDataset(folder, "tokens")


def test_a_position_in_other_data_is_refused_by_what_changed_or_becomes_the_start_of_its_epoch(tmp_path: Path) -> None:
    before, now = write(tmp_path / "before", [range(8), range(8, 11)]), write(tmp_path / "now", [range(8), range(8, 12), [12]])
    with ClipStream(before, 4, seed=3) as stream:
        for _ in range(7):  # 28 samples: in the third epoch of 11
            next(stream)
        state = stream.state_dict()
    assert state["shards"] == contents(before)
    order = Order(len(now), 3, buckets=2, lengths=now.lengths, batch=4)
    with ClipStream(now, 4, seed=3) as stream, ClipStream(now, 4, seed=3, order=order) as other:
        with pytest.raises(
            DataError, match=r"11 clips\) .* 13 clips\), where shards were added: tokens-00002\.tar \(1 clips\); changed: tok"
        ):
            stream.load_state_dict(state)
        assert stream.consumed == 0
        stream.load_state_dict(state, accept_new_data=True)
        assert stream.consumed == 2 * 13
        epoch = [sample["key"] for _ in range(4) for sample in next(stream)][:13]
        assert sorted(epoch) == sorted(f"k{clip}" for clip in range(13))
        stream.load_state_dict(stream.state_dict(), accept_new_data=True)  # the same data: nothing begins anew
        assert stream.consumed == 2 * 13 + 16
        with pytest.raises(DataError, match="length_buckets"):  # new data is no new order
            other.load_state_dict(state, accept_new_data=True)


def test_other_clips_of_the_same_shards_are_other_data(tmp_path: Path) -> None:
    data = write(tmp_path / "data", [range(8)])
    with ClipStream(Selection(data, np.arange(8)), 4) as stream:
        state = stream.state_dict()
    with ClipStream(Selection(data, np.arange(7)), 4) as stream, pytest.raises(DataError, match="the shards are the same, but"):
        stream.load_state_dict(state)
