"""`vit serve`: the answers are those of Transformers, the limits hold, and nothing is lost."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import io
import json
import re
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from asgi import ask
from browser import Browser
from browser import find as find_browser

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("multipart")

from vit_cli.main import main
from vit_cli.options import Parser
from vit_cli.serve.app import make_app
from vit_cli.serve.batcher import Batcher, Slot
from vit_cli.serve.command import add_options, make_service, names_of
from vit_cli.serve.limits import Deadline, Limits
from vit_cli.serve.openapi import description
from vit_cli.serve.service import Service
from vit_common.embedded import embedded_checkpoint, embedded_images
from vit_common.errors import DeviceError
from vit_flax.inference import ImageClassifier, ImageEncoder, ImageIndex

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DIGITS = [path.read_bytes() for path in embedded_images()]
BOUND = 2e-5


@pytest.fixture(scope="module")
def encoder():
    return ImageClassifier.from_pretrained(embedded_checkpoint())


@pytest.fixture(scope="module")
def index(encoder):
    files = list(map(str, embedded_images()))
    return ImageIndex(encoder.features(files), [*files[:-1], "gone.png"])


@pytest.fixture(scope="module")
def service(encoder, index):
    limits = Limits(body=100_000, pixels=10_000, images=4)
    made = Service(encoder, name="digits", limits=limits, index=index)
    yield made
    made.close()


@pytest.fixture(scope="module")
def app(service):
    return make_app(service, hosts={"127.0.0.1", "localhost"})


@pytest.fixture(scope="module")
def theirs():
    """Transformers' model of the digits, and what it makes of all of them."""
    model = transformers.ViTForImageClassification.from_pretrained(
        embedded_checkpoint(), attn_implementation="eager"
    ).eval()
    processor = transformers.ViTImageProcessor.from_pretrained(embedded_checkpoint())
    images = [np.asarray(PIL.Image.open(path))[..., None] for path in embedded_images()]
    pixels = processor(images, return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        out = model(**pixels, output_attentions=True, output_hidden_states=True)
        features = model.vit.layernorm(out.hidden_states[-1])[:, 0]
    return (
        out.logits.softmax(-1).numpy(),
        features.numpy(),
        torch.stack(out.attentions, 1).numpy(),
    )


def now(call):
    return asyncio.run(call)


def form(*images, **fields):
    """A form by a library that users have."""
    from urllib3.filepost import encode_multipart_formdata

    parts = [("images", (f"{i}.png", data, "image/png")) for i, data in enumerate(images)]
    return encode_multipart_formdata([*parts, *fields.items()], boundary="a-boundary")


def as_json(*images, **fields):
    listed = [base64.b64encode(data).decode() for data in images]
    return json.dumps({"images": listed, **fields}).encode(), "application/json"


# -- answers


@pytest.mark.parametrize("way", ["raw", "form", "json", "data address"])
def test_predictions_are_those_of_transformers(app, theirs, way):
    count = 1 if way in ("raw", "data address") else 3
    body, kind = {
        "raw": (DIGITS[0], "image/png"),
        "form": form(*DIGITS[:3]),
        "json": as_json(*DIGITS[:3]),
        "data address": (
            json.dumps(
                {"image": f"data:image/png;base64,{base64.b64encode(DIGITS[0]).decode()}"}
            ).encode(),
            "application/json; charset=utf-8",
        ),
    }[way]
    answer = now(ask(app, "/predict?top_k=10", body, kind))
    assert answer.status == 200
    assert answer.json["model"] == "digits"
    results = answer.json["results"]
    assert len(results) == count
    assert [row.get("name") for row in results] == (
        ["0.png", "1.png", "2.png"] if way == "form" else [None] * count
    )
    for row, wanted in zip(results, theirs[0], strict=False):
        found = row["predictions"]
        assert [each["index"] for each in found] == np.argsort(-wanted, kind="stable").tolist()
        np.testing.assert_allclose(
            [each["probability"] for each in found], np.sort(wanted)[::-1], rtol=0, atol=BOUND
        )
        assert [each["label"] for each in found] == [str(each["index"]) for each in found]


def test_features_and_attention_are_those_of_transformers(app, theirs):
    answer = now(ask(app, "/features", *form(*DIGITS[:3])))
    found = [row["features"] for row in answer.json["results"]]
    np.testing.assert_allclose(found, theirs[1][:3], rtol=0, atol=1e-4)
    answer = now(ask(app, "/attention", DIGITS[4]))
    (row,) = answer.json["results"]
    assert row["grid"] == [4, 4]
    wanted = theirs[2][4][:, :, 0, 1:].reshape(4, 4, 4, 4)  # of the class token to the patches
    np.testing.assert_allclose(row["attention"], wanted, rtol=0, atol=BOUND)
    total = np.eye(17)
    for layer in theirs[2][4].mean(1).astype(np.float64):  # Abnar and Zuidema 2020
        total = (0.5 * layer + 0.5 * np.eye(17)) @ total
    np.testing.assert_allclose(row["rollout"], total[0, 1:].reshape(4, 4), rtol=0, atol=BOUND)
    head, _, data = row["image"].partition(",")
    assert head == "data:image/png;base64"
    picture = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))
    np.testing.assert_array_equal(picture, PIL.Image.open(embedded_images()[4]))


