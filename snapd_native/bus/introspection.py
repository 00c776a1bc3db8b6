"""The introspection XML: the definition of the interfaces, and what Introspect returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from xml.etree import ElementTree

from snapd_native.wire.names import (
    INTROSPECTABLE,
    JOB,
    JOB_PATH,
    MANAGER,
    OBJECT_PATH,
    PEER,
    PROPERTIES,
)

_DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)

_STANDARD = f"""
  <interface name="{PEER}">
    <method name="Ping"/>
    <method name="GetMachineId">
      <arg name="machine_uuid" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="{INTROSPECTABLE}">
    <method name="Introspect">
      <arg name="xml_data" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="{PROPERTIES}">
    <method name="Get">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="GetAll">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="props" type="a{{sv}}" direction="out"/>
    </method>
    <method name="Set">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg name="value" type="v" direction="in"/>
    </method>
    <signal name="PropertiesChanged">
      <arg name="interface_name" type="s"/>
      <arg name="changed_properties" type="a{{sv}}"/>
      <arg name="invalidated_properties" type="as"/>
    </signal>
  </interface>
"""


@dataclass(frozen=True, slots=True)
class Interface:
    """The types of an interface's members, as signatures."""

    methods: dict[str, tuple[str, str]]
    """Signatures of input and output."""
    arguments: dict[str, list[str]]
    """Names of the input arguments."""
    signals: dict[str, str]
    properties: dict[str, str]


def contract() -> str:
    """Return the text of ``org.snapdnative1.xml``."""
    return resources.files(__package__).joinpath("org.snapdnative1.xml").read_text("utf-8")


def interfaces(xml: str) -> dict[str, Interface]:
    """Return the interfaces that an introspection document describes."""
    # The documents are part of the package, so a hardened parser is not needed.
    node = ElementTree.fromstring(xml)  # noqa: S314
    return {interface.attrib["name"]: _interface(interface) for interface in node.iter("interface")}


def describe(path: str, jobs: Sequence[str]) -> str | None:
    """Return the result of Introspect at ``path``, or None if there is no object.

    ``jobs`` are the last parts of the paths of all jobs.
    """
    if path == OBJECT_PATH:
        return _document(_definition(MANAGER), _STANDARD, _children(["job"] if jobs else []))
    if jobs and path == JOB_PATH:
        return _document(_children(jobs))
    if path in {f"{JOB_PATH}/{job}" for job in jobs}:
        return _document(_definition(JOB), _STANDARD)
    below = OBJECT_PATH.removeprefix(path.rstrip("/") + "/")
    if below == OBJECT_PATH:
        return None
    return _document(_children([below.partition("/")[0]]))


def _document(*parts: str) -> str:
    body = "\n".join(part.strip("\n") for part in parts if part)
    return f"{_DOCTYPE}<node>\n{body}\n</node>\n"


def _definition(name: str) -> str:
    begin, end = f'  <interface name="{name}">', "  </interface>"
    return begin + contract().partition(begin)[2].partition(end)[0] + end


def _children(names: Sequence[str]) -> str:
    return "\n".join(f'  <node name="{name}"/>' for name in names)


def _interface(node: ElementTree.Element) -> Interface:
    return Interface(
        methods={
            method.attrib["name"]: (_signature(method, "in"), _signature(method, "out"))
            for method in node.iter("method")
        },
        arguments={
            method.attrib["name"]: [
                arg.attrib["name"] for arg in method.iter("arg") if arg.get("direction") == "in"
            ]
            for method in node.iter("method")
        },
        signals={signal.attrib["name"]: _signature(signal, "") for signal in node.iter("signal")},
        properties={p.attrib["name"]: p.attrib["type"] for p in node.iter("property")},
    )


def _signature(member: ElementTree.Element, direction: str) -> str:
    return "".join(
        arg.attrib["type"]
        for arg in member.iter("arg")
        if arg.attrib.get("direction", "") == direction
    )
