"""Docker by its command line: containers, networks, images, and a `docker` program that pushes to the account's ECR."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rehearsal import operations
from rehearsal.operations import Account, Answer, Call, Request, control

REAL = shutil.which("docker") or "docker"  # found before the rehearsal's own is put before it
ECR = re.compile(
    r"\d{12}\.dkr\.ecr\.[\w-]+\.amazonaws\.com(?:\.cn)?/(?P<name>[^:@]+)(?::(?P<tag>[^@]+))?(?:@(?P<digest>.+))?"
)
PUSHES = ("BatchCheckLayerAvailability", "InitiateLayerUpload", "UploadLayerPart", "CompleteLayerUpload", "PutImage")
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
SHIM = """#!/bin/sh
# The account's ECR is no registry: `push` tells the rehearsal of the image, which stays on this machine.
case "$1 $*" in
  "login "*.dkr.ecr.*) cat >/dev/null; echo "Login Succeeded"; exit 0;;
  "logout "*.dkr.ecr.*) exit 0;;
  "push "*.dkr.ecr.*) for image in "$@"; do :; done; exec {python} -c '
import json, os, sys, urllib.error, urllib.request
asked = json.dumps({{"image": sys.argv[1], "key": os.environ.get("AWS_ACCESS_KEY_ID", "")}}).encode()
try:
    urllib.request.urlopen(urllib.request.Request("{front}/_rehearsal/push", data=asked))
except urllib.error.HTTPError as error:
    sys.exit("denied: " + json.loads(error.read())["error"])
print("pushed", sys.argv[1])' "$image";;
esac
exec {docker} "$@"
"""


def run(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """One command of Docker's."""
    return subprocess.run([REAL, *words], input=text, capture_output=True, text=True, errors="replace")


def absent() -> str:
    """Why there is no engine; empty when there is one."""
    try:
        done = run("version", "--format", "{{.Server.Version}}")
    except OSError as error:
        return str(error)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


@dataclass
class Container:
    """A container that was started, its log on its way to whoever reads it."""

    name: str
    process: subprocess.Popen[str]
    readers: list[threading.Thread] = field(default_factory=list)

    @property
    def code(self) -> int | None:
        """Its exit code; None as long as it runs."""
        return self.process.poll()

    def wait(self) -> int:
        """Its exit code, when all of its log is read."""
        code = self.process.wait()
        for reader in self.readers:
            reader.join()
        return code

    def stop(self, seconds: int) -> None:
        """SIGTERM, and SIGKILL after some seconds; also where Docker has yet to make it."""
        while self.code is None and run("stop", "--time", str(seconds), self.name).returncode:
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL."""
        run("kill", self.name)

    def address(self, port: int) -> str:
        """Where on this machine a published port answers."""
        for _ in range(100):
            if found := run("port", self.name, f"{port}/tcp").stdout.split():
                return found[0].replace("0.0.0.0", "127.0.0.1")  # noqa: S104
            if self.code is not None:
                break
            time.sleep(0.1)
        return ""


def start(
    account: Account, image: str, name: str, words: Sequence[str] = (), entrypoint: Sequence[str] = (),
    env: Mapping[str, str] | None = None, mounts: Mapping[str, Path] | None = None, more: Sequence[str] = (),
    read: Callable[[Iterable[str]], None] | None = None,
) -> Container:  # fmt: skip
    """Run a container.

    Args:
        account: that it belongs to, and ends with.
        image: as `image` found it.
        name: of its own.
        words: the command's.
        entrypoint: instead of the image's.
        env: variables.
        mounts: folders here, by path inside.
        more: options of `docker run`.
        read: is handed its lines in a thread; without it nobody reads them.
    """
    options = ["--rm", "--name", name, "--label", f"rehearsal={account.name}", *more]
    options += [word for key, value in (env or {}).items() for word in ("--env", f"{key}={value}")]
    options += [word for path, folder in (mounts or {}).items() for word in ("--volume", f"{folder}:{path}")]
    first = ["--entrypoint", entrypoint[0]] if entrypoint else []
    command = [REAL, "run", *options, *first, image, *entrypoint[1:], *words]
    # In a session of its own: Ctrl-C is for the program that runs in the account, and ends no container.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE if read else subprocess.DEVNULL, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    made = Container(name, process)
    if read and process.stdout:
        made.readers.append(account.spawn(read, process.stdout))
    return made


def network(account: Account, name: str, isolated: bool) -> str:
    """A network of the account's, with no way out where it is isolated."""
    done = run("network", "create", "--label", f"rehearsal={account.name}", *(["--internal"] if isolated else []), name)
    if done.returncode:
        raise RuntimeError(f"InternalServerError: Docker made no network: {done.stderr.strip()}")
    return name


