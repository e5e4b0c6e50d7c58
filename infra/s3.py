"""Requests to an object store that speaks S3: one client for each process, one policy of retries, errors that name the remedy.

Every request goes through `ask`, which repeats it, its body included, while what went wrong is of the kind that passes (a 5xx, SlowDown, a
time-out, a connection cut at any point), with exponential backoff and full jitter, at most `ATTEMPTS` times; botocore's own retries are
off. Refused or expired credentials are never tried again. Nothing is renamed: a file is one put, or one multipart upload that appears when
it is complete, and either may be repeated. A conditional put carries a token of its own, by which one that was carried out, but whose
answer was lost, is known as ours and not taken for somebody else's. Configuration is by AWS_* variables alone, looked at on every call:
renewed credentials count at once. Nothing heavy is imported before the first request. Why botocore, and not s3fs or pyarrow, is in
docs/storage.md. Not covered: what the files mean, local disks (`storage.py`).
"""

import contextlib
import functools
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias, TypeVar

from kinetok.infra.errors import StoreError

ATTEMPTS = 8
"""Of one request."""
FIRST_WAIT, LONGEST_WAIT = 0.2, 8.0
"""Seconds: the wait after failure n is drawn from 0 ... min(LONGEST_WAIT, FIRST_WAIT * 2**n); all waits together take 10 s on average."""
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 15.0
"""Until a connection stands, and between any two pieces of an answer."""
BLOCK_BYTES = 8 << 20
"""What one request reads: large against its latency, small against memory."""
PART_BYTES = 64 << 20
"""What one request writes; larger files go up in parts."""
AT_ONCE = 4
"""Blocks or parts of one file under way at a time: a single connection to S3 gives 50 to 100 MB/s."""
CONNECTIONS = 32
LISTED = 1000
"""Keys of one page, and of one request to delete."""
COPY_BYTES = 1 << 30
"""What one request copies inside the store; S3 takes up to 5 GiB."""

TOKEN = "kinetok-write"
"""Metadata of a conditional put: which attempt to write it was."""

T = TypeVar("T")
Answer: TypeAlias = dict[str, Any]
"""What botocore returns for a request."""


class Found(NamedTuple):
    """A file on the store, or on a disk: `version` is its ETag or time of modification."""

    name: str
    bytes: int
    version: str


class Refused(Exception):
    """A condition was not met; `again` where an earlier attempt may have been carried out without our knowing."""

    def __init__(self, again: bool) -> None:
        super().__init__(again)
        self.again = again


class Place(NamedTuple):
    """A bucket and a key, with the seconds after which no request is repeated (None: until `ATTEMPTS`)."""

    bucket: str
    key: str
    patience: float | None

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}".rstrip("/")

    @property
    def prefix(self) -> str:
        """Of the keys below this one."""
        return f"{self.key}/" if self.key else ""


def place(url: str, patience: float | None = None) -> Place:
    """The place of `s3://bucket/key`."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return Place(bucket, key.strip("/"), patience)


def ask(at: Place, verb: str, operation: str, take: Callable[[Answer], T], **parameters: object) -> T:
    """`take` of the answer to one request to the bucket, the two repeated together as the module says.

    Raises FileNotFoundError where the key is absent, Refused where a condition is not met, else StoreError: cannot `verb` (read, write)
    this place, and why.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    began = time.monotonic()
    for attempt in range(ATTEMPTS):
        try:
            return take(getattr(_client(), operation)(Bucket=at.bucket, **parameters))
        except (ClientError, BotoCoreError, HTTPError) as error:  # the last from a listing that is cut off, unwrapped
            if _code(error) in _REFUSALS or (_code(error) in _ABSENT and "IfMatch" in parameters):
                raise Refused(again=attempt > 0) from error
            if _code(error) in _ABSENT:
                raise FileNotFoundError(f"{at} is not there") from error
            waited = time.monotonic() - began
            last = attempt == ATTEMPTS - 1 or (at.patience is not None and waited >= at.patience)
            if last or not _passes(error):
                raise StoreError(f"cannot {verb} {at}: {_reason(error, attempt + 1, waited)}") from error
            time.sleep(random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)))
    raise AssertionError("the last attempt returns or raises")


