"""The page of `make serve-local` in a real browser, and who else may ask that server.

Where SCREENSHOTS names a folder, pictures of the page are left there to look at.
"""

from __future__ import annotations

import base64
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipelines.local import serve as serve_local
from tests.browser import Browser, chromium
from tests.helpers import CLASSES
from tests.hosting import Running, ask, edited, serving
from tests.test_inference import artifact, photo

__all__ = ["artifact"]  # a fixture
NAMES = ("it's <b>left.png", "up.png")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        if found is None:
            pytest.skip("there is no Chromium")
        yield found


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, label in zip(NAMES, ("left", "up"), strict=True):
        (folder / name).write_bytes(photo(label))
    (folder / "no.png").write_bytes(b"GIF89a")
    return folder


@contextmanager
def served(model: Path, folder: Path, *options: str) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve_local, "FILES", folder)
        with serving(model, folder / "log", local=["--local", *options]) as running:
            yield running


@pytest.fixture(scope="module")
def server(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with served(artifact, tmp_path_factory.mktemp("page")) as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: Running) -> Browser:
    browser.go(f"{server.url}/")
    return browser


def picture(browser: Browser, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        shot = browser.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        Path(folder, name).write_bytes(base64.b64decode(shot))


def titles(browser: Browser, count: int) -> list[str]:
    """The headings of so many answers, the newest first."""
    browser.until(f"document.querySelectorAll('article details').length >= {count}")
    found: list[str] = browser.run("[...document.querySelectorAll('article h2')].map((one) => one.textContent)")
    return found


def test_chosen_pictures_get_their_classes_with_bars(page: Browser, photos: Path) -> None:
    page.choose("#file", *[str(photos / name) for name in NAMES])
    second, first = titles(page, 2)
    assert first.startswith(f"{NAMES[0]}: left, ")  # a name is text
    assert second.startswith("up.png: up, ")
    rows = page.run("[...document.querySelectorAll('article:first-child tr')].map((row) => row.innerText.trim())")
    assert {row.split("\t")[0] for row in rows} == set(CLASSES)
    shares = [float(row.split("\t")[1].removesuffix(" %")) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    widths = page.run("[...document.querySelectorAll('article:first-child .bar')].map((bar) => bar.offsetWidth)")
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 20
    assert page.run("document.querySelector('article img').naturalWidth") > 0
    assert page.run("document.querySelector('article').innerText.match(/Answered in \\d+ ms/).length") == 1
    assert page.run("document.querySelectorAll('h2 b').length") == 0
    picture(page, "answers.png")


def test_nothing_is_fetched_from_elsewhere(page: Browser, server: Running, photos: Path) -> None:
    page.choose("#file", str(photos / "up.png"))
    titles(page, 1)
    fetched = page.run("performance.getEntriesByType('resource').map((one) => one.name)")
    assert {name for name in fetched if not name.startswith(("blob:", "data:"))} == {f"{server.url}/invocations"}
    policy = ask(server.url, method="GET", path="/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert page.run("fetch('http://127.0.0.2:9/').then(() => 'sent', () => 'refused')") == "refused"


GIVE = """(() => {
  const bytes = Uint8Array.from(atob("%s"), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "%s", { type: "image/png" }));
  document.body.dispatchEvent(new %s("%s", { %s: data, bubbles: true, cancelable: true }));
})()"""


@pytest.mark.parametrize(("kind", "name", "field"), [("DragEvent", "drop", "dataTransfer"),
                                                     ("ClipboardEvent", "paste", "clipboardData")])  # fmt: skip
def test_a_picture_is_dropped_or_pasted(page: Browser, kind: str, name: str, field: str) -> None:
    content = base64.b64encode(photo("down")).decode()
    page.run(GIVE % (content, f"{name}.png", kind, name, field))
    assert titles(page, 1)[0].startswith(f"{name}.png: down, ")
    page.run(f"document.body.dispatchEvent(new {kind}('{name}', {{{field}: new DataTransfer(), bubbles: true}}))")
    assert page.until("document.querySelector('[role=status]').textContent === 'There is no picture in that'")


def test_the_camera(page: Browser) -> None:
    page.run("document.querySelector('#camera').click()")
    page.until("!document.querySelector('#live').hidden && document.querySelector('video').videoWidth > 0")
    picture(page, "camera.png")
    page.run("document.querySelector('#take').click()")
    assert titles(page, 1)[0].startswith("camera.jpg: ")
    assert "%" in titles(page, 1)[0]
    assert page.run("document.querySelector('video').srcObject.getTracks().every((one) => one.readyState === 'ended')")


def test_a_refusal_is_said(page: Browser, photos: Path) -> None:
    page.choose("#file", str(photos / "no.png"))
    page.until("!!document.querySelector('article.bad')")
    assert "no.png: 6 bytes that are not a readable image" in titles(page, 1)[0]
    assert "not a readable image" in page.run("document.querySelector('[role=status]').textContent")


def test_by_keyboard_alone(page: Browser, photos: Path) -> None:
    page.choose("#file", str(photos / "up.png"))
    titles(page, 1)
    page.run("document.querySelector('summary').open = true")
    page.run("document.activeElement.blur()")
    seen = []
    for _ in range(8):
        page.press("Tab", 9)
        seen.append(page.run("document.activeElement.id || document.activeElement.tagName"))
    assert seen[:3] == ["file", "camera", "SUMMARY"]
    page.run("document.querySelector('summary').focus()")
    page.press("Enter", 13, "\r")
    assert page.until("document.querySelector('article details').open")
    page.press("Tab", 9)
    page.press("Tab", 9)
    assert page.run("document.activeElement.textContent") == "Copy curl"
    page.press("Enter", 13, "\r")
    assert page.until("document.querySelector('[role=status]').textContent.startsWith('curl is ')")


def test_to_a_screen_reader(page: Browser, photos: Path) -> None:
    page.choose("#file", str(photos / "up.png"))
    title = titles(page, 1)[0]
    heard = page.heard()
    assert ("heading", "Try the model") in heard
    assert ("heading", title) in heard
    assert ("button", "Use the camera") in heard
    assert any(role == "button" and name.startswith("Choose pictures") for role, name in heard)
    assert {name for role, name in heard if role == "rowheader"} == set(CLASSES)
    assert ("table", "Classes and their probabilities") in heard
    assert any(role == "status" for role, _ in heard)
    assert page.run("document.querySelector('[role=status]').textContent").startswith(title)
    assert not [node for node in heard if node[0] in ("button", "textbox", "link", "image") and not node[1]]


def test_what_is_there_to_copy_runs(page: Browser, photos: Path) -> None:
    page.choose("#file", str(photos / NAMES[0]))
    titles(page, 1)
    page.run("document.querySelector('article details').open = true")
    curl, python = page.run("[...document.querySelectorAll('article details pre')].map((one) => one.textContent)")
    picture(page, "code.png")
    for command in (["sh", "-c", f"{curl} --silent"], [sys.executable, "-c", python]):
        done = subprocess.run(command, cwd=photos, capture_output=True, text=True)
        assert "left" in done.stdout, done.stderr


def test_classes_are_text_and_many_are_folded(browser: Browser, artifact: Path, tmp_path: Path) -> None:
    hostile = ["<img src=x onerror=document.title='run'>", *(f"class {number}" for number in range(30))]
    code = f"\n\ndef predict_fn(batch, model, context=None):\n    names = {hostile!r}\n"
    code += "    row = [1 / len(names)] * len(names)\n"
    code += "    return {'labels': [names[0]], 'predictions': [0], 'probabilities': [row], 'classes': tuple(names)}\n"

    def change(folder: Path) -> None:
        with (folder / "code" / "inference.py").open("a") as file:
            file.write(code)

    with served(edited(artifact, tmp_path / "model", change), tmp_path) as running:
        (tmp_path / "a.png").write_bytes(photo())
        browser.go(f"{running.url}/")
        browser.choose("#file", str(tmp_path / "a.png"))
        assert titles(browser, 1)[0].startswith(f"a.png: {hostile[0]}, ")
        assert "The other 21 classes" in browser.run("document.querySelector('article').innerText")
        assert browser.run("document.title") == "Try the model"
        running.process.kill()
        running.process.wait()
        browser.choose("#file", str(tmp_path / "a.png"))
        browser.until("document.body.innerText.includes('a.png: the server does not answer')")


ELSEWHERE = "fetch('%s/invocations', %s).then((one) => one.status, (error) => error.message)"


@contextmanager
def elsewhere(port: int = 0) -> Iterator[str]:
    """Another origin, with an empty page."""

    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", port), Empty) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            yield f"http://localhost:{other.server_port}"
        finally:
            other.shutdown()
            thread.join()


def test_another_origin_s_page_is_refused_unless_it_is_named(
    browser: Browser, artifact: Path, server: Running, tmp_path: Path
) -> None:
    plain, own = "{method: 'POST', body: 'x'}", "{method: 'POST', body: 'x', headers: {'Content-Type': 'image/png'}}"
    with elsewhere() as origin, served(artifact, tmp_path, "--cors", origin) as open_one:
        browser.go(f"{origin}/")
        for options in (plain, own):
            assert browser.run(ELSEWHERE % (server.url, options)) == "Failed to fetch"
            assert browser.run(ELSEWHERE % (open_one.url, options)) in (400, 415)  # of the handlers
    assert not [line for line in server.lines() if line.get("bytes") == 1]  # it never came to the handlers


def test_only_this_machine_is_asked_for(server: Running) -> None:
    port = server.port
    for host in (f"127.0.0.1:{port}", "127.0.0.1", f"localhost:{port}", "LOCALHOST", "[::1]", f"127.1.2.3:{port}"):
        assert ask(server.url, method="GET", path="/ping", Host=host).status == 200, host
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1",
                 "", "[::1", "0x7f000001", "169.254.169.254"):  # fmt: skip
        for method, path in (("GET", "/ping"), ("GET", "/"), ("POST", "/invocations"), ("GET", "/nowhere")):
            message = ask(server.url, method=method, path=path, Host=host).refused(403)
            assert f"Host is {host!r}, which is not this machine" in message


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1"])
def test_only_pages_from_here_ask(server: Running, origin: str) -> None:
    for path in ("/invocations", "/endpoints/x/invocations", "/endpoints/x/async-invocations"):
        answer = ask(server.url, photo(), path=path, Origin=origin)
        assert "may not ask" in answer.refused(403)
        assert ("make serve-local CORS=" in answer.refused(403)) == (origin != "null")  # which it would not take
        assert not [name for name in answer.headers if name.startswith("access-control")]
    own = ask(server.url, photo("up"), "image/png", Origin=server.url)
    assert own.labels() == ["up"]
    assert not [name for name in own.headers if name.startswith("access-control")]


def test_sagemaker_has_none_of_it(artifact: Path, tmp_path: Path) -> None:
    with serving(artifact, tmp_path / "log") as running:
        for method, path in (("GET", "/"), ("POST", "/endpoints/x/invocations"), ("GET", "/page.html")):
            message = ask(running.url, method=method, path=path).refused(404)
            assert message == f"Not Found: {method} {path}; ask POST /invocations"
        assert ask(running.url, method="GET", path="/ping", Host="any.host").status == 200
        assert ask(running.url, photo("up"), "image/png", Origin="http://any.host").labels() == ["up"]
    from pipelines.local.images import SERVER

    assert {path.name for path in SERVER} == {"serve.py", "batcher.py", "connections.py"}


@pytest.mark.parametrize("cors", ["null", "*", "localhost:3000", "http://a/b", "file:///", "http://"])
def test_an_origin_that_is_none_is_one_sentence(verb: Any, cors: str) -> None:
    done = verb("serve-local", "--cors", cors)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"CORS is {cors}, which is no origin" in done.stderr
