"""The Manager's methods for programs without an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from snapd_native.client.asynchronous import Client
from snapd_native.model import Info

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _blocking(
    method: Callable[Concatenate[Client, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[BlockingClient, _P], _T]:
    """Return a method of `BlockingClient` that waits for the coroutine ``method``."""

    @wraps(method)
    def call(self: BlockingClient, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self._runner.run(method(self._client, *args, **kwargs))

    return call


class BlockingClient:
    """`Client` for programs without an event loop; use it as ``with BlockingClient() as client``.

    It is not thread-safe: use one client for each thread.
    """

    def __init__(self, instance: str = "") -> None:
        """Use an instance of the service; see `Client`."""
        self._client = Client(instance)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        """Connect to the system bus.

        Raises:
            Unavailable: it cannot be reached.
        """
        try:
            self._runner.run(self._client.__aenter__())
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Disconnect."""
        self._runner.run(self._client.__aexit__(kind, error, trace))
        self._runner.close()

    prepare = _blocking(Client.prepare)
    view = _blocking(Client.view)
    commit = _blocking(Client.commit)
    mounts = _blocking(Client.mounts)
    stat = _blocking(Client.stat)
    update = _blocking(Client.update)
    usage = _blocking(Client.usage)
    background_usage = _blocking(Client.background_usage)
    list = _blocking(Client.list)
    remove = _blocking(Client.remove)
    cleanup = _blocking(Client.cleanup)
    check = _blocking(Client.check)
    repair = _blocking(Client.repair)
    verify = _blocking(Client.verify)
    standby = _blocking(Client.standby)
    mount = _blocking(Client.mount)
    unmount = _blocking(Client.unmount)
    list_mounts = _blocking(Client.list_mounts)
    open_tree = _blocking(Client.open_tree)
    jobs = _blocking(Client.jobs)
    progress = _blocking(Client.progress)
    cancel = _blocking(Client.cancel)
    service = _blocking(Client.service)

    def walk(self, filters: Sequence[str] = ()) -> Iterator[Info]:
        """Iterate over all matching snapshots, in byte order of names."""
        infos = self._client.walk(filters)

        async def following() -> Info | None:
            return await anext(infos, None)

        while (info := self._runner.run(following())) is not None:
            yield info