_REFUSALS = {"PreconditionFailed", "412"}
_ABSENT = {"NoSuchKey", "404"}
_PASSING = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
_PASSING |= {"OperationAborted", "ConditionalRequestConflict"}
_REMEDIES = (
    (
        {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"},
        "the credentials have expired: renew AWS_SESSION_TOKEN and its keys",
    ),
    ({"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"}, "the credentials are wrong: check the AWS_* variables"),
    ({"AccessDenied", "AllAccessDisabled", "403"}, "the credentials do not allow it: check the AWS_* variables and the bucket's policy"),
    ({"400"}, "the store refuses the request, as it does with expired or foreign credentials: renew the AWS_* variables"),
    ({"RequestTimeTooSkewed"}, "this machine's clock is wrong: set it"),
    ({"NoSuchBucket"}, "The specified bucket does not exist: create it, or name another"),
)


def _code(error: BaseException | None) -> str:
    """S3's code of a refusal; of an answer to HEAD, which has no body, the HTTP status."""
    return str(_answer(error).get("Error", {}).get("Code", ""))


def _status(error: Exception) -> int:
    return int(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _answer(error: BaseException | None) -> Answer:
    """The store's answer in an error; empty where there was none."""
    return getattr(error, "response", None) or {}


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    from botocore import exceptions, parsers
    from urllib3.exceptions import HTTPError

    passing = (
        exceptions.HTTPClientError,  # refused, reset, timed out, cut off while the body was read
        exceptions.IncompleteReadError,
        exceptions.FlexibleChecksumError,
        parsers.ResponseParserError,
        HTTPError,
    )
    return isinstance(error, passing) or _status(error) >= 500 or _status(error) == 429 or _code(error) in _PASSING


def _reason(error: Exception, attempts: int, seconds: float) -> str:
    """What is wrong and what to do, for people."""
    for codes, remedy in _REMEDIES:
        if _code(error) in codes:
            return f"{remedy} ({_code(error)})"
    said = _answer(error).get("Error", {}).get("Message")
    what = f"the store answers {_status(error)} {_code(error)}, {said}" if said else str(error)
    if _passes(error):
        return f"{what}; asked {attempts} times in {seconds:.0f} s. Check the network and the store, then run again"
    return f"{what}; check the AWS_* variables"


def _client() -> Any:
    """The botocore client of this process (they do not survive a fork) under the present AWS_* variables."""
    return _made(os.getpid(), tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))))


