"""Data at URLs: fetched once, checked, shared by processes, within its limit, and right after anything that breaks on the way."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec
import pytest

from t2v_ds.data import remote
from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.disk_cache import DiskCache, own, share
from t2v_ds.data.manifest import MANIFEST, Manifest, ShardInfo
from t2v_ds.data.remote import CachedFolder, LocalFolder, open_folder
from t2v_ds.data.shards import write_shard
from t2v_ds.data.stream import ClipStream, whole_codes
from t2v_ds.errors import ConfigError, DataError
from tests import fault_cases as cases
from tests.helpers import finish, start

SHARDS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "tokens"
    folder.mkdir()
    shards = []
    for number in range(SHARDS):
        arrays = [cases.make_clip(4 * number + i, "tokens", side=cases.LARGE) for i in range(4)]
        samples = [(f"{number}{i}", cases.token_members(a, f"caption {number} {i}", [50] * len(a), {})) for i, a in enumerate(arrays)]
        shards.append(write_shard(folder / f"tokens-{number:05d}.tar", samples))
    Manifest.build("tokens", shards, grid_size=cases.LARGE, codebook_size=64, tokenizer_id="t").save(folder)
    return folder


class Files:
    """The files of a folder as a file system far away: counts what is fetched, and fails as it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: list[tuple[str, int]] = []  # name, first byte read
        self.fetched: Counter[str] = Counter()  # bytes
        self.read: Callable[[str, bytes, int], bytes] = lambda name, data, place: data  # what arrives instead of `data`
        self.can_seek = True

    def cat_file(self, path: str) -> bytes:
        name = path.removeprefix("root/")
        data = self.read(name, (self.folder / name).read_bytes(), 0)
        self.fetched[name] += len(data)
        return data

    def open(self, path: str, mode: str) -> Any:
        assert mode == "rb"
        files, name = self, path.removeprefix("root/")

        class File(io.BytesIO):
            def seek(self, place: int, whence: int = 0) -> int:
                if not files.can_seek:
                    raise ValueError("Cannot seek streaming HTTP file")
                return super().seek(place, whence)

            def read(self, size: int | None = -1) -> bytes:
                if not files.opened or files.opened[-1][0] != name or self not in files_open:
                    files_open.append(self)
                    files.opened.append((name, self.tell()))
                place = self.tell()
                data = files.read(name, super().read(min(size or 0, 4096)), place)
                files.fetched[name] += len(data)
                return data

        files_open: list[Any] = []
        return File((self.folder / name).read_bytes())


