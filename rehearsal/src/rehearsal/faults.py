"""Accidents on demand: `--fault <name>[=value]`, each once unless it says more.

spot-after=20s       the instances of a training job are reclaimed after so long
container-dies=5s    the containers of a job or an endpoint are killed after so long
throttle=3           so many requests of each operation of SageMaker's are answered with ThrottlingException first
lost-answer=CreateTrainingJob    the operation is carried out, and its answer never comes
never-an-answer=CreateTrainingJob    nor that of any later attempt
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable

from rehearsal.operations import Account, Answer, Call, NoAnswer, after, before, control, refuse, started
from rehearsal.operations import Request as Asked

MOST = 4  # refusals in a row that botocore's standard mode survives
DONE: dict[str, Counter[str]] = {}


def _value(account: Account, name: str, default: str = "") -> str | None:
    """What a fault was given; None when it was not asked for."""
    for fault in account.faults:
        word, _, value = fault.partition("=")
        if word == name:
            return value or default
    return None


def _done(account: Account) -> Counter[str]:
    return DONE.setdefault(account.name, Counter())


def seconds(text: str) -> float:
    """Of `20s`, `2m` or `20`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|)", text)
    if match is None:
        raise ValueError(f"a fault's time is {text!r}; write it as 20s or 2m")
    return float(match[1]) * (60 if match[2] == "m" else 1)


@control("faults")
def change(account: Account, request: Asked) -> Answer:
    """Choose other faults while the account runs: {"faults": ["throttle=2"]}."""
    with account.lock:
        account.faults[:] = request["faults"]
        _done(account).clear()
    return {"faults": account.faults}


@before
def throttle(account: Account, call: Call) -> None:
    """Too many requests."""
    times = _value(account, "throttle", str(MOST))
    if times is None or call.service not in ("sagemaker", "sagemaker-runtime") or call.principal.endswith(":root"):
        return
    with account.lock:
        _done(account)[f"throttle {call.operation}"] += 1
        over = _done(account)[f"throttle {call.operation}"] > int(times)
    if not over:
        account.note("fault", "throttle", call.operation)
        raise refuse("ThrottlingException", "Rate exceeded")


@before
def stay_silent(account: Account, call: Call) -> None:
    """Nobody hears what became of a repetition either."""
    if _lost(account, "never-an-answer", call) and _done(account)[f"never-an-answer {call.operation}"]:
        raise NoAnswer


@after
def lose(account: Account, call: Call, _: Answer) -> None:
    """Nobody hears what was carried out."""
    for name in ("lost-answer", "never-an-answer"):
        if _lost(account, name, call):
            with account.lock:
                _done(account)[f"{name} {call.operation}"] += 1
            if _done(account)[f"{name} {call.operation}"] == 1:
                account.note("fault", name, call.operation)
                raise NoAnswer


def _lost(account: Account, name: str, call: Call) -> bool:
    """Whether a fault is about an operation."""
    operations = _value(account, name, "CreateTrainingJob")
    return bool(operations) and call.operation in str(operations).split(",")


@started
def accident(account: Account, kind: str, name: str, play: Callable[[str], None]) -> None:
    """Reclaim the first training job's instances, or kill the first containers."""
    for fault, what, kinds in (("spot-after", "reclaim", ("training-job",)), ("container-dies", "die", ())):
        after_it = _value(account, fault, "5s")
        with account.lock:
            if after_it is None or (kinds and kind not in kinds) or _done(account)[fault]:
                continue
            _done(account)[fault] += 1

        def happen(fault: str = fault, what: str = what) -> None:
            account.note("fault", fault, f"{kind}/{name}")
            play(what)

        timer = threading.Timer(seconds(after_it), happen)
        timer.daemon = True
        timer.start()
        account.at_end(timer.cancel)