@functools.lru_cache(maxsize=4)
def _made(process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    import botocore.session
    from botocore.config import Config

    own = {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"} & dict(environment).keys()
    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=ANSWER_SECONDS,
        max_pool_connections=CONNECTIONS,
        # Stores of one's own seldom have a host name for each bucket.
        s3={"addressing_style": "path"} if own else {},
    )
    return botocore.session.get_session().create_client("s3", config=config)


def find(at: Place) -> Found | None:
    """Size and ETag of one file, None where it is absent."""
    try:
        return ask(at, "read", "head_object", lambda head: Found(at.key, int(head["ContentLength"]), str(head["ETag"])), Key=at.key)
    except FileNotFoundError:
        return None


def listing(at: Place) -> Iterator[Found]:
    """Every file below a place, by key."""
    for page in _pages(at):
        yield from (Found(row["Key"], row["Size"], row["ETag"]) for row in page.get("Contents", ()) if not row["Key"].endswith("/"))


def entries(at: Place) -> tuple[list[Found], list[str]]:
    """Files directly below a place, and the names of the folders there."""
    files: list[Found] = []
    folders: list[str] = []
    for page in _pages(at, Delimiter="/"):
        files += [Found(row["Key"], row["Size"], row["ETag"]) for row in page.get("Contents", ()) if not row["Key"].endswith("/")]
        folders += [str(row["Prefix"]).removeprefix(at.prefix).rstrip("/") for row in page.get("CommonPrefixes", ())]
    return files, folders


def _pages(at: Place, **parameters: object) -> Iterator[Answer]:
    token: dict[str, object] = {}
    while True:
        page = ask(at, "list", "list_objects_v2", dict, Prefix=at.prefix, MaxKeys=LISTED, **token, **parameters)
        yield page
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def has_below(at: Place) -> bool:
    """Whether there is any file below a place."""
    return ask(at, "list", "list_objects_v2", lambda page: bool(page.get("Contents")), Prefix=at.prefix, MaxKeys=1)


def read(at: Place) -> bytes:
    """A whole file: one request where it is no larger than a block, else several at a time. Raises FileNotFoundError."""

    def begin(answer: Answer) -> tuple[bytes, int, str]:
        total = int(str(answer["ContentRange"]).rpartition("/")[2]) if "ContentRange" in answer else int(answer["ContentLength"])
        return answer["Body"].read(), total, answer["ETag"]

    try:
        first, total, version = ask(at, "read", "get_object", begin, Key=at.key, Range=f"bytes=0-{BLOCK_BYTES - 1}")
    except StoreError as error:
        if _code(error.__cause__) == "InvalidRange":  # of an empty file
            return b""
        raise
    if len(first) == total:
        return first
    return first + _blocks(at, len(first), total - len(first), version)


def read_range(at: Place, start: int, length: int) -> bytes:
    """`length` bytes from `start` on, fewer where the file ends before; raises FileNotFoundError."""
    if length <= BLOCK_BYTES:
        return block(at, start, length)
    found = find(at)
    if found is None:
        raise FileNotFoundError(f"{at} is not there")
    return _blocks(at, start, max(0, min(length, found.bytes - start)), found.version)


def block(at: Place, start: int, length: int, version: str | None = None) -> bytes:
    """`read_range` by one request; of this very `version`, where given: raises StoreError where another is there now."""
    if not length:
        return b""
    same = {} if version is None else {"IfMatch": version.strip('"')}
    try:
        return ask(
            at,
            "read",
            "get_object",
            lambda answer: bytes(answer["Body"].read()),
            Key=at.key,
            Range=f"bytes={start}-{start + length - 1}",
            **same,
        )
    except Refused as error:
        raise StoreError(f"{at} changed while it was being read; run again to read it anew") from error
    except StoreError as error:
        if _code(error.__cause__) == "InvalidRange":  # begins at or behind the end
            return b""
        raise


def _blocks(at: Place, start: int, length: int, version: str) -> bytes:
    """`length` bytes that are there, some blocks at a time."""
    starts = range(start, start + length, BLOCK_BYTES)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return b"".join(threads.map(lambda begin: block(at, begin, min(BLOCK_BYTES, start + length - begin), version), starts))


Part: TypeAlias = Callable[[int, int], bytes]
"""`part(start, length)`: bytes of a file to write."""


def write(at: Place, size: int, part: Part) -> None:
    """Write a file of `size` bytes whole, replacing any old one."""
    if size <= PART_BYTES:
        ask(at, "write", "put_object", dict, Key=at.key, Body=part(0, size))
        return

    def send(upload: str, number: int) -> Answer:
        start = (number - 1) * PART_BYTES
        body = part(start, min(PART_BYTES, size - start))
        return ask(at, "write", "upload_part", dict, Key=at.key, UploadId=upload, PartNumber=number, Body=body)

    _in_parts(at, -(-size // PART_BYTES), send)


def copy(source: Place, target: Place) -> None:
    """Copy one file inside the store; raises FileNotFoundError."""
    found = find(source)
    if found is None:
        raise FileNotFoundError(f"{source} is not there")
    origin = {"Bucket": source.bucket, "Key": source.key}
    if found.bytes <= COPY_BYTES:
        ask(target, "write", "copy_object", dict, Key=target.key, CopySource=origin)
        return

    def send(upload: str, number: int) -> Answer:
        start = (number - 1) * COPY_BYTES
        span = f"bytes={start}-{min(start + COPY_BYTES, found.bytes) - 1}"
        part = {"UploadId": upload, "PartNumber": number, "CopySource": origin, "CopySourceRange": span}
        return ask(target, "write", "upload_part_copy", lambda answer: dict(answer["CopyPartResult"]), Key=target.key, **part)

    _in_parts(target, -(-found.bytes // COPY_BYTES), send)


def _in_parts(at: Place, parts: int, send: Callable[[str, int], Answer]) -> None:
    """A multipart upload of the parts that `send(upload, number)` puts there; nothing is left of one that fails."""
    upload = ask(at, "write", "create_multipart_upload", lambda answer: str(answer["UploadId"]), Key=at.key)
    try:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            tags = [answer["ETag"] for answer in threads.map(functools.partial(send, upload), range(1, parts + 1))]
        listed = [{"ETag": tag, "PartNumber": number} for number, tag in enumerate(tags, 1)]
        _complete(at, upload, {"Parts": listed})
    except BaseException:
        with contextlib.suppress(StoreError, FileNotFoundError):
            ask(at, "write", "abort_multipart_upload", dict, Key=at.key, UploadId=upload)
        raise


def _complete(at: Place, upload: str, parts: dict[str, object]) -> None:
    try:
        ask(at, "write", "complete_multipart_upload", dict, Key=at.key, UploadId=upload, MultipartUpload=parts)
    except StoreError as error:
        # Where the answer was lost, the upload is no more: then the file is there.
        if _code(error.__cause__) != "NoSuchUpload" or find(at) is None:
            raise


def write_if(at: Place, data: bytes, expected: bytes | None) -> bool:
    """Put `data` if the file still holds `expected` (None: is absent). Says whether it did."""
    token = uuid.uuid4().hex
    try:
        same = _same(at, expected)
        if same is None:
            return False
        ask(at, "write", "put_object", dict, Key=at.key, Body=data, Metadata={TOKEN: token}, **same)
    except Refused as refused:
        return refused.again and _token(at) == token
    except FileNotFoundError:
        return False
    return True


def remove_if(at: Place, expected: bytes) -> bool:
    """Delete the file if it still holds `expected`. Says whether it did."""
    try:
        same = _same(at, expected)
        if same is None:
            return False
        ask(at, "write", "delete_object", dict, Key=at.key, **same)
    except Refused as refused:
        return refused.again and find(at) is None
    except FileNotFoundError:
        return False
    return True


def _same(at: Place, expected: bytes | None) -> dict[str, object] | None:
    """The condition under which the file holds `expected`; None where it holds something else."""
    if expected is None:
        return {"IfNoneMatch": "*"}
    held, version = ask(at, "read", "get_object", lambda answer: (answer["Body"].read(), str(answer["ETag"])), Key=at.key)
    # Without the quotes, which AWS takes either way and some stores would take for a part of the tag.
    return {"IfMatch": version.strip('"')} if held == expected else None


def _token(at: Place) -> str | None:
    try:
        metadata = ask(at, "read", "head_object", lambda head: dict[str, str](head["Metadata"]), Key=at.key)
    except FileNotFoundError:
        return None
    return metadata.get(TOKEN)


def remove(at: Place) -> None:
    """Delete a file, and all files below it; absent is fine."""
    ask(at, "write", "delete_object", dict, Key=at.key)
    keys = [found.name for found in listing(at)]
    for first in range(0, len(keys), LISTED):
        _remove_keys(at, keys[first : first + LISTED])


def _remove_keys(at: Place, keys: list[str]) -> None:
    """Delete some keys at once; those that the store names as failed are asked for one by one."""
    listed = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    failed = ask(at, "write", "delete_objects", lambda answer: [row["Key"] for row in answer.get("Errors", ())], Delete=listed)
    for key in failed:
        ask(at, "write", "delete_object", dict, Key=key)
