"""Between the event loop and the model: decode in threads, merge what waits into one batch, compute in one thread.

Part of the server; see `serve.py`. Batches are merged as they are found: nothing waits for company, so a request alone
is answered as soon as it can be, and the more requests there are the larger the batches get.

A thread cannot be stopped, as a process could be. But to decode is to call the artifact's own handlers, and each
process that did so would import torch: 4 s and 500 MB. So `imaging.py` bounds the work beforehand, a decoder that is
not done in time counts as lost, and a server that has lost all of them says so at `/ping` and is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

HANDLERS = ("model_fn", "input_fn", "predict_fn", "output_fn")


@dataclass
class Waiting:
    """A decoded request in front of the model."""

    batch: Any
    answer: asyncio.Future[Any]


class Batcher:
    """An artifact's handlers and model, and the way of a request through them.

    Args:
        model_dir: an unpacked artifact; the handlers in its `code/` are used.
        merged: images of one merged batch, at most.
        threads: that decode (at least two), and that torch computes with.
        timeout: seconds after which nobody waits for an answer any more: a decoder that is not done then is stuck, and
            a model that is not done after twice as many.
    """

    def __init__(self, model_dir: Path, merged: int, threads: int, timeout: float) -> None:
        self._model_dir, self._merged, self._threads, self._timeout = model_dir, merged, threads, timeout
        self._decoders = ThreadPoolExecutor(max(threads, 2), "decode")
        self._decoding: dict[Any, float] = {}  # since when each request that is being decoded is
        self._computer = ThreadPoolExecutor(1, "model")
        self._waiting: deque[Waiting] = deque()
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._busy_since: float | None = None
        self.computed = 0  # batches

    async def load(self) -> None:
        """Import the handlers, load the model (which asks its golden samples and so warms it up), begin to work.

        Raises:
            Exception: whatever keeps the artifact from answering.
        """
        await asyncio.get_running_loop().run_in_executor(self._computer, self._load)
        self._worker = asyncio.create_task(self._work())

    @property
    def healthy(self) -> bool:
        """Whether requests will be answered: the model is loaded and not stuck, nor are all decoders."""
        now = time.monotonic()
        stuck = self._busy_since is not None and now - self._busy_since > 2 * self._timeout
        lost = sum(now - since > self._timeout for since in [*self._decoding.values()]) >= max(self._threads, 2)
        return self._worker is not None and not self._worker.done() and not stuck and not lost

    def _load(self) -> None:
        self._handlers = import_handlers(self._model_dir / "code")
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self._threads)
        self._model = call(self._handlers.model_fn, str(self._model_dir))

    async def answer(self, body: bytes, content_type: str | None, accept: str | None, context: Any) -> tuple[Any, str]:
        """Body and content type of the response.

        Raises:
            Exception: what the handlers raise; it has a `status` when the client is to blame.
        """
        loop = asyncio.get_running_loop()
        batch = await loop.run_in_executor(self._decoders, self._decode, body, content_type, context)
        waiting = Waiting(batch, loop.create_future())
        self._waiting.append(waiting)
        self._wake.set()
        rendered = call(self._handlers.output_fn, await waiting.answer, accept, context)
        return rendered if isinstance(rendered, tuple) else (rendered, "application/json")

    def _decode(self, body: bytes, content_type: str | None, context: Any) -> Any:
        """Where the handlers have a function `fit`, it makes images small before they wait, however large they came."""
        key = object()
        self._decoding[key] = time.monotonic()
        try:
            batch = call(self._handlers.input_fn, body, content_type, context)
            fit = getattr(self._handlers, "fit", None)
            return call(fit, batch, self._model) if fit else batch
        finally:
            del self._decoding[key]

    async def _work(self) -> None:
        """Merge what waits, compute, hand out; for as long as the server runs."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            while chosen := self._choose():
                self._busy_since = time.monotonic()
                answers = await loop.run_in_executor(self._computer, self._compute, [one.batch for one in chosen])
                self._busy_since = None
                for one, answer in zip(chosen, answers, strict=True):
                    if one.answer.done():  # the request was given up
                        continue
                    if isinstance(answer, Exception):
                        one.answer.set_exception(answer)
                    else:
                        one.answer.set_result(answer)
            self._wake.clear()

    def _choose(self) -> list[Waiting]:
        """The oldest that waits, and those right after it that can be merged with it; empty when nothing waits."""
        chosen: list[Waiting] = []
        images = 0
        while self._waiting:
            one = self._waiting[0]
            if not one.answer.done():
                size = len(one.batch) if is_batch(one.batch) else self._merged
                if chosen and (images + size > self._merged or not mergeable(chosen[0].batch, one.batch)):
                    break
                chosen.append(one)
                images += size
            self._waiting.popleft()
        return chosen

    def _compute(self, batches: list[Any]) -> list[Any]:
        """Answers, or the exceptions in their place; a batch that fails together is asked one by one."""
        self.computed += 1
        if len(batches) > 1:
            with contextlib.suppress(Exception):
                prediction = call(self._handlers.predict_fn, merge(batches), self._model)
                parts = split(prediction, [len(batch) for batch in batches])
                if parts is not None:
                    return parts
                self._merged = 1  # these handlers answer in a way of their own, which only they can take apart
        answers: list[Any] = []
        for batch in batches:
            try:
                answers.append(call(self._handlers.predict_fn, batch, self._model))
            except Exception as error:
                answers.append(error)
        return answers