@pytest.fixture
def files(source: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    files = Files(source)
    monkeypatch.setattr(remote, "_file_system", lambda url: (files, "root"))
    return files


def cached(tmp_path: Path, cache_bytes: int = 2**30, retries: int = 3) -> CachedFolder:
    folder = open_folder("far://root", tmp_path / "cache", cache_bytes, retries, backoff_s=0.001)
    assert isinstance(folder, CachedFolder)
    return folder


def infos(source: Path) -> list[ShardInfo]:
    return Manifest.load(source).shards


def take(folder: CachedFolder, shard: ShardInfo) -> Path:
    return folder.path(shard.name, shard.bytes, shard.sha256)


def is_right(path: Path, source: Path) -> bool:
    return path.read_bytes() == (source / path.name).read_bytes()


def kept(tmp_path: Path) -> list[str]:
    """Shards in the cache, and files that should not be there."""
    names = [path.name for path in (tmp_path / "cache").glob("*/*") if not path.name.endswith(".index.json") and path.name != MANIFEST]
    return sorted(names)


# --- where data may lie -----------------------------------------------------------------------------------------------


def test_a_path_is_used_as_it_is(source: Path, tmp_path: Path) -> None:
    folder = open_folder(source, tmp_path / "cache")
    assert isinstance(folder, LocalFolder)
    shard = infos(source)[0]
    assert folder.path(shard.name, shard.bytes, shard.sha256) == source / shard.name
    assert folder.folder == source
    assert folder.open_limit is None
    folder.release(shard.name)
    folder.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_any_file_system_of_fsspec_becomes_a_folder_that_reads_the_same(scheme: str, source: Path, tmp_path: Path) -> None:
    url = f"file://{source}"
    if scheme == "memory":
        url = f"memory://{tmp_path.name}/data"
        for path in source.iterdir():
            fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/data/{path.name}", path.read_bytes())
    with open_folder(url, tmp_path / "cache") as folder:  # type: ignore[union-attr]
        names = sorted(path.name for path in folder.folder.iterdir())
        assert names == sorted([MANIFEST, *(path.name for path in source.glob("*.index.json"))])  # shards come when they are needed
        for shard in infos(source):
            take(folder, shard)
        with ShardDataset(folder.folder, "tokens") as here, ShardDataset(source, "tokens") as there:
            assert here.digest == there.digest
            assert all((here.read(i)["codes"] == there.read(i)["codes"]).all() for i in range(len(there)))


def test_what_cannot_be_opened_is_one_sentence(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"class": "no_such_package.FileSystem", "err": "Install no_such_package to read far://"}
    monkeypatch.setitem(import_module("fsspec.registry").known_implementations, "far", missing)
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="far://x/y needs a package that is not installed: Install no_such_package"):
        open_folder("far://x/y", cache)
    with pytest.raises(DataError, match=r"nothing://x cannot be read .*allowed: a path, s3://"):
        open_folder("nothing://x", cache)
    with pytest.raises(DataError, match=r"file://.*nowhere/manifest\.json is missing: check the URL"):
        open_folder(f"file://{source}/nowhere", cache)
    with pytest.raises(ConfigError, match=r"set cache\.folder"):
        open_folder(f"file://{source}")
    largest = max(shard.bytes for shard in infos(source))
    with pytest.raises(ConfigError, match=f"'cache.max_bytes' is {largest - 1}; allowed: at least {largest}"):
        open_folder(f"file://{source}", cache, largest - 1)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"'cache\.folder' is .*file, which cannot be made"):
        open_folder(f"file://{source}", tmp_path / "file")


def test_small_files_are_fetched_once(files: Files, source: Path, tmp_path: Path) -> None:
    folder = cached(tmp_path)
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "config.json").write_text("{}")
    for _ in range(2):
        assert folder.fetch("tokenizer/config.json").read_text() == "{}"
    assert files.fetched["tokenizer/config.json"] == 2
    with pytest.raises(DataError, match="tokenizer/weights is missing"):
        folder.fetch("tokenizer/weights")
    (source / "tokenizer" / "config.json").unlink()
    (source / "tokenizer").rmdir()


# --- what breaks on the way -------------------------------------------------------------------------------------------


