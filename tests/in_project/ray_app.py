"""The four handlers under Ray Serve: replicas with a model each, in which waiting requests are answered together.

Copy this file into `code/` of an unpacked artifact, as the template's docs/recipes/ray-serve.md says. On AWS's managed
image for endpoints (`serve-ml-sagemaker-cpu`) set SM_RAYSERVE_APP=ray_app:app and PYTHONPATH=/opt/ml/model/code;
elsewhere, in `code/`:

    serve run ray_app:app

INFERENCE_REPLICAS, INFERENCE_BATCH_SIZE (requests) and INFERENCE_BATCH_WAIT_MS change what `Settings` holds.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import serve  # type: ignore[import-not-found]  # it has an environment of its own
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from payload import Batch, Limits, RequestError

ARTIFACT = str(Path(__file__).resolve().parent.parent)
handlers: Any = importlib.import_module("inference")  # inference.py beside this file; a folder in the source tree
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Settings(Limits):
    """What environment variables set, beside the limits of a request."""

    replicas: int = 2
    batch_size: int = 8
    batch_wait_ms: int = 5


SETTINGS = Settings.read(os.environ)


class Server:
    """One replica."""

    def __init__(self) -> None:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // SETTINGS.replicas))
        self.model = handlers.model_fn(ARTIFACT)
        wait = SETTINGS.batch_wait_ms / 1000  # seconds
        self.predict = serve.batch(max_batch_size=SETTINGS.batch_size, batch_wait_timeout_s=wait)(self.predict_many)

    async def __call__(self, request: Request) -> Response:
        """Answer `/ping` and `/invocations`, and `/`, where AWS's adapter sends what it gets at `/invocations`."""
        route = f"{request.method} {request.url.path}"
        try:
            if route == "GET /ping":
                return Response()
            if route not in ("POST /invocations", "POST /"):
                raise RequestError(404, f"there is no {route[:80]!r} here; there are POST /invocations and GET /ping")
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
                if len(body) > SETTINGS.max_bytes:
                    raise RequestError(413, f"the body has more bytes than the limit of {SETTINGS.max_bytes}")
            batch = await asyncio.to_thread(handlers.input_fn, body, request.headers.get("content-type"))
            answer = await self.predict(batch)
            if isinstance(answer, Exception):
                raise answer
            text, kind = handlers.output_fn(answer, request.headers.get("accept"))
            return Response(text, media_type=kind)
        except RequestError as error:
            return JSONResponse({"error": str(error)}, error.status)
        except Exception:
            logger.exception("a request failed")
            return JSONResponse({"error": "the server failed on this request; its log says why"}, 500)

    async def predict_many(self, batches: list[Batch]) -> list[Any]:
        """Answer requests of any kind, in order; the error of one takes the place of its answer."""
        answers: dict[int, Any] = {}
        kinds = ["images" if isinstance(batch, list) else batch.shape[1:] for batch in batches]
        for kind in set(kinds):
            alike = [index for index, other in enumerate(kinds) if other == kind]
            found = await asyncio.to_thread(self.predict_alike, [batches[index] for index in alike])
            answers.update(zip(alike, found, strict=True))
        return [answers[index] for index in range(len(batches))]

    def predict_alike(self, batches: list[Any]) -> list[Any]:
        """Ask the model once for all; where that fails or is too much, for each alone: none spoils another."""
        ends = np.cumsum([len(batch) for batch in batches])
        try:
            if len(batches) > 1 and ends[-1] > SETTINGS.max_batch:
                raise RequestError(413, "more together than one request may hold")
            merged = [image for batch in batches for image in batch]
            whole = handlers.predict_fn(merged if isinstance(batches[0], list) else np.stack(merged), self.model)
        except Exception as error:
            return [error] if len(batches) == 1 else [self.predict_alike([batch])[0] for batch in batches]
        parts = [slice(end - len(batch), end) for end, batch in zip(ends, batches, strict=True)]
        return [
            {key: values if isinstance(values, tuple) else values[part] for key, values in whole.items()}
            for part in parts
        ]  # fmt: skip


def app(_: dict[str, str]) -> Any:
    """Check the artifact before Ray hears of it, whose proxy calls itself healthy before a replica is; then bind."""
    handlers.model_fn(ARTIFACT)
    return serve.deployment(
        num_replicas=SETTINGS.replicas,
        max_ongoing_requests=2 * SETTINGS.batch_size,  # a replica: one batch in the model, the next being decoded
        max_queued_requests=8 * SETTINGS.batch_size,  # beyond, Ray answers 503
        ray_actor_options={"num_cpus": 0},  # replicas share the cores; a second must not wait for a second core
    )(Server).bind()