def test_neighbours(app, index, theirs):
    answer = now(ask(app, "/neighbours?top=3", *form(DIGITS[2], DIGITS[5])))
    unit = theirs[1] / np.linalg.norm(theirs[1], axis=1, keepdims=True)
    for row, place in zip(answer.json["results"], (2, 5), strict=True):
        cosines = unit @ unit[place]
        order = np.argsort(-cosines)[:3]
        assert [each["index"] for each in row["neighbours"]] == order.tolist()
        found = [each["similarity"] for each in row["neighbours"]]
        np.testing.assert_allclose(found, cosines[order], rtol=0, atol=1e-5)
    picture = now(ask(app, "/picture/2", method="GET"))
    assert picture.headers["content-type"] == "image/jpeg"
    assert PIL.Image.open(io.BytesIO(picture.body)).size == (224, 224)
    gone = now(ask(app, f"/picture/{len(index) - 1}", method="GET"))
    assert (gone.status, gone.json["error"]) == (404, "this picture is not here any more.")
    for number in ("99", "-1", "x", "../../etc/passwd"):
        assert now(ask(app, f"/picture/{number}", method="GET")).status == 404


def test_the_number_of_classes_is_asked_for_in_any_way(app):
    for answer in (
        now(ask(app, "/predict?top_k=2", DIGITS[0])),
        now(ask(app, "/predict", *form(DIGITS[0], top_k="2"))),
        now(ask(app, "/predict", *as_json(DIGITS[0], top_k=2))),
    ):
        assert len(answer.json["results"][0]["predictions"]) == 2
    assert len(now(ask(app, "/predict", DIGITS[0])).json["results"][0]["predictions"]) == 5


# -- what is refused


