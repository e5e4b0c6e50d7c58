"""Single files that a user names in a job, by path or address: prompts, questions. Not covered: videos (`sources.py`)."""

from kinetok.infra.errors import DataError
from kinetok.infra.storage import Folder


def read_user_file(url: str) -> bytes:
    """The whole file; DataError where there is none."""
    folder, _, name = url.rpartition("/")
    try:
        return Folder(folder or ".").read_bytes(name)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {url}") from error


def read_user_text(url: str) -> str:
    """The file as text; DataError where there is none, or it is not UTF-8."""
    try:
        return read_user_file(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{url} is not UTF-8 text ({error}); save it as UTF-8") from error
