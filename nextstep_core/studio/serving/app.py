"""OpenAI's images API over a line of pictures, as an ASGI application.

With a key, whoever sends it may ask; without one, programs of this machine, and no page that a browser on it shows.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import NextStepError, check_choice
from ...sentences import Sentence
from .asked import MOST_IMAGES, Limits, Wanted, parse_form, parse_json, picture_data, wanted
from .line import Full, Line, Picture

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MOST_JSON = 1 << 20  # bytes
MOST_UPLOAD = 20 << 20  # bytes of a request with pictures
MOST_FIELDS = 40  # of a form; there are fewer
READ_SECONDS = 60.0  # that a request may take to arrive
RETRY_SECONDS = 10  # that a client is told to wait when the line is full
GONE = 499  # the status of what nobody reads
GENERATION, EDIT = "image_generation", "image_edit"
IMAGE_FIELDS = ("image", "image[]")
HERE = ("127.0.0.1", "localhost", "[::1]")  # what a request to this machine calls it

T = TypeVar("T")
Handler = Callable[["Request"], Awaitable["Response"]]


@dataclass(frozen=True)
class Settings:
    """What a server is: the model's name, the key that it asks for, and what it allows."""

    model: str
    key: str | None = None
    limits: Limits = Limits()


class Refused(Exception):
    """A request that is answered with an error before it gets a place."""

    def __init__(self, status: int, said: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(said)
        self.status, self.said, self.kind, self.code = status, said, kind, code

    def as_data(self) -> dict[str, Any]:
        """In OpenAI's form."""
        return {"error": {"message": self.said, "type": self.kind, "param": None, "code": self.code}}


class Server:
    """Answers requests with what a line draws."""

    def __init__(self, line: Line, settings: Settings) -> None:
        self.line, self.settings = line, settings
        self._arriving = 0

    def app(self) -> Starlette:
        """The application. The line is started and stopped with it."""
        from starlette.applications import Starlette
        from starlette.routing import Route

        @asynccontextmanager
        async def drawing(_: Starlette) -> AsyncIterator[None]:
            self.line.start()
            yield
            await self.line.stop()

        routes = [
            Route("/v1/images/generations", self._answered(self._generate), methods=["POST"]),
            Route("/v1/images/edits", self._answered(self._edit), methods=["POST"]),
            Route("/v1/models", self._answered(self._models), methods=["GET"]),
            Route("/{path:path}", self._answered(self._nothing), methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
        ]
        return Starlette(routes=routes, lifespan=drawing)

    def _answered(self, handler: Handler) -> Handler:
        """The handler, for whoever may ask; what is wrong becomes an answer in OpenAI's form."""
        from starlette.responses import JSONResponse

        async def answer(request: Request) -> Response:
            try:
                self._admit(request)
                return await handler(request)
            except Full as error:
                refused = Refused(429, str(error), "requests", "rate_limit_exceeded")
            except NextStepError as error:
                refused = Refused(400, str(error))
            except Refused as error:
                refused = error
            headers = {"Retry-After": str(RETRY_SECONDS)} if refused.status == 429 else None
            return JSONResponse(refused.as_data(), refused.status, headers)

        return answer

    def _admit(self, request: Request) -> None:
        key = self.settings.key
        if key is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), key.encode()):
                raise Refused(401, str(Sentence("The API key is missing or wrong.")), code="invalid_api_key")
            return
        # A page in a browser can send requests here, under a name of its own for this machine even.
        host = request.headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in HERE or "origin" in request.headers:
            raise Refused(403, str(Sentence("Pages in a browser may not ask here. Start the server with an API key.")))

    async def _models(self, _: Request) -> Response:
        from starlette.responses import JSONResponse

        model = {"id": self.settings.model, "object": "model", "created": 0, "owned_by": "nextstep"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _nothing(self, _: Request) -> Response:
        raise Refused(404, str(Sentence("There is nothing here. Ask /v1/images/generations or /v1/images/edits.")))

    async def _generate(self, request: Request) -> Response:
        with self._arrival():
            fields = parse_json(await _body(request, MOST_JSON))
            one = wanted(fields, (), self.settings.model, self.settings.limits)
        return await self._draw(request, one, GENERATION)

    async def _edit(self, request: Request) -> Response:
        with self._arrival():
            fields, images = await _form(request)
            asked = parse_form(fields)
            # Decoding takes a while, and others are to be answered meanwhile.
            one = await asyncio.to_thread(wanted, asked, images, self.settings.model, self.settings.limits)
        return await self._draw(request, one, EDIT)

    @contextmanager
    def _arrival(self) -> Iterator[None]:
        """Counts a request while it is read: what is uploaded takes memory before it has a place."""
        if self.line.waiting >= self.line.places or self._arriving >= self.line.places:
            raise self.line.full()
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    async def _draw(self, request: Request, one: Wanted, kind: str) -> Response:
        from starlette.responses import JSONResponse, Response, StreamingResponse

        pictures = [Picture(picture_data(one, n), one.alike) for n in range(len(one.orders))]
        self.line.join(pictures)
        if one.stream:
            return StreamingResponse(self._stream(pictures[0], one, kind), media_type="text/event-stream")
        drawing, leaving = asyncio.create_task(_results(pictures)), asyncio.create_task(_left(request))
        try:
            await asyncio.wait({drawing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                return Response(status_code=GONE)
            data = [{"b64_json": text, "seed": seed} for text, seed in zip(await drawing, one.seeds, strict=True)]
        finally:
            self.line.leave(pictures)
            for task in (drawing, leaving):
                task.cancel()
        return JSONResponse({"created": int(time.time()), "data": data, **_facts(one)})

    async def _stream(self, picture: Picture, one: Wanted, kind: str) -> AsyncIterator[bytes]:
        try:
            while (event := await picture.events.get())["kind"] != "error":
                if event["kind"] == "progress":
                    yield b": drawing\n\n"  # a comment, so that nobody between here and there hangs up
                    continue
                done = event["kind"] == "done"
                name = f"{kind}.{'completed' if done else 'partial_image'}"
                said = {"type": name, "b64_json": b64encode(event["data"]).decode(), "created_at": int(time.time())}
                said |= {**_facts(one), "quality": "auto"}
                said |= {"seed": one.seeds[0]} if done else {"partial_image_index": event["index"]}
                yield _event(name, said)
                if done:
                    return
            yield _event("error", _failure(event).as_data())
        finally:
            self.line.leave([picture])


def _facts(one: Wanted) -> dict[str, str]:
    return {"size": f"{one.width}x{one.height}", "output_format": one.kind.format, "background": "opaque"}


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _failure(event: dict[str, Any]) -> Refused:
    said = str(Sentence.from_data(event["error"]))
    # A request that can be drawn and was not, as where memory ran out, is no fault of who asked.
    return Refused(500, said, "server_error") if event.get("ours") else Refused(400, said)


async def _results(pictures: Sequence[Picture]) -> list[str]:
    found = []
    for picture in pictures:
        while (event := await picture.events.get())["kind"] not in ("done", "error"):
            pass
        if event["kind"] == "error":
            raise _failure(event)
        found.append(b64encode(event["data"]).decode())
    return found


async def _left(request: Request) -> None:
    """Returns when whoever asked is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_large(most: int) -> Refused:
    return Refused(413, str(Sentence("The request has more than {most:,} bytes. Send less.", most=most)))


async def _in_time(arriving: Awaitable[T]) -> T:
    """What arrives; Refused where it takes too long, ends early or cannot be read."""
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    try:
        return await asyncio.wait_for(arriving, READ_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, str(Sentence("The request took too long to arrive. Send it again."))) from None
    except (ClientDisconnect, HTTPException) as error:  # the latter of a form that is none
        reason = getattr(error, "detail", "") or type(error).__name__
        raise Refused(400, str(Sentence("The request cannot be read ({reason}).", reason=reason))) from None


async def _body(request: Request, most: int) -> bytes:
    """The whole of a request; Refused for one that is too large."""

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise _too_large(most)
        return bytes(body)

    return await _in_time(read())


async def _form(request: Request) -> tuple[list[tuple[str, str]], list[bytes]]:
    """The fields of a form, and its pictures; a file's name is not looked at."""
    from starlette.datastructures import UploadFile
    from starlette.requests import Request

    received = 0

    async def receive() -> Any:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > MOST_UPLOAD:
            raise _too_large(MOST_UPLOAD)
        return message

    async def read() -> tuple[list[tuple[str, str]], list[bytes]]:
        fields, images = list[tuple[str, str]](), list[bytes]()
        limited = Request(request.scope, receive)
        async with limited.form(max_files=MOST_IMAGES, max_fields=MOST_FIELDS) as form:
            for name, value in form.multi_items():
                if not isinstance(value, UploadFile):
                    fields.append((name, value))
                elif name in IMAGE_FIELDS:
                    images.append(await value.read())
                else:
                    check_choice(Sentence("A file of the request"), name, IMAGE_FIELDS)
        if not images:
            raise NextStepError("The request has no picture. Send a form with a file as image.")
        return fields, images

    return await _in_time(read())
