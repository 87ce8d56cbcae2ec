"""`t2v evaluate` on tiny untrained models: every figure is what its name says, runs go on, and mistakes are one sentence."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from t2v_ds import cli
from t2v_ds.config import EvaluateConfig, PrepareConfig, QuantizerConfig, TextConfig, TokenizeConfig, TransformerConfig, VQVAEConfig
from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.manifest import Manifest
from t2v_ds.data.prepare import prepare
from t2v_ds.data.shards import raw_members, write_shard
from t2v_ds.errors import CheckpointError, ConfigError, DataError, UserError
from t2v_ds.evaluation import evaluate as module
from t2v_ds.evaluation.clips import is_still, motion, spread, two_spreads
from t2v_ds.evaluation.intervals import share_of, wilson
from t2v_ds.evaluation.likelihood import other_captions, unigram_bits
from t2v_ds.models.exported import export_model
from t2v_ds.models.facade import Generator, export_tokenizer, generator_config, load_generator, load_tokenizer
from t2v_ds.models.text import build_text_encoder
from t2v_ds.models.transformer import VideoTransformer
from t2v_ds.models.vqvae import VQVAE
from t2v_ds.tokenize import tokenize
from tests.unit.test_evaluate_frechet import Script, script

SIZE, GRID, K = 32, 4, 24
VQ = VQVAEConfig(SIZE, 8, (1, 1, 1), (0, 0, 0), 4, QuantizerConfig(codebook_size=K, codebook_dim=6), patch_encoder=True)
TEXT = TextConfig(tokens=12, width=12)
TRANSFORMER = TransformerConfig(width=16, layers=1, heads=2, max_frames=6, group=2, grid_size=GRID, codebook_size=K, text_width=TEXT.width)
SETTINGS = ["clips=5", "training_clips=8", "second_draws=3", "shape_prompts=4", "sheet_clips=2", "fvd.frames=3"]


@dataclass
class Chain:
    """Folders that the tests share and never change."""

    root: Path
    raw: Path  # 14 clips of moving shapes
    tokens: Path
    other_raw: Path  # 6 clips of noise
    validation: Path
    tokenizer: Path
    generator: Path
    network: Path  # TorchScript


def make_tokenizer(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    model = VQVAE(VQ).eval()
    model.quantizer.started.fill_(1)
    with torch.no_grad():
        model.quantizer.codebook.copy_(torch.randn(K, 6))
    return export_tokenizer(folder, VQ, model.state_dict())


def make_noise(folder: Path, clips: int, seed: int) -> Path:
    """Raw shards of another source."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(clips):
        frames = rng.integers(0, 256, (3 + i % 4, SIZE, SIZE, 3), dtype=np.uint8)
        samples.append((f"{i:06d}", raw_members(frames, f"noise number {i}", [50] * len(frames), {"source": "folder"})))
    folder.mkdir()
    Manifest.build("raw", [write_shard(folder / "raw-00000.tar", samples)], image_size=SIZE, source={"name": "folder"}).save(folder)
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    root = tmp_path_factory.mktemp("chain")
    names = ("raw", "tokens", "noise", "validation", "tokenizer", "generator")
    made = Chain(root, *(root / name for name in names), script(root / "network.pt", Script()))
    prepare(PrepareConfig(out=str(made.raw), clips=14, image_size=SIZE, min_frames=3, max_frames=6, shard_clips=5, workers=1))
    make_noise(made.other_raw, 6, 0)
    tokenizer_id = make_tokenizer(made.tokenizer, 0)
    for raw, tokens in ((made.raw, made.tokens), (made.other_raw, made.validation)):
        tokenize(TokenizeConfig(data=str(raw), tokenizer=str(made.tokenizer), out=str(tokens)))
    torch.manual_seed(1)
    model = VideoTransformer(TRANSFORMER)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    config = generator_config(TRANSFORMER, TEXT, build_text_encoder(TEXT).identity(), tokenizer_id, 3, 5, 70)
    export_model(made.generator, config, model.state_dict())
    shutil.copytree(made.tokenizer, made.generator / "tokenizer")
    with ShardDataset(made.tokens, "tokens") as data:
        (made.generator / "DONE").write_text(json.dumps({"step": 7, "data": data.digest}))
    return made


