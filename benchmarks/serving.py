"""Does a server answer as fast as a stream classifies, does it lose a request, and does it live?

    python benchmarks/serving.py [--model DIR] [--images DIR] [--clients 64] [--requests 1024]
        [--batch-size N] [--rounds 5] [--hostile 2000] [--parts speed hostile]

`vit serve` and a process that runs `ImageClassifier.stream` hold the same network and take turns:
the same images, the same size of batch, in both from bytes in memory. The clients are one process
with so many connections on loopback, each of which sends its next image when it has the answer; the
machine's cores are shared by clients and server. Every answer is compared with the stream's.
Then come hostile requests: bombs, wrong types, broken bodies, slow clients, connections that are
cut. Each must get its 4xx (a cut one nothing), and the server must answer as before, with as much
memory. Writes `results/serving-PART-MACHINE.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import json
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, parse, ratio, spread, write_result

DEIT = ROOT.parent / "shared" / "data" / "deit_tiny"
PHOTOS = ROOT.parent / "shared" / "data" / "trashnet_small" / "test"
WANTED = 0.9  # of the stream's throughput

STREAM = """
import json, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from vit_flax.inference import ImageClassifier
model, batch, *files = sys.argv[1:]
batch = int(batch) or None
data = [Path(file).read_bytes() for file in files]
classify = ImageClassifier.from_pretrained(model)
batch = batch or classify.default_batch_size
classify.compile(batch)
print(json.dumps(batch), flush=True)
for line in sys.stdin:
    count = int(line)
    images = [data[i % len(data)] for i in range(count)]
    start = time.perf_counter()
    found = [r.predictions[0] for r in classify.stream(images, top_k=1, batch_size=batch)]
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, [[p.index, p.probability] for p in found[:len(data)]]]), flush=True)
"""


# -- the server, and what it is asked


class Server:
    """`vit serve` in a process of its own.

    Args:
        model: what it serves.
        *options: of the command.
    """

    def __init__(self, model: str, *options: str) -> None:
        command = [sys.executable, "-m", "vit_cli", "serve", model, "--port", "0", *options]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ}
        )
        self.port, said = 0, []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            said.append(line)
            if found := re.search(r"at http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                return
        raise RuntimeError("".join(said))

    @property
    def memory(self) -> float:
        """Resident megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        return int(found[1]) / 1024 if found else 0.0

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        self.process.terminate()
        self.process.communicate(timeout=60)
        return self.process.returncode


