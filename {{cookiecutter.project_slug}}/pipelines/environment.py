"""Make the project's environment in `.venv` with uv, which is installed there when the machine has none.

    python3 pipelines/environment.py                    # what `make setup` runs: all groups of pyproject.toml but timm
    python3 pipelines/environment.py --group laptop     # only that one; other options are handed to `uv pip install`
    python3 pipelines/environment.py --audit            # what `make audit` runs: known vulnerabilities of what it holds
    python3 pipelines/environment.py --clean            # what `make clean` runs: caches and leftovers go

It runs on the system's Python, so it uses the standard library only. A committed `uv.lock` is respected; without one
the newest versions inside the ranges of pyproject.toml are installed. `--resolution lowest-direct --upgrade` installs
the lowest ones, and `--resolution highest --upgrade` the newest, whatever the lock says. `images.torch` names the build
of torch; where that cannot be had, it is PyPI's.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

GROUPS = ("container", "serving", "laptop", "dev")
MINIMUM = (3, 11)
CACHES = (".mypy_cache", ".pytest_cache", ".ruff_cache")
# Of a lock that was made with PyPI's torch: what only that build needs.
LOCKED = re.compile(r'(?m)^name = "((?:nvidia|cuda)-[\w-]+|triton|torch|torchvision)"\nversion = "([^"]+)"')
AUDITOR = "pip-audit>=2.9,<3"  # in an environment of its own, that uv makes and keeps


def find_uv(environment: Path) -> str:
    """The uv on PATH, or the one in the environment, installed there with pip when it is missing."""
    own = environment / "bin" / "uv"
    found = shutil.which("uv")
    if found or own.exists():
        return found or str(own)
    if sys.version_info < MINIMUM:
        sys.exit(
            f"error: this is Python {sys.version.split()[0]}; install Python 3.11 or newer, or uv, which brings one"
        )
    print("uv is not installed: putting it into .venv", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(environment)], capture_output=True, text=True)
    if made.returncode:
        shutil.rmtree(environment, ignore_errors=True)
        detail = (made.stdout + made.stderr).strip().splitlines()
        sys.exit(f"error: `{sys.executable} -m venv` failed ({detail[-1] if detail else 'no message'}); install the "
                 "package python3-venv, or uv")  # fmt: skip
    quiet = ["-q", "--disable-pip-version-check"]
    if subprocess.run([str(environment / "bin" / "python"), "-m", "pip", "install", *quiet, "uv"]).returncode:
        shutil.rmtree(environment, ignore_errors=True)
        sys.exit("error: pip could not install uv (see above); check the network or the proxy, or install uv yourself")
    return str(own)


def certificates() -> "str | None":
    """The bundle of certificates that this shell's programs are told to trust, if any."""
    names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "CURL_CA_BUNDLE")
    found = [os.environ[name] for name in names if Path(os.environ.get(name, "")).is_file()]
    return found[0] if found else None


def locked_versions(lock: Path) -> "dict[str, str]":
    """The versions that a lock has of torch, torchvision, and what only PyPI's build needs; without one, none."""
    return dict(LOCKED.findall(lock.read_text(encoding="utf-8"))) if lock.is_file() else {}


def torch_build() -> str:
    """What `images.torch` asks uv for; `auto` is what this machine's driver runs, and the CPU's build without any."""
    file = Path("configs", "infrastructure.yaml")  # which the template, whose environment this makes too, has not
    found = re.search(r"(?m)^  torch: *([\w.]+)", file.read_text(encoding="utf-8")) if file.is_file() else None
    wanted = os.environ.get("IMAGES__TORCH") or (found[1] if found else "auto")
    return "auto" if wanted == "cuda" else wanted


def audit(uv: str, environment: Path, settings: "dict[str, str]", options: "list[str]") -> int:
    """Look every installed version up in PyPI's list of known vulnerabilities; 1 when there are some, or no answer."""
    listed = subprocess.run(
        [uv, "pip", "freeze", "--python", str(environment)], env=settings, capture_output=True, text=True
    )
    if listed.returncode:
        sys.exit(f"error: uv could not list what is installed: {listed.stderr.strip()}; `make setup`")
    requirements = Path(".cache", "audit-requirements.txt")
    requirements.parent.mkdir(exist_ok=True)
    requirements.write_text(re.sub(r"\+\S+", "", listed.stdout), encoding="utf-8")  # torch 2.13.0+cpu is 2.13.0
    command = [uv, "tool", "run", "--from", AUDITOR, "pip-audit", "--strict", "--no-deps", "--disable-pip"]
    command += ["--progress-spinner", "off", "--requirement", str(requirements), *options]
    return subprocess.run(command, env=settings).returncode


def main(arguments: "list[str]") -> int:
    """Create or update the environment of the project in the current folder; see the module's docstring."""
    if "--clean" in arguments:
        for path in [*map(Path, CACHES), *Path(".cache").glob("*")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "trusted":  # which runs were made here; see runs.py
                path.unlink(missing_ok=True)
        return 0
    environment = Path(".venv").absolute()
    uv = find_uv(environment)
    inherited = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    settings = {**inherited, "UV_PROJECT_ENVIRONMENT": str(environment)}
    bundle = certificates()
    if bundle:
        settings["SSL_CERT_FILE"] = bundle  # the one name that uv knows
    if "--audit" in arguments:
        return audit(uv, environment, settings, [word for word in arguments if word != "--audit"])
    groups = [] if "--group" in arguments else [word for group in GROUPS for word in ("--group", group)]
    install = [uv, "pip", "install", "--python", str(environment)]
    build = ["--torch-backend", torch_build()]
    venv = [] if (environment / "bin" / "python").exists() else [[uv, "venv", "--allow-existing", str(environment)]]
    wanted = [*install, "-r", "pyproject.toml", *groups, *arguments]
    ways = [[*venv, [*wanted, *build]], [*venv, wanted]]  # the second where the first fails
    if any(word.startswith("--torch-backend") for word in arguments):
        ways = ways[1:]
    elif Path("uv.lock").exists() and not any(word.startswith("--resolution") for word in arguments):
        sync = [uv, "sync", "--locked", "--inexact", *groups, *arguments]
        locked = locked_versions(Path("uv.lock"))
        torch = [f"{name}=={locked[name]}" for name in ("torch", "torchvision") if name in locked]
        rest = [word for name in locked for word in ("--no-install-package", name)]
        ways = [[[*sync, *rest], [*install, *torch, *build]], [sync]] if "container" in sync else [[sync]]
    sys.dont_write_bytecode = True  # the template makes its own environment with this file, and would bake that
    sys.path.append(str(Path(__file__).resolve().parent.parent / "src"))
    from progress import waiting

    quiet = [] if arguments else ["--quiet"]  # not two hundred names; what is wrong is said all the same
    print("installing what pyproject.toml names into .venv; the first time this takes minutes", file=sys.stderr)
    for number, commands in enumerate(ways):
        with waiting("uv", alone=False):
            errors = None if number == len(ways) - 1 else subprocess.PIPE  # what is wrong is said by the last way
            for command in commands:
                done = subprocess.run([*command, *quiet], env=settings, stderr=errors, text=True)
                if done.returncode:
                    break
        if not done.returncode:
            sys.stderr.write(done.stderr or "")
            break
    else:
        print("error: the environment is not complete (see above); nothing else was changed", file=sys.stderr)
        return 1
    if number:
        print(f"the index of PyTorch's builds ({build[1]}) does not answer, so torch is PyPI's build", file=sys.stderr)
    (environment / ".ready").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