def image(account: Account, uri: str, role: str) -> str:
    """The name on this machine of an image that a request names.

    Raises:
        LookupError: when it is not where the request says, or the role may not have it.
    """
    place = ECR.fullmatch(uri)
    if place is None:
        if run("image", "inspect", uri).returncode:
            raise LookupError(f"ClientError: the image {uri} is not on this machine, and a rehearsal pulls none")
        return uri
    digest, tag = place["digest"], place["tag"] or "latest"
    found = account.client("ecr", role).batch_get_image(
        repositoryName=place["name"], imageIds=[{"imageDigest": digest} if digest else {"imageTag": tag}]
    )
    if not found["images"]:
        raise LookupError(f"ClientError: Cannot find image {uri}: {found['failures'][0]['failureReason']}")
    known = account.things["image"].get(f"{place['name']}@{found['images'][0]['imageId']['imageDigest']}", {})
    return str(known.get("local", uri))


@control("push")
def push(account: Account, request: Request) -> Answer:
    """What `docker push` does: the image is in ECR afterwards, when who asks may put it there."""
    uri = request["image"]
    place, facts = ECR.fullmatch(uri), json.loads(run("image", "inspect", uri).stdout or "[]")
    if place is None or not facts:
        raise ValueError(f"{uri} does not exist locally")
    who = str(account.keys.get(request["key"], request["key"]))
    for name in PUSHES:
        for hook in operations.BEFORE:
            hook(account, Call("ecr", name, {"repositoryName": place["name"]}, who))
    kind = facts[0].get("Descriptor", {}).get("mediaType", MANIFEST)
    layers = [{"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", "size": 1, "digest": layer}
              for layer in facts[0]["RootFS"]["Layers"]]  # fmt: skip
    config = {"mediaType": "application/vnd.docker.container.image.v1+json", "size": 1, "digest": facts[0]["Id"]}
    text = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers})
    made = account.client("ecr").put_image(
        repositoryName=place["name"], imageTag=place["tag"] or "latest", imageManifest=text, imageManifestMediaType=kind
    )
    keep(account, place["name"], made["image"]["imageId"]["imageDigest"], uri)
    return {}


def keep(account: Account, repository: str, digest: str, uri: str) -> None:
    """Remember the image behind a digest under a name of the account's own, which goes with it."""
    local = f"{account.name}/{repository}:{digest.rpartition(':')[2][:12]}"
    run("tag", uri, local)
    account.things.setdefault("image", {})[f"{repository}@{digest}"] = {"local": local}
    account.at_end(run, "rmi", "--no-prune", local)
    account.at_end(run, "rmi", "--no-prune", uri)


def put_first(account: Account) -> None:
    """Write the `docker` that programs in the account find first on their PATH."""
    account.things.setdefault("image", {})
    program = account.folder / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(SHIM.format(python=sys.executable, front=account.front, docker=REAL))
    program.chmod(0o755)


def give_back(folder: Path, local: str) -> None:
    """Files that containers wrote belong to root: give them to who runs this, who is to read and delete them."""
    if os.getuid():
        owner = f"{os.getuid()}:{os.getgid()}"
        run("run", "--rm", "--volume", f"{folder}:/given", "--entrypoint", "chown", local, "-R", owner, "/given")


def clean(account: Account) -> None:
    """Remove all containers and networks of the account."""
    mine = ("--quiet", "--filter", f"label=rehearsal={account.name}")
    for _ in range(20):
        if found := run("ps", "--all", *mine).stdout.split():  # one may have been in the making
            run("rm", "--force", *found)
        found = run("network", "ls", *mine).stdout.split()
        if not found or not run("network", "rm", *found).returncode:
            return
        time.sleep(0.5)


def facts_of(name: str) -> dict[str, Any]:
    """What Docker knows of a container; empty when there is none."""
    found = json.loads(run("inspect", name).stdout or "[]")
    return dict(found[0]) if found else {}