def request(
    path: str, body: bytes = b"", kind: str = "image/jpeg", method: str = "POST", **headers: str
) -> bytes:
    """A request as it goes over the wire."""
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1"]
    lines += [f"content-type: {kind}"] if kind else []
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if "content-length" not in sent and "transfer-encoding" not in sent:
        sent["content-length"] = str(len(body))
    lines += [f"{name}: {value}" for name, value in sent.items() if value]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the next answer.

    Raises:
        ConnectionError: the connection ended before it.
    """
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError as error:
        raise ConnectionError(f"no answer: {error.partial[:80]!r}") from error
    first, *lines = head.strip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    length = headers.get("content-length")
    if length is None:
        return int(first.split()[1]), headers, await reader.read()
    return int(first.split()[1]), headers, await reader.readexactly(int(length))


async def ask(port: int, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await answer(reader)
    finally:
        writer.close()


# -- the load


async def load(port: int, images: list[bytes], requests: int, clients: int) -> dict[str, Any]:
    """Clients that each send the next image when they have an answer.

    Returns:
        seconds in all, the latencies, and for each image its answers; `lost` counts requests
        without a 200.
    """
    wires = [request("/predict?top_k=1", data) for data in images]
    todo = iter(range(requests))
    latencies: list[float] = []
    found: dict[int, list[tuple[int, float]]] = collections.defaultdict(list)
    lost = 0

    async def client() -> None:
        nonlocal lost
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in todo:
            place = number % len(images)
            start = time.perf_counter()
            writer.write(wires[place])
            status, _, body = await answer(reader)
            latencies.append(time.perf_counter() - start)
            if status != 200:
                lost += 1
                continue
            best = json.loads(body)["results"][0]["predictions"][0]
            found[place].append((best["index"], best["probability"]))
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "latencies": latencies, "found": found, "lost": lost}


# -- hostile requests


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that states a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    packed = zlib.compress(data)
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def form(count: int, data: bytes = b"x", boundary: str = "b") -> bytes:
    """A form of files."""
    part = f'--{boundary}\r\ncontent-disposition: form-data; name="i"; filename="f"\r\n\r\n'
    return b"".join(part.encode() + data + b"\r\n" for _ in range(count)) + (
        f"--{boundary}--\r\n".encode()
    )


def wires(image: bytes, body: int = 20 << 20) -> dict[str, tuple[bytes, set[int]]]:
    """Hostile requests that are sent whole: name -> (bytes, the statuses that may come).

    Args:
        image: the content of a good file.
        body: bytes that a request may have.
    """
    bomb = png(40_000, 40_000, bytes(1 << 20))
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + bytes(6)
    gif += b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\0;"
    deep = b"[" * 100_000
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"
    huge = base64.b64encode(bomb).decode()
    as_json = {"kind": "application/json"}
    as_form = {"kind": "multipart/form-data; boundary=b"}
    return {
        "a PNG bomb": (request("/predict", bomb), {413}),
        "a GIF bomb": (request("/features", gif), {413}),
        "a bomb in JSON": (
            request("/predict", b'{"image": "%s"}' % huge.encode(), **as_json),
            {413},
        ),
        "a bomb in a form": (request("/predict", form(1, bomb), **as_form), {413}),
        "half a file": (request("/predict", image[: len(image) // 2]), {422}),
        "noise": (request("/predict", np.random.default_rng(0).bytes(9999)), {415}),
        "PostScript": (request("/predict", eps), {415}),
        "a page": (request("/predict", b"<html><script>", "text/html"), {415}),
        "no type": (request("/predict", image, ""), {415}),
        "nothing": (request("/predict", b""), {400}),
        "no JSON": (request("/predict", b"{", **as_json), {400}),
        "deep JSON": (request("/predict", deep, **as_json), {400}),
        "no base64": (request("/predict", b'{"image": "?"}', **as_json), {422}),
        "a number for an image": (request("/predict", b'{"image": 1}', **as_json), {422}),
        "a form without end": (request("/predict", form(1)[:-9], **as_form), {400, 415, 422}),
        "a form of no form": (request("/predict", b"\r\n\0" * 99, **as_form), {400, 422}),
        "too many files": (request("/predict", form(1000), **as_form), {413}),
        "a bad option": (request("/predict?top_k=-1", image), {422}),
        "two images": (request("/attention", form(2, image), **as_form), {422}),
        "no such path": (request("/etc/passwd", b"", "", "GET"), {404}),
        "a path upwards": (request("/picture/../../etc/passwd", b"", "", "GET"), {404}),
        "a wrong method": (request("/predict", b"", "", "DELETE"), {405}),
        "another name": (
            request("/predict", image).replace(b"host: 127.0.0.1", b"host: evil.example"),
            {421},
        ),
        "compressed": (request("/predict", image, content_encoding="gzip"), {415}),
        "a length below zero": (request("/predict", b"", content_length="-1"), {400}),
        "too long": (
            request("/predict", b"", content_length=str(body + 1), expect="100-continue"),
            {413},
        ),
        "too long in chunks": (
            request("/predict", b"", transfer_encoding="chunked")
            + (b"%x\r\n" % (body + 9))
            + bytes(body + 9),
            {413},
        ),
        "two lengths": (
            request("/predict", b"x", content_length="1").replace(
                b"content-length: 1", b"content-length: 1\r\ncontent-length: 2"
            ),
            {400},
        ),
        "a bad chunk": (request("/predict", b"zz\r\n", transfer_encoding="chunked"), {400}),
        "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", {400}),
        "endless headers": (b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nx: " + b"y" * 90_000, {400}),
    }


async def hostile(
    port: int, image: bytes, count: int, slow: int, clients: int, *, body: int = 20 << 20
) -> dict[str, Any]:
    """Send that many hostile requests, `slow` of them by clients that take their time.

    Returns:
        kind -> its answers; `wrong`, what was answered otherwise than it should.
    """
    whole = wires(image, body)
    seen: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    wrong: list[str] = []

    def note(kind: str, got: str, fine: bool) -> None:
        seen[kind][got] += 1
        if not fine:
            wrong.append(f"{kind}: {got}")

    async def send(kind: str) -> None:
        data, wanted = whole[kind]
        try:
            status, _, body = await asyncio.wait_for(ask(port, data), 60)
            # 429 while the large bodies of others fill the memory that requests may hold.
            note(kind, str(status), status in {*wanted, 429} and len(body) > 0)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            note(kind, type(error).__name__, False)

    async def cut(kind: str, after: float) -> None:
        """Send some or all of a good request, and go away without the answer."""
        data = request("/predict", image)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data if kind == "cut after it" else data[: int(len(data) * after)])
        with contextlib.suppress(OSError):
            await writer.drain()
        transport: Any = writer.transport
        transport.abort()
        note(kind, "cut", True)

    async def drip(kind: str) -> None:
        """A request that never ends."""
        data = request("/predict", image)
        place = data.index(b"\r\n\r\n") + 4
        data = data[:place][: place - 3] if kind == "slow headers" else data
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def write() -> None:
            with contextlib.suppress(OSError):
                for byte in range(len(data) - 1):
                    writer.write(data[byte : byte + 1])
                    await writer.drain()
                    await asyncio.sleep(0.5)

        writing = asyncio.ensure_future(write())
        try:
            status, _, _ = await asyncio.wait_for(answer(reader), 60)
            note(kind, str(status), status == 408)
        except (OSError, TimeoutError) as error:
            note(kind, type(error).__name__, False)
        finally:
            writing.cancel()
            writer.close()

    def jobs() -> Iterator[Callable[[], Awaitable[None]]]:
        names = [*whole, "cut in the headers", "cut in the body", "cut after it"]
        for number in range(count - slow):
            kind = names[number % len(names)]
            if kind in whole:
                yield lambda kind=kind: send(kind)
            else:
                after = 0.001 if kind == "cut in the headers" else 0.6
                yield lambda kind=kind, after=after: cut(kind, after)

    todo = jobs()

    async def client() -> None:
        for job in todo:
            await job()

    slowly = [drip("slow headers" if i % 2 else "slow body") for i in range(slow)]
    await asyncio.gather(*(client() for _ in range(clients)), *slowly)
    return {"seen": {kind: dict(each) for kind, each in seen.items()}, "wrong": wrong}


# -- the whole


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def compare(found: dict[int, list], wanted: list) -> int:
    """Answers that are not the stream's: another class, or another probability than batches of
    another size give."""
    return sum(
        index != wanted[place][0] or abs(probability - wanted[place][1]) > 1e-5
        for place, answers in found.items()
        for index, probability in answers
    )


class Stream:
    """A process that classifies a stream of the same images."""

    def __init__(self, model: str, batch_size: int, files: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", STREAM, model, str(batch_size), *files],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.batch_size = int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def run(self, images: int) -> tuple[float, list[tuple[int, float]]]:
        """Seconds, and the best class of each image with its probability."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{images}\n")
        self.process.stdin.flush()
        seconds, found = json.loads(self._line())
        return seconds, found

    def stop(self) -> None:
        self.process.communicate()


