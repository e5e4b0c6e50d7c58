"""Secrets stay where they are: in the environment. What is written, printed or sent to MLflow passes `redact`, and a job file that holds
one is refused.

A secret is the value of an environment variable whose name says so (`AWS_SECRET_ACCESS_KEY`, `HF_TOKEN`, `MLFLOW_TRACKING_PASSWORD`),
what stands before the @ of an address, and the signature of a signed one. Not covered: secrets that nothing marks as such, and what
Ray and libraries log by themselves in the worker logs of a cluster.
"""

import os
import re
from collections.abc import Iterator

HIDDEN = "***"
SHORTEST = 6
"""Characters of the shortest value that is taken for a secret: shorter ones stand in any text."""
_NAMES = re.compile(r"(?:^|_)(?:SECRET|TOKEN|PASS|PASSWD|PASSWORD|CREDENTIALS?|PRIVATE_?KEY|API_?KEY)(?:_|$)", re.IGNORECASE)
_PLACES = re.compile(r"_(FILE|PATH|DIR|URI|URL|MODE|TTL\w*)$", re.IGNORECASE)
"""Variables that say where a secret is, not what."""
_PASSWORD = re.compile(r"://[^/@\s:]*:([^/@\s]+)@")
_LOGIN = re.compile(r"(?<=://)[^/@\s'\"]+@")
_SIGNATURE = re.compile(
    r"(?<=[?&])((?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|sig|token|access_token|password)=)[^&\s'\"]+", re.IGNORECASE
)


def redact(text: str) -> str:
    """`text` with `***` for every secret."""
    text = _SIGNATURE.sub(rf"\1{HIDDEN}", _LOGIN.sub(f"{HIDDEN}@", text))
    for value in _values():
        text = text.replace(value, HIDDEN)
    return text


def in_address(url: str) -> bool:
    """Whether an address holds a login or a signature."""
    return bool(_LOGIN.search(url) or _SIGNATURE.search(url))


def where_secret(value: object, path: str = "") -> Iterator[str]:
    """Dotted paths of the texts in nested data that hold a secret."""
    if isinstance(value, str) and redact(value) != value:
        yield path
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from where_secret(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from where_secret(item, path)


def _values() -> list[str]:
    """Secrets of the environment, longest first: one may be part of another."""
    named = [value for name, value in os.environ.items() if _NAMES.search(name) and not _PLACES.search(name)]
    found = {*named, *(password for value in os.environ.values() for password in _PASSWORD.findall(value))}
    return sorted((value for value in found if len(value) >= SHORTEST), key=len, reverse=True)
