"""What an artifact of a stranger may do: archives that escape, names that lead out, code that looks around."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inference.artifact import ENTRIES, ArtifactError, digest_of, open_artifact, peek, unpack, verify
from inference.export import checksums
from pipelines import runs
from pipelines.local import sandbox
from pipelines.local import serve as serve_local
from pipelines.report import page
from pipelines.terminal import UserError
from tests.helpers import Verb, containers_and_networks, free_port, verb_environment
from tests.test_inference import archive, artifact, photo
from tests.test_serve_local import RUN, note, served

__all__ = ["archive", "artifact", "served"]  # fixtures
SOON = 2.0  # seconds in which whatever is refused is refused
Member = tuple[tarfile.TarInfo, bytes]


def entry(name: str, content: bytes = b"x", **facts: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in facts.items():
        setattr(info, key, value)
    return info, content


def packed(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def raw(*blocks: bytes) -> bytes:
    return gzip.compress(b"".join(blocks) + bytes(1024))


def header(name: str, kind: bytes = b"0", size: int = 0, field: bytes = b"") -> bytes:
    """A header as no library would write it."""
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = field or b"%011o\0" % size
    block[136:148], block[156:157], block[257:265] = b"00000000000\0", kind, b"ustar\x0000"
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(content: bytes, kind: bytes = b"x") -> bytes:
    return header("more", kind, len(content)) + content + bytes(-len(content) % 512)


def record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n".encode()
    length = len(text)
    while len(b"%d" % length) + len(text) != length:
        length = len(b"%d" % length) + len(text)
    return b"%d" % length + text


LINKS = {f"a {what} to {target}": packed(entry("there", b"", type=kind, linkname=target), entry("there/evil"))
         for what, kind in (("link", tarfile.SYMTYPE), ("hard link", tarfile.LNKTYPE))
         for target in ("..", "/etc", "/etc/passwd", ".", "loop")}  # fmt: skip
DEVICES = {name: packed(entry("code/inference.py", b"", type=kind)) for name, kind in (
    ("a pipe", tarfile.FIFOTYPE), ("a device", tarfile.CHRTYPE), ("a disk", tarfile.BLKTYPE),
    ("a contiguous file", tarfile.CONTTYPE), ("an unknown kind", b"Z"))}  # fmt: skip
NAMES = {f"the name {name!r}": packed(entry(name)) for name in (
    "../evil", "/tmp/evil", "a/../../evil", "..", "a/..", "code/\x1b]52;c;x\x07", "a\u202eb", "a\\..\\b", "a\nb",
    "\udcff", "/".join("d" * 20), "x" * 300)}  # fmt: skip
TWICE = {f"{first} and {second}": packed(entry(first), entry(second)) for first, second in (
    ("a", "a"), ("a", "A"), ("code/Inference.py", "code/inference.py"), ("a", "a/b"), ("a/b", "a"), ("A/b", "a/c"),
    ("stra\u00dfe", "STRASSE"), ("\u00e9", "e\u0301"), ("./a", "a"), ("a//b", "a/b"))}  # fmt: skip
HEADERS = {
    "a sparse file": raw(header("hole", b"S")),
    "a sparse file of POSIX": raw(extended(record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0")),
                                  header("hole", size=512), b"9" * 512),
    "a size below zero": raw(header("a", field=b"\xff" * 12)),
    "a size below zero, in whole blocks": raw(header("a", field=b"\xff" + (2**88 - 512).to_bytes(11, "big"))),
    "a size below zero in a record": raw(extended(record("size", "-512")), header("a")),
    "a size that is no number": raw(extended(record("size", "1e9")), header("a")),
    "a size that only Python reads": raw(extended(record("size", "1_0")), header("a"), bytes(512)),
    "an empty record": raw(extended(b"0 a=b\n"), header("a")),
    "a record that goes on": raw(extended(b"999 a=b\n"), header("a")),
    "a record of digits": raw(extended(b"1" * 8000), header("a")),
    "a header of 1 GB": raw(header("more", b"x", 2**30)),
    "a name of 1 MB": raw(header("more", b"L", 2**20), b"n" * 2**20),
    "a way out in a record": raw(extended(record("path", "../evil")), header("a")),
    "a way out in a long name": raw(extended(b"../evil\0", b"L"), header("a")),
    "a wrong checksum": raw(b"\1" + header("a")[1:]),
    "headers without end": raw(*[extended(record("a", "b"))] * (3 * ENTRIES + 1)),
    "a folder with content": raw(header("a", b"5", 512), bytes(512)),
    "no end": gzip.compress(header("a")),
}  # fmt: skip
SIZES = {
    "1 MB that becomes 1 GB": lambda: gzip.compress(header("a", size=2**30) + bytes(2**30 + 1024), 1),
    "a size that is a lie": lambda: gzip.compress(header("a", size=2**20) + bytes(2**28), 1),
    "zeros behind the end": lambda: gzip.compress(bytes(2**28), 1),
    "many streams": lambda: gzip.compress(b"") * 200_000,
    "many small files": lambda: packed(*(entry(f"{number}", b"") for number in range(ENTRIES + 1))),
    "many folders": lambda: packed(*(entry(f"{number}/a/b/c/d", b"") for number in range(ENTRIES))),
    "a name of gzip's without end": lambda: b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * 2**26,
    "9 GB": lambda: raw(header("a", size=2**33 - 1)),
    "an archive cut in two": lambda: packed(entry("a", os.urandom(99_999)))[:50_000],
    "a changed byte": lambda: packed(entry("a", b"y" * 9_999))[:-8] + bytes(4) + packed(entry("a", b"y" * 9_999))[-4:],
    "text": lambda: b"text",
    "nothing": lambda: b"",
}
HOSTILE: dict[str, Callable[[], bytes]] = {
    **{name: functools.partial(bytes, body) for name, body in (LINKS | DEVICES | NAMES | TWICE | HEADERS).items()},
    **SIZES,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_writes_nothing_outside(name: str, tmp_path: Path) -> None:
    path, folder = tmp_path / "model.tar.gz", tmp_path / "inside"
    path.write_bytes(HOSTILE[name]())
    began = time.monotonic()
    with pytest.raises(ArtifactError) as error:
        unpack(path, folder)
    assert time.monotonic() - began < SOON
    assert str(error.value).isprintable()
    assert {found.name for found in tmp_path.iterdir()} <= {"model.tar.gz", "inside"}
    assert not [found for found in folder.rglob("*") if found.is_symlink()]
    assert sum(found.stat().st_size for found in folder.rglob("*") if found.is_file()) < 2**26


def test_no_archive_becomes_larger_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large it is itself."""
    (tmp_path / "x.tar.gz").write_bytes(packed(entry("a", os.urandom(99_999))))
    unpack(tmp_path / "x.tar.gz", tmp_path / "once")
    monkeypatch.setattr("inference.artifact.LARGEST", 99_999)  # with its headers it has more
    with pytest.raises(ArtifactError, match="would become more than 99,999 bytes"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "again")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_what_packers_write_is_unpacked(form: int, tmp_path: Path) -> None:
    """GNU tar, Python and others: folders of their own, times as fractions, long names, several streams, padding."""
    long = "n" * 60 + "/" + "m" * 90
    members = [entry(".", b"", type=tarfile.DIRTYPE), entry("./a", b"1" * 513, mtime=1.5 if form else 1),
               entry("code", b"", type=tarfile.DIRTYPE), entry("code/b c.py"),
               entry(long), entry("empty", b"")]  # fmt: skip
    body = packed(*members, form=form)
    halves = gzip.decompress(body)
    for number, written in enumerate((body, gzip.compress(halves[:700]) + gzip.compress(halves[700:]) + bytes(99))):
        (tmp_path / "x.tar.gz").write_bytes(written)
        folder = tmp_path / str(number)
        unpack(tmp_path / "x.tar.gz", folder)
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert files == {"a": b"1" * 513, "code/b c.py": b"x", long: b"x", "empty": b""}
        with pytest.raises(ArtifactError, match="File exists"):  # nothing that is there is written over
            unpack(tmp_path / "x.tar.gz", folder)
    assert peek(tmp_path / "x.tar.gz", "a") == b"1" * 513
    assert peek(tmp_path / "x.tar.gz", "z") == b""


