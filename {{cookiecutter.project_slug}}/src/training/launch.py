"""Start training on this host: the command of every training job, PID 1 of its container.

    SourceCode(source_dir="src", command="exec python3 training/launch.py")

SDK V3's drivers, and the shell above them, pass no signal on: SIGTERM from a spot interruption would never arrive. With
one rank in all this process becomes the training script. Otherwise it stays, to pass signals on and to say why a rank
died that could not say so itself. With several GPUs, or with restarts, torchrun starts the ranks, and leaves them 110
of SageMaker's 120 seconds to save a checkpoint (where torch is too old to be told, as 2.10 is: 30).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the source root, instead of this script's folder

from training import interruption
from training.config import ConfigurationError, from_command_line

SCRIPT = Path(__file__).resolve().parent / "train.py"
GRACE = 110  # seconds between SIGTERM and SIGKILL for ranks under torchrun
DIED = re.compile(rb"failed \(exitcode: (-?\d+)\)")  # what torchrun says of the first rank that fails
HINTS = {"SIGKILL": "mostly because memory ran out", "SIGABRT": "as NCCL does when a rank does not answer"}


def network(environment: Mapping[str, str]) -> dict[str, str]:
    """What the SDK's own driver sets for NCCL, where the interface and the adapter that it names exist.

    And that a collective which times out ends its rank, also where torchrun does not set it.
    """
    interface = environment.get("SM_NETWORK_INTERFACE_NAME", "")
    settings = {"NCCL_SOCKET_IFNAME": interface} if interface and Path("/sys/class/net", interface).exists() else {}
    settings["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = environment.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") or "1"
    if Path("/sys/class/infiniband").is_dir():  # an Elastic Fabric Adapter
        settings |= {"FI_PROVIDER": "efa", "NCCL_PROTO": "simple"}
    return settings


def command(environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """What to start on this host, from the `SM_*` variables: the words, and variables to add.

    Returns:
        The training script itself for one rank a host, else torchrun with one rank a GPU (or PROCESSES_PER_HOST).
    """
    hosts, rank = int(environment.get("SM_HOST_COUNT") or 1), environment.get("SM_CURRENT_HOST_RANK") or "0"
    ranks = int(environment.get("PROCESSES_PER_HOST") or environment.get("SM_NUM_GPUS") or 0) or 1
    address = environment.get("SM_MASTER_ADDR") or "127.0.0.1"
    port = environment.get("SM_MASTER_PORT") or "7777"
    try:
        restarts = from_command_line([], environment).max_restarts
    except ConfigurationError:  # the script says what is wrong
        restarts = 0
    if ranks == 1 and not restarts:
        group = {"RANK": rank, "WORLD_SIZE": str(hosts), "LOCAL_RANK": "0"}
        group |= {"MASTER_ADDR": address, "MASTER_PORT": port}
        return [sys.executable, str(SCRIPT)], group if hosts > 1 else {}
    words = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={hosts}", f"--nproc-per-node={ranks}"]
    if hosts > 1:
        words += [f"--node-rank={rank}", f"--master-addr={address}", f"--master-port={port}"]
    else:
        words += ["--standalone"]
    # Ranks that start again must not find the addresses of the dead ones in the agent's own store (torch 2.15). The
    # time is a variable, as older torch stops at an option that it does not know.
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE)}
    return [*words, f"--max-restarts={restarts}", str(SCRIPT)], variables


def explain(code: int, failure: Path) -> None:
    """Write why the job failed, unless a rank that could say so did: others only saw that it was gone."""
    said = failure.read_text(encoding="utf-8") if failure.exists() else ""
    if code < 0 and not said.startswith("error: "):
        name = signal.Signals(-code).name
        hint = f", {HINTS[name]}" if name in HINTS else ""
        said = f"error: a process of the training was ended by {name}{hint}; the log's last lines may say more"
    failure.write_text(said or f"error: a process of the training ended with exit code {code} and gave no reason",
                       encoding="utf-8")  # fmt: skip


def main() -> int:
    """Become the training script, or run it or torchrun and pass signals on; 143 after a stop that was honoured."""
    words, variables = command(os.environ)
    os.environ.update(network(os.environ) | variables)
    if not variables:
        os.execv(words[0], words)  # noqa: S606  (a program and its words, no shell)
    codes: list[int] = []  # of ranks that failed, as torchrun says it
    asked: list[int] = []  # the signals that came here

    def stop(number: int, _: object) -> None:
        asked.append(number)
        agent.terminate()

    def copy() -> None:
        assert agent.stderr is not None
        with agent.stderr:
            for line in agent.stderr:
                codes.extend(int(code) for code in DIED.findall(line))
                with contextlib.suppress(OSError):  # nobody reads it any more; the ranks must not wait for that
                    os.write(2, line)

    with tempfile.TemporaryDirectory() as folder:
        stopped = Path(folder, "stopped")
        os.environ[interruption.MARK] = str(stopped)
        agent = subprocess.Popen(words, stderr=subprocess.PIPE)
        reader = threading.Thread(target=copy, daemon=True)
        reader.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        code = agent.wait()
        reader.join(timeout=5)  # a process that a rank has left behind may hold the pipe
        # torchrun ends the peers of a rank that failed by SIGTERM too, and that is no stop that somebody asked for.
        honoured = stopped.exists() and bool(asked or codes[-1:] in ([], [interruption.EXIT_CODE]))
        if code and not honoured and os.environ.get("SM_OUTPUT_FAILURE"):
            with contextlib.suppress(OSError):  # the disk may be what failed
                explain(codes[-1] if codes else code, Path(os.environ["SM_OUTPUT_FAILURE"]))
        return interruption.EXIT_CODE if honoured else code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
