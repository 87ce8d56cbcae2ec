"""Folders, tables and downloads: what becomes a clip, what is rejected, and what is an error."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_ds.config import DownloadConfig, PrepareConfig
from t2v_ds.data import download, transport
from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.gif import RejectedClip, encode_gif
from t2v_ds.data.prefetch import Prefetcher
from t2v_ds.data.prepare import prepare
from t2v_ds.data.sources import caption_of_name, open_source
from t2v_ds.errors import ConfigError, DataError


def gif_bytes(frames: int = 3, seed: int = 0) -> bytes:
    return encode_gif(np.random.default_rng(seed).integers(0, 256, (frames, 10, 12, 3), dtype=np.uint8), [50] * frames)


def config(source: Path | str, out: Path | str = "", **settings: Any) -> PrepareConfig:
    return PrepareConfig(source=str(source), out=str(out), **{"image_size": 8, "min_frames": 2, "max_frames": 5, **settings})


def outcomes(settings: PrepareConfig) -> list[tuple[str, str]]:
    """(where, caption or reason) of each row."""
    source = pickle.loads(pickle.dumps(open_source(settings)))  # as a worker process gets it
    found = []
    for i in range(len(source)):
        try:
            clip = source.load(i, settings)
        except RejectedClip as error:
            found.append((source.where(i), error.reason))
        else:
            assert clip.frames.shape == (len(clip.durations_ms), 8, 8, 3)
            assert clip.frames.dtype == np.uint8
            found.append((source.where(i), clip.caption))
    assert len({source.key(i) for i in range(len(source))}) == len(source)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "gifs"
    (root / "b").mkdir(parents=True)
    for name, data in {
        "b/cat_jumps-2.gif": gif_bytes(),
        "a 01.GIF": gif_bytes(),
        "12.gif": gif_bytes(),
        "long.gif": gif_bytes(6),
        "short.gif": gif_bytes(1),
        "cut.gif": gif_bytes()[:-40],
        "notes.txt": b"not listed",
    }.items():
        (root / name).write_bytes(data)
    return root


def test_folder_with_captions_from_file_names(folder: Path) -> None:
    assert outcomes(config(folder)) == [
        ("12.gif", "empty_caption"),
        ("a 01.GIF", "a"),
        ("b/cat_jumps-2.gif", "cat jumps"),
        ("cut.gif", "truncated"),
        ("long.gif", "too_long"),
        ("short.gif", "too_short"),
    ]
    assert caption_of_name("x/the_dog's--toy_(3).gif") == "the dog's toy"


def test_a_gif_without_its_last_byte_is_taken_on_request(tmp_path: Path) -> None:
    root = tmp_path / "gifs"
    root.mkdir()
    (root / "whole.gif").write_bytes(gif_bytes())
    (root / "bare.gif").write_bytes(gif_bytes()[:-1])
    assert outcomes(config(root)) == [("bare.gif", "truncated"), ("whole.gif", "whole")]
    assert outcomes(config(root, require_trailer=False)) == [("bare.gif", "bare"), ("whole.gif", "whole")]


@pytest.mark.parametrize("place", ["inside", "beside", "named"])
@pytest.mark.parametrize("header", [False, True])
def test_folder_with_captions_from_a_table(folder: Path, tmp_path: Path, place: str, header: bool) -> None:
    table = {"inside": folder / "captions.tsv", "beside": tmp_path / "gifs.tsv", "named": tmp_path / "other.txt"}[place]
    rows = [("b/cat_jumps-2.gif", " a  cat\u2028jumps "), ("./12.gif", "one"), ("12.gif", "two"), ("gone.gif", "gone"), ("a 01.GIF", " ")]
    lines = [f"{caption}\tMIT\t{name}" if header else f"{name}\t{caption}" for name, caption in rows]
    table.write_text("\n".join((["Caption\tlicence\tpath"] if header else []) + lines) + "\r\n\n", encoding="utf-8")
    assert outcomes(config(folder, captions=str(table) if place == "named" else "")) == [
        ("12.gif", "one"),
        ("12.gif", "two"),
        ("a 01.GIF", "empty_caption"),
        ("b/cat_jumps-2.gif", "a cat jumps"),
        ("cut.gif", "empty_caption"),  # there, and not in the table
        ("gone.gif", "missing_file"),
        ("long.gif", "empty_caption"),
        ("short.gif", "empty_caption"),
    ]


def test_description_changes_with_the_source_and_not_with_its_place(folder: Path, tmp_path: Path) -> None:
    first = open_source(config(folder)).describe()
    moved = folder.rename(tmp_path / "moved")
    assert open_source(config(moved)).describe() == first
    (moved / "12.gif").write_bytes(gif_bytes(4))
    assert open_source(config(moved)).describe() != first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://h/a.gif\tone\nhttp://h/b.gif\n", "line 2 has 1 columns instead of 2"),
        ("http://h/a.gif\tone\ttwo\n", "line 1 has 3 columns"),
        ("http://h/a.gif\tone\n\nftp://h/b.gif\tx\n", "line 3 names 'ftp://h/b.gif'"),
        ("a.gif\tone\n", "line 1 names 'a.gif'"),
        ("http://\tone\n", "expected an http or https URL"),
        ("\n", "no row"),
    ],
)
def test_a_bad_row_of_urls_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.tsv").write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        open_source(config(tmp_path / "x.tsv"))
    assert "x.tsv" in str(caught.value)


@pytest.mark.parametrize("row", ["../x.gif\tc", "/etc/x.gif\tc", "a.gif", "a.gif\tb\tc"])
def test_a_bad_row_of_files_is_named(folder: Path, row: str) -> None:
    (folder / "captions.tsv").write_text(f"12.gif\tc\n{row}\n")
    with pytest.raises(DataError, match=r"captions.tsv line 2"):
        open_source(config(folder))


def test_unknown_and_unfit_sources(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'nowhere' does not exist"):
        open_source(config("nowhere"))
    with pytest.raises(DataError, match="did you mean 'moving-shapes'"):
        open_source(config("moving_shapes"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.gif file"):
        open_source(config(tmp_path / "empty"))
    with pytest.raises(DataError, match="captions file nowhere does not exist"):
        open_source(config(folder, captions="nowhere"))
    with pytest.raises(ConfigError, match="captions of its own"):
        open_source(config("moving-shapes", captions="x.tsv"))
    (folder / "captions.tsv").write_text("gifs/12.gif\tx\n")
    with pytest.raises(DataError, match="names none of the 6 GIFs"):
        open_source(config(folder))
    (tmp_path / "x.tsv").write_bytes(b"http://h/a.gif\t\xff\n")
    with pytest.raises(DataError, match="not UTF-8"):
        open_source(config(tmp_path / "x.tsv"))


def test_moving_shapes_name_what_is_held_out_and_draw_the_same_clip_twice() -> None:
    settings = config("moving-shapes", clips=3, seed=5, image_size=16)
    source = open_source(settings)
    assert len(source) == 3
    assert source.describe()["held_out"]
    once, again = source.load(2, settings), open_source(settings).load(2, settings)
    assert (once.frames == again.frames).all()
    assert once.caption == again.caption
    assert once.provenance["attributes"]
    assert 2 <= len(once.frames) <= 5
    assert open_source(config("moving-shapes", clips=3, seed=6)).describe() != source.describe()


# --- downloads: a server on this machine ---------------------------------------------------------------------------


@dataclass
class Site:
    """A web server of a test, how often each path was asked for, and when."""

    url: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    known = Site()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            known.asked[self.path] += 1
            known.times.append(time.monotonic())
            name, data = self.path, gif_bytes()
            if name in ("/busy", "/closed") and known.asked[name] < 3:
                self.send_response(429)
                self.send_header("Retry-After", "1" if name == "/busy" else "3600")
                self.end_headers()
                return
            if name == "/loop":
                self.send_response(302)
                self.send_header("Location", "/loop")
                self.end_headers()
                return
            if name in ("/drip-header", "/drip"):
                self.wfile.write(b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if name == "/drip" else b"X-Slow: "))
                try:
                    for byte in data * 100:
                        self.wfile.write(bytes([byte]) if name == "/drip" else b"a")
                        time.sleep(0.05)
                except OSError:
                    pass
                return
            if name == "/page":
                data = b"<!DOCTYPE html><p>" + b"x" * 150_000
            if name == "/gone" or (name == "/flaky" and known.asked[name] < 3):
                self.send_error(404 if name == "/gone" else 503)
                return
            if name in ("/redirect", "/escape", "/file"):
                self.send_response(302)
                target = {"/redirect": "/good", "/escape": "http://10.0.0.1/x", "/file": "file:///etc/hostname"}[name]
                self.send_header("Location", target)
                self.end_headers()
                return
            self.send_response(200)
            if name not in ("/endless", "/shut"):
                self.send_header("Content-Length", str(len(data) + (1000 if name == "/cut" else 10**9 if name == "/huge" else 0)))
            self.end_headers()
            if name == "/endless":
                try:
                    while True:
                        self.wfile.write(data * 100)
                except OSError:
                    return
            self.wfile.write(data[:-9] if name == "/shut" and known.asked[name] < 3 else data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    known.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setattr(download, "_BACKOFF_S", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    transport._opener.cache_clear()
    yield known
    server.shutdown()
    server.server_close()


def url_config(site: Site, tmp_path: Path, names: list[str], allow_private: bool = True, captions: str = "a clip") -> PrepareConfig:
    table = tmp_path / "urls.tsv"
    table.write_text("".join(f"{site.url}{name}\t{captions}\n" for name in names))
    fetching = DownloadConfig(timeout_s=2, retries=2, max_bytes=200_000, allow_private=allow_private)
    return config(table, tmp_path / "out", download=fetching)


def test_downloads_retry_give_up_and_are_bounded(site: Site, tmp_path: Path) -> None:
    names = ["/good", "/gone", "/flaky", "/cut", "/huge", "/endless", "/redirect", "/file", "/escape"]
    settings = url_config(site, tmp_path, names)
    fetch_all(settings, range(6))
    found = dict(zip(names, outcomes(url_config(site, tmp_path, names[:8])), strict=False))
    assert {name: what for name, (_, what) in found.items()} == {
        "/good": "a clip",
        "/gone": "dead_link",
        "/flaky": "a clip",
        "/cut": "download_failed",
        "/huge": "too_large",
        "/endless": "too_large",
        "/redirect": "a clip",
        "/file": "download_failed",
    }
    assert site.asked["/flaky"] == 3  # two refusals, and then never again: it was in the cache
    assert site.asked["/good"] == 2  # itself once, once through the redirect
    assert site.asked["/gone"] == 2  # once by each, and no retry
    assert site.asked["/cut"] == 6
    assert not list((tmp_path / "out").rglob("*.tmp"))


def fetch_all(settings: PrepareConfig, rows: range) -> dict[str, str]:
    """Fetch what the rows need; URL -> why it failed."""
    source = open_source(settings)
    with Prefetcher(source.fetcher(settings), Counter(source.urls(rows)), 4) as prefetcher:
        failures = prefetcher.request(source.urls(rows)).result(timeout=60)
    return {url: str(failure) for url, failure in failures.items()}


def test_a_dead_link_is_asked_once_for_all_its_captions_and_files_go_when_no_block_needs_them(site: Site, tmp_path: Path) -> None:
    settings = url_config(site, tmp_path, ["/gone", "/good", "/gone", "/good", "/other", "/other"])
    source = open_source(settings)
    blocks = [source.urls(rows) for rows in (range(4), range(2, 5), range(4, 6))]
    with Prefetcher(source.fetcher(settings), Counter(url for urls in blocks for url in urls), 4) as prefetcher:
        futures = [prefetcher.request(urls) for urls in blocks]
        for future in futures[:2]:
            source.set_failures(future.result(timeout=60))
            for i in (0, 2):
                with pytest.raises(RejectedClip, match="HTTP 404"):
                    source.load(i, settings)
        assert futures[2].result(timeout=60) == {}
        assert site.asked == {"/gone": 1, "/good": 1, "/other": 1}
        kept = []
        for urls in blocks:
            prefetcher.release(urls)
            kept.append(len(list((tmp_path / "out").rglob("*.gif"))))
    assert kept == [2, 1, 0]


def test_a_busy_server_is_obeyed_and_does_not_use_up_the_retries(site: Site, tmp_path: Path) -> None:
    settings = url_config(site, tmp_path, ["/busy", "/closed"])
    settings.download.retries = 0
    failures = fetch_all(settings, range(2))
    assert failures == {f"{site.url}/closed": "download_failed: HTTP 429, which asks to wait 3600 s"}
    assert site.asked == {"/busy": 3, "/closed": 1}
    assert site.times[-1] - site.times[0] >= 2


class Clock:
    """The time module, with sleeps that take no time."""

    def __init__(self) -> None:
        self.slept = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


def test_a_rate_limit_spaces_the_requests_to_a_host(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = url_config(site, tmp_path, [f"/{n}" for n in range(11)])
    settings.download.total_s = 1e6
    for per_host, least in ((0.0, 0), (0.01, 900)):
        clock = Clock()
        monkeypatch.setattr(download, "time", clock)
        settings.out = str(tmp_path / str(per_host))
        settings.download.per_host = per_host
        fetch_all(settings, range(11))
        assert clock.slept >= least
        assert bool(clock.slept) == bool(least)
    assert len(site.times) == 22


def test_a_server_cannot_hold_a_download_by_dripping_or_redirecting(site: Site, tmp_path: Path) -> None:
    names = ["/drip", "/drip-header", "/loop"]
    settings = url_config(site, tmp_path, names)
    settings.download.total_s = 1.0  # each byte comes well within timeout_s
    start = time.monotonic()
    failures = fetch_all(settings, range(3))
    assert time.monotonic() - start < 10
    assert {url.removeprefix(site.url): why for url, why in failures.items()} == {
        "/drip": "download_failed: TimeoutError: the answer was not complete in time (download.total_s)",
        "/drip-header": "download_failed: TimeoutError: the answer was not complete in time (download.total_s)",
        "/loop": "download_failed: HTTP 302, redirected too often",
    }
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_what_is_no_gif_is_left_at_once_and_what_was_cut_without_a_length_is_asked_again(site: Site, tmp_path: Path) -> None:
    settings = url_config(site, tmp_path, ["/page", "/shut"])
    assert fetch_all(settings, range(2)) == {f"{site.url}/page": "not_a_gif: the answer, called no type, begins with b'<!DOCTYPE html><'"}
    assert site.asked == {"/page": 1, "/shut": 3}
    assert [path.read_bytes() for path in (tmp_path / "out").rglob("*.gif")] == [gif_bytes()]


def test_a_full_disk_is_an_error_and_no_rejected_clip(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def full(descriptor: int) -> None:
        if "downloads" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    settings = url_config(site, tmp_path, ["/good", "/gone"])
    settings.workers = 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="No space left on device"):
            prepare(settings)
    assert prepare(settings).rejected == {"dead_link": 1}


def test_private_addresses_are_refused(site: Site, tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "[::1]", "2130706433", "0x7f.1"):
        port = site.url.rpartition(":")[2]
        private = Site(url=f"http://{host}:{port}")
        settings = url_config(private, tmp_path, ["/good"], allow_private=False)
        with pytest.raises(RejectedClip) as caught:
            open_source(settings).load(0, settings)
        assert caught.value.reason == "download_failed", host
        assert "private address" in caught.value.detail, host
    assert not site.asked


def test_a_public_page_cannot_redirect_to_a_private_address(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "is_public", lambda address: address == "127.0.0.1")  # the test's server plays the public one
    settings = url_config(site, tmp_path, ["/escape", "/good"], allow_private=False)
    source = open_source(settings)
    with pytest.raises(RejectedClip, match=r"10\.0\.0\.1 is a private address"):
        source.load(0, settings)
    assert source.load(1, settings).caption == "a clip"


def test_the_table_of_public_addresses() -> None:
    private = ["10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1", "fe80::1%eth0", "fc00::1"]
    private += ["::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::a00:1"]
    assert [address for address in private if transport.is_public(address)] == []
    assert all(transport.is_public(address) for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"))


def test_preparing_a_table_of_urls_fetches_each_once_and_keeps_no_download(site: Site, tmp_path: Path) -> None:
    names = ["/gone"] + [f"/{n % 12}" for n in range(40)] + ["/gone"]  # three blocks, two workers
    settings = url_config(site, tmp_path, names)
    table = Path(settings.source)
    table.write_text("".join(f"{line} {n}\n" for n, line in enumerate(table.read_text().splitlines())))  # a caption each
    settings.workers = 2
    manifest = prepare(settings)
    assert (manifest.total_clips, manifest.rejected) == (40, {"dead_link": 2})
    assert set(site.asked.values()) == {1}
    prepare(settings)
    assert set(site.asked.values()) == {1}
    assert not (tmp_path / "out" / "downloads").exists()
    assert ShardDataset(tmp_path / "out", "raw").read(3)["provenance"]["url"] == f"{site.url}/3"


def test_preparing_needs_no_torch() -> None:
    """Every worker process would spend seconds and hundreds of megabytes on it."""
    code = "import sys, t2v_ds.data.prepare; print([name for name in ('torch', 'av', 'deepspeed') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