def run(chain: Chain, out: Path, *more: str) -> dict[str, Any]:
    settings = [*SETTINGS, f"fvd.weights={chain.network}", *more]
    cli.run(["evaluate", "--model", str(chain.generator), "--data", str(chain.tokens), "--out", str(out), *settings])
    return dict(json.loads((out / "report.json").read_text()))


@pytest.fixture(scope="module")
def report(chain: Chain) -> dict[str, Any]:
    """Of an undisturbed run with decoded codes."""
    return run(chain, chain.root / "report")


# -- small parts -----------------------------------------------------------------------------------------------------------


def test_intervals() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=2e-4)  # Newcombe 1998, table I
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=2e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=2e-4)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=2e-4)
    assert wilson(20, 20)[1] == 1
    assert share_of(1, 4)["share"] == 0.25
    for hits, count in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"{hits} hits of {count}"):
            wilson(hits, count)


def test_motion_is_in_levels() -> None:
    clip = np.zeros((3, 16, 16, 3), dtype=np.uint8)
    assert (motion(clip), motion(clip[:1]), is_still(clip)) == (0, 0, True)
    clip[1:] = 200  # one step of 200 in two
    assert (motion(clip), motion(clip[::-1])) == (100, 100)
    assert not is_still(clip)
    clip[1:] = 5
    assert is_still(clip) and motion(clip) == 2.5


def test_which_clips_are_chosen() -> None:
    assert spread(3, 9).tolist() == [0, 4, 8]
    assert spread(5, 2).tolist() == [0, 1]
    for count, total in ((3, 9), (4, 8), (5, 8), (9, 4), (2, 2), (100, 1001)):
        first, second = two_spreads(count, total)
        assert len(first) == min(count, total)
        assert len(second) == min(count, total - len(first))
        assert not set(first) & set(second) and max([*first, *second]) < total


def test_other_captions() -> None:
    assert other_captions(["a", "a", "b", "c"]) == ["b", "b", "c", "a"]
    assert other_captions(["a", "a"]) is None


# -- figures ---------------------------------------------------------------------------------------------------------------


def test_bits_a_code_are_the_models(chain: Chain) -> None:
    generator = load_generator(chain.generator)
    with ShardDataset(chain.tokens, "tokens") as data:
        codes = [data.read(i)["codes"] for i in range(4)]
        captions = data.captions(np.arange(4))
        counts = np.bincount(np.concatenate([data.read(i)["codes"].ravel() for i in range(14)]), minlength=K)
        shares = counts[counts > 0] / counts.sum()
        assert unigram_bits(data) == pytest.approx(-(shares * np.log2(shares)).sum(), rel=1e-12)
    bits = generator.bits_per_code(codes, captions)
    assert bits.dtype == np.float64 and bits.shape == (4,)
    alone = [float(generator.bits_per_code([one], [caption])[0]) for one, caption in zip(codes, captions, strict=True)]
    assert bits == pytest.approx(alone, rel=1e-5)
    assert abs(generator.bits_per_code(codes[:1], [""])[0] - bits[0]) > 1e-3  # the caption counts
    for logits in generator.model.head.logits:
        torch.nn.init.zeros_(logits.get_parameter("weight"))
        torch.nn.init.zeros_(logits.get_parameter("bias"))
    assert generator.bits_per_code(codes, captions) == pytest.approx([math.log2(K)] * 4, rel=1e-6)  # all codes alike


def test_the_loss_is_that_of_the_clips(chain: Chain, report: dict[str, Any]) -> None:
    generator = load_generator(chain.generator)
    with ShardDataset(chain.tokens, "tokens") as data:
        codes, captions = [data.read(i)["codes"] for i in range(14)], data.captions(np.arange(14))
    loss = report["loss"]["training"]
    bits = generator.bits_per_code(codes, captions)
    assert loss["clips"] == 14
    assert loss["bits"] == pytest.approx(bits.mean(), rel=1e-5)
    assert loss["high"] - loss["low"] == pytest.approx(2 * 1.96 * bits.std(ddof=1) / 14**0.5, rel=1e-3)
    others = other_captions(captions)
    assert others is not None
    assert loss["bits_with_captions_of_others"] == pytest.approx(generator.bits_per_code(codes, others).mean(), rel=1e-5)
    assert report["loss"]["measured_on"] == "the training clips" and "held_out" not in report["loss"]
    assert report["loss"]["uniform_bits"] == math.log2(K)