def noise(size):
    stream = io.BytesIO()
    PIL.Image.new("RGB", size).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "said"),
    [
        ("/predict", b"no image", "image/png", 415, "not an image of a kind that is taken: JPEG"),
        ("/predict", b"%!PS-Adobe-3.0 EPSF-3.0\n", "image/png", 415, "not an image of a kind"),
        ("/predict", DIGITS[0][:60], "image/png", 422, "cannot be decoded"),
        ("/predict", noise((101, 100)), "image/png", 413, "at most 10000 pixels"),
        ("/predict", DIGITS[0], "text/plain", 415, "given text/plain"),
        ("/predict", DIGITS[0], None, 415, "given no Content-Type"),
        ("/predict", b"", "image/png", 400, "the body is empty"),
        ("/predict", b"{", "application/json", 400, "not JSON"),
        ("/predict", b"[" * 99999, "application/json", 400, "not JSON"),
        ("/predict", b"[]", "application/json", 422, "wanted a JSON object"),
        ("/predict", b"{}", "application/json", 422, '"image" must be base64'),
        ("/predict", b'{"images": []}', "application/json", 422, "there is no image"),
        ("/predict", b'{"image": "%"}', "application/json", 422, "not valid base64"),
        ("/predict", b'{"image": ""}', "application/json", 422, "the image is empty"),
        ("/predict", *as_json(*[b"x"] * 5), 413, "at most 4 images a request; given 5"),
        ("/predict", *form(*[b"x"] * 5), 413, "at most 4 images a request"),
        ("/predict", *form(), 422, "there is no image"),
        ("/predict", b"x", "multipart/form-data", 400, "Missing boundary"),
        ("/predict?top_k=0", DIGITS[0], "image/png", 422, "top_k must be a positive integer"),
        ("/predict?top_k=x", DIGITS[0], "image/png", 422, "given 'x'"),
        ("/neighbours?top=-1", DIGITS[0], "image/png", 422, "top must be a positive integer"),
        ("/attention", *form(*DIGITS[:2]), 422, "attention is of one image; given 2"),
        ("/predict?topk=1", DIGITS[0], "image/png", 422, "unknown option 'topk'; wanted top_k."),
        ("/features", *form(DIGITS[0], top_k="2"), 422, "unknown option 'top_k'; wanted none."),
        ("/neighbours", *as_json(DIGITS[0], images=1), 422, '"images" a list of it'),
        ("/neighbours", *as_json(DIGITS[0], top_k=2), 422, "'top_k'; wanted top."),
        ("/predict", bytes(100_001), "image/png", 413, "at most 100000 bytes; given 100001"),
    ],
)
def test_what_is_refused(app, service, path, body, kind, status, said):
    answer = now(ask(app, path, body, kind))
    assert (answer.status, list(answer.json)) == (status, ["error"])
    assert said in answer.json["error"]
    assert (service.waiting, service.held) == (0, 0)


def test_more_that_is_refused(app, monkeypatch):
    monkeypatch.setattr("vit_cli.serve.bodies._DRAINING", 0.05)
    chunked = now(ask(app, "/predict", [bytes(60_000)] * 2, stated=False))
    assert chunked.status == 413
    assert chunked.headers["connection"] == "close"
    for headers, status in (
        ({"content-encoding": "gzip"}, 415),
        ({"content-length": "x"}, 400),
        ({"host": "evil.example"}, 421),
    ):
        answer = now(ask(app, "/predict", DIGITS[0], headers=headers))
        assert answer.status == status
    assert now(ask(app, "/predict", DIGITS[0], headers={"host": "localhost"})).status == 200
    assert now(ask(app, "/nothing", method="GET")).json["error"].startswith("there is nothing")
    answer = now(ask(app, "/predict", method="GET"))
    assert (answer.status, answer.json["error"]) == (
        405,
        "GET is not for this path; see /openapi.json.",
    )
    assert answer.headers["allow"] == "POST"


def test_one_bad_image_of_several(app, service):
    answer = now(ask(app, "/predict?top_k=1", *form(DIGITS[0], b"bad", DIGITS[1])))
    assert answer.status == 200
    first, bad, last = answer.json["results"]
    assert first["predictions"] and last["predictions"]  # noqa: PT018
    assert bad["name"] == "1.png"
    assert "not an image" in bad["error"]
    answer = now(ask(app, "/neighbours", *form(b"bad", DIGITS[1])))
    assert "error" in answer.json["results"][0]
    assert answer.json["results"][1]["neighbours"][0]["index"] == 1
    answer = now(ask(app, "/predict", *form(b"bad", noise((200, 200)))))
    assert answer.status == 422
    assert [list(row) for row in answer.json["results"]] == [["name", "error"]] * 2


