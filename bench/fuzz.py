"""Mutated shards, samples, videos and job files against their readers, in a child process with limits.

    python bench/fuzz.py --inputs 20000

Each input is a seeded mutation of one from the corpus: raw tars (checksums of headers mended now and then, so that damage goes past
them), sound tars of hostile members, and videos. An input that reaches new lines of kinetok's own parsers, or has an outcome not seen
before, joins the corpus: coverage guidance for our code, guidance by outcome for FFmpeg's. Allowed outcomes are rows of the index,
a `BadVideo` and a `DamagedShard`; any other exception escaped, a dead child died, and each is saved with its input below --keep.
Memory is the child's peak above its own size before the input; time is the child's CPU time. Exit code 1 where anything was found.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FrameType

from rich.console import Console
from rich.table import Table

PIPELINES = Path(__file__).parents[1] / "pipelines"
CORPUS_BYTES = 200_000
"""Larger files are left out of the corpus: their decoding would take the time of hundreds of small ones."""
TARGETS = {"tar": 0.25, "sample": 0.3, "video": 0.4, "job": 0.05}
"""Shares of the inputs."""
ADDRESS_SPACE = 12 << 30
"""Backstop where memory is taken faster than the parent looks."""
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
NUMBERS = (0, 1, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x00FFFFFF, 0x10000)
TEXTS = (
    b'{"caption": "\\ud800 lone", "group": "\\udfff"}',
    b'{"caption": "\\u001b]0;title\\u0007\\u0000", "group": "a\\u0000b", "split": "val"}',
    b'{"caption": ["list"], "group": {"a": 1}, "split": 3}',
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b'{"caption": ' + b"9" * 10_000 + b"}",
    b"[" + b"[],[]," * 100_000 + b"1]",
    b"<script>alert(1)</script>\xff\xfe\x00",
    b"NaN",
    b'{"caption": "' + b"x" * 300_000 + b'"}',
)
BOMBS = (
    b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (n + 1, n + 1, n, n) for n in range(97, 121)) + b"name: *y\n",
    b"name: " + b"[" * 5000,
    b"name: &a [*a]",
    b"? [a]\n: b\nname: 2026-13-41\nstages: " + b"9" * 5000,
)
NAMES = (
    "../up.mp4",
    "/etc/passwd.mp4",
    "a\0b.mp4",
    "\x1b[31mred.mp4",
    "a/../../b.json",
    ".mp4",
    "..",
    "",
    "x" * 300 + ".mp4",
    "\udcff.mp4",
)


@dataclass(frozen=True)
class Outcome:
    """What one input led to."""

    kind: str
    """`BadVideo corrupt`, `DamagedShard`, `rows kept`, `escaped TypeError` ..."""
    seconds: float = 0.0
    megabytes: float = 0.0
    fresh: bool = False
    """Whether it reached lines that no input before it reached."""
    detail: str = ""

    @property
    def bad(self) -> bool:
        return self.kind.startswith(("escaped", "died", "over"))


# ---------------------------------------------------------------------------------------------------------------- the child


def child(pipe: Connection, folder: str) -> None:
    """Run inputs until the pipe closes."""
    import logging

    logging.disable(logging.CRITICAL)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    runs = _targets(Path(folder))
    lines = _Lines()
    pipe.send(None)
    while True:
        try:
            target, data = pipe.recv()
        except EOFError:
            return
        pipe.send(_measured(runs[target], data, lines))


def _measured(run: Callable[[bytes], str], data: bytes, lines: "_Lines") -> Outcome:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began, detail = _memory("VmRSS"), time.process_time(), ""
    sys.settrace(lines)
    try:
        kind = run(data)
    except Exception as error:  # noqa: BLE001 - whatever comes out is what this bench looks for
        kind, detail = f"escaped {type(error).__name__}", str(error)[:200]
    finally:
        sys.settrace(None)
    return Outcome(kind, time.process_time() - began, (_memory("VmHWM") - before) / 1e3, lines.fresh(), detail)


def _memory(name: str, process: int | str = "self") -> int:
    """kB of `VmRSS` or `VmHWM`; 0 for a process that is gone."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


class _Lines:
    """A trace function that notes the lines of kinetok's parsers."""

    def __init__(self) -> None:
        self.seen: set[tuple[CodeType, int]] = set()
        self._size = 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> "_Lines | None":
        name = frame.f_code.co_filename
        if not name.endswith(("tars.py", "clip_parts.py", "decode.py", "cut.py", "job.py")):
            return None
        self.seen.add((frame.f_code, frame.f_lineno))
        return self

    def fresh(self) -> bool:
        before, self._size = self._size, len(self.seen)
        return self._size > before


