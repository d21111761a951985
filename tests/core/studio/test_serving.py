"""The server, driven by OpenAI's own client: every answer is of what was asked, whatever else goes on."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from nextstep_core import NextStepError
from nextstep_core.runtime.interrupt import go_on
from nextstep_core.studio.cluster import Where
from nextstep_core.studio.model_choice import ModelChoice
from nextstep_core.studio.serving import app as app_module
from nextstep_core.studio.serving import fleet
from nextstep_core.studio.serving.app import Settings
from nextstep_core.studio.serving.asked import Limits, picture_data, wanted
from nextstep_core.studio.serving.fleet import NEEDED
from nextstep_core.studio.serving.line import Lost
from nextstep_core.studio.serving.replica import Replica, draw_batch

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
pytest.importorskip("uvicorn", reason="Ray Serve is not installed")
pytest.importorskip("python_multipart", reason="python-multipart is not installed")
from served import FAILS, IMPOSSIBLE, SLOW, TOKENS, Flat, gray_of, served, several  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
WEB = httpx.Client(timeout=500)  # a busy machine takes its time


def client(address: str, **options: Any) -> Any:
    return openai.OpenAI(base_url=address, api_key="none", **{"max_retries": 0, "timeout": 500, **options})


def draw(address: str, prompt: str = "a", seed: int = 7, size: str = "32x16", **asked: Any) -> Any:
    return client(address).images.generate(prompt=prompt, size=size, extra_body={"seed": seed}, **asked)


def seen(image: Any) -> tuple[tuple[int, int], int]:
    return gray_of(base64.b64decode(image.b64_json))


def png(width: int = 20, height: int = 10, color: str = "red") -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with served(Replica(lambda _: Flat(), {}).draw) as (address, _):
        yield address


def test_pictures_are_those_that_were_asked_for(server: str) -> None:
    answer = draw(server, n=3, seed=250)
    assert [seen(image) for image in answer.data] == [((32, 16), 250), ((32, 16), 251), ((32, 16), 252)]
    assert [image.seed for image in answer.data] == [250, 251, 252]
    assert (answer.size, answer.output_format, answer.background) == ("32x16", "png", "opaque")
    assert [model.id for model in client(server).models.list()] == ["flat"]


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_the_file_is_of_the_format_that_was_asked_for(server: str, format: str) -> None:
    answer = draw(server, output_format=format, output_compression=80)
    with Image.open(BytesIO(base64.b64decode(answer.data[0].b64_json))) as image:
        assert image.format == format.upper()


def test_edits_take_several_pictures_and_no_name_of_a_file(server: str) -> None:
    files = [("../../etc/passwd", png()), ("b.png", png(10, 40))]
    answer = client(server).images.edit(image=files, prompt="Make it blue.", n=2, extra_body={"seed": 5})
    assert [seen(image)[1] for image in answer.data] == [5, 6]
    assert answer.size == "736x352", "the trained ratio that is nearest to the first picture's"


def test_an_upload_is_seen_the_way_up_that_it_says() -> None:
    """As phones write pictures: lying, with a note that they stand."""
    lying, file, says = Image.new("RGB", (40, 16), "red"), BytesIO(), Image.Exif()
    lying.paste("blue", (0, 0, 20, 16))
    says[0x0112] = 6  # to be turned to the right
    lying.save(file, "JPEG", exif=says, quality=100, subsampling=0)
    asked = wanted({"prompt": "a"}, [file.getvalue()], "flat")
    ((_, data),) = asked.orders[0]["images"]
    with Image.open(BytesIO(data)) as image:
        assert image.size == (16, 40) and asked.width < asked.height
        red, _, blue = image.convert("RGB").getpixel((8, 5))
        assert blue > 200 > 50 > red, "what lay at the left is above"


def test_a_large_upload_waits_in_the_size_that_can_be_drawn() -> None:
    file = BytesIO()
    Image.new("RGB", (4000, 3000), "red").save(file, "JPEG")
    asked = wanted({"prompt": "a"}, [file.getvalue()], "flat", Limits(side=512))
    ((_, data),) = asked.orders[0]["images"]
    with Image.open(BytesIO(data)) as image:
        assert image.size == (683, 512)


@pytest.mark.parametrize("partial", [0, 1, 3])
@pytest.mark.parametrize("editing", [False, True])
def test_a_picture_is_shown_while_it_is_drawn(server: str, partial: int, editing: bool) -> None:
    images, asked = client(server).images, {"prompt": SLOW, "size": "16x16", "partial_images": partial, "stream": True}
    asked |= {"extra_body": {"seed": 9}}
    events = list(images.edit(image=png(), **asked) if editing else images.generate(**asked))
    kind = "image_edit" if editing else "image_generation"
    assert [event.type for event in events] == [f"{kind}.partial_image"] * partial + [f"{kind}.completed"]
    assert [event.partial_image_index for event in events[:-1]] == list(range(partial))
    assert [seen(event)[1] for event in events] == [255] * partial + [9]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": " "}, "prompt has 1 letters"),
    ({"prompt": "x" * 32_001}, "at most 32,000"),
    ({"prompt": 3}, "prompt is 3"),
    ({"size": "17x16"}, "17"),
    ({"size": "2048x16"}, "1024"),
    ({"size": "16"}, "ok"),
    ({"size": "../etc"}, "size is"),
    ({"size": "99999999999999999999x16"}, "size is"),
    ({"n": 0}, "n is 0"),
    ({"n": 11}, "n is 11"),
    ({"n": 2, "stream": True}, "n is 2"),
    ({"stream": "yes"}, "stream is"),
    ({"partial_images": 4}, "partial_images is 4"),
    ({"model": "dall-e-3"}, "flat"),
    ({"quality": "hd"}, "quality is 'hd'"),
    ({"response_format": "url"}, "b64_json"),
    ({"background": "transparent"}, "opaque"),
    ({"output_format": "gif"}, "png"),
    ({"output_compression": 101}, "output_compression"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": True}, "seed is True"),
    ({"steps": 101}, "steps is 101"),
    ({"steps": 2.5}, "steps"),
    ({"cfg": float("1e999")}, "cfg"),
    ({"sampler": "best"}, "sampler"),
    ({"negative_prompt": ["x"]}, "negative_prompt"),
    ({"output": "/etc/passwd"}, "A field of the request"),
    ({"images": ["/etc/passwd"]}, "A field of the request"),
    ({"prompt": IMPOSSIBLE}, "It is impossible"),
]


@pytest.mark.parametrize(("fields", "said"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said_in_openais_form(server: str, fields: dict, said: str) -> None:
    asked = {"prompt": "a", **fields}
    found = WEB.post(f"{server}/images/generations", content=json.dumps(asked))
    if said == "ok":
        assert found.status_code == 200
        return
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert said in error["message"] and error["type"] == "invalid_request_error" and "code" in error


def test_what_could_be_drawn_and_was_not_is_no_fault_of_who_asked(server: str) -> None:
    found = WEB.post(f"{server}/images/generations", content=json.dumps({"prompt": FAILS}))
    error = found.json()["error"]
    assert found.status_code == 500 and "It does not work" in error["message"] and error["type"] == "server_error"


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'"x"'])
def test_a_body_that_is_no_json_object_is_refused(server: str, body: bytes) -> None:
    assert "no JSON object" in WEB.post(f"{server}/images/generations", content=body).json()["error"]["message"]


def bomb() -> bytes:
    file = BytesIO()
    Image.new("1", (5000, 5000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "no picture"),
        ([("image", b"")], "cannot be read"),
        ([("image", b"GIF89a")], "cannot be read"),
        ([("image", png()[:50])], "cannot be read"),
        ([("image", bomb())], "5000x5000 pixels"),
        ([("image[]", png())] * 5, "cannot be read"),
        ([("image", png()), ("mask", png())], "mask"),
    ],
    ids=["none", "empty", "gif", "torn", "pixels", "many", "mask"],
)
def test_uploads_that_are_refused(server: str, files: list, said: str) -> None:
    parts = [(name, ("x.png", data)) for name, data in files] or [("prompt2", (None, b"x"))]
    found = WEB.post(f"{server}/images/edits", data={"prompt": "a"}, files=parts)
    assert found.status_code == 400 and said in found.json()["error"]["message"], found.text


def test_a_request_that_is_too_large_is_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "MOST_UPLOAD", 10_000)
    monkeypatch.setattr(app_module, "MOST_JSON", 10_000)
    large = WEB.post(f"{server}/images/edits", data={"prompt": "a"}, files={"image": b"x" * 20_000})
    assert large.status_code == 413 and "10,000" in large.json()["error"]["message"]
    assert WEB.post(f"{server}/images/generations", content=b" " * 20_000).status_code == 413
    assert WEB.get(f"{server}/nowhere").status_code == 404


def test_without_a_key_no_page_in_a_browser_may_ask(server: str) -> None:
    for headers in ({"origin": "http://evil.example"}, {"host": "evil.example:80"}, {"host": "evil.example"}):
        found = WEB.get(f"{server}/models", headers=headers)
        assert found.status_code == 403 and "error" in found.json()
    assert WEB.get(f"{server}/models", headers={"host": "localhost:1"}).status_code == 200


def test_a_key_is_asked_for() -> None:
    with served(Replica(lambda _: Flat(), {}).draw, Settings("flat", "a key that is long")) as (address, _):
        with pytest.raises(openai.AuthenticationError):
            draw(address)
        keyed = openai.OpenAI(base_url=address, api_key="a key that is long", max_retries=0)
        headers = {"origin": "http://a.page", "host": "my.server"}
        assert keyed.images.generate(prompt="a", size="16x16", extra_headers=headers).data
        for given in ("", "Bearer", "Bearer a key", "Bearer \xe9", "Basic a key that is long"):
            found = WEB.get(f"{address}/models", headers={"authorization": given.encode("latin-1")})
            assert found.status_code == 401, given


def test_fifty_clients_at_once_get_what_each_asked_for() -> None:
    """Of two sizes and three kinds, from two workers, in batches of one kind."""
    asked = [(n, ("16x16", "32x16")[n % 2], ("png", "webp", "png")[n % 3]) for n in range(50)]

    def one(given: tuple[int, str, str]) -> None:
        seed, size, format = given
        answer = draw(address, SLOW if seed % 7 == 0 else "a", seed, size, n=1 + seed % 2, output_format=format)
        width, height = map(int, size.split("x"))
        for n, image in enumerate(answer.data):
            found, gray = seen(image)
            assert found == (width, height) and abs(gray - seed - n) <= 1 and image.seed == seed + n

    replicas = [Replica(lambda _: Flat(), {}) for _ in range(2)]
    with served(several(replicas), workers=2) as (address, line), ThreadPoolExecutor(50) as clients:
        list(clients.map(one, asked))
        assert line.waiting == 0 and sum(line.sizes) == 75
        assert 1 < max(line.sizes) <= 4


def test_a_full_line_says_so_and_takes_others_later() -> None:
    with served(Replica(lambda _: Flat(), {}).draw, places=2, together=1) as (address, line):
        with ThreadPoolExecutor(3) as clients:
            running = [clients.submit(draw, address, SLOW)]
            until(lambda: line.sizes and not line.waiting)
            running += [clients.submit(draw, address, SLOW) for _ in range(2)]
            until(lambda: line.waiting == 2)
            with pytest.raises(openai.RateLimitError, match="2 pictures wait already") as refused:
                draw(address)
            assert int(refused.value.response.headers["retry-after"]) > 0
            assert refused.value.code == "rate_limit_exceeded"
            with pytest.raises(openai.RateLimitError):
                client(address).images.edit(image=png(), prompt="a")
            assert all(seen(one.result().data[0])[1] == 7 for one in running)
        assert draw(address).data


def until(done: Any) -> None:
    ends = time.monotonic() + 300
    while not done():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_place_and_stops_the_work(stream: bool) -> None:
    flat = Flat()
    with served(Replica(lambda _: flat, {}).draw, places=3, together=1) as (address, line):
        body = {"prompt": SLOW, "size": "16x16", "stream": stream, "n": 1}
        host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
        open_ones = [send(host, int(port), body) for _ in range(4)]
        until(lambda: line.waiting == 3)
        for one in open_ones[1:]:
            one.close()
        until(lambda: line.waiting == 0)
        open_ones[0].close()
        time.sleep(0.5)
        before = flat.drawn
        assert draw(address).data
        assert before < TOKENS and flat.drawn == before + TOKENS, "what nobody waited for was not stopped"


def send(host: str, port: int, body: dict[str, Any]) -> socket.socket:
    """A request whose answer is not waited for."""
    content = json.dumps(body).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    found = socket.create_connection((host, port))
    found.sendall(head.encode() + content)
    return found


def test_one_that_fails_leaves_the_others_of_its_batch() -> None:
    prompts = ["a", FAILS, IMPOSSIBLE, "b"]
    with served(Replica(lambda _: Flat(), {}).draw) as (address, line), ThreadPoolExecutor(5) as clients:
        first = clients.submit(draw, address, SLOW)
        until(lambda: line.sizes)
        found = [clients.submit(draw, address, prompt, seed) for seed, prompt in enumerate(prompts)]
        assert seen(first.result().data[0])[1] == 7
        assert isinstance(found[1].exception(), openai.InternalServerError) and "not work" in str(found[1].exception())
        assert isinstance(found[2].exception(), openai.BadRequestError)
        assert [seen(found[n].result().data[0])[1] for n in (0, 3)] == [0, 3]


def test_a_picture_whose_worker_is_lost_is_drawn_alone_once_more() -> None:
    lost: list[int] = []
    replica = Replica(lambda _: Flat(), {})

    async def losing(pictures: Sequence[Any]) -> AsyncGenerator[Any, None]:
        harmful = any(one["order"]["prompt"] == "harm" for one in pictures)
        if harmful or not lost:
            lost.append(len(pictures))
            raise Lost("gone")
        async for event in replica.draw(pictures):
            yield event

    with served(losing) as (address, _), ThreadPoolExecutor(4) as clients:
        found = [clients.submit(draw, address, prompt, 1) for prompt in ("a", "b", "harm")]
        assert all(seen(one.result().data[0])[1] == 1 for one in found[:2])
        with pytest.raises(openai.InternalServerError, match="2 workers were lost"):
            found[2].result()
        events = client(address).images.generate(prompt="harm", size="16x16", stream=True)
        with pytest.raises(openai.APIError, match="2 workers were lost"):
            list(events)


@pytest.mark.parametrize("absent", NEEDED)
def test_what_a_server_needs_is_named_at_once(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it in one line, whichever part is not there."""
    found = fleet.find_spec
    monkeypatch.setattr(fleet, "find_spec", lambda name: None if name == absent else found(name))
    monkeypatch.setattr(fleet, "import_ray", lambda **_: pytest.fail("it was imported"))
    with pytest.raises(NextStepError, match=re.escape(fleet.INSTALL)):
        fleet.import_serve()


