"""Tables of captions: `file TAB caption` for a folder of GIFs, `url TAB caption` (TGIF) for clips to download.

A bad row is an error with its file and line, not a clip the less: a table that was cut or mixed up is noticed at once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from t2v_ds.errors import DataError


class Row(NamedTuple):
    """A row of a folder or TSV."""

    location: str  # path inside the folder with forward slashes, or URL
    caption: str
    problem: str = ""  # why it has no caption


def _table(path: Path) -> list[tuple[int, list[str]]]:
    """Lines of a TSV as (line number, columns), without blank ones."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    # Only \n ends a line here: str.splitlines() would also cut captions at characters such as U+2028.
    lines = enumerate(text.split("\n"), start=1)
    return [(number, line.rstrip("\r").split("\t")) for number, line in lines if line.strip()]


def _clean(caption: str) -> str:
    return " ".join(caption.split())


def file_rows(path: Path) -> list[Row]:
    """Rows of `file TAB caption`, or of any columns under a header that names `path` or `file`, and `caption`."""
    table = _table(path)
    columns, place, caption = 2, 0, 1
    if table:
        header = [name.strip().lower() for name in table[0][1]]
        names = [name for name in ("path", "file", "filename") if name in header]
        if names and "caption" in header:
            columns, place, caption = len(header), header.index(names[0]), header.index("caption")
            table = table[1:]
    rows = []
    for number, cells in table:
        if len(cells) != columns:
            raise DataError(f"{path} line {number} has {len(cells)} columns instead of {columns}: {_excerpt(cells)}")
        location = PurePosixPath(cells[place].strip())
        if location.is_absolute() or ".." in location.parts or not location.name:
            raise DataError(f"{path} line {number} names '{location}'; expected a path inside the folder of GIFs")
        rows.append(Row(str(location), _clean(cells[caption])))
    return rows


def url_rows(path: Path) -> list[Row]:
    """Rows of `url TAB caption`."""
    rows = []
    for number, cells in _table(path):
        if number == 1 and [cell.strip().lower() for cell in cells] == ["url", "caption"]:
            continue
        if len(cells) != 2:
            raise DataError(f"{path} line {number} has {len(cells)} columns instead of 2 (url TAB caption): {_excerpt(cells)}")
        url = cells[0].strip()
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"\s", url)
        except ValueError:
            good = False
        if not good:
            raise DataError(f"{path} line {number} names '{url[:100]}'; expected an http or https URL")
        rows.append(Row(url, _clean(cells[1])))
    if not rows:
        raise DataError(f"{path} holds no row of url TAB caption")
    return rows


def _excerpt(cells: list[str]) -> str:
    return json.dumps("\t".join(cells)[:80], ensure_ascii=False)
