"""Open a report in Chromium, on a phone and on a desk, light and dark, and look for what is broken.

``python -m tests.browser [REPORT.html [SHOT.png]]``; a made-up report without arguments. Needs chromium, chromedriver
(`make browser`). Exit code 1 and a list if anything is wrong; screenshots are written beside SHOT.png.
"""

import base64
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from ldm.commands import cli
from ldm.evaluation.page import html
from tests.tiny_evaluation import words, write_place
from tests.tiny_report import tiny_report

WINDOWS = {"phone": (390, 844, "light"), "wide": (1280, 900, "light"), "dark": (1280, 900, "dark")}
SWITCHES = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
LOOK = """
const found = [];
for (const image of document.images)
  if (!image.complete || !image.naturalWidth) found.push('an image is not shown: ' + image.alt);
for (const drawn of document.querySelectorAll('svg')) {
  const box = drawn.getBoundingClientRect();
  if (!box.width || !box.height) found.push('an svg has no box: ' + drawn.outerHTML.slice(0, 80));
}
for (const entry of performance.getEntriesByType('resource'))
  if (!entry.name.startsWith('data:')) found.push('a request: ' + entry.name);
if (document.scripts.length) found.push('a script');
if (innerWidth !== arguments[0]) found.push('a window of ' + innerWidth + ' px, not ' + arguments[0]);
if (document.documentElement.scrollWidth > innerWidth)
  found.push('wider than the window: ' + document.documentElement.scrollWidth + ' of ' + innerWidth + ' px');
return [found, document.images.length, document.querySelectorAll('svg').length, document.documentElement.scrollHeight];
"""


@contextmanager
def driver():
    """A running chromedriver: a function from method, path and body to the answer's value."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ask(method, path, body=None):
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
            return json.load(answer)["value"]

    process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                ask("GET", "/status")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield ask
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def browser(ask):
    """A browser with a profile that knows nothing: the path of its session."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = {"args": [*SWITCHES, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
        logging = {"goog:loggingPrefs": {"browser": "ALL"}}
        wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options, **logging}}
        session = f"/session/{ask('POST', '/session', {'capabilities': wanted})['sessionId']}"
        try:
            yield session
        finally:
            ask("DELETE", session)


def look(ask, session, page, window, shot):
    """What is wrong with `page` in one window, as sentences; writes the whole page to `shot`."""
    width, height, scheme = window

    def chrome(command, **parameters):
        return ask("POST", f"{session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    chrome("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    chrome("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    ask("POST", f"{session}/url", {"url": page.resolve().as_uri()})
    found, images, drawings, tall = ask("POST", f"{session}/execute/sync", {"script": LOOK, "args": [width]})
    found += [entry["message"] for entry in ask("POST", f"{session}/se/log", {"type": "browser"})]
    clip = {"x": 0, "y": 0, "width": width, "height": tall, "scale": 1}
    image = chrome("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
    shot.write_bytes(base64.b64decode(image))
    print(f"{shot}: {width} x {tall} px, {images} images, {drawings} drawings")
    return found


def pages(folder):
    """Write the reports that are looked at if none is named: a made-up one of everything, and a whole evaluation's."""
    made_up = folder / "made-up.html"
    made_up.write_text(html(tiny_report()), encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_place(place)
        more = ["--factors", place / "factors.yaml", "--clip", place / "clip", "--steps_sweep", "1,2"]
        cli.main(words(place, "model", folder / "evaluation", *more))
    return [made_up, folder / "evaluation" / "report.html"]


def main(page=None, shot=None):
    """Look at `page`; the screenshots are `shot`, or lie beside it, with phone, wide or dark before the suffix."""
    folder = Path("out/browser")
    folder.mkdir(parents=True, exist_ok=True)
    wrong = []
    for one in [Path(page)] if page else pages(folder):
        image = Path(shot or one.with_suffix(".png"))
        with driver() as ask, browser(ask) as session:
            for name, window in WINDOWS.items():
                found = look(ask, session, one, window, image.with_stem(f"{image.stem}-{name}"))
                wrong += [f"{one}, {name}: {sentence}" for sentence in found]
    print("\n".join(wrong) or "nothing is wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
