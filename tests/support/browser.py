"""A real browser, headless, spoken to over a pipe in its DevTools protocol; needs nothing but Chromium itself."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

DOWNLOADED = Path(__file__).resolve().parents[2] / ".chromium" / "bin" / "chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", str(DOWNLOADED))
PATIENCE = 60  # seconds


def found() -> str | None:
    """The browser of this machine, or the one that scripts/chromium.sh has put into this checkout."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of one headless Chromium, with what it complained about in `complaints`."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self._number, self._buffer = 0, b""

    def __enter__(self) -> Browser:
        self._profile = tempfile.mkdtemp(prefix="browser-")
        commands, self._to = os.pipe()
        self._from, answers = os.pipe()
        options = ["--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage"]
        options += [f"--user-data-dir={self._profile}", "--remote-debugging-pipe", "about:blank"]
        options += ["--no-sandbox"] if os.getuid() == 0 else []
        script = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, found() or "chromium", *options],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("Browser.close")
            self._process.wait(timeout=10)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command to the page."""
        return self._call(method, self._session, **parameters)

    def open(
        self, path: Path, *, width: int = 1000, height: int = 800, scheme: str = "light", medium: str = ""
    ) -> None:
        """Show a file in a window of this size, in light or dark or as printed, and wait until it is loaded."""
        self.complaints.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call(
            "Emulation.setEmulatedMedia", media=medium, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        self.call("Page.navigate", url=path.as_uri())
        end = time.monotonic() + PATIENCE
        while self.run("document.readyState + location.href") != f"complete{path.as_uri()}":
            if time.monotonic() > end:
                raise RuntimeError(f"{path}: not loaded after {PATIENCE} s")
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release one key."""
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def picture(self, clip: dict[str, float] | None = None) -> bytes:
        """What is seen, as PNG; `clip` {x, y, width, height, scale} of the whole page."""
        more = {"clip": clip, "captureBeyondViewport": True} if clip else {}
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", **more)["data"])

    def pdf(self) -> bytes:
        """The printed page."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        os.write(self._to, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._listen(answer)

    def _listen(self, event: dict[str, Any]) -> None:
        """Whatever a page says of itself, and whatever it asks the network for, is a complaint."""
        method, facts = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(facts["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(facts["args"]))
        elif method == "Log.entryAdded":
            self.complaints.append(facts["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not facts["request"]["url"].startswith(("file:", "data:")):
            self.complaints.append(f"asks for {facts['request']['url']}")

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0, end - time.monotonic()))[0]:
                raise RuntimeError(f"the browser did not answer within {PATIENCE} s")
            part = os.read(self._from, 1 << 16)
            if not part:
                raise RuntimeError("the browser ended")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)