def _targets(folder: Path) -> dict[str, Callable[[bytes], str]]:
    from kinetok.infra.errors import ConfigError
    from kinetok.infra.job import load_job
    from kinetok.infra.storage import Folder
    from kinetok.pipelines.catalog import STAGES
    from kinetok.pipelines.data.clip_index import part_bytes
    from kinetok.pipelines.data.clip_parts import shard_rows
    from kinetok.pipelines.data.decode import decode_clips, probe
    from kinetok.pipelines.data.reasons import BadVideo
    from kinetok.pipelines.data.recipe import CutRecipe, Filters
    from kinetok.pipelines.data.sources import PICTURE_EXTENSIONS, Shard, SourcePlan, version_of
    from kinetok.pipelines.data.tars import DamagedShard, read_samples

    wide = Filters(min_side=1, max_aspect=1000, min_motion=0, min_luma=0, min_contrast=0)
    recipe = CutRecipe(fps=8, frames=5, height=32, width=32, filters=wide)
    stills = recipe.model_copy(update={"frames": 1})

    def tar(data: bytes) -> str:
        try:
            count = sum(len(sample.members) for sample in read_samples(io.BytesIO(data), "fuzz"))
        except DamagedShard:
            return "DamagedShard"
        return "members" if count else "no members"

    def sample(data: bytes) -> str:
        path = folder / "input.tar"
        path.write_bytes(data)
        size, version = version_of(str(path))
        # Windows of one frame take pictures too; those of several, whatever else there is.
        chosen = stills if any(f".{extension}\0".encode() in data for extension in PICTURE_EXTENSIONS) else recipe
        rows = list(shard_rows(Shard(0, "fuzz", str(path), "tar", size, version), SourcePlan(Folder(str(folder))), chosen))
        part_bytes(rows)
        return f"rows {' '.join(sorted({str(row['decision']) for row in rows}))}"

    def video(data: bytes) -> str:
        try:
            probe(data)
            count = sum(1 for _ in decode_clips(data, starts=[0.0, 1.0], fps=8, frames=5, height=32, width=32))
        except BadVideo as error:
            return f"BadVideo {error.reason}"
        return f"{count} clips"

    def job(data: bytes) -> str:
        path = folder / "job.yaml"
        path.write_bytes(data)
        try:
            load_job(path, STAGES)
        except ConfigError:
            return "ConfigError"
        return "a job"

    return {"tar": tar, "sample": sample, "video": video, "job": job}


# --------------------------------------------------------------------------------------------------------------- the parent


@dataclass
class Corpus:
    """Inputs by target; what mutations are made of."""

    random: random.Random
    inputs: dict[str, list[bytes]] = field(default_factory=dict)

    @classmethod
    def of(cls, seed: int, odd: Path | None) -> "Corpus":
        paths = sorted([*(PIPELINES / "data" / "embedded" / "clips").glob("*.mp4"), *(odd.iterdir() if odd else ())])
        videos = [path.read_bytes() for path in paths if path.is_file() and path.stat().st_size <= CORPUS_BYTES]
        corpus = cls(random.Random(seed))
        small, stills = sorted(videos, key=len)[:24], pictures(paths[0])
        corpus.inputs = {
            "tar": [pack([(f"{i}.mp4", small[i][:2000]), (f"{i}.json", b'{"caption": "a"}'), (f"{i}.txt", b"b")]) for i in range(8)],
            "sample": [
                *(pack([(f"{i}.mp4", data), (f"{i}.json", TEXTS[i % len(TEXTS)])]) for i, data in enumerate(small)),
                *(pack([(f"{name}.{name}", data), (f"{name}.json", TEXTS[0])]) for name, data in stills.items()),
            ],
            "video": [*videos, *stills.values()],
            "job": [*(path.read_bytes() for path in sorted((PIPELINES / "jobs").glob("*.yaml"))), *BOMBS],
        }
        return corpus

    def mutate(self, target: str) -> bytes:
        """A new input for `target`."""
        draw = self.random
        data = draw.choice(self.inputs[target])
        if target == "sample":
            return self._sample(data)
        for _ in range(min(1 + int(draw.expovariate(0.4)), 12)):
            data = draw.choice(_MUTATIONS)(data, draw)
            if draw.random() < 0.1:
                data = _splice(data, draw.choice(self.inputs[target]), draw)
        return mended(data) if target == "tar" and draw.random() < 0.7 else data

    def _sample(self, data: bytes) -> bytes:
        """A sound tar whose members are mutated, renamed, doubled or replaced by hostile texts."""
        draw, members = self.random, list(members_of(data))
        for _ in range(1 + int(draw.expovariate(0.5))):
            place = draw.randrange(len(members)) if members else 0
            name, body = members[place] if members else ("a.mp4", b"")
            match draw.randrange(5):
                case 0:
                    members[place : place + 1] = [(name, draw.choice(_MUTATIONS)(body, draw))]
                case 1:
                    members[place : place + 1] = [(draw.choice(NAMES), body)]
                case 2:
                    members.insert(place, (f"{name.partition('.')[0]}.{draw.choice(('json', 'txt', 'left.mp4'))}", draw.choice(TEXTS)))
                case 3:
                    members.insert(place, (name, body))
                case 4:
                    members[place : place + 1] = [(name, draw.choice(TEXTS))]
        return pack(members[:30])