def test_a_worker_that_fails_while_it_is_left_goes_on() -> None:
    """As a connection to it may, that is to be told that nobody waits any more."""
    replica, failed = Replica(lambda _: Flat(), {}), []

    async def failing(pictures: Sequence[Any]) -> AsyncGenerator[Any, None]:
        try:
            async for event in replica.draw(pictures):
                yield event
        finally:
            if not failed:
                failed.append(1)
                raise ConnectionError("gone")

    with served(failing) as (address, _):
        assert [seen(draw(address, seed=seed).data[0])[1] for seed in (3, 4)] == [3, 4]
    assert failed


def test_every_picture_of_a_batch_is_told_how_far_it_is() -> None:
    asked = wanted({"prompt": SLOW, "n": 2, "size": "16x16"}, (), "flat")
    told: list[dict[str, Any]] = []
    draw_batch(Flat(), [picture_data(asked, n) for n in range(2)], told.append, go_on)
    assert {event["picture"] for event in told if event["kind"] == "progress"} == {0, 1}
    assert [event["picture"] for event in told if event["kind"] == "done"] == [0, 1]


def test_the_embedded_model_draws_as_it_does_alone() -> None:
    choice = ModelChoice("tiny", None, device="cpu", dtype="fp32").as_data()
    replica = Replica(None, choice)
    picture = replica._artist.pipeline.generate("a red circle", height=32, width=48, seed=3, steps=4)  # type: ignore[attr-defined]
    with served(replica.draw, Settings("tiny", limits=Limits(64, 8))) as (address, _):
        asked = {"prompt": "a red circle", "size": "48x32", "extra_body": {"seed": 3, "steps": 4}}
        *partial, whole = client(address).images.generate(**asked, stream=True, partial_images=1)
        files = [BytesIO(base64.b64decode(event.b64_json)) for event in (*partial, whole)]
        pixels = [torch.tensor(list(Image.open(file).tobytes())) for file in files]
        expected = (picture.images[0] * 255).round().flatten()
        assert (pixels[-1] - expected).abs().max() <= 1
        upper = 48 * 16 * 3
        assert len(partial) == 1 and (pixels[0][upper:] == 128).all(), "the lower half is not drawn yet"
        with pytest.raises(openai.BadRequestError, match="1 to 8"):
            client(address).images.generate(prompt="a", size="48x32", extra_body={"steps": 9})
        edited = client(address).images.edit(image=png(), prompt="Make it blue.", size="32x32", extra_body={"steps": 2})
        assert gray_size(edited.data[0]) == (32, 32)