def speed(options: argparse.Namespace, files: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The server beside the stream; what was measured, and what is wrong."""
    images = [Path(file).read_bytes() for file in files]
    stream = Stream(options.model, options.batch_size, files)
    server = Server(options.model, "--batch-size", str(stream.batch_size))
    ours: list[float] = []
    theirs: list[float] = []
    latencies: list[float] = []
    memory = [server.memory]
    lost = other = 0
    try:
        for turn in range(options.rounds + 1):
            seconds, wanted = stream.run(options.requests)
            one = asyncio.run(load(server.port, images, options.requests, options.clients))
            lost, other = lost + one["lost"], other + compare(one["found"], wanted)
            memory.append(server.memory)
            if turn == 0:
                continue  # to warm up
            ours.append(one["seconds"])
            theirs.append(seconds)
            latencies += one["latencies"]
            print(
                f"stream {options.requests / seconds:.1f} images/s, server "
                f"{options.requests / one['seconds']:.1f}: {seconds / one['seconds']:.2f}; p50 "
                f"{1000 * quantile(one['latencies'], 0.5):.0f} ms, p99 "
                f"{1000 * quantile(one['latencies'], 0.99):.0f} ms; {memory[-1]:.0f} MB",
                flush=True,
            )
    finally:
        stream.stop()
        code = server.stop()
    result = {
        "model": Path(options.model).name,
        "batch_size": stream.batch_size,
        "clients": options.clients,
        "requests": options.requests,
        "server_images_per_second": spread([options.requests / s for s in ours]),
        "stream_images_per_second": spread([options.requests / s for s in theirs]),
        "server_over_stream": ratio(ours, theirs),
        "latency_ms": {
            "p50": round(1000 * quantile(latencies, 0.5), 1),
            "p99": round(1000 * quantile(latencies, 0.99), 1),
        },
        "lost": lost,
        "other_answers": other,
        "memory_mb": [round(each) for each in memory],
    }
    faults = [f"{lost} requests lost"] * bool(lost) + [f"{other} other answers"] * bool(other)
    faults += [f"exit code {code}"] * (code != 0)
    median = result["server_over_stream"]["median"]
    if median < WANTED and not options.quick:
        faults.append(f"{median:.2f} of the stream's throughput")
    return result, faults


def survival(options: argparse.Namespace, files: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The server under hostile requests; what was seen, and what is wrong."""
    images = [Path(file).read_bytes() for file in files]
    server = Server(options.model, "--timeout", "20")
    try:
        first = asyncio.run(load(server.port, images, len(images), options.clients))
        before = server.memory
        found = asyncio.run(hostile(server.port, images[0], options.hostile, options.slow, 32))
        after = server.memory
        again = asyncio.run(load(server.port, images, len(images), options.clients))
        status, _, body = asyncio.run(ask(server.port, request("/health", b"", "", "GET")))
        health = json.loads(body)
    finally:
        code = server.stop()
    wanted = [first["found"][place][0] for place in range(len(images))]
    other = compare(again["found"], wanted)
    result = {
        "requests": options.hostile,
        "slow": options.slow,
        "wrong": found["wrong"],
        "memory_mb": [round(before), round(after)],
        "answers": found["seen"],
    }
    faults = found["wrong"][:5] + [f"{other} other answers"] * bool(other)
    faults += ["requests lost"] * bool(first["lost"] + again["lost"])
    faults += ["not healthy"] * (status != 200 or health["waiting"] != 0)
    faults += [f"exit code {code}"] * (code != 0)
    return result, faults


PARTS = {"speed": speed, "hostile": survival}


def main() -> None:
    """Run and write `results/serving-PART-MACHINE.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEIT))
    parser.add_argument("--images", default=str(PHOTOS))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=0, help="0 is the default of the device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hostile", type=int, default=2000)
    parser.add_argument("--slow", type=int, default=64, help="of them")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    options = parse(parser, requests=64, rounds=1, hostile=60, slow=2, clients=16)
    files = sorted(str(path) for path in Path(options.images).rglob("*.jpg"))
    if not files or not Path(options.model).is_dir():
        sys.exit("name a model and a folder of photos: --model, --images")
    files = files[: min(128, options.requests)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ["PYTHONPATH"] = path
    faults: list[str] = []
    for part in options.parts:
        result, wrong = PARTS[part](options, files)
        print(json.dumps(result, indent=1), flush=True)
        faults += wrong
        if not options.quick:
            write_result(f"serving-{part}", result)
    if faults:
        sys.exit("; ".join(faults))


if __name__ == "__main__":
    main()
