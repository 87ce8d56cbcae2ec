"""What a Chromium, without a window, shows of GIFs on a white page.

    GIFs -> a local server -> a page decodes them with the browser's own decoder (ImageDecoder), draws each frame on a white canvas
         -> posts the pixels back

The server is there because a page needs a secure context for ImageDecoder: 127.0.0.1 is one, a file is not.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

PAGE = """<!doctype html><script>
async function show(bytes) {  // 4 bytes width, height, frames, and for each frame 4 bytes of milliseconds and RGBA pixels
  const decoder = new ImageDecoder({data: bytes, type: "image/gif"});
  await decoder.tracks.ready;
  await decoder.completed;
  const count = decoder.tracks.selectedTrack.frameCount, parts = [];
  let width = 0, height = 0;
  for (let n = 0; n < count; ++n) {
    const image = (await decoder.decode({frameIndex: n, completeFramesOnly: true})).image;
    width = image.displayWidth; height = image.displayHeight;
    const canvas = new OffscreenCanvas(width, height), page = canvas.getContext("2d", {willReadFrequently: true});
    page.fillStyle = "white";
    page.fillRect(0, 0, width, height);
    page.drawImage(image, 0, 0);
    parts.push(new Uint32Array([(image.duration ?? 0) / 1000]), page.getImageData(0, 0, width, height).data);
    image.close();
  }
  return new Blob([new Uint32Array([width, height, count]), ...parts]);
}
(async () => {
  for (let n = 0; n < COUNT; ++n) {
    try {
      const body = await show(await (await fetch("/gif/" + n)).arrayBuffer());
      await fetch("/shown/" + n, {method: "POST", body});
    } catch (error) {
      await fetch("/failed/" + n, {method: "POST", body: String(error)});
    }
  }
})();
</script>"""


@dataclass(frozen=True)
class Shown:
    """Frames [T, H, W, 3] uint8 and how long each is shown; or why nothing is."""

    frames: np.ndarray
    durations_ms: list[int]
    error: str = ""


def find() -> str | None:
    """The program, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


def show(gifs: Sequence[bytes], timeout_s: float = 60.0) -> list[Shown]:
    """What the browser shows of each; waits at most `timeout_s` for the next one."""
    program = find()
    if program is None:
        raise RuntimeError("there is no chromium")
    answers: queue.Queue[tuple[int, Shown]] = queue.Queue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(gifs, answers))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--force-color-profile=srgb", "--no-first-run"]
        url = f"http://127.0.0.1:{server.server_port}/"
        browser = subprocess.Popen(
            [program, *flags, f"--user-data-dir={home}", "--remote-debugging-port=0", url],  # the port keeps it running
            env={**os.environ, "HOME": home}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            shown = dict(answers.get(timeout=timeout_s) for _ in gifs)
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
            server.shutdown()
            server.server_close()
    return [shown[n] for n in range(len(gifs))]


def _handler(gifs: Sequence[bytes], answers: queue.Queue[tuple[int, Shown]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                self._answer(PAGE.replace("COUNT", str(len(gifs))).encode(), "text/html")
            elif self.path.startswith("/gif/"):
                self._answer(gifs[int(self.path[5:])], "image/gif")
            else:
                self.send_error(404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            _, kind, number = self.path.split("/")
            failed = Shown(np.empty((0, 0, 0, 3), dtype=np.uint8), [], body.decode(errors="replace"))
            self._answer(b"", "text/plain")
            answers.put((int(number), _unpack(body) if kind == "shown" else failed))

        def _answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _unpack(body: bytes) -> Shown:
    width, height, count = np.frombuffer(body, dtype="<u4", count=3)
    rows = np.frombuffer(body, dtype=np.uint8, offset=12).reshape(count, 4 + 4 * width * height)
    durations = rows[:, :4].copy().view("<u4")[:, 0].tolist()
    return Shown(rows[:, 4:].reshape(count, height, width, 4)[..., :3].copy(), durations)
