"""The package on a running machine, in this order: upgrade, removal, installation, purge.

Then the program is installed without a package.
"""

from __future__ import annotations

import pytest

from snapd_native.wire.names import MANAGER
from tests.support.readme import shell_block
from tests.vm.guest import Guest

BUS = f"busctl call org.snapdnative1 /org/snapdnative1 {MANAGER}"
LATEST = "$(ls -t /vagrant/dist/snapd-native_*_all.deb | head -n 1)"
TARGET = "/var/test-target"


@pytest.fixture(scope="module")
def machine_with_mount(machine: Guest) -> Guest:
    """Return a machine with a mounted view."""
    machine.run(f"""
        mkdir -p {TARGET}
        source=$({BUS} Prepare 'ssa{{sv}}' first '' 0 | cut -d '"' -f 4)
        echo content >"$source/file"
        {BUS} Commit 'ssa{{sv}}' committed first 0
        {BUS} View 'ssa{{sv}}' look committed 0
        {BUS} Mount 'ssa{{sv}}' look {TARGET} 0""")
    return machine


def test_an_upgrade_restarts_the_service_and_keeps_mounts(machine_with_mount: Guest) -> None:
    """The later version is the same package with a higher version number."""
    out = machine_with_mount.run(
        f"""
        pids() {{
            systemctl show -P MainPID snapd-native snapd-native@ext4 snapd-native@xfs | xargs
        }}
        before=$(pids)
        rm -rf /var/tmp/later
        dpkg-deb -R {LATEST} /var/tmp/later
        sed -i 's/^Version: .*/&+later/' /var/tmp/later/DEBIAN/control
        dpkg-deb -b /var/tmp/later /var/tmp/later.deb >/dev/null
        dpkg -i /var/tmp/later.deb >/dev/null
        rm -r /var/tmp/later /var/tmp/later.deb
        echo "$before"
        pids
        systemctl is-active snapd-native snapd-native@ext4 snapd-native@xfs | xargs
        dpkg-query -W -f '${{Version}}\\n' snapd-native
        cat {TARGET}/file
        {BUS} ListMounts s look""",
    )
    before, after, active, version, content, mounts = out.splitlines()
    assert not set(before.split()) & set(after.split())
    assert active == "active active active"
    assert version.endswith("+later")
    assert content == "content"
    assert '"look" true "persistent"' in mounts


def test_removal_keeps_data_and_a_new_installation_finds_it(machine_with_mount: Guest) -> None:
    out = machine_with_mount.run(
        f"""
        dpkg -r snapd-native >/dev/null 2>&1
        ls -d /var/lib/snapd-native /srv/ext4/snapd-native /srv/xfs/snapd-native
        cat {TARGET}/file
        pgrep -xc snapd-native || true
        dpkg -i {LATEST} >/dev/null 2>&1
        systemctl enable --now -q snapd-native snapd-native@ext4 snapd-native@xfs
        {BUS} Stat s committed
        {BUS} ListMounts s look
        snapd-native check""",
    )
    lines = out.splitlines()
    assert lines[3:5] == ["content", "0"]
    assert '"committed" "committed"' in lines[5]
    assert '"look" true "persistent"' in lines[6]
    assert lines[7:] == []


def test_purge_unmounts_and_deletes_everything(machine_with_mount: Guest) -> None:
    out = machine_with_mount.run(
        f"""
        dpkg -P snapd-native >/dev/null 2>&1
        findmnt -N 1 -rno TARGET {TARGET} || echo unmounted
        ls -d /var/lib/snapd-native* /run/snapd-native /usr/bin/snapd-native 2>/dev/null || true
        busctl status org.snapdnative1 >/dev/null 2>&1 || echo no name || true
        systemctl list-units --all --plain --no-legend 'snapd-native*' | grep -v not-found || true
        rmdir {TARGET}""",
    )
    assert out.splitlines() == ["unmounted", "no name"]


def test_make_install_runs_the_service_and_make_uninstall_removes_it(machine: Guest) -> None:
    """The libraries of the package are still installed."""
    out = machine.run(
        f"""
        cd /vagrant
        {shell_block("without a package")}
        systemctl show -P ExecStart snapd-native | grep -o 'path=[^ ]*'
        snapd-native prepare build >/dev/null
        runuser -u nobody -- snapd-native ls 2>&1 | grep -o 'org.snapdnative1.[a-z]*' || true
        snapd-native ls kind==active | tail -n +2 | cut -d ' ' -f 1
        snapd-native rm build
        snapd-native cleanup
        systemctl disable -q --now snapd-native
        make uninstall
        find / -xdev -name '*snapd*native*' -not -path '/vagrant/*' -not -path '/proc/*' \
            -not -path '/sys/*' -not -path '/var/*' -not -path '/run/*' -not -path '/tmp/*'
        rm -r /var/lib/snapd-native""",
    )
    advice, *rest = out.splitlines()
    assert advice.startswith("now run: systemctl daemon-reload; ")
    assert rest == ["path=/usr/local/bin/snapd-native", "org.snapdnative1.read", "build"]