# -- time and room


class Gated:
    """The encoder, which runs nothing before the gate is open."""

    def __init__(self, encoder, error=None):
        self._encoder, self.gate, self.sizes, self.error = encoder, threading.Event(), [], error

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def run(self, pixels, *arguments, **options):
        self.sizes.append(len(pixels))
        self.gate.wait(20)
        if self.error is not None:
            raise self.error
        return self._encoder.run(pixels, *arguments, **options)


@pytest.fixture
def gated(encoder):
    made = []

    def make(error=None, **limits):
        slow = Gated(encoder, error)
        service = Service(slow, batch_size=8, limits=Limits(**limits), runners=1)
        made.append((slow, service))
        return slow, service, make_app(service)

    yield make
    for slow, service in made:
        slow.gate.set()
        service.close()


async def until(true):
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


def test_what_comes_while_the_device_is_busy_is_one_batch(gated, encoder):
    slow, service, app = gated()

    async def run():
        first = asyncio.ensure_future(ask(app, "/features", DIGITS[0]))
        await until(lambda: slow.sizes == [1])
        others = [asyncio.ensure_future(ask(app, "/features", data)) for data in DIGITS]
        await until(lambda: len(service._batcher._waiting) == len(DIGITS))
        slow.gate.set()
        return [await each for each in (first, *others)]

    answers = now(run())
    assert slow.sizes == [1, 8, 4]
    found = [answer.json["results"][0]["features"] for answer in answers]
    wanted = encoder.features(list(map(str, embedded_images())))
    np.testing.assert_allclose(found, np.concatenate([wanted[:1], wanted]), rtol=0, atol=1e-5)
    assert service.batches == {1: 1, 8: 1, 4: 1}


def test_a_full_queue_refuses_and_says_when_to_come_again(gated):
    slow, service, app = gated(queue=3)

    async def run():
        taken = [asyncio.ensure_future(ask(app, "/features", DIGITS[0])) for _ in range(3)]
        await until(lambda: service.waiting == 3)
        refused = await ask(app, "/features", DIGITS[0])
        slow.gate.set()
        return refused, [await each for each in taken], await ask(app, "/features", DIGITS[0])

    refused, taken, after = now(run())
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert "3 images are waiting already (at most 3)" in refused.json["error"]
    assert [each.status for each in (*taken, after)] == [200] * 4
    assert (service.waiting, service.held) == (0, 0)


def test_memory_of_requests_is_bounded(gated):
    slow, service, app = gated(memory=2 * len(DIGITS[0]))

    async def run():
        taken = [asyncio.ensure_future(ask(app, "/features", DIGITS[0])) for _ in range(2)]
        await until(lambda: service.waiting == 2)
        refused = await ask(app, "/features", DIGITS[1])
        slow.gate.set()
        return refused, [await each for each in taken]

    refused, taken = now(run())
    assert refused.status == 429
    size = 2 * len(DIGITS[0])
    assert f"requests hold {size} bytes already (at most {size})" in refused.json["error"]
    assert [each.status for each in taken] == [200] * 2
    assert service.held == 0


def test_a_deadline(gated):
    """The answer comes in time, and its image is not run any more."""
    slow, service, app = gated(seconds=0.2)

    async def run():
        first = asyncio.ensure_future(ask(app, "/features", DIGITS[0]))
        await until(lambda: slow.sizes == [1])
        late = await ask(app, "/features", DIGITS[1])
        await first
        slow.gate.set()
        await until(lambda: service.waiting == 0)
        return late

    late = now(run())
    assert late.status == 504
    assert "not done within 0.2 seconds" in late.json["error"]
    assert slow.sizes == [1]


def test_a_body_that_does_not_come(gated):
    _, service, app = gated(seconds=0.2)
    answer = now(ask(app, "/features", [b"x" * 10], stated=False, ends=False))
    assert answer.status == 408
    assert answer.headers["connection"] == "close"
    assert service.held == 0


