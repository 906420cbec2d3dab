"""The artifact behind HTTP, as SageMaker hosts it: `/ping`, `/invocations` and `/execution-parameters` on port 8080.

    serve                                                                  # in the image: /opt/ml/model is served
    python src/inference/serve.py --model-dir folder-of-an-unpacked-artifact --host 127.0.0.1

One process and one event loop; `connections.py` has how requests come to it and `batcher.py` what happens off it. The
image holds these three files alone, so they import nothing else of the project; the rest of the code comes with the
artifact. Settings are environment variables, whole numbers from 1: INFERENCE_QUEUE (requests inside; more get 503),
INFERENCE_MERGED (images of one merged batch), INFERENCE_WORKERS (batches that a CPU computes at a time),
INFERENCE_THREADS (of torch, for a batch that is alone; and for decoding), INFERENCE_TIMEOUT (seconds for a request, its
body included); and the limits of `payload.py`. A model that does not load ends the server
with code 3; SIGTERM lets it answer what is inside.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import logging
import os
import re
import resource
import signal
import socket
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the source root, instead of this script's folder

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from inference.batcher import Batcher, processors
from inference.connections import ACCEPTED, Connection, Intake, Refused, let_wait

MODEL_DIR = Path("/opt/ml/model")
DRAIN_SECONDS = 20  # after SIGTERM; the platform kills after 30
LOAD_FAILED = 3
ARENA_MAX = -8  # of glibc's mallopt
FORWARDED = re.compile(r"X-Amzn-SageMaker-[A-Za-z0-9-]{1,64}", re.IGNORECASE)  # what the platform lets through

logger = logging.getLogger("serving")


def number(name: str, default: int) -> int:
    """A setting from the environment.

    Raises:
        SystemExit: when it is no whole number from 1.
    """
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        sys.exit(f"error: the environment variable {name} is {text!r}; set it to a whole number from 1")
    return int(text)


@dataclass(frozen=True)
class Settings:
    """What can be set; see the module's docstring. Two vCPUs are one core, which one torch thread fills."""

    queue: int = field(default_factory=lambda: number("INFERENCE_QUEUE", 64))
    merged: int = field(default_factory=lambda: number("INFERENCE_MERGED", 32))
    threads: int = field(default_factory=lambda: number("INFERENCE_THREADS", max(processors() // 2, 1)))
    workers: int = field(default_factory=lambda: number("INFERENCE_WORKERS", processors()))
    timeout: int = field(default_factory=lambda: number("INFERENCE_TIMEOUT", 50))
    max_bytes: int = field(default_factory=lambda: number("INFERENCE_MAX_BYTES", 6 * 2**20))
    local: Mapping[str, Any] | None = None  # what `local.extend` takes, on a developer's machine


class Context:
    """What handlers get as `context`: headers of request and response, by the names of the PyTorch toolkit."""

    def __init__(self, request: Request) -> None:
        given = request.headers.get("x-amzn-sagemaker-inference-id", "")
        self.request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        self.response_headers = {"X-Request-Id": self.request_id}
        self._headers = request.headers

    def get_request_header(self, index: int, name: str) -> str | None:
        """A header of the request; a server that merges asks for each on its own, so the index is always 0."""
        return self._headers.get(name) if index == 0 else None

    def set_response_header(self, index: int, name: str, value: str) -> None:
        """Set a header of the response; only `X-Amzn-SageMaker-...` reaches a client of SageMaker.

        Raises:
            ValueError: for another name, or a value that is no plain text of one line.
        """
        if index or not FORWARDED.fullmatch(name) or not re.fullmatch(r"[ -~]{0,1024}", value):
            raise ValueError(f"header {name!r} cannot be set to {value!r}")
        self.response_headers[name] = value


def application(batcher: Batcher, settings: Settings) -> Starlette:
    """The routes. Whatever else is asked for is 404, or 405 for another method."""
    intake = Intake(settings.queue, settings.max_bytes)

    async def ping(_: Request) -> Response:
        return Response(status_code=200 if batcher.healthy else 503)

    async def execution_parameters(_: Request) -> Response:
        megabytes = max(settings.max_bytes // 2**20, 1)
        concurrent = max(min(settings.queue, 100 // megabytes), 1)  # the platform's rule: at most 100 MB on the way
        return JSONResponse(
            {"MaxConcurrentTransforms": concurrent, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": megabytes}
        )

    async def invocations(request: Request) -> Response:
        started, context, size = time.perf_counter(), Context(request), 0
        message, response = "", None
        try:
            if not batcher.healthy:
                raise Refused(503, "the model is not ready")
            async with asyncio.timeout(settings.timeout):
                async with intake.received(request) as (body, size):
                    types = request.headers.get("content-type"), ",".join(request.headers.getlist("accept"))
                    with intake.answering():
                        content, kind = await batcher.answer(body, *types, context)
            response, status = Response(content, 200, context.response_headers, kind), 200
        except TimeoutError:
            status, message = 504, f"no answer within {settings.timeout} s"
        except ClientDisconnect:
            status = 499
        except MemoryError as error:
            status, message = 503, "there is not enough memory for this request now; try again, or send less"
            log("error", request_id=context.request_id, message="".join(traceback.format_exception(error)))
        except Exception as error:
            given = getattr(error, "status", None)
            expected = isinstance(error, Refused) or (isinstance(given, int) and (400 <= given < 500 or given == 503))
            status = int(given or 500) if expected else 500
            message = str(error) if expected else f"the server failed; its log has why ({context.request_id})"
            if not expected:
                log("error", request_id=context.request_id, message="".join(traceback.format_exception(error)))
        if status == 408:
            context.response_headers["Connection"] = "close"
        if status == 503:
            context.response_headers["Retry-After"] = "1"
        milliseconds = round(1000 * (time.perf_counter() - started), 1)
        log("info", request_id=context.request_id, status=status, bytes=size, milliseconds=milliseconds)
        return response or Response(sentence(message), status, context.response_headers, "application/json")

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path[:80]}; ask POST /invocations"
        return Response(sentence(message), error.status_code, error.headers, "application/json")

    routes = [
        Route("/ping", ping),
        Route("/invocations", invocations, methods=["POST"]),
        Route("/execution-parameters", execution_parameters),
    ]
    served = Starlette(routes=routes, exception_handlers={HTTPException: refused})
    served.router.redirect_slashes = False  # to wherever the client's Host says
    if settings.local:
        from inference.local import extend

        extend(served, invocations, **settings.local)
    return served


def sentence(message: str) -> str:
    """The body of an answer that is none."""
    return json.dumps({"error": message})


def log(level: str, **facts: Any) -> None:
    """One line of JSON; never a payload."""
    logger.info(json.dumps({"time": round(time.time(), 3), "level": level} | facts))


class Server(uvicorn.Server):
    """uvicorn's server, which exits with 0 after SIGTERM instead of dying of the signal."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        for server in self.servers:
            let_wait(server)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take no more requests, answer those that are inside, leave."""
        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self.handle_exit, each, None)
        yield


async def serve(model_dir: Path, host: str, port: int, settings: Settings) -> int:
    """Serve until SIGTERM.

    Returns:
        The exit code: 0, or 3 when the artifact does not load.

    Raises:
        SystemExit: when the port cannot be had; the log says why.
    """
    batcher = Batcher(model_dir, settings.merged, settings.threads, settings.workers, settings.timeout)
    config = uvicorn.Config(
        application(batcher, settings), host=host, port=port, log_config=None, access_log=False, lifespan="off",
        timeout_graceful_shutdown=DRAIN_SECONDS, server_header=False, http=Connection, ws="none",
        backlog=ACCEPTED, proxy_headers=False,
    )  # fmt: skip
    server, code = Server(config), 0
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104  (what a browser can ask)

    async def load() -> None:
        nonlocal code
        try:
            await batcher.load()
            log("info", message=f"ready on http://{shown}:{port}")
        except Exception as error:
            log("error", message="".join(traceback.format_exception(error)))
            log("error", message=f"{model_dir} cannot be served: {error}")
            code, server.should_exit = LOAD_FAILED, True

    loading = asyncio.create_task(load())
    await server.serve()
    loading.cancel()
    return code


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Serve an unpacked artifact over HTTP.")
    parser.add_argument("--model-dir", type=Path, default=MODEL_DIR, help=f"default: {MODEL_DIR}")
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on")  # noqa: S104  (hosting's rule)
    parser.add_argument("--port", type=int, default=number("SAGEMAKER_BIND_TO_PORT", 8080))
    parser.add_argument("--local", action="store_true", help="add what serve-local has, see local.py")
    parser.add_argument("--files", type=Path, help="with --local: folder of asynchronous requests and their answers")
    parser.add_argument("--cors", help="with --local: an origin whose pages may ask too")
    options = parser.parse_args()
    local = {"files": options.files, "host": options.host, "cors": options.cors} if options.local else None
    settings = Settings(local=local)
    if not 0 <= options.port < 2**16:
        parser.error(f"port {options.port} is not between 0 and 65535")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="PIL")  # of damaged images: lines, and memory for each that is another one
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # no line has them; each costs
    logging._srcfile = None  # nor where it was written; see logging's HOWTO
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk, fails no request
    with contextlib.suppress(AttributeError):  # glibc would keep up to 64 MB of freed memory for each thread, for good
        ctypes.CDLL(None).mallopt(ARENA_MAX, 1)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # a connection is an open file
    try:
        return asyncio.run(serve(options.model_dir, options.host, options.port, settings))
    except SystemExit:  # uvicorn's, after it said why
        return 1


if __name__ == "__main__":
    exit_code = main()
    with contextlib.suppress(OSError):  # a full disk
        sys.stdout.flush()
    os._exit(exit_code)  # a thread that still loads or computes would hold the process
