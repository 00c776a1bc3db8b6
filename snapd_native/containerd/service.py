"""The gRPC service that containerd calls; see its ``api/services/snapshots/v1``."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from snapd_native import errors
from snapd_native.containerd import snapshots_pb2 as wire
from snapd_native.containerd.snapshots import Snapshots
from snapd_native.errors import SnapdError
from snapd_native.model import Info, Kind, Mount

log = logging.getLogger(__name__)

SERVICE = "containerd.services.snapshots.v1.Snapshots"

BLOCK = 100
"""Snapshots in one message of List, as containerd's own service sends them."""

_CODES = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DataLoss: grpc.StatusCode.DATA_LOSS,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Internal: grpc.StatusCode.INTERNAL,
    errors.AccessDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.InteractiveAuthorizationRequired: grpc.StatusCode.PERMISSION_DENIED,
}

_KINDS = {Kind.VIEW: wire.VIEW, Kind.ACTIVE: wire.ACTIVE, Kind.COMMITTED: wire.COMMITTED}

_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
_Request = TypeVar("_Request", bound=Message)
_Reply = TypeVar("_Reply", bound=Message)


class Service:
    """The methods of the service, for one containerd."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what a gRPC server needs to serve the methods."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Prepare": _unary(self._prepare, wire.CreateRequest),
                "View": _unary(self._view, wire.CreateRequest),
                "Mounts": _unary(self._mounts, wire.KeyRequest),
                "Commit": _unary(self._commit, wire.CommitRequest),
                "Remove": _unary(self._remove, wire.KeyRequest),
                "Stat": _unary(self._stat, wire.KeyRequest),
                "Update": _unary(self._update, wire.UpdateRequest),
                "List": grpc.unary_stream_rpc_method_handler(
                    self._list,
                    request_deserializer=wire.ListRequest.FromString,
                    response_serializer=wire.ListResponse.SerializeToString,
                ),
                "Usage": _unary(self._usage, wire.KeyRequest),
                "Cleanup": _unary(self._cleanup, wire.CleanupRequest),
            },
        )

    async def _prepare(self, request: wire.CreateRequest) -> wire.MountsResponse:
        made = await self._snapshots.prepare(request.key, request.parent, dict(request.labels))
        return _mounts(made)

    async def _view(self, request: wire.CreateRequest) -> wire.MountsResponse:
        made = await self._snapshots.view(request.key, request.parent, dict(request.labels))
        return _mounts(made)

    async def _mounts(self, request: wire.KeyRequest) -> wire.MountsResponse:
        return _mounts(await self._snapshots.mounts(request.key))

    async def _commit(self, request: wire.CommitRequest) -> wire.Empty:
        labels = dict(request.labels)
        await self._snapshots.commit(request.name, request.key, labels, request.parent)
        return wire.Empty()

    async def _remove(self, request: wire.KeyRequest) -> wire.Empty:
        await self._snapshots.remove(request.key)
        return wire.Empty()

    async def _stat(self, request: wire.KeyRequest) -> wire.InfoResponse:
        return wire.InfoResponse(info=_info(await self._snapshots.stat(request.key)))

    async def _update(self, request: wire.UpdateRequest) -> wire.InfoResponse:
        labels, paths = dict(request.info.labels), [*request.update_mask.paths]
        info = await self._snapshots.update(request.info.name, labels, paths)
        return wire.InfoResponse(info=_info(info))

    async def _list(
        self, request: wire.ListRequest, context: _Context
    ) -> AsyncIterator[wire.ListResponse]:
        block: list[wire.Info] = []
        try:
            async for info in self._snapshots.walk([*request.filters]):
                block.append(_info(info))
                if len(block) == BLOCK:
                    yield wire.ListResponse(info=block)
                    block = []
        except Exception as error:
            await context.abort(*_status("List", error))
        if block:
            yield wire.ListResponse(info=block)

    async def _usage(self, request: wire.KeyRequest) -> wire.UsageResponse:
        usage = await self._snapshots.usage(request.key)
        return wire.UsageResponse(size=usage.size, inodes=usage.inodes)

    async def _cleanup(self, _: wire.CleanupRequest) -> wire.Empty:
        await self._snapshots.cleanup()
        return wire.Empty()


def _unary(
    method: Callable[[_Request], Awaitable[_Reply]], takes: type[_Request]
) -> grpc.RpcMethodHandler[_Request, _Reply]:
    """Return the handler of a method that answers with one message, or with an error."""

    async def answer(request: _Request, context: _Context) -> _Reply:
        try:
            return await method(request)
        except Exception as error:
            name = method.__name__.removeprefix("_").capitalize()
            await context.abort(*_status(name, error))
            # It has raised.
            raise

    return grpc.unary_unary_rpc_method_handler(
        answer,
        request_deserializer=takes.FromString,
        response_serializer=lambda reply: reply.SerializeToString(),
    )


def _status(method: str, error: Exception) -> tuple[grpc.StatusCode, str]:
    """Return the status of an error, and its sentence."""
    if isinstance(error, SnapdError):
        return _CODES[type(error)], error.message
    log.error("%s failed: %s", method, error, exc_info=error)
    return grpc.StatusCode.INTERNAL, f"{method} failed because of a bug: see the plugin's log"


def _mounts(mount: Mount) -> wire.MountsResponse:
    one = wire.Mount(type=mount.type, source=mount.source, options=mount.options)
    return wire.MountsResponse(mounts=[one])


def _info(info: Info) -> wire.Info:
    return wire.Info(
        name=info.name,
        parent=info.parent,
        kind=_KINDS[info.kind],
        created_at=_timestamp(info.created),
        updated_at=_timestamp(info.updated),
        labels=info.labels,
    )


def _timestamp(microseconds: int) -> wire.Timestamp:
    seconds, rest = divmod(microseconds, 1_000_000)
    return wire.Timestamp(seconds=seconds, nanos=rest * 1000)
