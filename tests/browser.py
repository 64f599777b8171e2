"""A headless Chromium, driven through a pipe by its DevTools protocol; no driver is needed."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


# The browser reads from 3 and writes to 4. (Not by `preexec_fn`: JAX warns of the fork.)
_WIRED = """
import os, sys
a, b, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
a, b = (os.dup2(x, 200 + i) for i, x in enumerate((a, b)))
os.dup2(a, 3), os.dup2(b, 4)
os.execv(program, sys.argv[3:])
"""


def find() -> str | None:
    """The browser's program, where there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser, to be used in a `with` block.

    Args:
        size: (width, height) of its window.
        dark: whether the system prefers dark colours.
    """

    def __init__(self, size: tuple[int, int] = (1200, 1000), *, dark: bool = False) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        ours_out, self._write = os.pipe()
        self._read, theirs_out = os.pipe()
        self._ids = itertools.count(1)
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        program = find()
        assert program is not None

        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", _WIRED, str(ours_out), str(theirs_out), program),
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--remote-debugging-pipe", "--no-first-run", "--disable-extensions"),
                *("--disable-background-networking", "--disable-component-update"),
                f"--user-data-dir={self._profile.name}",
                f"--window-size={size[0]},{size[1]}",
                "about:blank",
            ],
            pass_fds=(ours_out, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": self._profile.name},
            start_new_session=True,
        )
        os.close(ours_out)
        os.close(theirs_out)
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(each for each in targets if each["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.do(f"{domain}.enable")
        width, height = size
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._write)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()
        os.close(self._read)
        self._profile.cleanup()

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            answer = self._next(end - time.monotonic())
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)
        raise TimeoutError(method)

    def _next(self, seconds: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], seconds)[0]:
                raise TimeoutError("the browser does not answer")
            data = os.read(self._read, 1 << 20)
            if not data:
                raise RuntimeError("the browser ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, to the page."""
        return self._call(method, self._session, **params)

    def open(self, address: str) -> None:
        """Go to an address."""
        self.do("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript."""
        found = self.do(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:2000])
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> None:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{script}; {self.run('document.body.innerText')}")
            time.sleep(0.05)

    def choose(self, selector: str, path: str) -> None:
        """Give a file to an input."""
        root = self.do("DOM.getDocument")["root"]["nodeId"]
        node = self.do("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.do("DOM.setFileInputFiles", files=[path], nodeId=node)

    def picture(self) -> bytes:
        """The whole page as a PNG."""
        found = self.do("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        return base64.b64decode(found["data"])

    @property
    def asked(self) -> list[str]:
        """Addresses that the page asked for so far."""
        return [
            each["params"]["request"]["url"]
            for each in self.events
            if each.get("method") == "Network.requestWillBeSent"
        ]

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings in the page's console so far."""
        return [
            json.dumps(each["params"])
            for each in self.events
            if each.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")
        ]
