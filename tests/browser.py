"""A headless Chromium, driven over HTTP through chromedriver: what a page looks like and does in a real browser."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


class Browser:
    """One window of a session."""

    def __init__(self, address: str) -> None:
        self._address = address

    def _ask(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self._address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def devtools(self, command: str, **settings: Any) -> Any:
        return self._ask("goog/cdp/execute", cmd=command, params=settings)

    def open(self, path: Path, *, width: int, dark: bool = False, media: str = "", scripts: bool = True) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.devtools("Emulation.setScriptExecutionDisabled", value=not scripts)
        self._ask("url", url=path.resolve().as_uri())

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        return self._ask("execute/sync", script=f"return {expression};", args=[])

    def console(self) -> list[str]:
        """Warnings and errors since the last look."""
        return [entry["message"] for entry in self._ask("se/log", type="browser")]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last look; data that are in the page are not asked for."""
        entries = [json.loads(entry["message"])["message"] for entry in self._ask("se/log", type="performance")]
        found = [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]
        return [address for address in found if not address.startswith("data:")]

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        found = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(found["data"])


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser of its own, with an empty folder for its profile."""
    assert CHROMIUM is not None and DRIVER is not None
    driver = subprocess.Popen(
        [DRIVER, "--port=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"HOME": str(profile)},
    )
    try:
        assert driver.stdout is not None
        port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
        base = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*QUIET, f"--user-data-dir={profile / 'chromium'}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        wanted["goog:loggingPrefs"] = {"browser": "ALL", "performance": "ALL"}
        body = json.dumps({"capabilities": {"alwaysMatch": wanted}}).encode()
        request = urllib.request.Request(base, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            session = f"{base}/{json.load(answer)['value']['sessionId']}"
        try:
            found = Browser(session)
            found._ask("url", url="about:blank")
            found.console(), found.requests()  # of the page that it began with
            yield found
        finally:
            urllib.request.urlopen(urllib.request.Request(session, method="DELETE"), timeout=60).close()
    finally:
        driver.terminate()
        driver.wait()
        driver.stdout.close()
