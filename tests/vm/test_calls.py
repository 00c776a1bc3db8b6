"""Calls on a whole machine, and their effects on its disks and mounts."""

from __future__ import annotations

import re

import pytest

from snapd_native.wire.names import MANAGER
from tests.support.readme import shell_block
from tests.vm.guest import INSTANCES, Guest


def call(instance: str, member: str, arguments: str) -> str:
    name = ".".join(filter(None, ["org.snapdnative1", instance]))
    return f"busctl call {name} /org/snapdnative1 {MANAGER} {member} {arguments}\n"


def prepare_expression(instance: str, key: str, parent: str = "") -> str:
    """Return a shell expression that prepares a snapshot and expands to its directory."""
    prepare = call(instance, "Prepare", f"'ssa{{sv}}' '{key}' '{parent}' 0").strip()
    return f"$({prepare} | cut -d '\"' -f 4)"


def test_the_busctl_calls_of_the_readme_work(guest: Guest) -> None:
    calls = shell_block("calls")
    assert calls.startswith("busctl ")
    mounting, unmounting = (calls.index(f" {member} ") for member in ("ListMounts", "Unmount"))
    before, after = (calls.rindex("\n", 0, at) + 1 for at in (mounting, unmounting))
    show = "echo; findmnt -N 1 -rno TARGET,OPTIONS /mnt || echo none\n"
    out = guest.run(calls[:before] + show + calls[before:after] + calls[after:] + show)
    assert 'a(ssas) 1 "bind" "/var/lib/snapd-native/snapshots/' in out
    assert 'a(ssbsu) 1 "/mnt" "look" true "persistent" 0' in out
    assert 'a(ssstta{ss}) 1 "look" "view" "v1"' in out
    assert re.search(r"^/mnt ro\b", out, re.MULTILINE)
    assert out.endswith("\nnone\n")


@pytest.mark.parametrize(("instance", "name"), [("xfs", "commands"), ("ext4", "mounting")])
def test_the_commands_of_the_readme_work(guest: Guest, instance: str, name: str) -> None:
    commands = shell_block(name)
    assert commands.startswith("snapd-native prepare ")
    guest.run(f"export SNAPD_NATIVE_INSTANCE={instance}\n{commands}")


def test_a_mount_appears_on_the_host_with_the_mounts_below_it(guest: Guest) -> None:
    out = guest.run(f"""
        source={prepare_expression("xfs", "tree")}
        mkdir "$source/below" /run/test-target
        trap 'umount -q "$source/below"; rmdir /run/test-target' EXIT
        mount -t tmpfs below "$source/below"
        echo content >"$source/below/file"
        {call("xfs", "Mount", "'ssa{sv}' tree /run/test-target 0")}
        echo mounted
        cut -d ' ' -f 5 /proc/1/mountinfo | grep /run/test-target
        cat /run/test-target/below/file
        {call("xfs", "Unmount", "'sa{sv}' /run/test-target 1 lazy b true")}
        echo unmounted
        cut -d ' ' -f 5 /proc/1/mountinfo | grep /run/test-target || true
        """)
    _, mounted = out.split("mounted\n", 1)
    assert mounted == "/run/test-target\n/run/test-target/below\ncontent\nunmounted\n"


@pytest.mark.parametrize(("instance", "shared"), [("xfs", True), ("ext4", False)])
def test_a_copy_shares_its_blocks_where_reflink_works(
    guest: Guest, instance: str, shared: bool
) -> None:
    out = guest.run(f"""
        first={prepare_expression(instance, "first")}
        head -c 4M /dev/urandom >"$first/file"
        {call(instance, "Commit", "'ssa{sv}' parent first 0")}
        second={prepare_expression(instance, "second", "parent")}
        sync
        cmp "$first/file" "$second/file"
        filefrag -v "$second/file"
        echo change >>"$second/file"
        ! cmp -s "$first/file" "$second/file" """)
    extents = [line for line in out.splitlines() if re.match(r" +\d+: ", line)]
    assert extents
    assert all(("shared" in line) is shared for line in extents), out


MAKE_SPECIAL_FILES = """
import os, stat, sys
root = sys.argv[1]
os.mknod(f"{root}/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
os.mknod(f"{root}/disk", 0o660 | stat.S_IFBLK, os.makedev(7, 200))
os.mknod(f"{root}/whiteout", stat.S_IFCHR, 0)
os.mkfifo(f"{root}/fifo")
for name, mode in (("setuid", 0o4755), ("setgid", 0o2711)):
    with open(f"{root}/{name}", "w") as file:
        file.write(name)
    os.chown(f"{root}/{name}", 1000, 1000)
    os.chmod(f"{root}/{name}", mode)
os.mkdir(f"{root}/sticky")
os.chmod(f"{root}/sticky", 0o1777)
os.symlink("/etc/shadow", f"{root}/link")
os.link(f"{root}/setuid", f"{root}/hard")
with open(f"{root}/sparse", "w") as file:
    file.truncate(1 << 30)
with open(f"{root}/capable", "w") as file:
    file.write("x")
os.setxattr(f"{root}/sticky", "trusted.overlay.opaque", b"y")
os.setxattr(f"{root}/setgid", "user.of", b"a")
os.system(f"setcap cap_net_raw+ep {root}/capable; setfacl -m u:1000:rwx {root}/capable")
"""

DESCRIBE_TREE = """
cd "$1"
export LC_ALL=C
find . -printf '%p %M %U:%G %n %T@ %l\\n' | sort
find . '(' -type c -o -type b ')' -exec stat -c '%n %t:%T' {} + | sort
getcap -r . | sort
find . | sort | xargs getfattr -h -d -m - -e hex | grep -v '^$'
find . ! -type l | sort | xargs getfacl -n
du -s --block-size=512 sparse
"""


@pytest.mark.parametrize("instance", INSTANCES)
def test_prepare_copies_devices_capabilities_acls_and_holes(guest: Guest, instance: str) -> None:
    out = guest.run(f"""
        show() {{
            {DESCRIBE_TREE}
        }}
        first={prepare_expression(instance, "first")}
        python3 - "$first" <<'END'
{MAKE_SPECIAL_FILES}
END
        {call(instance, "Commit", "'ssa{sv}' parent first 0")}
        second={prepare_expression(instance, "second", "parent")}
        (show "$first") >/run/first
        (show "$second") >/run/second
        diff /run/first /run/second
        echo same
        cat /run/second
        rm /run/first /run/second""")
    for sign in (
        "same",
        "cap_net_raw=ep",
        "./null 1:3",
        "-rwsr-xr-x",
        "./whiteout 0:0",
        "trusted.",
    ):
        assert sign in out


def test_another_service_that_sees_a_mount_cannot_change_a_committed_tree(guest: Guest) -> None:
    """A service with PrivateTmp= has copies of the host's mounts, also of later ones."""
    guest.run("systemd-run --unit=neighbour --property=PrivateTmp=yes sleep infinity")
    inside = "nsenter --mount --target $(systemctl show --value --property=MainPID neighbour)"
    try:
        guest.run("snapd-native prepare shared; mkdir -p /srv/shared")
        guest.run("snapd-native mount shared /srv/shared")
        guest.run(f"{inside} sh -c 'echo text >/srv/shared/file'")
        guest.run("snapd-native commit --digest done shared")
        refused = guest.attempt(f"{inside} sh -c 'echo more >>/srv/shared/file'")
        assert "Operation not permitted" in refused.stderr
        assert guest.run("snapd-native verify done").endswith("done\n")
    finally:
        guest.run("systemctl stop neighbour; snapd-native umount /srv/shared; snapd-native rm done")