def call(handler: Callable[..., Any], *arguments: Any) -> Any:
    """Call a handler. What asyncio would take for its own, and hang or stop at, becomes an ordinary error.

    Raises:
        Exception: what the handler raises.
    """
    try:
        return handler(*arguments)
    except (StopIteration, SystemExit, TimeoutError) as error:
        raise RuntimeError(f"a handler raised {error!r}") from error


def import_handlers(code: Path) -> ModuleType:
    """Import the artifact's `inference.py`, or the file that SAGEMAKER_PROGRAM names, with its own modules beside it.

    Raises:
        FileNotFoundError: when there is none.
        AttributeError: when one of the four handlers is missing.
    """
    path = code / os.environ.get("SAGEMAKER_PROGRAM", "inference.py")
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; mount an unpacked model.tar.gz")
    sys.path.insert(0, str(code))
    spec = importlib.util.spec_from_file_location("artifact_inference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    call(spec.loader.exec_module, module)
    missing = [name for name in HANDLERS if not callable(getattr(module, name, None))]
    if missing:
        raise AttributeError(f"{path} has no function {', '.join(missing)}; it needs {', '.join(HANDLERS)}")
    return module


def is_batch(batch: Any) -> bool:
    """Whether it can be merged: a list of images, or an array. Tensors, tables and the like go alone."""
    return isinstance(batch, list) or (type(batch).__name__ == "ndarray" and batch.ndim > 0)


def mergeable(first: Any, second: Any) -> bool:
    """Whether two batches are of one kind: lists, or arrays of one type with equal rows."""
    if isinstance(first, list) or isinstance(second, list):
        return isinstance(first, list) and isinstance(second, list)
    return is_batch(first) and is_batch(second) and (first.shape[1:], first.dtype) == (second.shape[1:], second.dtype)


def merge(batches: list[Any]) -> Any:
    """One batch of several, in order."""
    if isinstance(batches[0], list):
        return [image for batch in batches for image in batch]
    import numpy as np

    return np.concatenate(batches)


def split(prediction: Any, sizes: list[int]) -> list[dict[str, list[Any]]] | None:
    """One prediction for each of the merged batches; None when it is no dictionary of lists of a value an image."""
    if not isinstance(prediction, dict):
        return None
    if not all(isinstance(values, list) and len(values) == sum(sizes) for values in prediction.values()):
        return None
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [
        {name: values[start : start + size] for name, values in prediction.items()}
        for start, size in zip(starts, sizes, strict=True)
    ]