def test_a_report_has_everything(chain: Chain, report: dict[str, Any]) -> None:
    out = chain.root / "report"
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md", "sheet.png", "tensorboard"]
    assert (report["step"], report["data_is_of_the_training"], report["drawn_for"]) == (7, True, "captions of the training clips")
    frechet, copies, motions = report["frechet"], report["memorisation"], report["motion"]
    assert (frechet["measure"], frechet["clips"], frechet["features"], frechet["floor"]["clips"]) == ("FVD", 5, 7, 5)
    assert frechet["distance"] > frechet["floor"]["distance"] > 0
    assert frechet["real_clips"] == "what the codes decode to"
    assert copies["training_clips"] == 8 and copies["nearest_is_own"]["of"] == 5
    assert motions["drawn"]["stills"]["of"] == 5 and motions["real"]["levels"] > 0
    assert report["distinctness"]["prompts"] == 3 and report["distinctness"]["between_seeds"] > 0
    faithful = report["faithfulness"]
    assert [row["all"]["of"] for row in faithful.values()] == [2, 2, 4, 4]
    assert faithful["true clips"]["colour"]["share"] == 1
    text = (out / "report.md").read_text()
    for line in ("## FVD", "measured on the training clips", "`--data` is what", "| real, other real (floor) | 5 |", "| seen (2) |"):
        assert line in text, line
    assert f"{report['loss']['unigram_bits']:.4f}" in text and frechet["sha256"] in text
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size == (2 * (8 * (SIZE + 4) + 4) + 12, 2 * (13 + 6 + SIZE + 4) + 4)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("FVD/distance")] == [(7, pytest.approx(frechet["distance"], rel=1e-6))]
    assert events.Scalars("loss/training/bits")[0].value == pytest.approx(report["loss"]["training"]["bits"], rel=1e-6)
    assert events.Tags()["images"] == ["drawn beside nearest training clips"]


def test_real_frames_are_used_where_they_are_given(chain: Chain, report: dict[str, Any], tmp_path: Path) -> None:
    found = run(chain, tmp_path / "out", "--raw", str(chain.raw))
    assert found["frechet"]["real_clips"] == "frames of the raw shards"
    with ShardDataset(chain.raw, "raw") as data:
        numbers, _ = two_spreads(5, 14)
        expected = np.mean([motion(data.read(int(i))["frames"]) for i in numbers])
    assert found["motion"]["real"]["levels"] == pytest.approx(expected)
    assert found["motion"]["real"]["levels"] != report["motion"]["real"]["levels"]
    assert found["motion"]["drawn"] == report["motion"]["drawn"]  # the same clips are drawn
    assert found["loss"] == report["loss"]


def test_held_out_clips_and_data_that_no_program_reads(chain: Chain, report: dict[str, Any], tmp_path: Path) -> None:
    held_out = ("--validation", str(chain.validation), "--raw", str(chain.other_raw), str(chain.raw))
    found = run(chain, tmp_path / "a", *held_out)
    assert found["loss"]["measured_on"] == "held-out clips" and found["loss"]["held_out"]["clips"] == 6
    assert found["loss"]["training"] == report["loss"]["training"]
    assert found["drawn_for"] == "captions of held-out clips"
    assert found["memorisation"]["nearest_is_own"] is None
    assert found["frechet"]["floor"]["clips"] == 3  # of 6 clips, 5 are drawn for: two halves of them
    assert "measured on held-out clips" in (tmp_path / "a" / "report.md").read_text()
    found = run(chain, tmp_path / "b", *held_out, "prompts_from=training")
    assert found["drawn_for"] == "captions of the training clips" and found["memorisation"]["nearest_is_own"]["of"] == 5
    cli.run([
        "evaluate", "--model", str(chain.generator), "--data", str(chain.validation), "--out", str(tmp_path / "c"),
        *SETTINGS, f"fvd.weights={chain.network}", "second_draws=0",
    ])  # fmt: skip
    other = json.loads((tmp_path / "c" / "report.json").read_text())
    assert other["data_is_of_the_training"] is False
    assert "not of moving-shapes" in other["faithfulness"]["skipped"] and other["distinctness"] == {"skipped": "second_draws is 0"}
    text = (tmp_path / "c" / "report.md").read_text()
    assert "is **not** what the model was trained on" in text and "Not measured: the data is not of moving-shapes" in text


