"""Captions are embedded once: their vectors lie in the token shards, are checked like codes, and are what a transformer trains on."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t2v_ds import cli
from t2v_ds.config import (
    DemoConfig,
    IndexConfig,
    QuantizerConfig,
    StoredTextConfig,
    TextConfig,
    TokenizeConfig,
    TransformerRunConfig,
    VQVAEConfig,
)
from t2v_ds.config_loader import load_config
from t2v_ds.data.collate import pad_text
from t2v_ds.data.dataset import Buffer, ShardDataset
from t2v_ds.data.manifest import MANIFEST, Manifest, StoredText
from t2v_ds.data.shards import TEXT, index_path, npy_bytes, raw_members, read_shard, token_members, write_shard
from t2v_ds.data.stream import ClipStream
from t2v_ds.data.validate import QUARANTINE, Codes, index_folder, verify_folder
from t2v_ds.errors import ConfigError, DataError
from t2v_ds.kernels import clips as native
from t2v_ds.models.facade import export_tokenizer
from t2v_ds.models.text import Embedded, HashingTextEncoder, StoredTextEncoder
from t2v_ds.models.vqvae import VQVAE
from t2v_ds.pipeline import _stored_text
from t2v_ds.tokenize import CLAIM, tokenize
from t2v_ds.training.run import _text_encoder, _Vary

TOKENS, WIDTH, CLIPS = 4, 8, 8
SETTINGS = StoredTextConfig("hashing", TOKENS, WIDTH)
ENCODER = HashingTextEncoder(TOKENS, WIDTH)
STORED = StoredText(ENCODER.identity(), TextConfig("hashing", TOKENS, WIDTH), WIDTH)
CODES = Codes("t" * 16, 64, 2, 8)
WORDS = ["red", "circle", "moves", "right", "slowly"]
CAPTIONS = ["!?", *(" ".join(WORDS[: 1 + i % 5]) + f" {i}" for i in range(1, CLIPS))]  # 0 to 6 words
CAPTIONS[6] = CAPTIONS[1]  # in the other shard
CUT = 2  # captions of more than TOKENS words
VQ = VQVAEConfig(16, 8, (1, 2), (0, 0), 8, QuantizerConfig(codebook_size=16, codebook_dim=4))


def expected(i: int) -> np.ndarray:
    return ENCODER.embed([CAPTIONS[i]])[0].vectors.numpy().astype(np.float16)


def members_of(i: int, text: bool = True) -> dict[str, bytes]:
    codes = np.random.default_rng(i).integers(0, CODES.codebook_size, (2 + i % 3, 2, 2))
    stored = (expected(i), len(CAPTIONS[i].split()) > TOKENS) if text else ()
    return token_members(codes, CAPTIONS[i], [50] * len(codes), {}, *stored)


def build(folder: Path, text: bool = True) -> ShardDataset:
    """Two shards."""
    folder.mkdir(exist_ok=True)
    shards = []
    for number in range(2):
        samples = [(f"k{i}", members_of(i, text)) for i in range(4 * number, 4 * number + 4)]
        shards.append(write_shard(folder / f"tokens-{number:05d}.tar", samples))
    about = STORED.describe(CUT) if text else {}
    fields = {"grid_size": 2, "codebook_size": 64, "tokenizer_id": CODES.tokenizer_id, "image_size": 8}
    Manifest.build("tokens", shards, **fields, **about).save(folder)
    return ShardDataset(folder, "tokens")


def change(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["compiled", "python"])
def test_what_was_stored_is_read_one_or_many_at_a_time(tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reader == "python":
        monkeypatch.setattr(native, "_library", lambda: None)
    data = build(tmp_path)
    assert data.stored_text == STORED
    assert data.text_lengths.tolist() == [0, 3, 4, 4, 4, 2, 3, 4]
    for i in range(CLIPS):
        assert (data.read(i)["text"] == expected(i)).all()
        assert data.read(i)["text"].shape == (data.text_lengths[i], WIDTH)
    numbers, buffer = np.array([7, 0, 2, 7, 1]), Buffer()
    codes = data.read_codes(numbers, buffer).copy()
    found = data.read_text(numbers, buffer.beside)
    assert found.dtype == np.float16
    assert (found == np.concatenate([expected(int(i)) for i in numbers])).all()
    assert (data.read_codes(numbers, buffer) == codes).all()
    assert (found == np.concatenate([expected(int(i)) for i in numbers])).all()  # reading codes again has not touched it
    assert data.read_text(np.array([], dtype=np.int64), buffer.beside).shape == (0, WIDTH)


def test_vectors_are_padded_as_an_encoder_pads_them(tmp_path: Path) -> None:
    data, numbers = build(tmp_path), np.arange(CLIPS)
    padded = pad_text(data.read_text(numbers, Buffer()), data.text_lengths, TOKENS)
    vectors, mask = ENCODER.encode(CAPTIONS)
    assert padded["text"].dtype == torch.float32
    assert torch.equal(padded["text"], vectors)
    assert torch.equal(padded["mask"], mask)
    nothing = pad_text(np.empty((0, WIDTH), np.float16), np.array([0, 0]), TOKENS)
    assert nothing["text"].shape == (2, TOKENS, WIDTH)
    assert not nothing["mask"].any()


def test_the_webdataset_package_reads_the_vectors(tmp_path: Path) -> None:
    import webdataset

    data = build(tmp_path)
    urls = [str(tmp_path / shard.name) for shard in data.shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in theirs] == [f"k{i}" for i in range(CLIPS)]
    for i, sample in enumerate(theirs):
        assert (sample[TEXT] == expected(i)).all()
        assert sample[TEXT].dtype == np.float16
        assert (sample["codes.npy"] == data.read(i)["codes"]).all()
        assert sample["json"].get("text_truncated", False) == (len(CAPTIONS[i].split()) > TOKENS)


def test_shards_without_vectors_are_read_as_before(tmp_path: Path) -> None:
    data = build(tmp_path, text=False)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for name in [name for name in manifest if name.startswith("text")]:
        del manifest[name]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))  # as written before there were any
    data = ShardDataset(tmp_path, "tokens")
    assert data.stored_text is None
    assert "text" not in data.read(1)
    assert verify_folder(tmp_path)[1] == []
    with pytest.raises(DataError, match="holds no text vectors"):
        data.read_text(np.array([0]), Buffer())


@pytest.mark.parametrize("text", [np.zeros((2, 8), np.float32), np.zeros(8, np.float16), *np.float16([[[np.inf]], [[np.nan]]])])
def test_only_finite_vectors_of_half_precision_are_stored(text: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"needs finite float16 \[n, width\]"):
        token_members(np.zeros((1, 2, 2), np.int64), "x", [50], {}, text)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_of_the_vectors_is_an_error_that_verify_names(tmp_path: Path) -> None:
    build(tmp_path)
    path = tmp_path / "tokens-00001.tar"
    offset, size, _ = json.loads(index_path(path).read_text())["clips"][2]["members"][TEXT]
    good = path.read_bytes()
    for place in (offset, offset + 130, offset + size - 1):  # magic number, numbers
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with ShardDataset(tmp_path, "tokens") as data:
            data.read_codes(np.array([6]), Buffer())
            for read in (lambda data=data: data.read(6), lambda data=data: data.read_text(np.arange(CLIPS), Buffer())):
                with pytest.raises(DataError, match=r"clip k6 of shard .*tokens-00001\.tar is damaged \(its checksum differs\)"):
                    read()
        [problem] = verify_folder(tmp_path)[1]
        assert "1 of 4 clips are damaged or gone: clip k6 is not what was written (its checksum differs)" in problem
    config = IndexConfig(data=str(tmp_path), again=True, max_bad_share=0.3)
    assert index_folder(config).quarantined == {"checksum": 1}
    assert verify_folder(tmp_path)[1] == []
    with ShardDataset(tmp_path, "tokens") as data:
        assert data.stored_text == STORED
        numbers = [i for i in range(CLIPS) if i != 6]
        assert (data.read_text(np.arange(CLIPS - 1), Buffer()) == np.concatenate([expected(i) for i in numbers])).all()
    assert Manifest.load(tmp_path).text_truncated == sum(len(CAPTIONS[i].split()) > TOKENS for i in numbers)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"text_width": 8', '"text_width": 16', r"clip k1 of .* has no text vectors of 16 numbers for up to 4 tokens"),
        ('"tokens": 4', '"tokens": 3', "clip k2 of .* has no text vectors of 8 numbers for up to 3 tokens"),
        ('"text_truncated": 2', '"text_truncated": 5', "'text_truncated' is not what its shards hold"),
        ('"text_width": 8', '"text_width": "8"', r"manifest\.json is damaged \(text_width '8'\)"),
        ('"tokens": 4', '"tokens": 0', "setting 'text.tokens' is 0; allowed"),
        ('"encoder"', '"encoderr"', r"unknown setting 'text\.encoderr' in manifest\.json"),
    ],
)
def test_a_manifest_that_promises_other_vectors_is_damaged(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    build(tmp_path)
    change(tmp_path, MANIFEST, old, new)
    with pytest.raises((DataError, ConfigError), match=sentence):
        for problem in verify_folder(tmp_path)[1]:
            raise DataError(problem)


def test_a_clip_without_vectors_or_with_others_is_an_error(tmp_path: Path) -> None:
    samples = [("k1", members_of(1)), ("k2", {name: data for name, data in members_of(2).items() if name != TEXT})]
    shard = write_shard(tmp_path / "tokens-00000.tar", samples)
    fields = {"grid_size": 2, "codebook_size": 64, "tokenizer_id": "t", **STORED.describe(0)}
    Manifest.build("tokens", [shard], **fields).save(tmp_path)
    with pytest.raises(DataError, match=r"clip k2 of .* has no text vectors"):
        ShardDataset(tmp_path, "tokens")
    vectors = npy_bytes(np.zeros((4, 6), np.float16))  # as many bytes as [3, 8]
    shard = write_shard(tmp_path / "tokens-00000.tar", [("k1", {**members_of(1), TEXT: vectors})])
    Manifest.build("tokens", [shard], **fields).save(tmp_path)
    with pytest.raises(DataError, match=r"clip k1 of .* holds text vectors of another shape than its index says"):
        ShardDataset(tmp_path, "tokens").read_text(np.array([0]), Buffer())


# --- tars of others ---------------------------------------------------------------------------------------------------


def foreign(folder: Path, edit: Callable[[dict[str, bytes]], Any] = lambda members: None) -> IndexConfig:
    """As if others had written them: no index, no manifest; `edit` may change the members of clip 5."""
    folder.mkdir(exist_ok=True)
    for number in range(2):
        samples = [(f"k{i}", members_of(i)) for i in range(4 * number, 4 * number + 4)]
        if number == 1:
            edit(samples[1][1])
        write_shard(folder / f"tokens-{number:05d}.tar", samples)
    for path in folder.glob("*.index.json"):
        path.unlink()
    return IndexConfig(data=str(folder), max_bad_share=0)


def test_vectors_of_others_are_taken_in_where_their_encoder_is_named(tmp_path: Path) -> None:
    config = foreign(tmp_path / "x")
    index_folder(config, CODES, STORED)
    build(tmp_path / "ours")
    for path in (tmp_path / "ours").glob("*.index.json"):
        assert (tmp_path / "x" / path.name).read_bytes() == path.read_bytes()
    found, ours = (Manifest.load(tmp_path / name) for name in ("x", "ours"))
    assert (found.stored_text, found.text_truncated) == (ours.stored_text, ours.text_truncated) == (STORED, CUT)
    assert verify_folder(tmp_path / "x")[1] == []


def test_vectors_whose_encoder_nobody_names_are_left_alone(tmp_path: Path) -> None:
    config = foreign(tmp_path, lambda members: members.update({TEXT: b"nonsense"}))
    assert index_folder(config, CODES).quarantined == {}
    with ShardDataset(tmp_path, "tokens") as data:
        assert data.stored_text is None
        assert len(data) == CLIPS
    assert verify_folder(tmp_path)[1] == []


def test_the_command_line_takes_vectors_in(raw: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    tokenize(settings(raw, ours))
    shutil.copytree(ours, theirs)
    for path in (theirs / MANIFEST, *theirs.glob("*.index.json")):
        path.unlink()
    text = ["text.encoder=hashing", f"text.tokens={TOKENS}", f"text.width={WIDTH}"]
    index = ["index", "--data", str(theirs), "--tokenizer", str(raw / "tokenizer")]
    cli.run([*index, *text])
    found, wanted = (Manifest.load(folder) for folder in (theirs, ours))
    assert (found.shards, found.stored_text, found.text_truncated) == (wanted.shards, STORED, CUT)
    cli.run([*index, "again=true", *text])
    assert Manifest.load(theirs) == found
    with pytest.raises(ConfigError, match=r"theirs holds text vectors of hashing-4x8-\w+, not of hashing-4x9-\w+: leave"):
        cli.run([*index, "again=true", *text, "text.width=9"])
    for path in raw.glob("raw/*.tar"):
        (tmp_path / "frames").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "frames")
    with pytest.raises(ConfigError, match=r"'text.encoder' is given, but .*frames holds frames; allowed: with codes"):
        cli.run(["index", "--data", str(tmp_path / "frames"), *text])


def vectors_as(array: np.ndarray) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({TEXT: npy_bytes(array)})


@pytest.mark.parametrize(
    ("edit", "reason", "detail"),
    [
        (lambda members: members.pop(TEXT), "member_missing", "member k5.text.npy is missing"),
        (lambda members: members.update({TEXT: b"nonsense"}), "npy_header", "member k5.text.npy is not a .npy file"),
        (lambda members: members.update({TEXT: members[TEXT] + b"x"}), "array_size", "bytes; float16 [2, 8] takes 160"),
        (lambda members: members.update({TEXT: members[TEXT].replace(b"'descr': ", b"'descr':  ", 1).replace(b"}  ", b"} ", 1)}),
         "npy_header", "is not as numpy writes it"),
        (vectors_as(np.zeros((2, 8), np.float32)), "text_vectors", "holds float32 [2, 8]; allowed: float16 [0 to 4, 8]"),
        (vectors_as(np.zeros((5, 8), np.float16)), "text_vectors", "holds float16 [5, 8]; allowed: float16 [0 to 4, 8]"),
        (vectors_as(np.zeros((2, 9), np.float16)), "text_vectors", "holds float16 [2, 9]"),
        (vectors_as(np.zeros((2, 8, 1), np.float16)), "text_vectors", "holds float16 [2, 8, 1]"),
        (vectors_as(np.full((2, 8), np.inf, np.float16)), "text_vectors", "holds numbers that are not finite"),
        (vectors_as(np.full((2, 8), np.nan, np.float16)), "text_vectors", "holds numbers that are not finite"),
    ],
)  # fmt: skip
def test_bad_vectors_of_others_make_a_bad_clip(edit: Callable[[dict[str, bytes]], Any], reason: str, detail: str, tmp_path: Path) -> None:
    config = foreign(tmp_path, edit)
    with pytest.raises(DataError, match=rf"1 of 8 clips of .* are bad; .*most often {reason} \(1\)"):
        index_folder(config, CODES, STORED)
    [listed] = [json.loads(line) for line in (tmp_path / QUARANTINE).read_text().splitlines()]
    assert (listed["key"], listed["reason"]) == ("k5", reason)
    assert detail in listed["detail"]
    assert index_folder(dataclasses.replace(config, max_bad_share=0.2), CODES, STORED).manifest.total_clips == CLIPS - 1
    with ShardDataset(tmp_path, "tokens") as data:
        assert (data.read_text(np.array([5]), Buffer()) == expected(6)).all()


# --- tokenizing -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw shards, and an untrained tokenizer."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "raw").mkdir()
    shards = []
    for number in range(2):
        samples = []
        for i in range(4 * number, 4 * number + 4):
            frames = np.random.default_rng(i).integers(0, 256, (2 + i % 3, 16, 16, 3), dtype=np.uint8)
            samples.append((f"k{i}", raw_members(frames, CAPTIONS[i], [50] * len(frames), {})))
        shards.append(write_shard(folder / "raw" / f"raw-{number:05d}.tar", samples))
    Manifest.build("raw", shards, image_size=16).save(folder / "raw")
    torch.manual_seed(0)
    export_tokenizer(folder / "tokenizer", VQ, VQVAE(VQ).state_dict())
    return folder


def settings(raw: Path, out: Path, text: TextConfig = SETTINGS, **more: Any) -> TokenizeConfig:
    text = StoredTextConfig(**dataclasses.asdict(text))
    return TokenizeConfig(data=str(raw / "raw"), tokenizer=str(raw / "tokenizer"), out=str(out), text=text, **more)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_captions_are_stored_many_a_forward_pass_and_cut_ones_are_counted(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    passes: list[list[str]] = []
    compute = HashingTextEncoder._compute
    monkeypatch.setattr(HashingTextEncoder, "_compute", lambda self, captions: passes.append(captions) or compute(self, captions))
    with caplog.at_level(logging.WARNING):
        manifest = tokenize(settings(raw, tmp_path / "x"))
    assert manifest is not None
    assert [one for one in passes if one[0] in CAPTIONS] == [CAPTIONS[:4], CAPTIONS[4:]]  # a shard a pass here; the rest is the identity's
    assert (manifest.stored_text, manifest.text_truncated) == (STORED, CUT)
    assert "2 of 8 captions are longer than text.tokens: their ends are not stored" in caplog.text
    with ShardDataset(tmp_path / "x", "tokens") as data:
        for i in range(CLIPS):
            assert (data.read(i)["text"] == expected(i)).all()
    assert verify_folder(tmp_path / "x")[1] == []
    arguments = ["text.encoder=hashing", f"text.tokens={TOKENS}", f"text.width={WIDTH}"]
    cli.run(["tokenize", "--data", str(raw / "raw"), "--tokenizer", str(raw / "tokenizer"), "--out", str(tmp_path / "x"), *arguments])
    assert f"text vectors of {ENCODER.identity()}; 2 captions are cut to text.tokens=4" in capsys.readouterr().out


def test_parts_and_interrupted_runs_make_the_same_files(
    raw: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = HashingTextEncoder._compute

    def unsteady(self: HashingTextEncoder, captions: list[str]) -> list[Embedded]:
        """As a model's last bits: other ones in other company."""
        return [Embedded(one.vectors + len("".join(captions)), one.is_cut) for one in compute(self, captions)]

    monkeypatch.setattr(HashingTextEncoder, "_compute", unsteady)
    tokenize(settings(raw, tmp_path / "one"))
    with caplog.at_level(logging.WARNING):
        assert tokenize(settings(raw, tmp_path / "two", part="2/2")) is None
    assert "captions are longer than text.tokens (4)" in caplog.text  # a part says what it cut itself
    assert json.loads((tmp_path / "two" / CLAIM).read_text())["text_identity"].startswith("hashing-4x8-")
    tokenize(settings(raw, tmp_path / "two", part="1/2"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_folder_of_other_vectors_is_refused(raw: Path, tmp_path: Path) -> None:
    other, none = TextConfig("hashing", TOKENS, 2 * WIDTH), TextConfig("")
    out = tmp_path / "x"
    tokenize(settings(raw, out, part="1/2"))
    before = contents(out)
    for _ in range(2):  # claimed, then finished
        with pytest.raises(DataError, match=r"holds the text vectors of hashing-4x8-.*, this run would store .* hashing-4x16-.*: give"):
            tokenize(settings(raw, out, other))
        with pytest.raises(DataError, match=r"holds the text vectors of hashing-4x8-.*, this run would store no text vectors"):
            tokenize(settings(raw, out, none))
        assert contents(out) == before
        tokenize(settings(raw, out))
        before = contents(out)
    tokenize(settings(raw, tmp_path / "y", none, part="1/2"))
    claim = json.loads((tmp_path / "y" / CLAIM).read_text())
    del claim["text_identity"]  # as an earlier version wrote it
    (tmp_path / "y" / CLAIM).write_text(json.dumps(claim))
    with pytest.raises(DataError, match="holds no text vectors, this run would store the text vectors of hashing-4x8-"):
        tokenize(settings(raw, tmp_path / "y"))
    manifest = tokenize(settings(raw, tmp_path / "y", none))
    assert manifest is not None and manifest.stored_text is None
    assert all(TEXT not in members for _, members in read_shard(tmp_path / "y" / "tokens-00000.tar"))


def test_vectors_beyond_half_precision_are_refused(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = Embedded(torch.full((1, WIDTH), 7e4), False)
    monkeypatch.setattr(HashingTextEncoder, "_compute", lambda self, captions: [large] * len(captions))
    with pytest.raises(ConfigError, match=r"'text.encoder' names hashing-4x8-.*, whose vectors reach 70000; allowed: 65504"):
        tokenize(settings(raw, tmp_path / "x"))
    assert not list((tmp_path / "x").glob("tokens-*.tar"))


def test_the_text_settings_of_tokenizing(tmp_path: Path) -> None:
    assert TokenizeConfig().text.encoder == ""
    assert load_config(TokenizeConfig, overrides=["text.tokens=9"]).text == StoredTextConfig("", 9)  # tokens alone store nothing
    assert load_config(TransformerRunConfig).text.encoder == "hashing"
    assert load_config(TransformerRunConfig, overrides=["text.encoder="]).text.encoder == ""
    help_text = cli._settings_help(TokenizeConfig)
    assert "text.encoder=  (whose vectors are stored" in help_text
    assert "text.tokens=16  (longest caption in tokens" in help_text
    demo = DemoConfig(transformer=TransformerRunConfig(text=TextConfig("hashing", 7, 9)))
    assert _stored_text(demo) == StoredTextConfig("hashing", 7, 9)
    asked = StoredTextConfig("hashing", 5, 6)
    assert _stored_text(dataclasses.replace(demo, tokenize=TokenizeConfig(text=asked))) == asked
    with pytest.raises(ConfigError, match=r"'transformer\.text\.encoder' is ''; allowed: an encoder's name"):
        _stored_text(DemoConfig(transformer=TransformerRunConfig(text=TextConfig(""))))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 2])
def test_stored_vectors_reach_training_as_an_encoder_gives_them(tmp_path: Path, threads: int) -> None:
    """The same samples, excerpts and dropped captions, batch for batch."""
    config = TransformerRunConfig(caption_dropout=0.4, excerpt_share=0.5, excerpt_frames=1)
    with build(tmp_path / "text") as stored, build(tmp_path / "none", text=False) as plain:
        streams = [ClipStream(data, 4, seed=3, threads=threads, load=_Vary(config), micro_batch=2) for data in (stored, plain)]
        dropped = 0
        for _ in range(40):
            mine, other = (next(stream) for stream in streams)
            vectors, mask = ENCODER.encode(other.pop("captions"))
            assert torch.equal(mine.pop("text"), vectors)
            assert torch.equal(mine.pop("mask"), mask)
            assert mine.keys() == other.keys() == {"codes", "lengths", "starts", "context", "passes", "last_given"}
            assert torch.equal(mine.pop("codes"), other.pop("codes"))
            assert mine == other
            dropped += int((~mask.any(1)).sum())
        assert 20 < dropped < 60  # of 80, of which a tenth has no words
        for stream in streams:
            stream.close()


def run_config(folder: Path, encoder: str = "hashing", tokens: int = TOKENS, **more: Any) -> TransformerRunConfig:
    return TransformerRunConfig(data=str(folder), text=TextConfig(encoder, tokens, WIDTH), **more)


def test_the_encoder_of_a_run_is_the_one_stored_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with build(tmp_path / "text") as stored, build(tmp_path / "none", text=False) as plain:
        for config in (run_config(tmp_path), run_config(tmp_path, "", 16, sample_prompts=("a red circle",))):
            encoder, chosen = _text_encoder(config, stored)
            assert isinstance(encoder, HashingTextEncoder)
            assert (encoder.identity(), chosen) == (STORED.identity, STORED.settings)
        encoder, chosen = _text_encoder(run_config(tmp_path, tokens=9), plain)
        assert (encoder.tokens, chosen.tokens) == (9, 9)
        monkeypatch.setattr("t2v_ds.training.run.build_text_encoder", None)  # an encoder that is not at hand
        encoder, chosen = _text_encoder(run_config(tmp_path, "", 16), stored)
        assert isinstance(encoder, StoredTextEncoder)
        assert (encoder.identity(), encoder.tokens, encoder.width, chosen) == (STORED.identity, TOKENS, WIDTH, STORED.settings)
        for mine, other in zip(encoder.encode(CAPTIONS[:4]), ENCODER.encode(CAPTIONS[:4]), strict=True):
            assert torch.equal(mine, other)  # what is shown while training


def test_a_run_with_another_encoder_or_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with build(tmp_path / "text") as stored, build(tmp_path / "none", text=False) as plain:
        with pytest.raises(ConfigError, match=r"'text.encoder' is empty, but .* holds no text vectors: name .* or tokenize again"):
            _text_encoder(run_config(tmp_path, ""), plain)
        with pytest.raises(
            ConfigError,
            match=r"holds the text vectors of hashing-4x8-\w+, but this run's text encoder is hashing-5x8-\w+: set text.encoder=hashing "
            r"text.tokens=4 text.width=8 and .*, or text.encoder= \(empty\) .*, or tokenize again with text.encoder=hashing text.tokens=5",
        ):
            _text_encoder(run_config(tmp_path, tokens=5), stored)
        monkeypatch.setattr(HashingTextEncoder, "identity", lambda self: "hashing-of-other-files")
        with pytest.raises(ConfigError, match="but this run's text encoder is hashing-of-other-files"):
            _text_encoder(run_config(tmp_path, "", sample_prompts=("a red circle",)), stored)
