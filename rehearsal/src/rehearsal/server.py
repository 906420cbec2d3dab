"""The account's address: what modules take over is carried out here, all else by moto; refusals are AWS's."""

from __future__ import annotations

import http.client
import http.server
import json
import logging
import re
import socket
import traceback
import urllib.request
import warnings
from typing import Any
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError
from moto.server import ThreadedMotoServer

from rehearsal import gaps, operations, wire
from rehearsal.operations import Account, Answer, Call, NoAnswer, Refused, Request, control, refuse

READS = re.compile(r"(Describe|List|Get|Head|Batch(Get|Check)|Search|Query|Filter|Invoke)")
HOPS = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "host", "content-length", "server", "date"}


def start(account: Account) -> None:
    """Moto, and the front before it, on free ports of 127.0.0.1; both end with the account."""
    gaps.mend()
    for name in ("werkzeug", "moto"):  # what moto lacks is noted as a gap, and told to who asked
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"moto\.")
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    account.moto = f"http://127.0.0.1:{moto.get_host_and_port()[1]}"
    account.at_end(moto.stop)
    urllib.request.urlopen(f"{account.moto}/moto-api/reset", data=b"").close()  # noqa: S310  of an account before
    handler = type("Front", (Front,), {"account": account})
    front = Server(("127.0.0.1", 0), handler)
    account.front = f"http://127.0.0.1:{front.server_address[1]}"
    account.spawn(front.serve_forever, 0.1)
    account.at_end(front.server_close)
    account.at_end(front.shutdown)


@control("events")
def events(account: Account, request: Request) -> Answer:
    """What has happened since an event of that number."""
    return {"events": account.events[request.get("since", 0) :]}


class Server(http.server.ThreadingHTTPServer):
    """Quiet about clients that hang up."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is the client's business."""


class Front(http.server.BaseHTTPRequestHandler):
    """One connection of a client."""

    account: Account
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Nothing is said."""

    def handle_expect_100(self) -> bool:
        """Let a client send its body at once: it waits for this."""
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()
        return True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _say(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD" or "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _any(self) -> None:
        body, headers = self._body(), {name.lower(): value for name, value in self.headers.items()}
        if self.path.startswith("/_rehearsal/"):
            return self._control(body)
        call = Call("s3", "", {}, "", headers, body)
        try:
            key, call.service, call.operation, call.request = wire.asked(self.command, self.path, headers, body)
            call.principal = self.account.keys.get(key, key)
            reply = self._carry_out(call)
        except NoAnswer:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        except Refused as error:
            self.account.note("refused", f"{call.service}:{call.operation}", f"{error.code}: {error}")
            reply = wire.refused(call.service, error, self.path)
        return self._say(*reply)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = do_OPTIONS = _any  # noqa: N815

    def _carry_out(self, call: Call) -> wire.Reply:
        for hook in operations.BEFORE:
            hook(self.account, call)
        operations.CALLER.set(call)
        token, known = (
            wire.token(call.service, call.operation, call.request),
            self.account.things.setdefault("token", {}),
        )
        if token in known:
            reply: wire.Reply = known[token]["reply"]
            return reply
        handler = operations.HANDLERS.get((call.service, call.operation))
        answer: dict[str, Any] = {}
        try:
            if handler is None:
                reply = self._forward(call)
            else:
                answer = handler(self.account, call.request) or {}
                reply = wire.answered(call.service, call.operation, answer)
        except ClientError as error:  # moto's, passed on by a handler
            said, status = error.response["Error"], error.response["ResponseMetadata"]["HTTPStatusCode"]
            raise refuse(said["Code"], said["Message"], status) from error
        except (KeyError, TypeError, ValueError, OSError, BotoCoreError) as error:  # a fault of the rehearsal's own
            trace = traceback.format_exc()
            self.account.note("broken", f"{call.service}:{call.operation}", trace)
            raise refuse("InternalFailure", f"the rehearsal failed at {call.operation}: {trace}", 500) from error
        if reply[0] < 300 and call.operation and not READS.match(call.operation):
            self.account.note("executed", f"{call.service}:{call.operation}")
        if token and reply[0] < 300:
            known[token] = {"reply": reply}
        for look in operations.AFTER:
            look(self.account, call, answer)
        return reply

    def _forward(self, call: Call) -> wire.Reply:
        """Have moto answer; SageMaker's own lack what AWS leaves out."""
        parts = urlsplit(self.account.moto)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)
        try:
            sent = {name: value for name, value in self.headers.items() if name.lower() not in HOPS | {"expect"}}
            connection.request(self.command, self.path, call.raw, sent | {"Content-Length": str(len(call.raw))})
            answer = connection.getresponse()
            status, headers, body = answer.status, answer.headers, answer.read()
        finally:
            connection.close()
        if status >= 500 and "html" in headers.get("Content-Type", ""):
            self.account.note("gap", f"{call.service}:{call.operation}")
            raise refuse("NotImplemented", f"the rehearsal plays no {call.operation} of {call.service}", 501)
        kept = {name: value for name, value in headers.items() if name.lower() not in HOPS}
        if self.command == "HEAD" and "Content-Length" in headers:
            kept["Content-Length"] = headers["Content-Length"]
        if call.service == "sagemaker" and status < 300 and body:
            body = json.dumps(wire.filled(json.loads(body))).encode()
        return status, kept, body

    def _control(self, body: bytes) -> None:
        name = self.path.removeprefix("/_rehearsal/")
        try:
            status, answer = 200, operations.CONTROLS[name](self.account, json.loads(body or b"{}"))
        except Exception as error:  # whoever asks gets the reason
            status, answer = 400, {"error": f"{type(error).__name__}: {error}"}
        self._say(status, {"Content-Type": "application/json"}, json.dumps(answer, default=str).encode())
