"""A registry of images on 127.0.0.1 that takes what `docker push` sends, and answers as ECR does."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from botocore.exceptions import ClientError


class Registry:
    """What was pushed: blobs and manifests by digest, tags; and the calls of ECR's client that the verbs make."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}  # by digest: media type and text
        self.tags: dict[str, str] = {}

    def keep(self, tag: str, kind: str, text: bytes) -> str:
        """A manifest, and the tag that it has from now on."""
        digest = f"sha256:{hashlib.sha256(text).hexdigest()}"
        self.manifests[digest] = (kind, text)
        if not tag.startswith("sha256:"):
            self.tags[tag] = digest
        return digest

    def get_authorization_token(self) -> dict[str, Any]:
        """A user and a password."""
        return {"authorizationData": [{"authorizationToken": base64.b64encode(b"AWS:secret").decode()}]}

    def describe_images(self, repositoryName: str, imageIds: list[dict[str, str]]) -> dict[str, Any]:
        """The media type of a tag's manifest."""
        digest = self.tags.get(imageIds[0]["imageTag"])
        if digest is None:
            raise ClientError({"Error": {"Code": "ImageNotFoundException"}}, "DescribeImages")
        return {"imageDetails": [{"imageManifestMediaType": self.manifests[digest][0]}]}

    def batch_get_image(self, repositoryName: str, imageIds: list[dict[str, str]]) -> dict[str, Any]:
        """A manifest."""
        asked = imageIds[0]
        digest = asked.get("imageDigest") or self.tags[asked["imageTag"]]
        return {"images": [{"imageManifest": self.manifests[digest][1].decode()}]}

    def put_image(self, repositoryName: str, imageManifest: str, imageManifestMediaType: str, imageTag: str) -> None:
        """A manifest of blobs that were pushed, as ECR demands."""
        image = json.loads(imageManifest)
        assert image["mediaType"] == imageManifestMediaType
        assert {part["digest"] for part in (image["config"], *image["layers"])} <= {*self.blobs}
        self.keep(imageTag, imageManifestMediaType, imageManifest.encode())


class Answers(BaseHTTPRequestHandler):
    """The registry's side of a push: https://distribution.github.io/distribution/spec/api/."""

    protocol_version = default_request_version = "HTTP/1.1"  # the second for what is no request: docker tries TLS first
    registry: Registry
    uploads: dict[str, bytes]

    def log_message(self, *_: Any) -> None:
        """Nothing is said."""

    def _answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": "0"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def do_GET(self) -> None:
        kind, _, name = self.path.partition("?")[0].rpartition("/")
        if self.path == "/v2/":
            return self._answer(200, Docker_Distribution_Api_Version="registry/2.0")
        digest = self.registry.tags.get(name, name)
        found: tuple[str, bytes] | None = self.registry.manifests.get(digest)
        if kind.endswith("/blobs") and name in self.registry.blobs:
            found = ("application/octet-stream", self.registry.blobs[name])
        if found is None:
            return self._answer(404)
        self._answer(200, Content_Type=found[0], Content_Length=str(len(found[1])), Docker_Content_Digest=digest)
        if self.command == "GET":
            self.wfile.write(found[1])
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self._body()
        name = uuid.uuid4().hex
        self.uploads[name] = b""
        self._answer(202, Location=f"{self.path.partition('?')[0].rstrip('/')}/{name}", Range="0-0")

    def do_PATCH(self) -> None:
        name = self.path.rpartition("/")[2]
        self.uploads[name] += self._body()
        self._answer(202, Location=self.path, Range=f"0-{len(self.uploads[name]) - 1}")

    def do_PUT(self) -> None:
        place, _, query = self.path.partition("?")
        kind, _, name = place.rpartition("/")
        body = self._body()
        if kind.endswith("/manifests"):
            digest = self.registry.keep(name, self.headers["Content-Type"], body)
        else:
            content = self.uploads.pop(name) + body
            digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
            assert digest.removeprefix("sha256:") in query
            self.registry.blobs[digest] = content
        self._answer(201, Location=place, Docker_Content_Digest=digest)


@contextlib.contextmanager
def running() -> Iterator[tuple[str, Registry]]:
    """The address of a registry, which docker trusts because it is this machine's, and what it holds."""
    kept = Registry()
    answers = type("Here", (Answers,), {"registry": kept, "uploads": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}", kept
        finally:
            server.shutdown()