def test_without_a_network_there_is_no_fvd(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["clips=2", "training_clips=2", "second_draws=0", "shape_prompts=0", "fvd.frames=2"]
    out = tmp_path / "out"
    cli.run(["evaluate", "--model", str(chain.generator), "--data", str(chain.tokens), "--out", str(out), *settings])
    found = json.loads((out / "report.json").read_text())
    assert found["frechet"]["measure"] == "stand-in FVD"
    assert found["frechet"]["network"] == "stand-in: random r3d_18, seed 0; comparable only with itself"
    for text in ((out / "report.md").read_text(), capsys.readouterr().out):
        assert text.count("FVD") == text.count("stand-in FVD") == 1
    tags = EventAccumulator(str(out / "tensorboard")).Reload().Tags()["scalars"]
    assert "stand-in_FVD/distance" in tags and not [tag for tag in tags if tag.startswith("FVD")]


# -- going on --------------------------------------------------------------------------------------------------------------


def test_a_finished_folder_is_left_alone(chain: Chain, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    out = chain.root / "report"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(Generator, "generate", lambda *_, **__: pytest.fail("drawn again"))
    assert run(chain, out, "batch=3") == report  # which changes no figure
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    for more, sentence in (
        (["sampling.seed=5"], f"{out} holds a report with settings.sampling.seed 0, this run has 5: choose another folder, or again=true"),
        (["--raw", str(chain.raw)], "holds a report with data.frames 'what the codes decode to', this run has 'frames of the raw shards'"),
    ):
        with pytest.raises(DataError, match=sentence):
            run(chain, out, *more)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_other_settings_are_measured_on_request(chain: Chain, report: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(chain.root / "report", out)
    found = run(chain, out, "sampling.seed=5", "again=true")
    assert found["motion"]["drawn"] != report["motion"]["drawn"] and found["loss"] == report["loss"]
    assert EventAccumulator(str(out / "tensorboard")).Reload().Scalars("FVD/distance")[0].value == pytest.approx(
        found["frechet"]["distance"], rel=1e-6
    )


@pytest.mark.parametrize("where", ["second draws", "page", "faithfulness"])
def test_a_killed_run_goes_on(chain: Chain, report: dict[str, Any], tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls, generate = tmp_path / "out", [], Generator.generate

    def counted(self: Generator, prompts: list[str], *rest: Any, **named: Any) -> list[np.ndarray]:
        if where == "second draws" and len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(len(prompts))
        return generate(self, prompts, *rest, **named)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "generate", counted)
        if where != "second draws":
            patch.setattr(module, {"page": "write_page", "faithfulness": "judge"}[where], die)
        with pytest.raises(KeyboardInterrupt):
            run(chain, out)
    assert not (out / "report.json").exists()
    with pytest.raises(DataError, match=r"holds a part of a report with settings\.clips 5, this run has 4"):
        run(chain, out, "clips=4")
    where = ""
    monkeypatch.setattr(Generator, "generate", counted)
    assert run(chain, out) == report
    assert calls == [5, 3, 4]  # nothing is drawn twice
    assert (out / "sheet.png").read_bytes() == (chain.root / "report" / "sheet.png").read_bytes()
    assert not (out / ".work").exists()


def test_what_another_version_began_begins_anew(chain: Chain, report: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".work").mkdir(parents=True)
    (out / ".work" / "settings.json").write_text(json.dumps({"identity": report["identity"], "code": "older"}))
    (out / ".work" / "loss.json").write_text(json.dumps({"training": {"bits": -1}}))
    assert run(chain, out) == report


# -- mistakes --------------------------------------------------------------------------------------------------------------


def test_mistakes_are_told_before_anything_is_written(chain: Chain, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = make_tokenizer(tmp_path / "other", 5)
    own = load_tokenizer(chain.tokenizer).tokenizer_id
    tokenize(TokenizeConfig(data=str(chain.other_raw), tokenizer=str(tmp_path / "other"), out=str(tmp_path / "foreign")))
    Manifest.build("tokens", [], tokenizer_id=own, image_size=SIZE, grid_size=GRID, codebook_size=K).save(chain.root)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(chain.network.read_bytes()[:500])
    model, data = ["--model", str(chain.generator)], ["--data", str(chain.tokens)]
    cases: list[tuple[list[str], type[UserError], str]] = [
        (data, ConfigError, "--model is not given"),
        (model, ConfigError, "--data is not given"),
        ([*data, "--model", "nowhere"], CheckpointError, "there is no model folder nowhere"),
        ([*data, "--model", str(chain.tokenizer)], CheckpointError, "holds a model of kind 'tokenizer'; expected a generator"),
        ([*model, "--data", "nowhere"], DataError, "data folder nowhere does not exist: make it with t2v tokenize"),
        ([*model, "--data", str(chain.raw)], DataError, "holds raw shards, made by t2v prepare; expected token shards"),
        ([*model, "--data", str(tmp_path / "foreign")], CheckpointError, f"made with tokenizer {own}, but .*foreign is tokenizer {other}"),
        ([*model, *data, "--validation", str(tmp_path / "foreign")], CheckpointError, f"{own}.*{other}"),
        ([*model, *data, "--validation", str(chain.tokens)], DataError, "holds the same clips as --data"),
        ([*model, "--data", str(chain.root)], DataError, f"{chain.root} holds no clips"),
        ([*model, *data, "--raw", str(chain.other_raw)], DataError, "of which .*tokens were not made; give the raw shards of those"),
        ([*model, *data, "clips=0"], ConfigError, "setting 'clips' is 0; allowed: >= 2"),
        ([*model, *data, "fvd.architecture=i3d"], ConfigError, "'fvd.architecture' is 'i3d'; allowed: 'torchscript', 'r3d_18', 's3d'"),
        ([*model, *data, f"fvd.weights={cut}"], ConfigError, "is no whole TorchScript file"),
        ([*model, *data, "perceptual.weights=nowhere"], ConfigError, r"'perceptual\.weights' is 'nowhere', which is no file"),
        ([*model, *data, "sampling.frames=7"], ConfigError, "'sampling.frames' is 7; this model knows 1 to 6 frames"),
        ([*model, *data, "sampling.guidance_schedule=passes"], ConfigError, "'sampling.guidance_schedule' is 'passes', but this model"),
        ([*model, *data, "sampling.loop=true"], ConfigError, "'sampling.loop' is true, but this model was not trained to end on a frame"),
        ([*model, *data, "prompts_from=test"], ConfigError, "'prompts_from' is 'test'; allowed: 'validation' or 'training'"),
        ([*model, "--data", "s3://bucket/tokens"], ConfigError, "a URL; allowed: a folder of this machine"),
    ]
    for arguments, error, sentence in cases:
        with pytest.raises(error, match=sentence) as caught:
            cli.run(["evaluate", "--out", str(out), *SETTINGS, *arguments])
        assert "\n" not in str(caught.value)
        assert not out.exists(), arguments
    with pytest.raises(ConfigError, match="--out is not given"):
        cli.run(["evaluate", *model, *data])


def test_other_peoples_files_are_not_replaced(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds other files \('thesis.txt'\): choose a new or empty folder"):
        run(chain, tmp_path)
    with pytest.raises(ConfigError, match="which is a file; allowed: a folder"):
        run(chain, tmp_path / "thesis.txt")
    with pytest.raises(DataError, match="holds other files"):
        run(chain, chain.generator)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_longer_clips_than_the_model_knows(chain: Chain, tmp_path: Path) -> None:
    prepare(PrepareConfig(out=str(tmp_path / "raw"), clips=2, image_size=SIZE, min_frames=8, max_frames=8, workers=1))
    tokenize(TokenizeConfig(data=str(tmp_path / "raw"), tokenizer=str(chain.tokenizer), out=str(tmp_path / "tokens")))
    with pytest.raises(ConfigError, match="holds clips of 8 frames; the model knows 1 to 6"):
        run(chain, tmp_path / "out", "--validation", str(tmp_path / "tokens"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("clips", 1), ("loss_clips", -1), ("training_clips", 1), ("second_draws", 1), ("shape_prompts", 1), ("sheet_clips", 0), ("batch", 0),
     ("precision", "fp16")],
)  # fmt: skip
def test_settings_have_ranges(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"setting '{name}' is {value!r}; allowed: "):
        EvaluateConfig(**{name: value})
