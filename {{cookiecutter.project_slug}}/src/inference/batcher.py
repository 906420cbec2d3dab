"""Between the event loop and the model: decode in threads, merge what waits into batches, compute them in threads.

Part of the server; see `serve.py`. Batches are merged as they are found: nothing waits for company, so a request alone
is answered as soon as it can be, and the more requests there are the larger the batches get; each worker takes its
share of what waits. On a CPU it computes with as many of torch's threads as there are for it: all while it is the only
one, and one when all of them work, which wastes least. Of a network that answers within milliseconds only one worker
computes, as the others would but compete with the decoders, and a request that is alone is computed by the thread that
has decoded it: to hand it over is a good part of what such a network takes. Each GPU has one worker and its own model.

A thread cannot be stopped, as a process could be. But to decode is to call the artifact's own handlers, and each
process that did so would import torch: 4 s and 500 MB. So `imaging.py` bounds the work beforehand, a decoder that is
not done in time counts as lost, and a server that has lost all of them says so at `/ping` and is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import IO, Any

FAST = 0.01  # seconds for an image, below which one worker is enough
HANDLERS = ("model_fn", "input_fn", "predict_fn", "output_fn")
Body = bytes | IO[bytes]
Waiting = tuple[Any, asyncio.Future[Any]]  # a decoded request in front of the model, and its answer


class Batcher:
    """An artifact's handlers and model, and the way of a request through them.

    Args:
        model_dir: an unpacked artifact; the handlers in its `code/` are used.
        merged: images of merged batches that a CPU computes at a time, or a GPU, at most.
        threads: that decode (at least two), and that compute a batch which is alone.
        workers: batches that are computed at a time, where there is no GPU.
        timeout: seconds after which nobody waits for an answer any more: a decoder that is not done then is stuck, and
            a model that is not done after twice as many.
    """

    def __init__(self, model_dir: Path, merged: int, threads: int, workers: int, timeout: float) -> None:
        self._model_dir, self._merged, self._timeout = model_dir, merged, timeout
        self._threads, self._workers, self._gpus = threads, workers, 0
        self._active = 1  # workers that take something
        self._decoders = ThreadPoolExecutor(max(threads, 2), "decode")
        self._decoding: dict[int, float] = {}  # since when each thread that decodes does so
        self._computers: list[ThreadPoolExecutor] = []  # each of one thread
        self._models: list[Any] = []  # of each worker; the same one, but for GPUs
        self._waiting, self._wake = deque[Waiting](), asyncio.Event()
        self._working: list[asyncio.Task[None]] = []
        self._busy: dict[int, float] = {}  # since when a worker computes; -1 is a decoder in the place of one
        self.computed = 0  # batches

    async def load(self) -> None:
        """Import the handlers, load the model (which asks its golden samples and so warms it up), begin to work.

        Raises:
            Exception: whatever keeps the artifact from answering.
        """
        first, self._loop = ThreadPoolExecutor(1, "model-0"), asyncio.get_running_loop()
        self._gpus = await self._loop.run_in_executor(first, self._load, 0)
        if self._gpus:
            self._workers = self._active = self._gpus
        else:  # they share the machine's memory
            self._merged = max(self._merged // self._workers, 1)
        self._computers = [first, *(ThreadPoolExecutor(1, f"model-{number}") for number in range(1, self._workers))]
        for number in range(1, self._gpus):
            await self._loop.run_in_executor(self._computers[number], self._load, number)
        self._models += self._models[:1] * (self._workers - len(self._models))
        self._working = [asyncio.create_task(self._work(number)) for number in range(self._workers)]

    @property
    def healthy(self) -> bool:
        """Whether requests will be answered: the model is loaded and not stuck, nor are all decoders."""
        now = time.monotonic()
        stuck = any(now - since > 2 * self._timeout for since in [*self._busy.values()])
        lost = sum(now - since > self._timeout for since in [*self._decoding.values()]) >= max(self._threads, 2)
        return bool(self._working) and not any(task.done() for task in self._working) and not stuck and not lost

    def _load(self, worker: int) -> int:
        """Load the model of a worker, in its thread. Gives the number of GPUs."""
        if not worker:
            self._handlers = import_handlers(self._model_dir / "code")
        torch, gpus = sys.modules.get("torch"), 0
        if torch:
            torch.set_num_threads(self._threads)
            gpus = torch.cuda.device_count()
            if gpus:
                torch.cuda.set_device(worker)  # of this thread: where `cuda` is meant to be
        self._models.append(call(self._handlers.model_fn, str(self._model_dir)))
        return int(gpus)

    async def answer(self, body: Body, content_type: str | None, accept: str | None, context: Any) -> tuple[Any, str]:
        """Body and content type of the response.

        Raises:
            Exception: what the handlers raise; it has a `status` when the client is to blame.
        """
        batch, answers = await self._loop.run_in_executor(self._decoders, self._begin, body, content_type, context)
        rendered = call(self._handlers.output_fn, await self._wait(batch, answers), accept, context)
        return rendered if isinstance(rendered, tuple) else (rendered, "application/json")

    def _wait(self, batch: Any, answers: list[Any]) -> asyncio.Future[Any]:
        """Put a batch in front of the model, unless it has its answer."""
        waiting = batch, self._loop.create_future()
        if answers:
            hand_out([waiting], answers)
        else:
            self._waiting.append(waiting)
            self._wake.set()
        return waiting[1]

    def _begin(self, *request: Any) -> tuple[Any, list[Any]]:
        """Decode, and where a fast network is idle compute as well: the batch, and a list of the answer if there is."""
        batch, now = self._decode(*request), time.monotonic()
        if self._workers == 1 or self._active > 1 or self._waiting or self._busy:  # one worker alone has the model
            return batch, []
        if self._busy.setdefault(-1, now) is not now:  # another decoder was first
            return batch, []
        answers = self._compute([batch], -1)
        if self._waiting:  # the first worker let them
            self._loop.call_soon_threadsafe(self._wake.set)
        return batch, answers

    def _decode(self, body: Body, content_type: str | None, context: Any) -> Any:
        """Where the handlers have a function `fit`, it makes images small before they wait, however large they came."""
        self._decoding[threading.get_ident()] = time.monotonic()
        try:
            if not isinstance(body, bytes) and not getattr(self._handlers, "TAKES_FILES", False):
                body.seek(0)
                body = body.read()
            batch = call(self._handlers.input_fn, body, content_type, context)
            fit = getattr(self._handlers, "fit", None)
            return call(fit, batch, self._models[0]) if fit else batch
        finally:
            del self._decoding[threading.get_ident()]

    async def _work(self, worker: int) -> None:
        """Merge what waits, compute, hand out; for as long as the server runs."""
        while True:
            await self._wake.wait()
            while worker < self._active and (chosen := self._choose()):
                own, batches = self._computers[worker], [batch for batch, _ in chosen]
                hand_out(chosen, await self._loop.run_in_executor(own, self._compute, batches, worker))
            self._wake.clear()

    def _choose(self) -> list[Waiting]:
        """The oldest that waits, and of those right after it what can be merged with it, up to a worker's share."""
        chosen: list[Waiting] = []
        if -1 in self._busy:
            return chosen
        images, share = 0, -(-len(self._waiting) // self._active)
        while self._waiting and len(chosen) < share:
            batch, answer = self._waiting[0]
            if not answer.done():
                size = len(batch) if is_batch(batch) else self._merged
                if chosen and (images + size > self._merged or not mergeable(chosen[0][0], batch)):
                    break
                chosen.append((batch, answer))
                images += size
            self._waiting.popleft()
        return chosen

    def _compute(self, batches: list[Any], worker: int) -> list[Any]:
        """Answers, or the exceptions in their place; and learn how many workers the network is worth."""
        self._busy[worker] = begun = time.monotonic()
        self.computed += 1
        if "torch" in sys.modules:  # of this thread: OpenMP keeps a number for each
            sys.modules["torch"].set_num_threads(max(self._threads // len(self._busy), 1))
        answers = self._predict(batches, self._models[worker])
        images = sum(len(batch) if is_batch(batch) else 1 for batch in batches)
        if not self._gpus:
            self._active = self._workers if time.monotonic() - begun > FAST * images else 1
        del self._busy[worker]
        return answers

    def _predict(self, batches: list[Any], model: Any) -> list[Any]:
        """The answers; where a batch fails together, its parts are asked one by one."""
        if len(batches) > 1:
            with contextlib.suppress(Exception):
                prediction = call(self._handlers.predict_fn, merge(batches), model)
                parts = split(prediction, [len(batch) for batch in batches])
                if parts is not None:
                    return parts
                self._merged = 1  # these handlers answer in a way of their own, which only they can take apart
        answers: list[Any] = []
        for batch in batches:
            try:
                answers.append(call(self._handlers.predict_fn, batch, model))
            except Exception as error:
                answers.append(error)
        return answers


def hand_out(chosen: list[Waiting], answers: list[Any]) -> None:
    """Give to those that waited what they waited for, and keep nothing of it."""
    for (_, future), answer in zip(chosen, answers, strict=True):
        if not future.done():  # it would be, were the request given up
            (future.set_exception if isinstance(answer, Exception) else future.set_result)(answer)
    answers.clear()  # an exception among them knows the thread's frames, and these know the list


def processors(root: Path = Path("/")) -> int:
    """How many this process may use: by its affinity, and by the quotas of its cgroup and of those around it."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, own = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            for folder in (Path(own), *Path(own).parents):  # a container may see its own as the topmost
                with contextlib.suppress(OSError, ValueError):  # there is none: "max"
                    texts = [(top / str(folder).lstrip("/") / name).read_text(encoding="utf-8") for name in files]
                    quota, period = map(int, " ".join(texts).split())
                    count = min(count, math.ceil(quota / period)) if quota > 0 else count
    return max(count, 1)


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


def split(prediction: Any, sizes: list[int]) -> list[dict[str, Any]] | None:
    """One prediction for each of the merged batches; None when it is no dictionary of lists of a value an image.

    A tuple in it is true of every image, and goes to each of them.
    """
    if not isinstance(prediction, dict):
        return None
    lists = [values for values in prediction.values() if not isinstance(values, tuple)]
    if not all(isinstance(values, list) and len(values) == sum(sizes) for values in lists):
        return None
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [
        {name: part if isinstance(part, tuple) else part[start : start + size] for name, part in prediction.items()}
        for start, size in zip(starts, sizes, strict=True)
    ]