def pictures(video: Path) -> dict[str, bytes]:
    """The first frame of a video as a picture of each format, by extension."""
    import av

    with av.open(str(video)) as box:
        shown = next(box.decode(video=0))
    made = {}
    for extension, (codec, pixels) in {"jpg": ("mjpeg", "yuvj420p"), "png": ("png", "rgb24"), "webp": ("libwebp", "yuv420p")}.items():
        context = av.VideoCodecContext.create(codec, "w")
        context.height, context.width = shown.height, shown.width
        context.pix_fmt, context.time_base = pixels, shown.time_base
        made[extension] = b"".join(bytes(packet) for packet in (*context.encode(shown.reformat(format=pixels)), *context.encode(None)))
    return made


def pack(members: list[tuple[str, bytes]]) -> bytes:
    from kinetok.pipelines.data.tars import TarWriter

    file = io.BytesIO()
    tar = TarWriter(file)
    for name, data in members:
        tar.add(name.encode("utf-8", "surrogateescape").decode("latin-1"), data)
    tar.close()
    return file.getvalue()


def members_of(data: bytes) -> Iterator[tuple[str, bytes]]:
    from kinetok.pipelines.data.tars import DamagedShard, read_members

    try:
        for member in read_members(io.BytesIO(data), "corpus"):
            yield member.name, member.data
    except DamagedShard:
        return


def mended(data: bytes) -> bytes:
    """The tar with the checksum of every block that looks like a header put right."""
    found = bytearray(data)
    for at in range(0, len(found) - 511, 512):
        if found[at + 257 : at + 262] == b"ustar":
            found[at + 148 : at + 156] = b" " * 8
            found[at + 148 : at + 156] = b"%06o\0 " % sum(found[at : at + 512])
    return bytes(found)


def _place(data: bytes, draw: random.Random) -> int:
    """Half of the time near an end, where containers keep their tables."""
    size = max(1, len(data))
    match draw.randrange(4):
        case 0:
            return draw.randrange(min(size, 1024))
        case 1:
            return size - 1 - draw.randrange(min(size, 4096))
    return draw.randrange(size)


def _put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _flip(data: bytes, draw: random.Random) -> bytes:
    at = _place(data, draw)
    return _put(data, at, bytes([(data[at] if data else 0) ^ 1 << draw.randrange(8)]))


def _set(data: bytes, draw: random.Random) -> bytes:
    return _put(data, _place(data, draw), bytes([draw.choice(INTERESTING)]))


def _number(data: bytes, draw: random.Random) -> bytes:
    width = draw.choice((2, 4, 8))
    value = draw.choice(NUMBERS) % (1 << 8 * width)
    return _put(data, _place(data, draw), value.to_bytes(width, draw.choice(("big", "little"))))


