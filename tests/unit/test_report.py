"""`t2v prepare --report`: what it says of a folder is what is in it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2v_ds import cli
from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.gif import encode_gif
from t2v_ds.data.report import write_report
from t2v_ds.errors import DataError

CAPTIONS = ["a cat jumps", "a dog | sleeps", "a cat jumps", "the quick brown fox jumps over the lazy dog", "a cat", "cut", "short"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report") / "gifs"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(len(CAPTIONS)):
        frames = rng.integers(0, 256, (15 + i % 2 if i < 6 else 3, 20, 20, 3), dtype=np.uint8)
        data = encode_gif(frames, [50] * len(frames))
        (root / f"{i}.gif").write_bytes(data[:500] if i == 5 else data)
    (root / "captions.tsv").write_text("".join(f"{i}.gif\t{caption}\n" for i, caption in enumerate(CAPTIONS)))
    return root


def row(text: str, name: str) -> str:
    """The second cell of the table row that begins with `name`."""
    found = re.findall(rf"^\| {re.escape(name)} \| (.*?) \|", text, flags=re.MULTILINE)
    assert len(found) == 1, (name, text)
    return str(found[0])


def test_the_report_counts_what_is_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "raw"
    cli.run(["prepare", "--source", str(folder), "--report", "--out", str(out), "image_size=32", "workers=1"])
    text = (out / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert row(text, "rows read") == "7"
    assert row(text, "clips kept") == "5 (71.4%)"
    assert row(text, "frames in total") == str(15 + 16 + 15 + 16 + 15)
    assert row(text, "bytes").startswith(f"{sum(path.stat().st_size for path in out.glob('*.tar')):,} (")
    assert (row(text, "truncated"), row(text, "too_short")) == ("1", "1")
    assert (row(text, "15"), row(text, "16")) == ("3", "2")
    assert row(text, "distinct captions") == "4 of 5"
    assert row(text, "words a caption") == "mean 4.2, median 3, 95% at most 8, 2 to 9"
    assert row(text, "distinct words") == "12 (lower case), 7 of them once"
    assert row(text, "most frequent").startswith("a 4, cat 3, jumps 3, dog 2, the 2, brown 1")
    assert row(text, "longest") == CAPTIONS[3]
    assert "Rot" not in text
    with Image.open(out / "contact_sheet.png") as sheet, ShardDataset(out, "raw") as dataset:
        pixels = np.asarray(sheet.convert("RGB"))
        tile = dataset.read(0)["frames"][0]
        assert any((pixels[y : y + 32, 4:36] == tile).all() for y in range(pixels.shape[0] - 32))


def test_a_finished_folder_is_only_described(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "raw"
    with pytest.raises(DataError, match="does not exist"):
        write_report(out)
    cli.run(["prepare", "--source", str(folder), "--out", str(out), "image_size=32", "workers=1"])
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert not (out / "report.md").exists()
    capsys.readouterr()
    cli.run(["prepare", "--report", "--out", str(out)])  # without the source and the settings that made it
    assert capsys.readouterr().out.strip() == (out / "report.md").read_text().strip()
    after = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert {path.name for path in after.keys() - before.keys()} == {"report.md", "contact_sheet.png"}
    assert all(after[path] == time for path, time in before.items())
    cli.run(["prepare", "--source", str(folder), "--out", str(out), "image_size=32", "workers=1"])  # and is still a finished folder


def test_rot_is_told_by_answer(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "urls.tsv"
    table.write_text("http://10.0.0.1/a.gif\tx\nhttp://10.0.0.2/b.gif\ty\n")
    out = tmp_path / "raw"
    with pytest.raises(DataError, match=r"no clip of source .* can be used: download_failed 2"):
        cli.run(["prepare", "--source", str(table), "--out", str(out)])
    listed = (out / "rejected.jsonl").read_text()
    made = tmp_path / "made"
    cli.run(["prepare", "--source", str(folder), "--out", str(made), "image_size=32", "workers=1"])
    manifest = made / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"too_short": 1,', '"download_failed": 2, "too_short": 1,'))
    (made / "rejected.jsonl").write_text(listed)
    text = write_report(made)
    assert "Rot (links that are dead or failed): 2 of 9 rows, 22.2%." in text
    assert row(text, "10.0.0.1 is a private address; download.allow_private=true allows it") == "1"
