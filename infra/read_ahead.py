"""`ReadAhead`: a file on an object store as a stream, in blocks, the next ones already on their way while one is used.

At most `1 + ahead` blocks are in memory and nothing is put on disk, however large the file. What is read from here and there is not read
ahead: only going on from one block to the next is. Not covered: where the bytes come from (`s3.py`), writing.
"""

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class ReadAhead(io.RawIOBase):
    """`size` bytes that `fetch(start, length)` gives; wrap it in `io.BufferedReader` for reads that are never short."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, *, block: int, ahead: int) -> None:
        self._fetch, self._size, self._block, self._ahead = fetch, size, block, ahead
        self._position = 0
        self._last = -1
        self._blocks: dict[int, Future[bytes]] = {}
        self._threads = ThreadPoolExecutor(1 + ahead, thread_name_prefix="read ahead")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        if self._position >= self._size:
            return 0
        target = memoryview(buffer).cast("B")
        number, begin = divmod(self._position, self._block)
        part = memoryview(self._read_block(number))[begin : begin + len(target)]
        target[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._blocks.clear()
        super().close()

    def _read_block(self, number: int) -> bytes:
        if number != self._last:
            ahead = self._ahead if number == self._last + 1 else 0
            last = min(number + ahead, (self._size - 1) // self._block)
            self._blocks = {wanted: self._blocks.get(wanted) or self._begin(wanted) for wanted in range(number, last + 1)}
            self._last = number
        return self._blocks[number].result()

    def _begin(self, number: int) -> Future[bytes]:
        start = number * self._block
        return self._threads.submit(self._fetch, start, min(self._block, self._size - start))
