"""Run a real polkitd on a private bus, with the rules of a test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import PROJECT

POLICY = Path("/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf")
"""The bus policy that lets a process own the name of polkit."""

_SCRIPT = """
mount --bind "$1" /etc/polkit-1/rules.d
mount --bind "$2" /usr/share/polkit-1/actions
exec /usr/lib/polkit-1/polkitd
"""


@contextmanager
def run_polkitd(address: str, rules: str, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Run polkitd with the actions of the project and with ``rules`` in JavaScript."""
    places = [directory / name for name in ("rules.d", "actions")]
    for place in places:
        place.mkdir()
        place.chmod(0o755)
    (places[0] / "50-test.rules").write_text(rules)
    policy = PROJECT / "dbus" / "org.snapdnative1.policy"
    (places[1] / policy.name).write_text(policy.read_text())
    for path in directory.rglob("*.*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    command = ["unshare", "-m", "--propagation", "private", "sh", "-eu", "-c", _SCRIPT, "sh"]
    with subprocess.Popen(
        [*command, *map(str, places)],
        env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert any("Acquired the name" in line for line in process.stdout)
            yield process
        finally:
            process.terminate()
