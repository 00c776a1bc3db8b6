"""The code blocks of the documents for users: those of the shell have names, and tests run each."""

from __future__ import annotations

import re

from tests.support import PROJECT

_TEXT = "".join(
    (PROJECT / document).read_text()
    for document in ("README.md", "docs/containerd.md", "docs/operations.md", "docs/security.md")
)


IN_PACKAGING_TESTS = {
    "demo": "make demo\n",
    "commands": "snapd-native prepare build\n",
    "mounting": "snapd-native prepare site\n",
    "calls": "busctl introspect ",
    "in C": "gdbus-codegen ",
    "full disk": "df ",
    "archives": "make dist\n",
}
"""The blocks that `tests/packaging` runs: the name and the beginning of each."""

IN_MACHINE_TESTS = {
    "install": "make deb\n",
    "without a package": "make install\n",
    "instance": "systemctl enable --now snapd-native@data\n",
    "check": "snapd-native check\n",
    "backup": "systemctl stop snapd-native\ntar --create ",
    "restore": "systemctl stop snapd-native\nmv ",
    "delete": "chattr -R -f -i ",
    "move": "systemctl stop snapd-native\ncp ",
    "rule": "groupadd ",
    "exposure": "systemd-analyze security ",
    "broker": "cat >/etc/dbus-1/system.d/",
}
"""The blocks that need systemd: `tests/vm` runs them."""


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", _TEXT, re.MULTILINE | re.DOTALL)


def shell_block(name: str) -> str:
    """Return the commands of the block with one of the names above."""
    beginning = (IN_PACKAGING_TESTS | IN_MACHINE_TESTS)[name]
    (found,) = (block for block in code_blocks("sh") if block.startswith(beginning))
    return found
