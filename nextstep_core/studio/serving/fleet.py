"""So many replicas of a model, which Ray Serve starts, places and replaces when they are lost."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ...errors import NextStepError
from ..cluster import PACKAGE, Where, connect, import_ray
from ..worker import Data, Maker
from .line import Lost

APP = "nextstep"
INSTALL = 'python -m pip install "ray[serve]" python-multipart'
# Starlette and uvicorn come with Ray Serve; Starlette reads forms by the last.
NEEDED = ("ray", "starlette", "uvicorn", "python_multipart")
HEALTH_SECONDS = 2.0  # between looks at whether a replica is there


class Fleet:
    """Replicas with the model of a `choice`: one on each GPU that `where` tells, or so many workers on CPUs."""

    def __init__(self, where: Where, choice: Mapping[str, Any], maker: Maker | None = None) -> None:
        self.where = where.check()
        self._ray, self._serve = import_serve()
        self._ours = not self._ray.is_initialized()
        if self._ours:
            connect(self._ray, self.where)
        self.workers = self._count()
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            self._serve.start(
                proxy_location="Disabled", logging_config={"log_level": "ERROR", "enable_access_log": False}
            )
            made = _deployment(self._serve, self.where, self.workers, sent=self._ours).bind(maker, dict(choice))
            self._handle = self._serve.run(made, name=APP, route_prefix=None).options(stream=True)
        except Exception as error:  # of many kinds, by what does not start
            self.shutdown()
            raise NextStepError(
                "Workers are lost before they have the model ({reason}).",
                reason=(str(error).splitlines() or [type(error).__name__])[0],
            ) from None

    async def draw(self, pictures: Sequence[Data]) -> AsyncGenerator[Data, None]:
        """Have a batch drawn by a replica that is free; Lost where that is gone before the end."""
        stream = self._handle.draw.remote(list(pictures))
        try:
            async for event in stream:
                yield event
        except self._ray.exceptions.RayActorError as error:
            raise Lost((str(error).splitlines() or [type(error).__name__])[0]) from None
        finally:
            stream.cancel()

    def shutdown(self) -> None:
        """Let the replicas go."""
        if self._ray.is_initialized():
            self._serve.shutdown()
            if self._ours:
                self._ray.shutdown()

    def _count(self) -> int:
        if self.where.workers is not None:
            return self.where.workers
        there = int(self._ray.cluster_resources().get("GPU", 0))
        if there == 0 or there < (self.where.gpus or 0):
            if self._ours:
                self._ray.shutdown()
            raise NextStepError(
                "There are {there} GPUs. Ask for as many, or for workers on CPUs: --workers 2.", there=there
            )
        return self.where.gpus or there


def import_serve() -> tuple[Any, Any]:
    """Ray and Ray Serve; NextStepError, with the line that installs them, where they are not there."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own, 15, starves replicas where other programs compute
    try:
        if any(find_spec(name) is None for name in NEEDED):
            raise ImportError
        ray = import_ray(alone=True)
        from ray import serve
    except ImportError:
        raise NextStepError("A server needs Ray Serve. Install it: {command}", command=INSTALL) from None
    return ray, serve


def _deployment(serve: Any, where: Where, workers: int, sent: bool) -> Any:
    """What Ray Serve makes replicas of. They have this package as `cluster` has its workers have it."""

    class NextStepReplica:
        """Sent as it stands here."""

        def __init__(self, maker: Any, choice: dict[str, Any]) -> None:
            from nextstep_core.studio.serving.replica import Replica

            self.replica = Replica(maker, choice)

        async def draw(self, pictures: list[dict[str, Any]]) -> Any:
            async for event in self.replica.draw(pictures):
                yield event

    needs: dict[str, Any] = {"num_cpus": 1} | ({"num_gpus": 1} if where.resource == "GPU" else {})
    if not sent:
        needs["runtime_env"] = {"env_vars": {"PYTHONPATH": str(PACKAGE.parent)}}
    return serve.deployment(
        NextStepReplica,
        num_replicas=workers,
        max_ongoing_requests=1,
        ray_actor_options=needs,
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=1.0,
    )
