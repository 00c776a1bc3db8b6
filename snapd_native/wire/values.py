"""Translate values of the contract to dbus-next's: structs are lists, variants are `Variant`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from snapd_native.model import Finding, Info, Kind, Lifetime, Mount, Mounted, Trouble

Body = list[Any]
"""The arguments of a message, in dbus-next's types."""


def mount_to_wire(mount: Mount) -> Body:
    """Pack a mount as ``(ssas)``."""
    return [mount.type, mount.source, list(mount.options)]


def mount_from_wire(value: Sequence[Any]) -> Mount:
    """Unpack a mount from ``(ssas)``."""
    type_, source, options = value
    return Mount(type_, source, tuple(options))


def mounted_to_wire(mounted: Mounted) -> Body:
    """Pack a mount of the service as ``(ssbsu)``."""
    return [mounted.target, mounted.key, mounted.read_only, mounted.lifetime.value, mounted.uid]


def mounted_from_wire(value: Sequence[Any]) -> Mounted:
    """Unpack a mount of the service from ``(ssbsu)``."""
    target, key, read_only, lifetime, uid = value
    return Mounted(target, key, read_only, Lifetime(lifetime), uid)


def finding_to_wire(finding: Finding) -> Body:
    """Pack a finding as ``(sss)``."""
    return [finding.kind.value, finding.key, finding.what]


def finding_from_wire(value: Sequence[Any]) -> Finding:
    """Unpack a finding from ``(sss)``."""
    kind, key, what = value
    return Finding(Trouble(kind), key, what)


def info_to_wire(info: Info) -> Body:
    """Pack a record as ``(ssstta{ss})``."""
    return [
        info.name,
        info.kind.value,
        info.parent,
        info.created,
        info.updated,
        dict(info.labels),
    ]


def info_from_wire(value: Sequence[Any]) -> Info:
    """Unpack a record from ``(ssstta{ss})``."""
    name, kind, parent, created, updated, labels = value
    return Info(name, Kind(kind), parent, created, updated, labels)
