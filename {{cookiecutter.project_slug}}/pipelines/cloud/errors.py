"""What AWS and its SDKs refuse, as one sentence with the next step."""

from __future__ import annotations

import os
from typing import Any

from pipelines.terminal import UserError
from progress import plain

ATTEMPTS = 5  # of a request, with growing pauses (botocore's standard mode)
REASONS = {
    "no credentials": ("NoCredentials", "PartialCredentials", "ProfileNotFound"),
    "expired": ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "TokenRetrieval",
                "UnauthorizedSSOToken", "SSOTokenLoad", "LoginRefreshRequired", "CredentialRetrieval"),
    "invalid": ("InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch", "AuthFailure"),
    "denied": ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthorizationError"),
    "quota": ("ResourceLimitExceeded", "LimitExceeded", "LimitExceededException", "ServiceQuotaExceededException"),
    "capacity": ("CapacityError", "InsufficientCapacity", "InsufficientInstanceCapacity"),
    "throttled": ("Throttling", "ThrottlingException", "TooManyRequestsException", "RequestLimitExceeded", "SlowDown"),
    "network": ("EndpointConnection", "ConnectTimeout", "SSL", "ProxyConnection"),
    "unanswered": ("ReadTimeout", "ConnectionClosed"),
    "foreign": ("ResponseParser",),
}  # fmt: skip
MISSING = ("ResourceNotFoundException", "ResourceNotFound", "RepositoryNotFoundException", "NoSuchBucket", "NoSuchKey",
           "404")  # the last is S3's answer to a HEAD  # fmt: skip
STEPS = {
    "no credentials": "there are no AWS credentials; run `aws configure` or `aws sso login`, or set AWS_PROFILE",
    "expired": "the AWS credentials have expired; get new ones, for instance with `aws sso login`",
    "invalid": "AWS does not accept these credentials; check AWS_PROFILE, the keys, and this machine's clock",
    "denied": "these credentials may not do that; `make doctor` shows what is missing",
    "quota": "a quota of the account is reached; ask for more at Service Quotas, or choose another instance type",
    "capacity": "AWS has no such machines free right now; try again later, another instance type or another region",
    "trust": "SageMaker may not use the execution role; `make bootstrap` puts its trust policy right",
    "throttled": f"too many requests, {ATTEMPTS} attempts were refused; try again in a minute",
    "network": "AWS cannot be reached; check the network, the proxy and aws.region",
    "unanswered": "AWS gave no answer; check the network, and with `make status` whether it did what it was asked for",
    "foreign": "what answered is not AWS, but the page of a proxy or of a network's login, perhaps; check both",
}
HOPELESS = ("no credentials", "expired", "invalid")  # reasons that hold for every other request, too
SIGN_IN = "sign in again with `aws {} --profile {}`"
PROFILE = {  # class of botocore's or Python's, or what its name begins with: what is wrong with a profile, what to do
    "ProfileNotFound": "is in no file of AWS's; `aws configure list-profiles` lists those that are",
    "UnauthorizedSSOToken": f"has no session any more; {SIGN_IN.format('sso login', '{0}')}",
    "SSO": f"has no session yet; {SIGN_IN.format('sso login', '{0}')}",
    "TokenRetrieval": f"has no session any more; {SIGN_IN.format('sso login', '{0}')}",
    "Login": f"has no session any more; {SIGN_IN.format('login', '{0}')}",
    "MissingDependency": "comes from `aws login`, which needs a package: `uv pip install 'botocore[crt]'`",
    "JSONDecodeError": "has a program (credential_process) that does not answer with JSON; run it by hand",
    "CredentialRetrieval": "gives no credentials: {1}; run its credential_process by hand",
    "FileNotFoundError": "needs a file or program that is not there: {1}; see ~/.aws/config",
    "PermissionError": "needs a file or program that may not be used: {1}",
    "EOFError": "needs an MFA code, and nobody is there to type one; run the verb in a terminal",
    "ClientError": "may not become its role: {1}; check role_arn, source_profile and mfa_serial in ~/.aws/config",
}


class ProfileError(UserError):
    """The credentials that are chosen cannot be had, so that nothing in AWS can be asked, not even a price."""


def of_requests() -> tuple[type[Exception], type[Exception], type[Exception]]:
    """What a request to AWS may end in: no answer, a refusal, an answer that is not AWS's."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return BotoCoreError, ClientError, ResponseParserError


def of_profile(error: Exception) -> str:
    """Why the chosen profile gives no credentials, and what to do."""
    name = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"
    kind, reason = type(error).__name__, plain(" ".join(str(error).split())).rstrip(".")[:300]
    step = next((text for begins, text in PROFILE.items() if kind.startswith(begins)), "gives no credentials: {1}")
    return f"the AWS profile {name} {step.format(name, reason)}"


def said(error: Exception) -> tuple[str, str | None]:
    """An error of boto3, botocore or SDK V3's own checks, with what to do about it; and its reason in `STEPS`."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import ClientError
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        found = f"{where} of {error.title}: {first['msg']}, not {str(first['input'])[:100]!r}"
        return plain(f"the SageMaker SDK does not take {' '.join(found.split())}"), None
    cause = error.__context__ if isinstance(error, Boto3Error) and error.__context__ else error  # of a transfer
    if isinstance(cause, ClientError):
        details = cause.response.get("Error", {})
        message = plain(" ".join(str(details.get("Message", cause)).split()))
        reason = "trust" if "could not assume role" in message.lower() else _reason(details.get("Code", ""))
        step = f"; {STEPS[reason]}" if reason else ""
        return f"{message.rstrip('.')} ({details.get('Code')}){step}", reason
    reason = _reason(type(cause).__name__.removesuffix("Error"))
    return STEPS.get(reason or "", plain(" ".join(str(cause).split()))), reason


def _reason(code: str) -> str | None:
    return next((reason for reason, codes in REASONS.items() if code in codes), None)


def missing(error: Any) -> bool:
    """Whether a `ClientError` says that the thing asked for does not exist."""
    details = error.response["Error"]
    gone = ("does not exist", "could not find", "not found", "cannot find")
    return (
        details["Code"] in MISSING
        or (details["Code"] == "ValidationException" and any(w in details["Message"].lower() for w in gone))
        or (details["Code"] == "ValidationError" and "does not exist" in details["Message"])
    )