def test_shards_are_fetched_once(files: Files, source: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with cached(tmp_path) as folder:
            assert all(is_right(take(folder, shard), source) for shard in infos(source))
    assert all(files.fetched[shard.name] == shard.bytes for shard in infos(source))
    assert all(files.fetched[path.name] == path.stat().st_size for path in source.glob("*.index.json"))
    assert kept(tmp_path) == [shard.name for shard in infos(source)]


def test_a_connection_that_breaks_goes_on_where_it_was(files: Files, source: Path, tmp_path: Path) -> None:
    broken: Counter[str] = Counter()

    def read(name: str, data: bytes, place: int) -> bytes:
        if name.endswith(".tar") and place >= 8192 and broken[name] < 2:
            broken[name] += 1
            raise ConnectionResetError("reset by peer")
        return data

    files.read = read
    folder, shard = cached(tmp_path), infos(source)[0]
    assert is_right(take(folder, shard), source)
    assert files.opened == [(shard.name, 0), (shard.name, 8192), (shard.name, 8192)]
    assert files.fetched[shard.name] == shard.bytes  # nothing twice
    assert kept(tmp_path) == [shard.name]


def test_an_answer_that_ends_early_goes_on_where_it_was(files: Files, source: Path, tmp_path: Path) -> None:
    is_first = True

    def read(name: str, data: bytes, place: int) -> bytes:
        nonlocal is_first
        if name.endswith(".tar") and place >= 4096 and is_first:
            is_first = False
            return b""
        return data

    files.read = read
    folder, shard = cached(tmp_path), infos(source)[1]
    assert is_right(take(folder, shard), source)
    assert files.opened == [(shard.name, 0), (shard.name, 4096)]


def test_a_server_that_gives_whole_files_only_is_asked_again_for_all(files: Files, source: Path, tmp_path: Path) -> None:
    files.can_seek = False
    test_breaks = iter([True])

    def read(name: str, data: bytes, place: int) -> bytes:
        if name.endswith(".tar") and place >= 4096 and next(test_breaks, False):
            raise TimeoutError
        return data

    files.read = read
    shard = infos(source)[0]
    assert is_right(take(cached(tmp_path), shard), source)
    assert files.fetched[shard.name] == shard.bytes + 4096


def test_an_end_to_trying(files: Files, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, shard = cached(tmp_path, retries=2), infos(source)[0]

    def fail(name: str, data: bytes, place: int) -> bytes:
        raise TimeoutError("no byte for 20 s")

    files.read = fail
    said = r"far://root/tokens-00000\.tar could not be fetched in 3 attempts; the last: TimeoutError: no byte for 20 s"
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match=said):
        take(folder, shard)
    assert [record.message.rpartition("; ")[2] for record in caplog.records] == ["trying again in 0.001 s", "trying again in 0.002 s"]
    files.read = lambda name, data, place: data
    assert is_right(take(folder, shard), source)  # an error is not remembered
    (tmp_path / "other").mkdir()
    files.folder = tmp_path / "other"
    caplog.clear()
    with pytest.raises(DataError, match=r"tokens-00001\.tar is missing"):
        take(folder, infos(source)[1])
    assert caplog.records == []  # what is missing is not asked for again


@pytest.mark.parametrize("times", [1, 9])
@pytest.mark.parametrize("what", ["flipped", "longer", "endless"])
def test_wrong_bytes_are_never_used(times: int, what: str, files: Files, source: Path, tmp_path: Path) -> None:
    left = times

    def read(name: str, data: bytes, place: int) -> bytes:
        nonlocal left
        assert files.fetched[name] < 10**6, "it would go on for ever"
        if not name.endswith(".tar") or not left:
            return data
        if what == "endless":
            left -= place == 40960
            return b"x" * 4096
        if place == 4096:
            left -= 1
            return data + b"x" if what == "longer" else bytes([data[0] ^ 1]) + data[1:]
        return data

    files.read = read
    folder, shard = cached(tmp_path), infos(source)[0]
    if times == 1:
        assert is_right(take(folder, shard), source)
    else:
        with pytest.raises(DataError, match=r"in 4 attempts; the last: .*its size or sha256 is not what manifest\.json says"):
            take(folder, shard)
        assert kept(tmp_path) == [f".{shard.name}.part"]
        assert (folder.folder / f".{shard.name}.part").stat().st_size == 0


def test_indexes_are_checked_when_they_come_and_when_they_are_there(files: Files, source: Path, tmp_path: Path) -> None:
    left = 1

    def read(name: str, data: bytes, place: int) -> bytes:
        nonlocal left
        if name == "tokens-00002.index.json" and left:
            left -= 1
            return data[:-5]
        return data

    files.read = read
    folder = cached(tmp_path)
    path = folder.folder / "tokens-00002.index.json"
    path.write_bytes(path.read_bytes()[:-1])
    cached(tmp_path)
    assert is_right(path, source)
    left = 99
    path.unlink()
    with pytest.raises(DataError, match=r"tokens-00002\.index\.json could not be fetched.*not the one that manifest\.json names"):
        cached(tmp_path)


def test_a_shard_that_was_cut_here_is_fetched_again(files: Files, source: Path, tmp_path: Path) -> None:
    shard = infos(source)[0]
    with cached(tmp_path) as folder:
        os.truncate(take(folder, shard), 100)
    with cached(tmp_path) as folder:
        assert is_right(take(folder, shard), source)


def test_a_full_disk_is_said_at_once(files: Files, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, shard = cached(tmp_path), infos(source)[0]
    with pytest.raises(OSError, match="File too large"), cases.full_disk(8192):
        take(folder, shard)
    assert caplog.records == []
    assert is_right(take(folder, shard), source)


def test_data_that_was_made_again_is_another_folder(files: Files, source: Path, tmp_path: Path) -> None:
    with cached(tmp_path) as old:
        take(old, infos(source)[0])
        files.read = lambda name, data, place: data.replace(b'"tokenizer_id": "t"', b'"tokenizer_id": "u"')
        with cached(tmp_path) as new:
            assert new.folder != old.folder
            assert Manifest.load(new.folder).tokenizer_id == "u"
            assert Manifest.load(old.folder).tokenizer_id == "t"


# --- the limit --------------------------------------------------------------------------------------------------------


def test_the_longest_unused_go_and_none_in_use(files: Files, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = infos(source)
    assert len({shard.bytes for shard in shards}) == 1
    folder = cached(tmp_path, 2 * shards[0].bytes)
    assert folder.open_limit == 2

    def use(number: int) -> None:
        take(folder, shards[number])
        folder.release(shards[number].name)
        time.sleep(0.02)  # the clock of the file system is coarse

    for number in (0, 1, 0, 2):
        use(number)
    assert kept(tmp_path) == [shards[0].name, shards[2].name]
    first = take(folder, shards[0])
    for number in (1, 2, 3, 1):
        use(number)
    assert kept(tmp_path) == [shards[0].name, shards[1].name]
    assert is_right(first, source)
    take(folder, shards[1])
    assert caplog.records == []
    with cached(tmp_path, 2 * shards[0].bytes) as another:  # as another process: locks are those of open files
        take(another, shards[2])
        assert "over its limit" in caplog.text
        assert kept(tmp_path) == [shard.name for shard in shards[:3]]
    folder.close()
    use(3)
    assert len(kept(tmp_path)) == 2


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (3, 0, 5, 1, 4, 2)])
def test_files_go_in_the_order_of_their_last_use(order: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for place, number in enumerate(order):
        path = tmp_path / "data" / f"{number}.tar"
        path.write_bytes(bytes(10))
        os.utime(path, ns=(0, place * 10**9))
    for left in (4, 3, 1):
        DiskCache(tmp_path, 10 * left + 5).make_room(5)
        assert {int(path.stem) for path in tmp_path.glob("data/*.tar")} == set(order[6 - left :])


def test_a_file_that_goes_before_it_is_locked_is_not_taken_for_the_one_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lock = tmp_path / "x.tar", fcntl.flock
    happens: list[Callable[[], Any]] = []

    def flock(descriptor: int, operation: int) -> None:
        if happens:
            happens.pop()()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    for take_lock in (share, own):
        path.touch()
        happens.append(path.unlink)
        assert take_lock(path) is None
    path.touch()
    happens.append(lambda: path.rename(tmp_path / "renamed"))  # a shard that is whole now
    assert own(path) is None
    path.touch()
    happens.append(lambda: (path.unlink(), path.touch()))
    assert own(path) is None


def test_a_shard_that_another_has_just_fetched_is_not_fetched_again(files: Files, source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    shard = infos(source)[0]
    with cached(tmp_path) as first, cached(tmp_path) as second:
        take(first, shard)
        too_early = iter([True])  # the second looks, then the first is done
        monkeypatch.setattr(remote, "share", lambda path: None if next(too_early, False) else share(path))
        assert is_right(take(second, shard), source)
    assert files.fetched[shard.name] == shard.bytes
    assert kept(tmp_path) == [shard.name]


def test_threads_share_and_evict_without_an_error(files: Files, source: Path, tmp_path: Path) -> None:
    shards = infos(source)
    with cached(tmp_path) as folder:
        results: list[bool] = []
        run_threads(8, lambda n: results.extend(is_right(take(folder, shards[(n + i) % SHARDS]), source) for i in range(SHARDS)))
        assert results == [True] * 8 * SHARDS
    assert all(files.fetched[shard.name] == shard.bytes for shard in shards)
    wrong: list[str] = []

    def churn(n: int) -> None:
        with cached(tmp_path, 2 * shards[0].bytes) as mine:
            for i in range(12):
                shard = shards[(n * 3 + i * (n + 1)) % SHARDS]
                if not is_right(take(mine, shard), source):
                    wrong.append(shard.name)
                mine.release(shard.name)

    run_threads(4, churn)
    assert wrong == []
    assert not [name for name in kept(tmp_path) if name.startswith(".")]


def run_threads(count: int, work: Callable[[int], Any]) -> None:
    failed: list[BaseException] = []

    def run(n: int) -> None:
        try:
            work(n)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert not any(thread.is_alive() for thread in threads)


# --- processes --------------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
from pathlib import Path
from t2v_ds.data import remote
from t2v_ds.data.manifest import Manifest

source, cache, log, pause = sys.argv[1:]
fetch = remote.CachedFolder._fetch

def logged(self, path, part, size, sha256):
    with open(log, "a") as file:
        file.write(f"{path.name} {part.seek(0, 2)}\\n")
    fetch(self, path, part, size, sha256)

remote.CachedFolder._fetch = logged
remote._CHUNK = 1024
file_system = remote._file_system

def slow(url):
    files, root = file_system(url)
    open_ = files.open
    def opened(*args):
        file = open_(*args)
        read = file.read
        class Slow:
            seek = file.seek
            def __enter__(self): return self
            def __exit__(self, *_): file.close()
            def read(self, size=-1):
                time.sleep(float(pause) if size > 0 else 0)
                return read(size)
        return Slow()
    files.open = opened
    return files, root

remote._file_system = slow
folder = remote.open_folder(f"file://{source}", cache)
print("ready", flush=True)
for shard in Manifest.load(folder.folder).shards:
    path = folder.path(shard.name, shard.bytes, shard.sha256)
    assert path.read_bytes() == Path(source, shard.name).read_bytes()
print("done")
"""


def child(source: Path, tmp_path: Path, pause: float) -> subprocess.Popen[str]:
    return start(["-c", CHILD, str(source), str(tmp_path / "cache"), str(tmp_path / "log"), str(pause)])


def logged(tmp_path: Path) -> Iterator[tuple[str, int]]:
    for line in (tmp_path / "log").read_text().splitlines():
        name, _, place = line.partition(" ")
        yield name, int(place)


def test_processes_that_start_at_once_fetch_each_shard_once(source: Path, tmp_path: Path) -> None:
    results = finish([child(source, tmp_path, 0.002) for _ in range(3)], 60)
    assert [(code, output.splitlines()[-1]) for code, output in results] == [(0, "done")] * 3
    assert sorted(logged(tmp_path)) == [(shard.name, 0) for shard in infos(source)]


def test_a_killed_process_blocks_nobody_and_its_bytes_are_used(source: Path, tmp_path: Path) -> None:
    process = child(source, tmp_path, 0.02)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    part = None
    deadline = time.monotonic() + 30
    while part is None or part.stat().st_size < 12_000:
        assert time.monotonic() < deadline
        time.sleep(0.005)
        part = next((tmp_path / "cache").glob("*/.tokens-00000.tar.part"), None)
    process.send_signal(signal.SIGKILL)
    finish([process])
    [(code, output)] = finish([child(source, tmp_path, 0)], 60)
    assert (code, output) == (0, "ready\ndone\n")
    places = dict(logged(tmp_path))  # the last of each shard
    assert places.pop("tokens-00000.tar") >= 12_000
    assert set(places.values()) == {0}


@pytest.mark.parametrize("room", [1, 2, 10])
def test_a_stream_of_it_is_that_of_the_folder(source: Path, tmp_path: Path, room: int) -> None:
    """With room for fewer shards than the data set has, too."""
    folder = open_folder(f"file://{source}", tmp_path / "cache", room * infos(source)[0].bytes)
    with (
        ShardDataset(folder, "tokens") as remote,
        ShardDataset(source, "tokens") as local,
        ClipStream(remote, 1, seed=3, threads=2, load=whole_codes) as found,
        ClipStream(local, 1, seed=3, threads=0, load=whole_codes) as wanted,
    ):
        for _ in range(64):
            mine, theirs = next(found), next(wanted)
            assert (mine["codes"] == theirs["codes"]).all()
            assert mine["keys"] == theirs["keys"]
        remote.verify()
    assert len(kept(tmp_path)) <= room + 2  # what is in use is never removed
