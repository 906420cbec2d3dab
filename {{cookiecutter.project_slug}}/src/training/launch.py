"""Start training on this host: the command of every training job, PID 1 of its container.

    SourceCode(source_dir="src", command="exec python3 training/launch.py")

SDK V3's drivers, and the shell above them, pass no signal on: SIGTERM from a spot interruption would never arrive. With
one rank a host this process becomes the training script. With several GPUs, or with restarts, torchrun starts the
ranks, gets the signal from here, and leaves them 110 of SageMaker's 120 seconds to save a checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the source root, instead of this script's folder

from training import interruption
from training.config import ConfigurationError, from_command_line

SCRIPT = Path(__file__).resolve().parent / "train.py"
GRACE = 110  # seconds between SIGTERM and SIGKILL for ranks under torchrun


def network(environment: Mapping[str, str]) -> dict[str, str]:
    """What the SDK's own driver sets for NCCL, where the interface and the adapter that it names exist."""
    interface = environment.get("SM_NETWORK_INTERFACE_NAME", "")
    settings = {"NCCL_SOCKET_IFNAME": interface} if interface and Path("/sys/class/net", interface).exists() else {}
    if Path("/sys/class/infiniband").is_dir():  # an Elastic Fabric Adapter
        settings |= {"FI_PROVIDER": "efa", "NCCL_PROTO": "simple"}
    return settings


def command(environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """What to start on this host, from the `SM_*` variables: the words, and variables to add.

    Returns:
        The training script itself for one rank a host, else torchrun with one rank a GPU.
    """
    hosts, rank = int(environment.get("SM_HOST_COUNT") or 1), environment.get("SM_CURRENT_HOST_RANK") or "0"
    ranks = int(environment.get("SM_NUM_GPUS") or 0) or 1
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
    # Ranks that start again must not find the addresses of the dead ones in the agent's own store (torch 2.15).
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return [*words, f"--max-restarts={restarts}", f"--shutdown-timeout={GRACE}", str(SCRIPT)], variables


def main() -> int:
    """Become the training script, or run torchrun and pass signals on; 143 after a stop that was honoured."""
    words, variables = command(os.environ)
    os.environ.update(network(os.environ) | variables)
    if words == [sys.executable, str(SCRIPT)]:
        os.execv(words[0], words)  # noqa: S606  (a program and its words, no shell)
    with tempfile.TemporaryDirectory() as folder:
        stopped = Path(folder, "stopped")
        os.environ[interruption.MARK] = str(stopped)
        agent = subprocess.Popen(words)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: agent.terminate())
        code = agent.wait()
        return interruption.EXIT_CODE if stopped.exists() else code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