@pytest.mark.parametrize("made", ["/dev/zero", "pipe", "folder"])
def test_what_is_no_file_is_no_archive(made: str, tmp_path: Path) -> None:
    path = tmp_path / "model.tar.gz"
    if made == "pipe":
        os.mkfifo(path)
    elif made == "folder":
        path.mkdir()
    else:
        path.symlink_to(made)
    with pytest.raises(ArtifactError, match="there is no artifact at"):
        unpack(path, tmp_path / "inside")


NAMED = ["/dev/zero", "../../../../dev/zero", "/etc/hostname", "code", "pipe", "link", "link to a file", "linked/file",
         "code/../a", ""]  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_name_in_model_json_never_leads_out(name: str, artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(artifact, folder)
    (folder / "a").write_text("a")
    if name == "pipe":
        os.mkfifo(folder / name)
    elif name == "link":
        (folder / name).symlink_to("/dev/zero")
    elif name == "link to a file":
        (tmp_path / "empty").touch()
        (folder / name).symlink_to(tmp_path / "empty")
    elif name == "linked/file":
        (folder / "linked").symlink_to(tmp_path)
    began = time.monotonic()
    facts = json.loads((folder / "model.json").read_text())
    facts["files"] |= {"a": hashlib.sha256(b"a").hexdigest(), name: hashlib.sha256(b"").hexdigest()}
    (folder / "model.json").write_text(json.dumps(facts))
    with pytest.raises(ArtifactError, match=r"is missing or does not match its checksum|is no plain file"):
        verify(folder)
    assert time.monotonic() - began < SOON


BROKEN = ["[]", "{}", '{"files": 3}', '{"files": [1]}', "[" * 100_000, "1" * 9_000, "", "\udcff", '{"files": {"a": 1}}']


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_model_json_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ArtifactError, match=r"model.json is missing or broken|a is missing or does not match"):
        verify(tmp_path)


