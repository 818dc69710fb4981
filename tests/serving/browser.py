"""A headless Chromium, driven over the WebDriver protocol. That is plain HTTP, so no library is needed."""

from __future__ import annotations

import base64
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from aft_ray.serving.app import free_port

DRIVER, CHROMIUM = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
MISSING = "no chromium and chromedriver on PATH: apt-get install chromium chromium-driver"
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--force-color-profile=srgb"]
KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Control": "\ue009", "ArrowRight": "\ue014", "ArrowLeft": "\ue012"}


class Browser:
    """One browser window."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=120)
        options = {"args": ARGUMENTS, "binary": CHROMIUM}
        capabilities = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._send("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{session['sessionId']}"

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        value = self._client.request(method, path, json=body).json()["value"]
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"{value['error']}: {value['message']}")
        return value

    def _do(self, path: str, **body: Any) -> Any:
        return self._send("POST", self._session + path, body)

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page in a viewport of this size."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        self._do("/url", url=url)

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._do("/goog/cdp/execute", cmd=command, params=parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script and return its value."""
        return self._do("/execute/sync", script=script, args=list(arguments))

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def press(self, *keys: str, held: str | None = None) -> None:
        """Type keys one after the other: names of `KEYS`, or text."""
        actions = [{"type": "keyDown", "value": KEYS[held]}] if held else []
        for key in keys:
            for value in [KEYS[key]] if key in KEYS else key:
                actions += [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
        if held:
            actions.append({"type": "keyUp", "value": KEYS[held]})
        self._do("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def wait(self, condition: Callable[[], bool], timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"still not true after {timeout_s} s; console: {self.console()}"
            time.sleep(0.05)

    def console(self) -> list[str]:
        """Return the browser's warnings and errors since the last call."""
        return [entry["message"] for entry in self._do("/se/log", type="browser")]

    def screenshot(self, path: Path) -> None:
        """Return a picture of the whole page, not only of the visible part."""
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._send("DELETE", self._session)
        self._client.close()


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser and end it afterwards."""
    assert DRIVER is not None and CHROMIUM is not None, MISSING
    port = free_port("127.0.0.1")
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"{url}/status").json()["value"]["ready"]:
                    break
            except httpx.HTTPError:
                assert time.monotonic() < end, "chromedriver does not answer"
            time.sleep(0.1)
        window = Browser(url)
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait()