def _octal(data: bytes, draw: random.Random) -> bytes:
    """A size or type field of some tar header."""
    at = 512 * draw.randrange(max(1, len(data) // 512))
    field_at, text = draw.choice(((124, b"%011o\0" % draw.choice(NUMBERS)), (156, draw.choice((b"1", b"2", b"g", b"x", b"L", b"S", b"5")))))
    return _put(data, at + field_at, text)


def _cut(data: bytes, draw: random.Random) -> bytes:
    at = _place(data, draw)
    return data[:at] + data[at + draw.randrange(1, 1000) :]


def _double(data: bytes, draw: random.Random) -> bytes:
    at, size = _place(data, draw), draw.randrange(1, 4000)
    return data[: at + size] + data[at : at + size] * draw.choice((1, 1, 20)) + data[at + size :]


def _zero(data: bytes, draw: random.Random) -> bytes:
    return _put(data, _place(data, draw), bytes(draw.randrange(1, 600)))


def _noise(data: bytes, draw: random.Random) -> bytes:
    return _put(data, _place(data, draw), draw.randbytes(draw.randrange(1, 64)))


def _end(data: bytes, draw: random.Random) -> bytes:
    return data[: _place(data, draw)]


def _splice(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return data[: _place(data, draw)] + other[_place(other, draw) :]


_MUTATIONS = (_flip, _flip, _set, _number, _number, _octal, _cut, _double, _zero, _noise, _end)


class Runner:
    """One child at a time; a dead one is replaced."""

    def __init__(self, seconds: float, megabytes: float) -> None:
        self.seconds, self.megabytes = seconds, megabytes
        self._scratch = TemporaryDirectory(prefix="kinetok-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=child, args=(theirs, self._scratch.name), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()
        self._base = _memory("VmRSS", self._pid)

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def run(self, target: str, data: bytes) -> Outcome:
        """What the input leads to; a child that breaks a limit is killed."""
        began = self._cpu()
        try:
            self._pipe.send((target, data))
            while not self._pipe.poll(0.05):
                spent, size = self._cpu() - began, (_memory("VmRSS", self._pid) - self._base) / 1e3
                if spent > self.seconds or size > self.megabytes:
                    return self._killed(f"over {'time' if spent > self.seconds else 'memory'}", spent, size)
            found: Outcome = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            return self._killed(f"died {self._process.exitcode}", 0.0, 0.0)
        if found.megabytes > self.megabytes:
            return Outcome("over memory", found.seconds, found.megabytes, found.fresh, found.kind)
        return found

    def _killed(self, kind: str, seconds: float, megabytes: float) -> Outcome:
        self._end()
        self._start()
        return Outcome(kind, seconds, megabytes)

    def close(self) -> None:
        self._end()
        self._scratch.cleanup()

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _cpu(self) -> float:
        """CPU seconds of the child; 0 for one that is gone."""
        try:
            words = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Tally:
    """Outcomes counted, with the largest time and memory."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    worst: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    found: list[tuple[int, str, Outcome]] = field(default_factory=list)

    def add(self, number: int, target: str, outcome: Outcome) -> bool:
        """Whether this kind of outcome is new for the target."""
        place = (target, outcome.kind)
        self.counts[place] += 1
        seconds, megabytes = self.worst.get(place, (0.0, 0.0))
        self.worst[place] = (max(seconds, outcome.seconds), max(megabytes, outcome.megabytes))
        if outcome.bad:
            self.found.append((number, target, outcome))
        return self.counts[place] == 1

    def table(self, title: str) -> Table:
        table = Table("target", "outcome", "inputs", "longest, CPU s", "most memory, MB", title=title, title_justify="left")
        for (target, kind), count in sorted(self.counts.items()):
            seconds, megabytes = self.worst[target, kind]
            table.add_row(target, kind, str(count), f"{seconds:.2f}", f"{megabytes:.0f}")
        return table


def fuzz(inputs: range, seed: int, runner: Runner, corpus: Corpus, keep: Path | None, tally: Tally) -> None:
    """Run the inputs of these numbers; an interrupt ends it early, with what was found until then in `tally`."""
    for number in inputs:
        target = corpus.random.choices(list(TARGETS), list(TARGETS.values()))[0]
        data = corpus.mutate(target)
        outcome = runner.run(target, data)
        if (tally.add(number, target, outcome) or outcome.fresh) and not outcome.bad and len(data) <= CORPUS_BYTES:
            corpus.inputs[target].append(data)
        if outcome.bad and keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{seed}-{number:06d}-{target}-{outcome.kind.replace(' ', '-')}").write_bytes(data)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--inputs", type=int, default=20_000)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--seconds", type=float, default=60.0, help="CPU time that one input may take")
    asked.add_argument("--megabytes", type=float, default=1500.0, help="memory that one input may take")
    asked.add_argument("--keep", type=Path, help="save what broke a limit here")
    asked.add_argument("--json", type=Path, help="write the counts here")
    given = asked.parse_args()
    odd = Path(os.environ.get("KINETOK_DATA", "nowhere")) / "odd"
    runner, tally, began = Runner(given.seconds, given.megabytes), Tally(), time.perf_counter()
    try:
        fuzz(range(given.inputs), given.seed, runner, Corpus.of(given.seed, odd if odd.is_dir() else None), given.keep, tally)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        runner.close()
    seconds, inputs = time.perf_counter() - began, sum(tally.counts.values())
    Console().print(tally.table(f"{inputs} inputs in {seconds:.0f} s, {len(tally.found)} found"))
    for number, target, outcome in tally.found[:50]:
        print(f"input {number} ({target}): {outcome.kind} {outcome.detail}")
    if given.json:
        counts = [{"target": t, "outcome": k, "inputs": n, "seconds": tally.worst[t, k][0]} for (t, k), n in sorted(tally.counts.items())]
        given.json.write_text(json.dumps({"inputs": inputs, "seconds": seconds, "found": len(tally.found), "outcomes": counts}))
    sys.exit(1 if tally.found else 0)


if __name__ == "__main__":
    main()
