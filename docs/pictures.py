"""Make the pictures of the README from a finished run, with a headless Chromium.

    python docs/pictures.py report runs/quickstart     # docs/pictures/report.png: the first screen of the report
    python docs/pictures.py page                       # docs/pictures/page.png: the page at /, after it has answered

The second command needs a server (`aft-ray serve --config configs/quickstart.yaml`), and both need chromium and
chromedriver: apt-get install chromium chromium-driver fonts-dejavu-core
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.serving.browser import Browser, browser  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
WIDTH = 1000
NUM_COLORS = 64
"""A palette keeps a picture of text below 100 kB, and nobody sees the difference."""


def save(window: Browser, name: str, height: int) -> None:
    """Write what the window shows, from the top of the page, as `docs/pictures/<name>.png`."""
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}
    shot = window.devtools("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    PICTURES.mkdir(exist_ok=True)
    path = PICTURES / f"{name}.png"
    picture.quantize(NUM_COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB")


def report(window: Browser, run: Path, height: int) -> None:
    """Take the top of a run's report."""
    window.open((run / "report" / "report.html").resolve().as_uri(), width=WIDTH, height=height)
    save(window, "report", height)


def page(window: Browser, base_url: str, question: str, height: int) -> None:
    """Ask the page at `/` a question, as a reader would, and take what it shows when the answer is complete."""
    window.open(base_url, width=WIDTH, height=height)
    window.wait(lambda: window.run("return document.getElementById('model').options.length") > 0)
    window.run("document.getElementById('question').focus()")
    window.press(question)
    window.press("Enter", held="Control")
    window.wait(lambda: "Answered in" in window.text("#status"), timeout_s=300)
    window.run("document.activeElement.blur(); scrollTo(0, 0)")
    save(window, "page", min(height, window.run("return document.documentElement.scrollHeight")))


def main() -> None:
    """Read the command line and take one picture."""
    parser = argparse.ArgumentParser(description="Make the pictures of the README.")
    which = parser.add_subparsers(dest="which", required=True)
    of_report = which.add_parser("report", help="the first screen of a run's report")
    of_report.add_argument("run", type=Path, help="run folder, such as runs/quickstart")
    of_report.add_argument("--height", type=int, default=800)
    of_page = which.add_parser("page", help="the page at / of a running server, with an answer")
    of_page.add_argument("--base-url", default="http://127.0.0.1:8000/")
    of_page.add_argument("--question", default="What do bees do for us? Stay within 35 words and use the word flowers.")
    of_page.add_argument("--height", type=int, default=1100)
    arguments = parser.parse_args()
    with browser() as window:
        if arguments.which == "report":
            report(window, arguments.run, arguments.height)
        else:
            page(window, arguments.base_url, arguments.question, arguments.height)


if __name__ == "__main__":
    main()
