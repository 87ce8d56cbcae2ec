"""Several processes tokenize one data set: the same folder as one process makes, and no manifest before all have finished."""

from __future__ import annotations

from pathlib import Path

import torch

from t2v_ds.config import QuantizerConfig, VQVAEConfig
from t2v_ds.models.facade import export_tokenizer
from t2v_ds.models.vqvae import VQVAE
from tests.helpers import finish, start


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def plant_leftovers(folder: Path) -> None:
    """What a process killed in the middle of its first or last steps leaves behind."""
    (folder / ".tokenizer.host.1.tmp").mkdir()
    for name in (".tokenizer.host.1.tmp/model.safetensors", "..tokenize.json.host.1.tmp", ".manifest.json.host.1.tmp"):
        (folder / name).write_bytes(b"half")


def test_parts_at_once_make_what_one_process_makes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = VQVAEConfig(image_size=16, stem_channels=8, channel_multipliers=(1, 2), residual_blocks=(0, 0), norm_groups=8,
                         quantizer=QuantizerConfig(codebook_size=16, codebook_dim=4))  # fmt: skip
    model = VQVAE(config)
    export_tokenizer(tmp_path / "tokenizer", config, dict(model.state_dict()))
    settings = ["clips=35", "shard_clips=5", "image_size=16", "min_frames=2", "max_frames=3", "workers=1"]
    prepare = start(["-m", "t2v_ds", "prepare", "--out", str(tmp_path / "raw"), *settings])
    tokenize = ["-m", "t2v_ds", "tokenize", "--data", str(tmp_path / "raw"), "--tokenizer", str(tmp_path / "tokenizer"), "--out"]
    assert [code for code, _ in finish([prepare])] == [0]
    ((code, output),) = finish([start([*tokenize, str(tmp_path / "parts"), "part=2/4"])])
    assert code == 0, output
    assert "shards of other parts are missing" in output
    assert not (tmp_path / "parts/manifest.json").exists()
    plant_leftovers(tmp_path / "parts")
    results = finish([start([*tokenize, str(tmp_path / "parts"), f"part={part}/4"]) for part in (1, 3, 4, 2)])
    results += finish([start([*tokenize, str(tmp_path / "one")])])
    assert [code for code, _ in results] == [0] * 5, results
    assert files(tmp_path / "parts") == files(tmp_path / "one")
    plant_leftovers(tmp_path / "one")  # killed as the last shard was done: run again, it clears up
    ((code, output),) = finish([start([*tokenize, str(tmp_path / "one")])])
    assert code == 0 and "tokenized already" in output
    assert files(tmp_path / "parts") == files(tmp_path / "one")


def test_a_part_that_is_none_is_refused(tmp_path: Path) -> None:
    for part in ("0/3", "4/3", "2", "a/b"):
        ((code, output),) = finish([start(["-m", "t2v_ds", "tokenize", "--data", "x", "--tokenizer", "y", "--out", "z", f"part={part}"])])
        assert code == 2
        assert "PART/PARTS, such as 2/10" in output