def test_a_client_that_goes_away(gated):
    """Its images are dropped; those of others are not."""
    slow, service, app = gated()

    async def run():
        first = asyncio.ensure_future(ask(app, "/features", DIGITS[0]))
        await until(lambda: slow.sizes == [1])
        leaves = asyncio.Event()
        leaving = asyncio.ensure_future(ask(app, "/features", DIGITS[1], leaves=leaves))
        staying = asyncio.ensure_future(ask(app, "/features", DIGITS[2]))
        await until(lambda: len(service._batcher._waiting) == 2)
        leaves.set()
        await leaving
        slow.gate.set()
        return await first, await staying

    assert [each.status for each in now(run())] == [200, 200]
    assert slow.sizes == [1, 1]
    assert (service.waiting, service.held) == (0, 0)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DeviceError("no room for one image."), "no room for one image."),
        (RuntimeError("secret"), "the network could not be run."),
    ],
)
def test_a_batch_that_fails(gated, error, said):
    slow, service, app = gated(error=error)
    slow.gate.set()
    answer = now(ask(app, "/features", DIGITS[0]))
    assert (answer.status, answer.json["error"]) == (500, said)
    slow.error = None
    assert now(ask(app, "/features", DIGITS[0])).status == 200
    assert service.waiting == 0


def test_what_is_not_finite_is_an_error(gated, monkeypatch):
    slow, _, app = gated()
    monkeypatch.setattr(slow, "run", lambda pixels, *_, **__: np.full((len(pixels), 3), np.nan))
    answer = now(ask(app, "/features", DIGITS[0]))
    assert (answer.status, "not finite" in answer.json["error"]) == (500, True)


def test_the_end(gated):
    """What runs is finished; what waits, and what comes, is told so."""
    slow, service, app = gated()

    async def run():
        first = asyncio.ensure_future(ask(app, "/features", DIGITS[0]))
        await until(lambda: slow.sizes == [1])
        second = asyncio.ensure_future(ask(app, "/features", DIGITS[1]))
        await until(lambda: len(service._batcher._waiting) == 1)
        service.stopping = True
        late = await ask(app, "/features", DIGITS[2])
        health = await ask(app, "/health", method="GET")
        closing = asyncio.ensure_future(asyncio.to_thread(service.close))
        left = await second
        slow.gate.set()
        await closing
        return await first, left, late, health

    assert [each.status for each in now(run())] == [200, 503, 503, 503]


def test_works_are_not_mixed():
    """Slots of one work run together, the oldest first, however they come."""
    runs, gate = [], threading.Event()

    def run(work, pixels):
        gate.wait(20)
        runs.append((work, pixels[:, 0].tolist()))
        return pixels

    batcher = Batcher(run, {"a": 3, "b": 2})
    done = threading.Semaphore(0)
    batcher.put(Slot("b", lambda _: done.release(), pixels=np.array([0])))
    time.sleep(0.1)
    for i, work in enumerate("abaaabb", 1):
        batcher.put(Slot(work, lambda _: done.release(), pixels=np.array([i])))
    gate.set()
    for _ in range(8):
        assert done.acquire(timeout=20)
    batcher.close()
    assert runs == [("b", [0]), ("a", [1, 3, 4]), ("b", [2, 6]), ("a", [5]), ("b", [7])]
    settled = []
    batcher.put(Slot("a", settled.append, pixels=np.array([9])))
    assert settled == [None]


# -- what the server says of itself


