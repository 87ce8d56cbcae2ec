"""What a browser shows is compared with Chromium: without it those tests are not collected."""

from tests import chromium

collect_ignore = [] if chromium.find() else ["test_gif_browser.py"]


def pytest_report_header() -> str:
    return "GIFs in Chromium: tested" if not collect_ignore else "not collected: tests/unit/test_gif_browser.py (no chromium)"
