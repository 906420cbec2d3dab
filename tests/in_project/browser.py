"""A headless Chromium that tests drive through its pipe, with nothing but the standard library."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
WORDS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
         "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--window-size=1100,900")  # fmt: skip


class Browser:
    """One page of it."""

    def __init__(self, read: IO[bytes], write: IO[bytes]) -> None:
        self._read, self._write = read, write
        self._rest, self._number, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the DevTools protocol and its result."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        command = {"id": self._number, "method": method, "params": parameters} | session
        self._write.write(json.dumps(command).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                piece = self._read.read(2**16)
                assert piece, "the browser ended"
                self._rest += piece
            text, _, self._rest = self._rest.partition(b"\0")
            message = json.loads(text)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        more = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        found = self.call("Runtime.evaluate", expression=script, **more)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 30) -> Any:
        """The same, once it is true."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"{script}: {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return found

    def go(self, url: str) -> None:
        """Open an address."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def choose(self, selector: str, *files: str) -> None:
        """Files in an input, as a person chooses them."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=list(files))

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key."""
        facts = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **facts, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def heard(self) -> list[tuple[str, str]]:
        """Role and name of all that a screen reader reads."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")
        ]


@contextmanager
def chromium() -> Iterator[Browser | None]:
    """A browser; None where there is none."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        yield None
        return
    ends = [*os.pipe(), *os.pipe()]
    theirs = [fcntl.fcntl(ends[place], fcntl.F_DUPFD, 20) for place in (0, 3)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        script = f'exec "$@" 3</dev/fd/{theirs[0]} 4>/dev/fd/{theirs[1]}'
        command = ["sh", "-c", script, "sh", program, *WORDS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(command, pass_fds=theirs, stderr=subprocess.DEVNULL)
        for end in (*theirs, ends[0], ends[3]):
            os.close(end)
        try:
            with os.fdopen(ends[2], "rb", 0) as read, os.fdopen(ends[1], "wb", 0) as write:
                yield Browser(read, write)
        finally:
            process.kill()
            process.wait()