def test_metrics_are_read_by_prometheus(encoder):
    parser = pytest.importorskip("prometheus_client.parser")
    service = Service(encoder, name="digits")
    app = make_app(service)
    try:
        for body in (DIGITS[0], DIGITS[1], b"bad"):
            now(ask(app, "/features", body))
        answer = now(ask(app, "/metrics", method="GET"))
    finally:
        service.close()
    text = answer.body.decode()
    families = {each.name: each for each in parser.text_string_to_metric_families(text)}
    requests = {
        (s.labels["path"], s.labels["status"]): s.value for s in families["vit_requests"].samples
    }
    assert requests == {("/features", "200"): 2, ("/features", "415"): 1}
    images = {s.labels["outcome"]: s.value for s in families["vit_images"].samples}
    assert images == {"ok": 2, "refused": 1}
    batches = {s.name: s.value for s in families["vit_batch_images"].samples}
    assert batches["vit_batch_images_count"] == 2
    assert batches["vit_batch_images_sum"] == 2
    for name in ("vit_batch_images", "vit_request_seconds"):
        buckets = [s.value for s in families[name].samples if s.name.endswith("_bucket")]
        assert buckets == sorted(buckets)
    assert families["vit_waiting_images"].samples[0].value == 0


def test_the_description_is_true(app, service):
    """Every path in it is there, and takes what it says; every path that is there is in it."""
    found = now(ask(app, "/openapi.json", method="GET")).json
    assert found == description(service)
    assert found["openapi"] == "3.1.0"
    routes = {route.path.replace(":int", ""): route.methods - {"HEAD"} for route in app.routes}
    assert {path: {m.upper() for m in each} for path, each in found["paths"].items()} == routes
    for path, each in found["paths"].items():
        (method,) = each
        answer = now(ask(app, path.format(number=0), DIGITS[0], method=method.upper()))
        assert answer.status == 200, path
        (kind,) = each[method]["responses"]["200"]["content"]
        assert answer.headers["content-type"].startswith(kind)
        if method == "post":
            schema = each["post"]["responses"]["200"]["content"]["application/json"]["schema"]
            row = schema["properties"]["results"]["items"]["properties"]
            assert {*answer.json["results"][0]} <= {*row}


def test_health(app):
    answer = now(ask(app, "/health", method="GET"))
    assert answer.status == 200
    assert answer.json["status"] == "ok"
    assert (answer.json["classes"], answer.json["layers"], answer.json["heads"]) == (10, 4, 4)


def test_a_network_without_classes(encoder, gated):
    _, _, app = gated()  # not an ImageClassifier
    answer = now(ask(app, "/predict", DIGITS[0]))
    assert (answer.status, "has no classes" in answer.json["error"]) == (404, True)
    assert now(ask(app, "/neighbours", DIGITS[0])).json["error"].endswith("without --index.")
    assert now(ask(app, "/health", method="GET")).json["classes"] is None


def test_the_page_needs_no_network(app):
    answer = now(ask(app, "/", method="GET"))
    page = answer.body.decode()
    assert not re.findall(r"""<[^>]*\b(?:src|href)=(?!["']?data:)""", page)
    assert not re.findall(r"https?://|//cdn|@import|url\(", page)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "connect-src 'self'" in policy


# -- the command


def test_what_the_command_refuses(capsys, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"vit: error: cannot listen on 127.0.0.1, port {port} (Address already in use); see --host "
        "and --port.\n"
    )
    for options, text in (
        (["--port", "65536"], "must be from 0 to 65535"),
        (["--timeout", "0"], "must be a positive number of seconds"),
        (["a", "b"], "wanted one model; given a, b"),
        (
            ["--host", "no such host.invalid", "--port", "0"],
            "cannot listen on no such host.invalid",
        ),
        ([str(tmp_path / "none"), "--port", "0"], "no such file or directory"),
        (["--port", "0", "--index", str(tmp_path / "f.npz")], "no such file"),
    ):
        assert main(["serve", *options]) == 2
        said = capsys.readouterr().err
        assert text in said
        assert len(said.splitlines()) == 1
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "uvicorn" else found(name)
    )
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == (
        "vit: error: a server needs starlette, uvicorn and python-multipart; run: pip install "
        "starlette uvicorn python-multipart (the extra `serve`)\n"
    )


