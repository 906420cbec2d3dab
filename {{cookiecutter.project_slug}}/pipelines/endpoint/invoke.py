"""Classify an image file with an endpoint on SageMaker: `make invoke IMAGE=photo.jpg`, `... ENDPOINT=<name>`.

python -m pipelines invoke --image photo.jpg --json        # the answer as the endpoint gave it
"""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any

from pipelines import terminal
from pipelines.cloud.account import Account, explained, place, unless_missing, until
from pipelines.config import load
from pipelines.endpoint import state
from pipelines.endpoint.model import MOST_BYTES
from pipelines.terminal import UserError
from progress import plain

ASYNC_POLL, ASYNC_PATIENCE = 2.0, 20 * 60  # seconds; the first instance after none takes minutes to come


def ask(account: Account, facts: dict[str, Any], body: bytes, kind: str, variant: str | None = None) -> Any:
    """The model's answer to one request.

    Args:
        account: to work in.
        facts: of a running endpoint.
        body: of the request.
        kind: its content type.
        variant: that is to answer; None: whichever the weights choose.

    Raises:
        UserError: with what the model has against the request, or why there is no answer.
    """
    from botocore.exceptions import ClientError
    from sagemaker.core.resources import Endpoint

    endpoint, waits = Endpoint(endpoint_name=facts["EndpointName"]), "AsyncInferenceConfig" in facts
    own = {"session": account.session, "region": account.region}
    serverless = any(item.get("CurrentServerlessConfig") for item in facts.get("ProductionVariants", []))
    most = MOST_BYTES["async" if waits else "serverless" if serverless else "realtime"]
    if len(body) > most:
        raise UserError(f"the request has {len(body):,} bytes, this endpoint takes {most:,}; TYPE=async takes more")
    with explained(f"asking {endpoint.endpoint_name}"):
        if waits:
            return json.loads(_ask_async(account, endpoint, facts, body, kind))
        options = {"target_variant": variant} if variant else {}
        try:
            answer = endpoint.invoke(body=body, content_type=kind, accept="application/json", **own, **options)
        except ClientError as error:
            if error.response["Error"]["Code"] != "ModelError":
                raise
            status, text = error.response.get("OriginalStatusCode", 500), error.response.get("OriginalMessage", "")
            raise UserError(f"{endpoint.endpoint_name} answered {status}: {sentence(text)}") from error
        return json.loads(answer.body.read())


def _ask_async(account: Account, endpoint: Any, facts: dict[str, Any], body: bytes, kind: str) -> bytes:
    """Put the request into the bucket, wait for the answer or the failure there, and clean up."""
    s3 = account.client("s3")
    folder = facts["AsyncInferenceConfig"]["OutputConfig"]["S3OutputPath"].rpartition("/")[0]
    uri = f"{folder}/input/{uuid.uuid4().hex}"
    s3.put_object(**place(uri), Body=body, **account.encryption())
    try:
        made = endpoint.invoke_async(
            input_location=uri, content_type=kind, session=account.session, region=account.region
        )
        if not any(variant.get("CurrentInstanceCount") for variant in facts["ProductionVariants"]):
            print(
                f"{endpoint.endpoint_name} has no instance right now; the first one comes in some minutes", flush=True
            )

        def look(_: object) -> tuple[bytes | None, str]:
            answer = _taken(s3, made.output_location)
            failure = None if answer is not None else _taken(s3, made.failure_location)
            if failure is not None:
                raise UserError(f"{endpoint.endpoint_name} failed: {sentence(failure.decode(errors='replace'))}")
            return answer, ""

        late = f"no answer in {ASYNC_PATIENCE // 60} minutes; it would come to {made.output_location}"
        return until(f"the answer of {endpoint.endpoint_name}", ASYNC_POLL, look, ASYNC_PATIENCE, lambda: late)
    finally:
        s3.delete_object(**place(uri))


def _taken(s3: Any, uri: str) -> bytes | None:
    """The content of an object, which is deleted then; None when it is not there."""
    where = place(uri)
    found = unless_missing(s3.get_object, **where)
    content = found and bytes(found["Body"].read())
    if found:
        s3.delete_object(**where)
    return content


def sentence(text: str) -> str:
    """What the model says in a refusal, `{"error": "..."}`, also where AWS wraps it into words of its own."""
    found = re.search(r'\{"error": ("(?:[^"\\]|\\.)*")\}', text)
    return plain(json.loads(found[1]) if found else " ".join(text.split())[:300] or "no message")


def show(file: Path, answer: dict[str, Any]) -> None:
    """Print an answer about one image as `make predict` does; names of other classes than the first are not in it."""
    label, probability = answer["labels"][0], max(answer["probabilities"][0])
    label = plain(label)
    print(f"{plain(file)}: {label}\n  {label}  {probability:6.1%}  {'#' * round(40 * probability)}", flush=True)


def main() -> int:
    """Command line; see the module's docstring."""
    parser = terminal.parser("Classify an image file with an endpoint on SageMaker.", settings=True)
    parser.add_argument(
        "--image", variable="IMAGE", type=Path, action="append", default=[], help="an image file; may be repeated"
    )
    parser.add_argument("--endpoint", variable="ENDPOINT", help="default: endpoint.name")
    parser.add_argument("--variant", variable="VARIANT", help="of an endpoint with several (default: by their weights)")
    parser.add_argument("--json", action="store_true", help="print the answer as it came")
    options = parser.parse_args()
    if not options.image:
        raise UserError("IMAGE is missing; name a file, such as make invoke IMAGE=photo.jpg")
    account = Account(load(options.set))
    facts = state.running(account, state.name(account.settings, options.endpoint))
    for file in options.image:
        try:
            body = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error
        answer = ask(account, facts, body, "application/x-image", options.variant)
        if options.json:
            print(json.dumps(answer))
        else:
            show(file, answer)
    return 0