def gray_size(image: Any) -> tuple[int, int]:
    return Image.open(BytesIO(base64.b64decode(image.b64_json))).size


@pytest.mark.parametrize(
    ("host", "key", "said"),
    [
        ("0.0.0.0", None, "others can reach"),
        ("192.168.0.1", None, "others can reach"),
        ("example.org", None, "others can reach"),
        ("::", None, "others can reach"),
        ("0.0.0.0", "short", "too short"),
        ("127.0.0.1", "", "too short"),
        ("127.0.0.1", "\n" * 20, "too short"),
        ("127.0.0.1", None, None),
        ("localhost", None, None),
        ("::1", None, None),
        ("0.0.0.0", "k" * 16, None),
    ],
)
def test_who_can_be_reached_by_others_needs_a_key(
    monkeypatch: pytest.MonkeyPatch, host: str, key: str | None, said: str | None
) -> None:
    from nextstep_core.studio.commands.serve import KEY, key_for

    monkeypatch.delenv(KEY, raising=False)
    if key is not None:
        monkeypatch.setenv(KEY, key)
    if said is None:
        assert key_for(host) == key
    else:
        with pytest.raises(NextStepError, match=said):
            key_for(host)


def test_an_address_that_is_taken_is_told() -> None:
    from nextstep_core.studio.commands.serve import listening

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(NextStepError, match="cannot be used"):
            listening("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(NextStepError, match="cannot be used"):
        listening("no such host.", 80)


class Mortal(Flat):
    """Says which process draws, by the prompt."""

    def draw(self, orders: Any, report: Any, check: Any) -> Any:
        for one in orders:
            if one.prompt.startswith("tell "):
                Path(one.prompt[5:]).write_text(str(os.getpid()))
        return super().draw(orders, report, check)


def mortal(_: Any) -> Mortal:
    return Mortal()


@pytest.mark.slow
def test_a_killed_replica_is_replaced_and_its_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    from nextstep_core.studio.serving.fleet import Fleet

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent))))
    fleet = Fleet(Where(workers=2), {}, maker=mortal)
    try:
        with served(fleet.draw, workers=2, together=1) as (address, _), ThreadPoolExecutor(12) as clients:
            found = [clients.submit(draw, address, SLOW, seed) for seed in range(5)]
            told = clients.submit(draw, address, f"tell {tmp_path / 'pid'}", 9)
            assert seen(told.result().data[0])[1] == 9
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
            found += [clients.submit(draw, address, SLOW, seed) for seed in range(5, 10)]
            assert [seen(one.result(200).data[0])[1] for one in found] == list(range(10))
            until(lambda: replicas_running() == 2)
    finally:
        fleet.shutdown()


def replicas_running() -> int:
    from ray import serve

    (deployment,) = serve.status().applications["nextstep"].deployments.values()
    return int(deployment.replica_states.get("RUNNING", 0))