@pytest.mark.parametrize(
    ("address", "options", "others"),
    [
        ("127.0.0.1", [], set()),
        ("127.0.0.2", ["--host", "127.0.0.2"], {"127.0.0.2"}),
        ("::1", ["--host", "::1", "--allow-host", "My.Proxy"], {"my.proxy", "::1"}),
        ("0.0.0.0", ["--host", "0.0.0.0"], None),
        ("10.0.0.7", ["--host", "here", "--allow-host", "b"], {"here", "b"}),
    ],
)
def test_names_that_are_answered(address, options, others):
    parser = Parser("vit serve")
    add_options(parser)
    found = names_of(parser.parse(options), address)
    here = address in ("127.0.0.1", "127.0.0.2", "::1")
    local = {"127.0.0.1", "localhost", "[::1]"} if here else set()
    assert found == (None if others is None else local | others)


@pytest.mark.parametrize("named", [False, True])
def test_the_model_is_read_as_the_index_says(tmp_path, named):
    """So its images are their own nearest; the same model as its files say makes other features."""
    model, images = str(embedded_checkpoint()), embedded_images()
    encode = ImageEncoder.from_pretrained(model, layer_norm_eps=0.5)
    made_with = {"model": model, "layers": [-1], "pool": "cls", "layer_norm_eps": 0.5}
    np.savez(
        tmp_path / "f.npz",
        features=encode.features(images),
        files=np.array(list(map(str, images))),
        made_with=np.array(json.dumps(made_with)),
    )
    parser = Parser("vit serve")
    add_options(parser)
    names = [model] if named else []
    options = parser.parse([*names, "--index", str(tmp_path / "f.npz"), "--batch-size", "1"])
    with contextlib.ExitStack() as stack:
        service = make_service(options, stack)
        stack.callback(service.close)
        (row,) = now(service.answer(service.near, [DIGITS[3]], Deadline(60)))
        (near,) = now(service.search(row[None], 1))
    assert (service.name, near[0].index) == (model, 3)
    assert near[0].similarity == pytest.approx(1.0, abs=1e-6)


