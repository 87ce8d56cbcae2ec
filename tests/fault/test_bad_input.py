"""Bad input to the real command: one clear sentence, exit code 2, no traceback, and nothing half-written."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.gif import encode_gif
from t2v_ds.data.manifest import Manifest
from t2v_ds.models.facade import export_tokenizer, load_tokenizer
from tests.fault.conftest import TEXT, Trained, said, t2v


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def at_most(kind: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (value, value))


def damaged_copy(folder: Path, copy: Path, file: str, change: Callable[[bytes], bytes]) -> Path:
    shutil.copytree(folder, copy)
    (copy / file).write_bytes(change((copy / file).read_bytes()))
    return copy


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def gifs(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        frames = rng.integers(0, 5, (16, 24, 24, 3), dtype=np.uint8) * 50
        (folder / f"clip_{i}.gif").write_bytes(encode_gif(frames, [50] * 16))
    return folder


# -- settings and flags ----------------------------------------------------------------------------------------------------


def test_unknown_settings_name_the_nearest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sentence = said(t2v("train-vqvae", "--data", "raw", "--out", out, "train.learning_rat=1"))
    assert "unknown setting 'train.learning_rat'" in sentence
    assert "did you mean 'train.learning_rate'" in sentence
    path = tmp_path / "my.yaml"
    path.write_text("transformer:\n  model:\n    widht: 8\n")
    sentence = said(t2v("demo", "--config", path, "--out", out))
    assert f"unknown setting 'transformer.model.widht' in {path}" in sentence
    assert "did you mean 'transformer.model.width'" in sentence
    assert not out.exists()


def test_a_mistake_in_a_prompt_or_a_name_is_told_before_anything_is_drawn(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "x.gif"
    model = ("generate", "--model", trained.generator, "--out")
    assert "--prompt is empty" in said(t2v(*model, out, "--prompt", "  "))
    assert "--prompt is empty" in said(t2v(*model, out))
    assert "x.avi'; allowed: a file name that ends in .gif or .mp4" in said(t2v(*model, tmp_path / "x.avi", "--prompt", "a red circle"))
    assert "setting 'frames' is 41; this model knows 1 to 40 frames" in said(t2v(*model, out, "--prompt", "a red circle", "frames=41"))
    assert list(tmp_path.iterdir()) == []
    done = t2v(*model, out, "--prompt", "a red circle moves up", "frames=3")  # and with none of them it draws
    assert done.returncode == 0, done.stderr
    assert out.read_bytes()[:6] == b"GIF89a"


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("prepare", {"source": "NOWHERE"}),
        ("train-vqvae", {"data": "NOWHERE"}),
        ("tokenize", {"data": "RAW", "tokenizer": "NOWHERE"}),
        ("train-transformer", {"data": "NOWHERE"}),
        ("generate", {"model": "NOWHERE", "prompt": "a red circle"}),
    ],
)
def test_missing_folders_are_named(verb: str, flags: dict[str, str], trained: Trained, tmp_path: Path) -> None:
    places = {"NOWHERE": str(tmp_path / "nowhere"), "RAW": str(trained.raw)}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", places.get(value, value))]
    out = tmp_path / "out.gif"
    sentence = said(t2v(verb, *arguments, "--out", out))
    assert str(tmp_path / "nowhere") in sentence
    assert list(tmp_path.iterdir()) == []


def test_folders_of_another_kind_are_named(trained: Trained, tmp_path: Path) -> None:
    sentence = said(t2v("train-transformer", "--data", trained.raw, "--out", tmp_path / "out"))
    assert "holds raw shards, made by t2v prepare; expected token shards, made by t2v tokenize" in sentence
    sentence = said(t2v("generate", "--model", trained.tokenizer, "--prompt", "a", "--out", tmp_path / "x.gif"))
    assert "holds a model of kind 'tokenizer'; expected a generator" in sentence
    assert list(tmp_path.iterdir()) == []


# -- sources ---------------------------------------------------------------------------------------------------------------


def test_a_bad_row_of_a_table_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = tmp_path / "tgif.tsv"
    table.write_text("https://example.org/a.gif\ta cat jumps\nhttps://example.org/b.gif a dog runs\n")
    sentence = said(t2v("prepare", "--source", table, "--out", out))
    assert f"{table} line 2 has 1 columns instead of 2" in sentence
    table.write_text("https://example.org/a.gif\ta cat jumps\nfile:///etc/passwd\ta secret\n")
    assert f"{table} line 2 names 'file:///etc/passwd'; expected an http or https URL" in said(
        t2v("prepare", "--source", table, "--out", out)
    )
    folder = gifs(tmp_path / "gifs", 2)
    (folder / "captions.tsv").write_text("clip_0.gif\ta cat\n../clip_1.gif\ta dog\n")
    assert "line 2 names '../clip_1.gif'" in said(t2v("prepare", "--source", folder, "--out", out))
    assert not out.exists()


def bomb(image: bool) -> bytes:
    """A GIF of a few bytes whose screen, or whose only image, declares 65535 x 65535 pixels (12.9 GB as RGB)."""
    screen, frame = ((16, 16), (65535, 65535)) if image else ((65535, 65535), (16, 16))
    header = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    pixels = b"\x02" + b"\x02\x4c\x01" + b"\x00"
    return header + (b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + pixels) * 16 + b";"


def test_gif_bombs_are_counted_and_memory_stays_bounded(tmp_path: Path) -> None:
    folder, out = gifs(tmp_path / "gifs", 2), tmp_path / "out"
    for number, image in enumerate((False, True)):
        (folder / f"bomb_{number}.gif").write_bytes(bomb(image))
    settings = ("prepare", "--source", folder, "--out", out, "image_size=16", "workers=1")
    bounded = at_most(resource.RLIMIT_AS, 2 * 2**30)
    done = t2v(*settings, limit=bounded)
    assert done.returncode == 0, done.stderr
    manifest = Manifest.load(out, "raw")
    assert manifest.total_clips == 2
    assert manifest.rejected == {"too_large": 2}
    assert "rejected, too_large: 2" in done.stdout
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert all("65535" in one["detail"] for one in rejected)
    for path in folder.glob("clip_*"):
        path.unlink()
    shutil.rmtree(out)
    sentence = said(t2v(*settings, limit=bounded))
    assert f"no clip of source '{folder}' can be used: too_large 2; see {out / 'rejected.jsonl'}" in sentence
    assert [path.name for path in out.iterdir()] == ["rejected.jsonl"]


# -- damaged and mismatched files ------------------------------------------------------------------------------------------


def test_a_flipped_byte_of_a_raw_shard_stops_training_and_tokenizing(trained: Trained, tmp_path: Path) -> None:
    raw = damaged_copy(trained.raw, tmp_path / "raw", "raw-00001.tar", flip)
    named = f"of shard {raw / 'raw-00001.tar'} is damaged (its checksum differs)"
    run = tmp_path / "run"
    assert named in said(t2v("train-vqvae", "--config", trained.vqvae_config, "--data", raw, "--out", run, "train.steps=50"))
    assert not {"DONE", "model.safetensors"} & set(contents(run) if run.exists() else {})
    out = tmp_path / "tokens"
    tokenizing = ("tokenize", "--tokenizer", trained.tokenizer, "--data", raw, "--out", out, *TEXT)
    assert named in said(t2v(*tokenizing))
    assert sorted(path.name for path in out.glob("*.tar")) == ["tokens-00000.tar"]  # whole; the next one is not there
    assert not (out / "manifest.json").exists()
    shutil.copy(trained.raw / "raw-00001.tar", raw)  # restored, as the sentence says: it goes on
    assert t2v(*tokenizing).returncode == 0
    assert contents(out) == contents(trained.tokens)


def test_a_cut_shard_is_noticed_before_the_first_step(trained: Trained, tmp_path: Path) -> None:
    tokens = damaged_copy(trained.tokens, tmp_path / "tokens", "tokens-00002.tar", half)
    run = tmp_path / "run"
    sentence = said(t2v("train-transformer", "--config", trained.transformer_config, "--data", tokens, "--out", run))
    size = (tokens / "tokens-00002.tar").stat().st_size
    assert f"shard {tokens / 'tokens-00002.tar'} has {size} bytes instead of {2 * size}" in sentence
    assert not run.exists()


def test_muon_beside_a_stage_that_cuts_matrices_is_refused(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = ("train-transformer", "--config", trained.transformer_config, "--data", trained.tokens, "--out", run)
    sentence = said(t2v(*training, "train.optimizer=muon", "train.ds_config=zero1"))
    assert "'zero1' partitions them (ZeRO stage 1); allowed: train.ds_config=zero0, or train.optimizer=adamw" in sentence
    assert not run.exists()


def test_another_tokenizer_is_refused_by_both_ids(trained: Trained, tmp_path: Path) -> None:
    own = load_tokenizer(trained.tokenizer)
    state = own.model.state_dict()
    state["quantizer.codebook"] = state["quantizer.codebook"] + torch.ones(8)
    other = export_tokenizer(tmp_path / "other", own.model.config, state)
    run = tmp_path / "run"
    training = ("train-transformer", "--config", trained.transformer_config, "--data", trained.tokens, "--out", run)
    sentence = said(t2v(*training, "--tokenizer", tmp_path / "other"))
    assert own.tokenizer_id in sentence
    assert other in sentence
    assert not run.exists()
    before = contents(trained.tokens)
    sentence = said(t2v("tokenize", "--data", trained.raw, "--tokenizer", tmp_path / "other", "--out", trained.tokens))
    assert own.tokenizer_id in sentence
    assert other in sentence
    assert contents(trained.tokens) == before


def test_a_training_checkpoint_cut_in_half(trained: Trained, tmp_path: Path) -> None:
    newest = max((trained.tokenizer / "checkpoints").iterdir()).relative_to(trained.tokenizer)
    file = newest / "native" / "mp_rank_00_model_states.pt"
    run = damaged_copy(trained.tokenizer, tmp_path / "run", str(file), half)
    before = contents(run)
    # More steps than it was trained for: it goes on from its newest checkpoint.
    sentence = said(t2v("train-vqvae", "--config", trained.vqvae_config, "--data", trained.raw, "--out", run, "train.steps=8"))
    size = (run / file).stat().st_size
    assert f"checkpoint is damaged: {run / file} has {size} bytes where" in sentence
    assert f"delete the folder {run / newest} and run again to go back to step 3" in sentence
    after = contents(run)
    unchanged = [name for name in before if name.startswith("checkpoints/") or name.endswith((".safetensors", "config.json"))]
    assert {name: after.get(name) for name in unchanged} == {name: before[name] for name in unchanged}
    assert not [name for name in after if "partial" in name]


def test_exported_models_cut_in_half(trained: Trained, tmp_path: Path) -> None:
    generator = damaged_copy(trained.generator, tmp_path / "generator", "model.safetensors", half)
    out = tmp_path / "x.gif"
    sentence = said(t2v("generate", "--model", generator, "--prompt", "a red circle", "--out", out))
    assert f"{generator / 'model.safetensors'} (" in sentence
    assert "is cut or damaged" in sentence
    tokenizer = damaged_copy(trained.tokenizer, tmp_path / "tokenizer", "model.safetensors", half)
    sentence = said(t2v("tokenize", "--data", trained.raw, "--tokenizer", tokenizer, "--out", tmp_path / "tokens"))
    assert f"{tokenizer / 'model.safetensors'} (" in sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generator", "tokenizer"]


# -- a disk that takes no more ---------------------------------------------------------------------------------------------


def test_preparing_where_files_cannot_grow(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "raw"
    settings = ("image_size=32", "max_frames=16", "clips=40", "shard_clips=16", "chunk_clips=20", "workers=1")
    prepare = ("prepare", "--source", "moving-shapes", "--out", out, *settings)
    sentence = said(t2v(*prepare, limit=at_most(resource.RLIMIT_FSIZE, 40_000)))
    assert f"preparing {out} failed: " in sentence
    assert "File too large" in sentence
    assert list(out.glob("*.tar")) == []
    assert not (out / "manifest.json").exists()
    assert t2v(*prepare).returncode == 0
    assert contents(out) == contents(trained.raw)


def test_tokenizing_onto_a_full_disk(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    out.mkdir()
    (out / ".tokens-00001.tar.tmp").symlink_to("/dev/full")  # the name that the second shard is written under
    tokenize = ("tokenize", "--tokenizer", trained.tokenizer, "--data", trained.raw, "--out", out, *TEXT)
    assert "the disk is full: make room, then run the same command again" in said(t2v(*tokenize))
    assert [path.name for path in out.glob("tokens-*.tar")] == ["tokens-00000.tar"]
    assert not (out / "manifest.json").exists()
    (out / ".tokens-00001.tar.tmp").unlink()
    assert t2v(*tokenize).returncode == 0
    assert contents(out) == contents(trained.tokens)


def test_a_checkpoint_that_cannot_be_written(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = ("train-vqvae", "--config", trained.vqvae_config, "--data", trained.raw, "--out", run)
    sentence = said(t2v(*training, limit=at_most(resource.RLIMIT_FSIZE, 40_000)))
    assert f"checkpoint {run / 'checkpoints' / 'step_00000003'} cannot be written: is the disk full" in sentence
    assert list((run / "checkpoints").iterdir()) == []
    assert not (run / "model.safetensors").exists()
    assert t2v(*training).returncode == 0
    assert (run / "model.safetensors").read_bytes() == (trained.tokenizer / "model.safetensors").read_bytes()
    with ShardDataset(trained.raw, "raw") as dataset:
        assert load_tokenizer(run).encode(dataset.read(0)["frames"].copy()).shape == (len(dataset.read(0)["frames"]), 8, 8)


# -- what is there already -------------------------------------------------------------------------------------------------


def test_other_peoples_files_are_never_replaced(trained: Trained, tmp_path: Path) -> None:
    mine = tmp_path / "project"
    (mine / "downloads").mkdir(parents=True)
    (mine / "downloads" / "thesis.txt").write_text("x")
    before = contents(mine)
    assert "holds other files ('downloads'): choose a new or empty folder" in said(t2v("prepare", "--out", mine, "clips=3"))
    source = gifs(tmp_path / "gifs", 2)
    kept = contents(source)
    assert "holds other files" in said(t2v("prepare", "--source", source, "--out", source))
    assert contents(source) == kept
    shutil.copytree(trained.tokenizer, mine / "tokenizer")
    before = contents(mine)
    training = ("train-transformer", "--config", trained.transformer_config, "--data", trained.tokens, "--out", mine, "text.encoder=")
    assert f"{mine / 'tokenizer'} would be replaced, but holds" in said(t2v(*training))
    assert contents(mine) == before  # said before it trained, and not after


def test_codes_of_other_data_or_precision_are_not_mixed(trained: Trained, tmp_path: Path) -> None:
    command = ("tokenize", "--data", trained.raw, "--tokenizer", trained.tokenizer, "--out", tmp_path / "tokens", *TEXT)
    shutil.copytree(trained.tokens, tmp_path / "tokens")
    assert "was made with precision=fp32" in said(t2v(*command, "precision=bf16"))
    sentence = said(t2v(*command, "text.width=8"))
    assert "holds the text vectors of hashing-12x16-" in sentence and "would store the text vectors of hashing-12x8-" in sentence
    assert "this run would store no text vectors" in said(t2v(*command, "text.encoder="))
    (tmp_path / "tokens" / "manifest.json").unlink()
    assert "holds shards but neither manifest.json nor" in said(t2v(*command))
    (tmp_path / "tokens" / ".tokenize.json").write_text(json.dumps({"raw_digest": "other", "precision": "fp32"}))
    assert "holds the codes of other data" in said(t2v(*command))


def test_text_vectors_of_another_encoder_are_refused_by_both_ids(trained: Trained, tmp_path: Path) -> None:
    training = ("train-transformer", "--config", trained.transformer_config, "--data", trained.tokens, "--out", tmp_path / "run")
    sentence = said(t2v(*training, "text.tokens=9"))
    assert "holds the text vectors of hashing-12x16-" in sentence and "this run's text encoder is hashing-9x16-" in sentence
    assert "set text.encoder=hashing text.tokens=12 text.width=16 and " in sentence
    assert "or text.encoder= (empty) to use what is stored, or tokenize again with text.encoder=hashing text.tokens=9 " in sentence
    assert not (tmp_path / "run").exists()


def test_a_manifest_cannot_name_a_path(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.raw, tmp_path / "raw")
    path = tmp_path / "raw" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["name"] = "../../victim/raw-00000.tar"
    path.write_text(json.dumps(manifest))
    out = tmp_path / "out"
    sentence = said(t2v("tokenize", "--data", tmp_path / "raw", "--tokenizer", trained.tokenizer, "--out", out))
    assert "is damaged (shard name '../../victim/raw-00000.tar')" in sentence
    assert not out.exists()


def test_a_tokenizer_that_would_never_quantize_is_not_trained(trained: Trained, tmp_path: Path) -> None:
    settings = ("model.image_size=32", "losses.perceptual=0", "train.steps=9")
    command = ("train-vqvae", "--data", trained.raw, "--out", tmp_path / "run", *settings)
    sentence = said(t2v(*command, "model.quantizer.warmup_steps=9"))
    assert "'model.quantizer.warmup_steps' is 9, but the run has 9 steps" in sentence
    assert not (tmp_path / "run").exists()
