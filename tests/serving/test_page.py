"""The page at `/` in a real browser, on desktop and phone: what it shows, also by keyboard, and what it never does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

import httpx
import pytest

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.inference.plan import Plan
from tests.serving.browser import CHROMIUM, DRIVER, MISSING, Browser, browser
from tests.serving.local_server import serving
from tests.serving.test_ingress import service_over

HOSTILE = 'Nile. <img src=x onerror="document.title=1"> <script>document.title = 2</script> & so on'
PLAIN = "The Niger, the Congo and the Orange River, from west to south. All three reach the Atlantic Ocean."
NEEDS_CHROMIUM = pytest.mark.skipif(DRIVER is None or CHROMIUM is None, reason=MISSING)
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """Serve answers of markup and of plain text, 20 ms per word; the fourth sample of each layer fails."""
    engine = ScriptedEngine(ScriptedEngineConfig(answers=(HOSTILE, PLAIN), seconds_per_token=0.02, fail_on=(3,)))
    with serving(service_over(engine, Plan(num_proposals=4, num_layers=2), adapters={"aft": "/adapters/aft"})) as url:
        yield url


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as window:
        yield window


def ask(window: Browser, question: str = "Name three rivers in Africa.") -> None:
    """Ask a question with the keyboard only."""
    window.wait(lambda: window.run("return document.getElementById('model').options.length") > 0)
    window.run("document.getElementById('question').focus()")
    window.press(question)
    window.press("Enter", held="Control")
    window.wait(lambda: not window.run("return document.getElementById('run').hidden"))


def is_answered(window: Browser) -> bool:
    return "Answered in" in window.text("#status")


def texts(window: Browser, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
    return list(window.run(script, selector))


@NEEDS_CHROMIUM
def test_a_question_shows_its_drafts_its_layers_its_answer_and_what_they_cost(window: Browser, site: str) -> None:
    window.open(site)
    ask(window)
    window.wait(lambda: is_answered(window))
    assert texts(window, "#drafts h2") == ["Drafts", "Aggregations, layer 1"]
    assert len(texts(window, "#drafts .card")) == 8
    assert texts(window, "#drafts .card .text")[:2] == [HOSTILE, PLAIN]
    assert texts(window, "#drafts .failed .facts") == ["failed: engine error"] * 2
    assert window.text("#answer") == HOSTILE
    rows = [row.split("|") for row in window.run(
        "return [...document.querySelectorAll('#usage-rows tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent).join('|'))"
    )]  # fmt: skip
    assert [row[0] for row in rows] == ["Drafts", "Aggregations, layer 1", "Final answer", "All"]
    assert [row[1:3] for row in rows] == [["3", "1"], ["3", "1"], ["1", "0"], ["7", "2"]]
    assert all(float(row[-1]) > 0 for row in rows)


@NEEDS_CHROMIUM
def test_what_the_model_writes_stays_text_and_the_browser_has_nothing_to_complain_of(
    window: Browser, site: str
) -> None:
    window.open(site)
    window.console()
    ask(window, "<b>bold</b>")
    window.wait(lambda: is_answered(window))
    assert window.run("return document.title") == "aft_ray"
    assert window.run("return document.querySelectorAll('img, main script, main b').length") == 0
    assert window.console() == []


@NEEDS_CHROMIUM
def test_drafts_come_before_the_answer_which_grows(window: Browser, site: str) -> None:
    window.open(site)
    window.run(
        "window.seen = []; new MutationObserver(() => window.seen.push("
        "[document.querySelectorAll('#drafts .text').length, document.getElementById('answer').textContent.length]"
        ")).observe(document.querySelector('main'), {subtree: true, childList: true, characterData: true})"
    )
    ask(window)
    window.wait(lambda: is_answered(window))
    seen = window.run("return window.seen")
    assert any(0 < drafts < 8 and length == 0 for drafts, length in seen)
    assert all(drafts == 8 for drafts, length in seen if length)
    assert len({length for _, length in seen}) > 4


@NEEDS_CHROMIUM
def test_every_setting_is_reached_and_changed_by_keyboard(window: Browser, site: str) -> None:
    window.open(site)
    window.wait(lambda: window.run("return document.getElementById('model').options.length") == 2)
    window.run("document.getElementById('question').focus()")
    reached = []
    for _ in range(5):
        window.press("Tab")
        reached.append(window.run("return document.activeElement.id"))
        if reached[-1] in {"proposals", "layers"}:
            window.press("ArrowLeft")
            assert window.run("return document.activeElement.matches(':focus-visible')")
    assert reached == ["model", "proposals", "layers", "key", "submit"]
    assert (window.text("#proposals-value"), window.text("#layers-value")) == ("3", "1")
    assert window.text("#cost") == "4 answers are written."


@NEEDS_CHROMIUM
def test_controls_have_labels_and_news_is_announced(window: Browser, site: str) -> None:
    window.open(site)
    script = "return [...document.querySelectorAll('input, select, textarea')].map((node) => node.labels.length)"
    assert window.run(script) == [1] * 5
    assert window.run("return document.getElementById('status').getAttribute('aria-live')") == "polite"
    assert window.run("return document.getElementById('error').getAttribute('role')") == "alert"


@NEEDS_CHROMIUM
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_it_all_without_scrolling_sideways(window: Browser, site: str, dark: bool) -> None:
    window.open(site, **PHONE, dark=dark)
    ask(window)
    window.wait(lambda: is_answered(window))
    assert window.run("return document.documentElement.scrollWidth <= window.innerWidth")
    heights = (
        "return [...document.querySelectorAll('button, input, select')].map((n) => n.getBoundingClientRect().height)"
    )
    assert all(height >= 44 for height in window.run(heights))
    background = window.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(21, 24, 27)" if dark else "rgb(251, 251, 250)")


@NEEDS_CHROMIUM
def test_a_run_can_be_stopped(window: Browser, site: str) -> None:
    window.open(site)
    ask(window)
    window.run("document.getElementById('stop').click()")
    window.wait(lambda: window.text("#status") == "Stopped.")
    assert not window.run("return document.getElementById('submit').disabled")


@NEEDS_CHROMIUM
def test_an_error_is_shown_as_the_server_says_it(window: Browser) -> None:
    engine = ScriptedEngine(ScriptedEngineConfig(fail_requests=True))
    with serving(service_over(engine, Plan(num_layers=0))) as url:
        window.open(url)
        ask(window)
        window.wait(lambda: "scripted failure" in window.text("#error"))
        assert not window.run("return document.getElementById('error').hidden")


@NEEDS_CHROMIUM
def test_a_key_is_asked_for_works_and_is_kept_nowhere(window: Browser, split_url: str) -> None:
    window.open(f"{split_url}/")
    window.wait(lambda: "needs an API key" in window.text("#status"))
    window.run("document.getElementById('key').focus()")
    window.press("key-two", "Tab")
    ask(window)
    window.wait(lambda: is_answered(window))
    assert window.text("#answer") == "written by the aggregator"
    kept = "return JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    assert "key-two" not in window.run(kept)


def test_the_page_and_its_parts_come_with_a_strict_policy(site: str) -> None:
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        response = httpx.get(site + path)
        assert response.headers["content-type"].startswith(kind)
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy


@pytest.mark.parametrize("name", ["index.html", "page.css", "page.js"])
def test_the_page_names_nothing_outside_and_writes_no_html(name: str) -> None:
    text = (files("aft_ray.serving.http") / "page" / name).read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("// ", ""))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Storage|cookie", text)