@pytest.fixture
def serving(monkeypatch):
    """The benchmark's clients."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "serving", raising=False)
    import serving

    return serving


@pytest.mark.slow
def test_a_server_on_this_machine(serving, theirs):
    """A process of its own: good requests from several clients, hostile ones, and SIGTERM while it
    has a request."""
    options = ["--batch-size", "4", "--timeout", "3", "--max-bytes", "200000", "--queue", "64"]
    server = serving.Server(str(embedded_checkpoint()), *options)
    try:
        one = asyncio.run(serving.load(server.port, DIGITS, 48, 12))
        assert one["lost"] == 0
        assert sum(map(len, one["found"].values())) == 48
        for place, answers in one["found"].items():
            for index, probability in answers:
                assert index == theirs[0][place].argmax()
                assert abs(probability - theirs[0][place].max()) < BOUND
        count = len(serving.wires(DIGITS[0])) + 3
        found = asyncio.run(serving.hostile(server.port, DIGITS[0], count, 0, 8, body=200_000))
        assert found["wrong"] == []
        assert sum(sum(each.values()) for each in found["seen"].values()) == count

        async def end():
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            data = serving.request("/predict", DIGITS[3])
            writer.write(data[:-20])
            await asyncio.sleep(0.3)  # it has begun
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            writer.write(data[-20:])
            status, _, body = await serving.answer(reader)
            writer.close()
            return status, json.loads(body)

        status, body = asyncio.run(end())
        assert status == 200
        assert body["results"][0]["predictions"][0]["index"] == theirs[0][3].argmax()
    finally:
        code = server.stop()
    assert code == 0


def test_a_second_interrupt_ends_it_at_once(serving):
    server = serving.Server(str(embedded_checkpoint()), "--batch-size", "1")
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(serving.request("/predict", DIGITS[0])[:-20])
        time.sleep(0.3)  # it has begun
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        _, said = server.process.communicate(timeout=30)
    assert server.process.returncode == 130
    assert said == "vit: stopped after 0 images\n"


@pytest.mark.slow
def test_two_thousand_hostile_requests(serving, theirs):
    options = ["--timeout", "5", "--max-bytes", "2000000"]
    server = serving.Server(str(embedded_checkpoint()), *options)
    try:
        asyncio.run(serving.load(server.port, DIGITS, 512, 64))
        before = server.memory
        found = asyncio.run(serving.hostile(server.port, DIGITS[0], 2000, 32, 32, body=2_000_000))
        assert found["wrong"] == []
        after = server.memory
        one = asyncio.run(serving.load(server.port, DIGITS, 512, 64))
        assert one["lost"] == 0
        assert {i for each in one["found"].values() for i, _ in each} == {
            int(row.argmax()) for row in theirs[0]
        }
        assert after - before < 150
        status, _, body = asyncio.run(
            serving.ask(server.port, serving.request("/health", b"", "", "GET"))
        )
        assert (status, json.loads(body)["waiting"]) == (200, 0)
    finally:
        assert server.stop() == 0


# -- the page in a browser


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="there is no Chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page(serving, tmp_path, theirs, capsys, dark):
    """A photo is chosen; its classes, attention and neighbours are on the page."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in embedded_images():
        shutil.copy(path, photos)
    features = str(tmp_path / "features.npz")
    assert main(["features", str(photos), "--output", features, "-q"]) == 0
    server = serving.Server(str(embedded_checkpoint()), "--index", features)
    try:
        with Browser((1000, 900), dark=dark) as browser:
            browser.open(f"http://127.0.0.1:{server.port}/")
            browser.wait("document.body && document.body.dataset.ready")
            browser.choose("#file", str(photos / "digit-2-01.png"))
            browser.wait("document.body.dataset.shown")
            rows = "[...document.querySelectorAll('#bars .row')]"
            labels = browser.run(f"{rows}.map(r => r.querySelector('span').textContent)")
            assert labels == np.argsort(-theirs[0][4], kind="stable")[:8].astype(str).tolist()
            shares = browser.run(f"{rows}.map(r => r.querySelector('b').textContent)")
            assert shares[0] == f"{100 * theirs[0][4].max():.1f}%"
            tiles = "document.querySelectorAll('#heads canvas').length"
            assert browser.run(tiles) == 4
            pixels = "document.getElementById('photo').toDataURL()"
            seen = set()
            for layer in range(4):
                browser.run(f"layer.value = {layer}; layer.dispatchEvent(new Event('input')); true")
                seen.add(browser.run(pixels))
            browser.run("head.value = 'rollout'; head.dispatchEvent(new Event('input')); true")
            seen.add(browser.run(pixels))
            browser.run("document.querySelectorAll('#heads button')[2].click(); true")
            seen.add(browser.run(pixels))
            assert browser.run("document.getElementById('head').value") == "2"
            assert len(seen) == 6
            images = "[...document.querySelectorAll('#pictures img')]"
            browser.wait(f"{images}.every(i => i.complete && i.naturalWidth > 0)")
            assert browser.run(f"{images}.length") == 12
            assert browser.run(f"{images}[0].alt").endswith("digit-2-01.png")
            (tmp_path / "bad.png").write_bytes(b"no image")
            browser.choose("#file", str(tmp_path / "bad.png"))
            browser.wait("document.getElementById('said').className == 'bad'")
            assert "not an image" in browser.run("document.getElementById('said').textContent")
            here = f"http://127.0.0.1:{server.port}/"
            assert [a for a in browser.asked if not a.startswith((here, "data:"))] == []
            assert [c for c in browser.complaints if "415" not in c] == []
            picture = PIL.Image.open(io.BytesIO(browser.picture()))
            assert picture.width > 900
            assert (np.asarray(picture.convert("L"))[0, 0] < 60) == dark
    finally:
        server.stop()