def test_a_large_model_json_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, path = tmp_path / "model", tmp_path / "model.tar.gz"
    folder.mkdir()
    (folder / "model.json").write_text('{"files": {}}')
    runs.pack(folder, path)
    assert (verify(folder), peek(path, "model.json")) == ({"files": {}}, b'{"files": {}}')
    monkeypatch.setattr("inference.artifact.FACTS", 9)
    with pytest.raises(ArtifactError, match=r"model.json is missing or broken"):
        verify(folder)
    with pytest.raises(ArtifactError, match=r"holds model.json of 13 bytes, more than 9"):
        peek(path, "model.json")


def changed(artifact: Path, folder: Path, code: str, file: str = "inference.py", honest: bool = True) -> Path:
    """An artifact with more code, whose checksums are right if it is honest."""
    shutil.copytree(artifact, folder / "changed")
    with (folder / "changed" / "code" / file).open("a") as text:
        text.write(code)
    if honest:
        model = folder / "changed" / "model.json"
        model.write_text(json.dumps(json.loads(model.read_text()) | {"files": checksums(folder / "changed")}))
    runs.pack(folder / "changed", folder / "changed.tar.gz")
    return folder / "changed.tar.gz"


@pytest.mark.parametrize("file", ["inference.py", "imaging.py", "sitecustomize.py", "json.py", "torch.py"])
def test_no_code_is_imported_before_it_is_checked(file: str, artifact: Path, tmp_path: Path) -> None:
    """Changed, or put beside the files that model.json names."""
    path = changed(artifact, tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')\n", file, honest=False)
    with pytest.raises(ArtifactError, match=r"checksum|not among the files"), open_artifact(path):
        pass
    assert not (tmp_path / "ran").exists()


def test_no_server_starts_on_what_does_not_match(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "WORK", tmp_path / "work")
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    path = changed(artifact, tmp_path, "# changed\n", honest=False)
    with pytest.raises(UserError, match=r"inference.py is missing or does not match its checksum"):
        serve_local.server(path, None, free_port()).__enter__()


def test_a_report_reads_no_archive_that_explodes(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"run": "r"}')
    (tmp_path / "model.tar.gz").write_bytes(gzip.compress(header("model.json", size=2**30) + bytes(2**30), 1))
    began = time.monotonic()
    assert any("model.tar.gz cannot be read" in note for note in page.read(tmp_path).notes)
    assert time.monotonic() - began < SOON


VARIABLES = {"AWS_SECRET_ACCESS_KEY": "s3cret", "AWS_SESSION_TOKEN": "s3cret", "HF_TOKEN": "s3cret",
             "MLFLOW_TRACKING_PASSWORD": "s3cret", "GITHUB_TOKEN": "s3cret", "HTTPS_PROXY": "http://me:s3cret@p",
             "INFERENCE_API_KEY": "s3cret", "UV_INDEX_URL": "https://me:s3cret@i", "DATABASE_URL": "s3cret",
             "SSH_AUTH_SOCK": "s3cret", "DOCKER_AUTH_CONFIG": "s3cret"}  # fmt: skip


def test_the_environment_of_an_artifact_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (VARIABLES | {"INFERENCE_QUEUE": "7", "OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    found = sandbox.environment()
    assert not found.keys() & VARIABLES.keys()
    assert (found["INFERENCE_QUEUE"], found["OMP_NUM_THREADS"], found["PATH"]) == ("7", "1", os.environ["PATH"])


LOOK = """
import json as _json, os as _os, pathlib as _pathlib, sys as _sys
def _look():
    import socket, subprocess
    found = {"secrets": [name for name, value in _os.environ.items() if "s3cret" in value]}
    def tried(what):
        try:
            return bool(what()) or True
        except BaseException as error:
            return False
    project = _pathlib.Path("@PROJECT@")
    found["wrote"] = [name for name in ("evil", "pipelines/__init__.py", ".cache/trusted", "src/evil.py",
                                        "artifacts/evil")
                      if tried(lambda: (project / name).open("a").write("# evil\\n"))]
    found["read"] = [name for name in ("configs/infrastructure.yaml", ".cache/trusted") if (project / name).exists()]
    found["asked"] = tried(lambda: socket.create_connection(("@HOST@", @PORT@), timeout=1))
    found["networks"] = [name for _, name in socket.if_nameindex() if name != "lo"]
    found["root"] = _os.getuid() == 0 and tried(lambda: _os.mknod("/dev/x", 0o20600, 5))
    found["system"] = tried(lambda: open("/usr/evil", "w"))
    print("FOUND " + _json.dumps(found) + "\\x1b]52;c;ZXZpbA==\\x07", flush=True)
if _os.path.isdir("/opt/scratch") or _os.path.isdir("/opt/ml/model"):  # in a container, never on this machine
    _look()
"""
SAY = """
import json as _json, os as _os
secrets = [name for name, value in _os.environ.items() if "s3cret" in value]
print("FOUND " + _json.dumps({"secrets": secrets}), flush=True)
"""


@pytest.fixture
def listener() -> Iterator[tuple[str, int, list[Any]]]:
    """Something on this machine that an artifact may want to phone."""
    calls: list[Any] = []
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()

        def answer() -> None:
            while True:
                try:
                    calls.append(server.accept()[1])
                except OSError:
                    return

        threading.Thread(target=answer, daemon=True).start()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
                host = probe.getsockname()[0]
            except OSError:
                host = "127.0.0.1"
        yield host, server.getsockname()[1], calls
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def stranger(served: Path, artifact: Path, tmp_path: Path, listener: tuple[str, int, list[Any]]) -> Path:
    """A copy of the project whose newest run is a stranger's, and looks around as soon as it is imported."""
    host, port, _ = listener
    code = LOOK.replace("@PROJECT@", str(served)).replace("@HOST@", host).replace("@PORT@", str(port))
    shutil.copy(changed(artifact, tmp_path, code), served / "artifacts" / RUN / "model.tar.gz")
    return served


def words(verb: str) -> list[str]:
    extra = ["--port", str(free_port())] if verb == "serve-local" else []
    return [verb, *extra, *(["--data", "pictures"] if verb == "batch-local" else []),
            *(["--image", "photo.png"] if verb in ("predict", "serve-local") else [])]  # fmt: skip


def data_for(project: Path, packed_data: Path) -> None:
    """What the verbs that need data are asked about."""
    (project / "pictures").mkdir()
    shutil.copy(project / "photo.png", project / "pictures")
    shutil.copytree(packed_data, project / "data" / "edges")
    fingerprint = json.loads((packed_data / "test" / "dataset.json").read_text())["fingerprint"]
    facts = {"run": RUN, "data": "data/edges", "dataset_fingerprint": fingerprint}
    (project / "artifacts" / RUN / "run.json").write_text(json.dumps(facts))


VERBS = ["predict", "evaluate", "batch-local", "serve-local"]


@pytest.mark.parametrize("verb_name", VERBS)
@pytest.mark.parametrize("why", ["LOCAL_MODE is process", "no Docker engine answers"])
def test_without_a_container_one_sentence_names_trust(
    stranger: Path, packed: Path, verb: Verb, verb_name: str, why: str
) -> None:
    data_for(stranger, packed)
    more = {"DOCKER_HOST": "unix:///nowhere"} | ({"COMPUTE__LOCAL_MODE": "process"} if "process" in why else {})
    done = verb(*words(verb_name), **more)
    assert (done.returncode, done.stderr.count("\n"), "FOUND" in done.stdout) == (1, 1, False)
    assert "was not made by a run or job of this project" in done.stderr
    assert "TRUST=1" in done.stderr
    if shutil.which("docker") or "process" in why:
        assert why in done.stderr


@pytest.mark.parametrize("verb_name", VERBS)
def test_trust_holds_for_one_call_and_hands_no_secret_on(
    stranger: Path, artifact: Path, packed: Path, verb: Verb, verb_name: str, tmp_path: Path
) -> None:
    data_for(stranger, packed)
    (tmp_path / "second").mkdir()
    shutil.copy(changed(artifact, tmp_path / "second", SAY), stranger / "artifacts" / RUN / "model.tar.gz")
    noted = (stranger / ".cache" / "trusted").read_text()
    done = verb(*words(verb_name), "--trust", "--mode", "process", **VARIABLES)
    assert done.returncode == 0, done.stderr
    line = next(line for line in (done.stdout + done.stderr).splitlines() if line.startswith("FOUND"))
    assert '"secrets": []' in line
    assert (stranger / ".cache" / "trusted").read_text() == noted
    assert "TRUST=1" in verb(*words(verb_name), "--mode", "process").stderr


@pytest.mark.container
@pytest.mark.parametrize("verb_name", VERBS)
def test_a_stranger_s_code_runs_where_it_can_do_nothing(
    stranger: Path, packed: Path, verb: Verb, verb_name: str, serving_image: str, listener: tuple[str, int, list[Any]]
) -> None:
    assert serving_image
    data_for(stranger, packed)
    before, kept = containers_and_networks(), (stranger / "pipelines" / "__init__.py").read_text()
    done = verb(*words(verb_name), **VARIABLES)
    assert done.returncode == 0, done.stderr + done.stdout
    text = next(line for line in (done.stdout + done.stderr).splitlines() if line.startswith("FOUND"))
    found = json.loads(text.removeprefix("FOUND ").partition("\\x1b")[0])
    assert found == {
        "secrets": [],
        "wrote": [],
        "read": [],
        "asked": False,
        "networks": [],
        "root": False,
        "system": False,
    }
    assert "\x1b" not in done.stdout + done.stderr
    assert not listener[2]
    assert (stranger / "pipelines" / "__init__.py").read_text() == kept
    assert containers_and_networks() == before
    assert not list((stranger / ".cache" / "local").iterdir())
    if verb_name == "evaluate":
        assert "metrics" in json.loads((stranger / "artifacts" / RUN / "evaluation.json").read_text())
    if verb_name == "batch-local":
        assert "photo.png" in (stranger / "artifacts" / RUN / "batch" / "pictures.jsonl").read_text()
    if verb_name in ("predict", "serve-local"):
        assert "photo.png: left" in done.stdout


LEAVE = """
import os as _os
for _name in ("evaluation.json", "evaluation.json.partial"):
    if _os.path.isdir("/opt/scratch"):
        _os.symlink("@TARGET@", "/opt/scratch/output/" + _name)
"""


@pytest.mark.container
def test_a_link_in_place_of_the_result_is_left_behind(
    stranger: Path, artifact: Path, packed: Path, verb: Verb, serving_image: str, tmp_path: Path
) -> None:
    assert serving_image
    data_for(stranger, packed)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "second").mkdir()
    path = changed(artifact, tmp_path / "second", LEAVE.replace("@TARGET@", str(tmp_path / "mine")))
    shutil.copy(path, stranger / "artifacts" / RUN / "model.tar.gz")
    verb("evaluate")
    assert not (stranger / "artifacts" / RUN / "evaluation.json").exists()
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.container
def test_a_stop_ends_the_container_too(stranger: Path, artifact: Path, serving_image: str, tmp_path: Path) -> None:
    assert serving_image
    (tmp_path / "second").mkdir()
    path = changed(artifact, tmp_path / "second", "print('begun', flush=True)\nimport time\ntime.sleep(600)\n")
    shutil.copy(path, stranger / "artifacts" / RUN / "model.tar.gz")
    before = containers_and_networks()
    process = subprocess.Popen([sys.executable, "-m", "pipelines", "predict", "--image", "photo.png"], cwd=stranger,
                               env=verb_environment(), stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    while "begun" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30)
    process.stdout.close()
    assert containers_and_networks() == before


def test_trust_is_of_the_content(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the run or the project is called, and whoever wrote what into the list."""
    digest, file = digest_of(archive), tmp_path / ".cache" / "trusted"
    monkeypatch.setattr(runs, "TRUSTED", file)
    assert not runs.trusted(archive)  # no list
    file.parent.mkdir()
    cases = {f"{digest} 2026\n": True, f"# mine\n\n{'0' * 64} a\n{digest}": True, "": False,
             f"{digest[:63]}\n": False, f"a {digest}\n": False, f"{digest.upper()}\n": False, f"{digest}x\n": False,
             "\udcff\0\n": False}  # fmt: skip
    for text, right in cases.items():
        file.write_text(text, errors="surrogateescape")
        assert runs.trusted(archive) == right, text
    file.write_text(f"{digest} a\n")
    copy = tmp_path / "elsewhere" / "model.tar.gz"
    copy.parent.mkdir()
    shutil.copy2(archive, copy)
    assert runs.trusted(copy)
    with copy.open("r+b") as other:
        other.seek(4)  # the time in gzip's header: nothing else changes
        other.write(struct.pack("<I", 1))
    os.utime(copy, ns=(archive.stat().st_atime_ns, archive.stat().st_mtime_ns))
    assert not runs.trusted(copy)
    assert zlib.decompress(copy.read_bytes(), 31) == zlib.decompress(archive.read_bytes(), 31)
    shutil.move(file, tmp_path / "list")
    file.symlink_to(tmp_path / "list")
    assert not runs.trusted(archive)
    file.unlink()
    os.mkfifo(file)
    assert not runs.trusted(archive)  # and does not wait for it


def test_a_list_that_cannot_be_written_costs_no_run(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "mine")  # what it leads to is no list of this project's
    for place in (tmp_path, tmp_path / "link"):
        monkeypatch.setattr(runs, "TRUSTED", place)
        runs._trust(archive.parent)
        assert "is not noted as trusted" in capsys.readouterr().out
    assert not (tmp_path / "mine").exists()


def test_a_copied_run_is_a_stranger_s_in_another_project(served: Path, verb: Verb) -> None:
    assert verb("predict", "--image", "photo.png", DOCKER_HOST="unix:///nowhere").returncode == 0
    other = served.parent / "another name"
    shutil.copytree(served, other, symlinks=True, ignore=shutil.ignore_patterns(".cache"))
    command = [sys.executable, "-m", "pipelines", "predict", "--image", "photo.png"]
    environment = verb_environment() | {"COMPUTE__LOCAL_MODE": "process"}
    done = subprocess.run(command, cwd=other, env=environment, capture_output=True, text=True)
    assert (done.returncode, "TRUST=1" in done.stderr) == (1, True)
    note(other, other / "artifacts" / RUN / "model.tar.gz")
    assert subprocess.run(command, cwd=other, env=environment, capture_output=True).returncode == 0
    served.rename(served.parent / "renamed")
    again = subprocess.run(command, cwd=served.parent / "renamed", env=environment, capture_output=True)
    assert again.returncode == 0


def test_clean_forgets_no_trust(served: Path, verb: Verb) -> None:
    (served / ".cache" / "local").mkdir()
    (served / ".cache" / "image-build.log").touch()
    command = [sys.executable, "pipelines/environment.py", "--clean"]
    assert subprocess.run(command, cwd=served).returncode == 0
    assert [path.name for path in (served / ".cache").iterdir()] == ["trusted"]
    assert verb("predict", "--image", "photo.png", DOCKER_HOST="unix:///nowhere").returncode == 0


def test_an_answer_that_is_none_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo.png").write_bytes(photo())
    for body in (b"", b"[]", b'{"labels": []}', b"null", b'{"labels": ["a"], "probabilities": [3]}', b"\xff"):
        monkeypatch.setattr(serve_local, "ask", lambda *_, body=body: (200, body))
        with pytest.raises(UserError, match="is no classification"):
            serve_local.ask_about(tmp_path / "photo.png", b"", 1)
