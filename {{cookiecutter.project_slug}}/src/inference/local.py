"""What `make serve-local` adds to the server on this machine, and no image holds: a page, and AWS's own addresses.

The page at `/` is `page.html`. Only this machine is answered, and in a browser only pages from here: a page elsewhere
could else send what it likes, and one whose name's address was changed to this machine's could also read the answers.
`POST /endpoints/<any name>/invocations` and `/async-invocations` answer as SageMaker does, whose errors have a shape of
their own. Of an asynchronous request, `s3://bucket/key` is the file `bucket/key` in the folder of such files.
"""

from __future__ import annotations

import asyncio
import io
import ipaddress
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

AMAZON = "x-amzn-sagemaker-"
IGNORED = re.compile(f"{AMAZON}(target-.*|inference-component|session-id|enable-explanations)")
INLINE_BYTES = 128_000  # of an asynchronous request that names no file
PIECE = 2**20  # bytes that are read at a time, of one that does
TRIES = 60  # of one, a second apart, while the server has no room for it
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob: data:; media-src blob: mediastream:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
Answer = Callable[[Request], Awaitable[Response]]


def extend(served: Starlette, answer: Answer, files: Path | None, host: str, cors: str | None) -> None:
    """Add the addresses.

    Args:
        served: the server's routes.
        answer: to a request at `/invocations`.
        files: the folder of asynchronous requests and answers; None: there is none.
        host: the address that the server listens on.
        cors: an origin whose pages may ask too.
    """
    content = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    async def page(_: Request) -> Response:
        return HTMLResponse(content, headers=PAGE_HEADERS)

    async def invoke(request: Request) -> Response:
        response = await answer(request)
        if (status := response.status_code) >= 400:
            text, who = bytes(response.body).decode(), "client" if status < 500 else "server"
            facts = {"ErrorCode": "MODEL_ERROR", "OriginalStatusCode": status, "OriginalMessage": text}
            message = f'Received {who} error ({status}) from primary with message "{text}"'
            response = _error(424, "ModelError", message, response.headers, **facts)
        if ignored := [name for name in request.headers if IGNORED.fullmatch(name)]:
            response.headers["X-Ignored"] = ", ".join(ignored)
        response.headers["X-Amzn-Invoked-Production-Variant"] = "local"  # the one there is
        return response

    async def invoke_later(request: Request) -> Response:
        location, number = request.headers.get(f"{AMAZON}inputlocation", ""), uuid.uuid4().hex
        places = {name: f"s3://local/{name}/{number}.out" for name in ("output", "failure")}
        try:
            if files is None:
                raise ValueError("an artifact that is not trusted gets no files, which asynchronous requests need")
            location = location.encode("latin-1").decode()  # in UTF-8, as clients write it
            body = _located(files, location).open("rb") if location else io.BytesIO(await request.body())
            if not location and len(body.read()) > INLINE_BYTES:
                raise ValueError(f"the body has more than {INLINE_BYTES} bytes; put it into a file, and name that")
        except OSError as error:
            return _error(400, "ValidationError", f"{location} stands for {error.filename}: {error.strerror}")
        except ValueError as error:
            return _error(400, "ValidationError", str(error))
        meant = {f"{AMAZON}{name}".encode(): name.encode() for name in ("content-type", "accept")}
        headers = [(meant.get(name, name), text) for name, text in request.headers.raw if name not in meant.values()]
        scope = {**request.scope, "headers": headers}

        async def receive() -> dict[str, Any]:
            piece = await asyncio.to_thread(body.read, PIECE)
            return {"type": "http.request", "body": piece, "more_body": bool(piece)}

        async def work() -> None:
            for _ in range(TRIES):  # in the queue
                body.seek(0)
                if (response := await answer(Request(scope, receive))).status_code != 503:
                    break
                await asyncio.sleep(1)
            body.close()
            target = _located(files, places["output" if response.status_code == 200 else "failure"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_suffix(".part").write_bytes(response.body)
            target.with_suffix(".part").rename(target)

        said = {f"X-Amzn-SageMaker-{name.title()}Location": place for name, place in places.items()}
        given = request.headers.get(f"{AMAZON}inference-id", number)
        return JSONResponse({"InferenceId": given}, 202, said, background=BackgroundTask(work))

    served.add_route("/", page, ["GET"])
    served.add_route("/endpoints/{name}/invocations", invoke, ["POST"])
    served.add_route("/endpoints/{name}/async-invocations", invoke_later, ["POST"])
    if cors:
        every: Any = {"allow_methods": "*", "allow_headers": "*", "expose_headers": "*"}
        served.add_middleware(CORSMiddleware, allow_origins=[cors], **every)
    served.add_middleware(Guard, host, cors)


class Guard:
    """Refuses a request that was meant for another host, or comes from another origin's page."""

    def __init__(self, app: ASGIApp, host: str, cors: str | None) -> None:
        self._app, self._host, self._cors = app, host, cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, or answer 403."""
        headers, message = Headers(scope=scope), ""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._here(host):
            message = f"Host is {host[:80]!r}, which is not this machine; ask http://127.0.0.1 or http://localhost"
        elif origin not in (None, f"http://{host}", self._cors):
            way = "open it from a server" if origin == "null" else f"make serve-local CORS={origin[:80]} lets them"
            message = f"pages of {origin[:80]!r} may not ask; {way}"
        await (JSONResponse({"error": message}, 403) if message else self._app)(scope, receive, send)

    def _here(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in (self._host, "localhost") or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _located(files: Path, location: str) -> Path:
    """The file that an address in S3 stands for."""
    found = re.fullmatch(r"s3://([^/]+/[^\0]+)", location)
    path = (files / found[1]).resolve() if found else files
    if not path.is_relative_to(files.resolve()) or not found:
        raise ValueError(f"{location!r} is no address of the form s3://bucket/key, which stands for a file in {files}")
    return path


def _error(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None, **facts: Any) -> Response:
    """An error as AWS's clients read it; a request that is refused keeps its headers, but those of its body."""
    kept = {name: text for name, text in (headers or {}).items() if not name.startswith("content-")}
    return JSONResponse({"Message": message, **facts}, status, {**kept, "x-amzn-ErrorType": kind})
