"""Pages as a browser sees them."""

from __future__ import annotations

import re
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from povfarm import Request, Response

VOID = {"meta", "link", "img", "input"}


class Dom(HTMLParser):
    """A page as a browser sees it: every element with its attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: List[Tuple[str, Dict[str, str]]] = []
        self.text = ""
        self.open: List[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: Sequence[Tuple[str, Optional[str]]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, **attributes: str) -> List[Dict[str, str]]:
        """The attributes of every ``tag`` whose attributes contain these."""
        return [found for name, found in self.elements if name == tag and all(
            value in found.get(key.rstrip("_"), "") for key, value in attributes.items())]

    def harmless(self) -> None:
        """Nothing that runs or that the content policy would refuse."""
        for tag, attributes in self.elements:
            assert tag not in ("style", "b", "iframe", "object", "base"), tag
            assert tag != "script" or re.match(r"/[-\w/]*script\.js\?", attributes["src"]), attributes
            for name, value in attributes.items():
                assert name != "style" and not name.startswith("on"), (tag, attributes)
                if name in ("href", "src", "action", "formaction"):
                    assert re.match(r"(/|\?|#)(?!/)", value), value


class Recorder:
    """A router that notes what a browser asked for."""

    def __init__(self, router: Any) -> None:
        self.router = router
        self.answers: Dict[str, int] = {}
        self._lock = threading.Lock()

    def handle(self, request: Request) -> Response:
        response: Response = self.router.handle(request)
        with self._lock:
            self.answers[request.path] = response.status
        return response


def chromium(browser: str, url: str, tmp_path: Path, *flags: str) -> Dom:
    """Load a page in the real browser and return the document that it made of it."""
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path / 'profile'}", *flags, "--dump-dom", url],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=True)
    return Dom(done.stdout)
