"""A real browser that a test drives: chromedriver's WebDriver protocol, spoken with urllib."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Iterator, List

from helpers.base import need, wait_until

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # what a WebDriver calls one


class Browser:
    """A window of headless Chromium, with what it complained of."""

    def __init__(self, driver: str, profile: Path, javascript: bool, width: int, height: int,
                 dark: bool) -> None:
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                     "--disable-background-networking", "--disable-component-update",
                     "--disable-sync", f"--user-data-dir={profile}", "--hide-scrollbars",
                     f"--window-size={width},{height}"]
        options = {"args": arguments, "prefs": {
            "profile.default_content_setting_values.javascript": 1 if javascript else 2}}
        self._driver = driver
        made = self._send("POST", "/session", {"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}})
        self._session = f"/session/{made['sessionId']}"
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height,
                      deviceScaleFactor=1, mobile=False)
        if dark:
            self.devtools("Emulation.setEmulatedMedia", features=[
                {"name": "prefers-color-scheme", "value": "dark"}])

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self._driver + path, None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def send(self, command: str, **body: Any) -> Any:
        """Give the window a command of WebDriver."""
        return self._send("POST", f"{self._session}/{command}", body)

    def devtools(self, command: str, **values: Any) -> Any:
        """Give it a command of Chromium's own."""
        return self.send("goog/cdp/execute", cmd=command, params=values)

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is there."""
        self.send("url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of a function in the page; return what it returns."""
        return self.send("execute/sync", script=script, args=list(arguments))

    def text(self) -> str:
        """What somebody can read on the page."""
        return str(self.run("return document.body.innerText"))

    def wait(self, script: str, what: str, seconds: float = 60) -> Any:
        """Wait until an expression is true in the page."""
        return wait_until(lambda: self.run(f"return {script}"), what, seconds)

    def element(self, selector: str) -> str:
        """The first element that fits, as WebDriver names it."""
        found = wait_until(lambda: self.send("elements", using="css selector", value=selector),
                           f"there is no {selector}")  # while a page is loaded there is none
        return str(found[0][ELEMENT])

    def click(self, selector: str) -> None:
        """Click on the first element that fits, as a hand does."""
        self.send(f"element/{self.element(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Type into a field, or name a file in one."""
        self.send(f"element/{self.element(selector)}/value", text=text)

    def press(self, *keys: str) -> None:
        """Press and let go keys, one after the other."""
        self.send("actions", actions=[{"type": "key", "id": "keys", "actions": [
            {"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]}])

    def complaints(self) -> List[str]:
        """What the browser found wrong since it was asked last: errors, refused by the policy."""
        return [entry["message"] for entry in self.send("se/log", type="browser")
                if entry["level"] in ("SEVERE", "WARNING")]

    def picture(self, to: Path, whole: bool = False) -> None:
        """Keep what it looks like, or the ``whole`` page."""
        if whole:
            height = self.run("return document.documentElement.scrollHeight")
            width = self.run("return innerWidth")
            self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height,
                          deviceScaleFactor=1, mobile=False)
        to.write_bytes(base64.b64decode(self.devtools("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        """Close the window."""
        self._send("DELETE", self._session)


@contextlib.contextmanager
def browser(place: Path, javascript: bool = True, width: int = 1440, height: int = 900,
            dark: bool = False) -> Iterator[Browser]:
    """A browser of a test's own, in a new directory."""
    program = shutil.which("chromedriver")
    need("chromium", program is not None, "chromedriver is not installed: apt-get install "
         "chromium-driver")
    driver = subprocess.Popen([str(program), "--port=0"], stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert driver.stdout is not None
        line = next(line for line in driver.stdout if "successfully on port" in line)
        port = line.rpartition(" ")[2].strip().rstrip(".")
        window = Browser(f"http://127.0.0.1:{port}", place / "profile", javascript, width, height,
                         dark)
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait()
        driver.stdout.close()
