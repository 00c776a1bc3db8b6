"""The operations of the README, run on a whole machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.readme import IN_MACHINE_TESTS, shell_block
from tests.vm.guest import Guest

COMMIT_TREE = """
    snapd-native prepare import
    mkdir "$(snapd-native mounts import | cut -f 2)/directory"
    echo data >"$(snapd-native mounts import | cut -f 2)/directory/file"
    ln "$(snapd-native mounts import | cut -f 2)"/directory/{file,link}
    setfattr -n trusted.of -v it "$(snapd-native mounts import | cut -f 2)/directory/file"
    snapd-native commit v1 import
"""
"""A script that commits a small tree as v1."""

PRINT_CONTENT = """
    look=$(snapd-native view look v1 | cut -f 2)
    cat "$look/directory/file"
    stat -c %h "$look/directory/file"
    getfattr --absolute-names --only-values -n trusted.of "$look/directory/file"
"""
"""A script that prints the content of v1."""

CONTENT = "data\n2\nit"


@pytest.fixture
def data(guest: Guest) -> Iterator[Guest]:
    """Yield a machine with the directory /srv/data; remove it and all changes afterwards."""
    guest.run("mkdir /srv/data")
    yield guest
    guest.run(
        """
        systemctl -q disable --now snapd-native@data
        rm -rf /etc/systemd/system/snapd-native.service.d
        systemctl daemon-reload
        systemctl restart snapd-native
        chattr -R -f -i /srv/data /var/lib/snapd-native.old || true
        rm -rf /srv/data /var/backups/snapd-native.tar /var/lib/snapd-native.old
        """
    )


def test_every_documented_operation_has_a_test() -> None:
    assert set(IN_MACHINE_TESTS) == {
        *(
            "install",
            "instance",
            "check",
            "backup",
            "restore",
            "delete",
            "move",
            "rule",
            "exposure",
        ),
        *("without a package", "broker"),  # in test_package and test_broker
    }


def test_the_documented_installation_works(guest: Guest) -> None:
    build, *commands = shell_block("install").splitlines()
    # tools/vm has already built the installed package, by the same script.
    assert build == "make deb"
    out = guest.run("\n".join(["cd /vagrant", *commands]))
    assert "active (running)" in out


def test_the_documented_setup_of_an_instance_works(data: Guest) -> None:
    assert data.run(shell_block("instance")).split() == [
        "NAME",
        "KIND",
        "PARENT",
        "AGE",
        "LABELS",
    ]
    assert data.run("stat -c %a /srv/data/snapd-native /run/snapd-native@data") == "700\n700\n"


def test_an_instance_without_its_disk_does_not_start(guest: Guest) -> None:
    assert guest.attempt("systemctl start snapd-native@nowhere").returncode != 0
    assert guest.attempt("test -e /srv/nowhere").returncode != 0


def test_the_documented_check_shows_the_calls_in_the_journal(guest: Guest) -> None:
    guest.run(COMMIT_TREE)
    out = guest.run(f"journalctl --sync; {shell_block('check')}")
    assert 'Commit name="v1" key="import": done (uid 0, ' in out


def test_the_documented_backup_can_be_restored(data: Guest) -> None:
    data.run(COMMIT_TREE + shell_block("backup"))
    data.run("snapd-native rm v1; snapd-native prepare later; snapd-native commit v2 later")
    data.run(shell_block("restore"))
    assert CONTENT in data.run(PRINT_CONTENT)
    assert data.run("stat -c %a /var/lib/snapd-native") == "700\n"
    assert data.attempt("rm -r /var/lib/snapd-native.old").returncode != 0
    data.run(shell_block("delete"))


def test_the_documented_move_of_the_state_keeps_the_data(data: Guest) -> None:
    data.run(COMMIT_TREE + shell_block("move"))
    out = data.run(PRINT_CONTENT + "\necho; echo $look")
    assert CONTENT in out
    assert out.splitlines()[-1].startswith("/srv/data/moved/snapshots/")
    # Mounts are visible on the host, also with the state in the new place.
    data.run("snapd-native mount look /mnt; grep -q ' /mnt ' /proc/1/mountinfo")
    data.run("snapd-native umount /mnt; snapd-native rm look v1")


def test_the_documented_polkit_rule_allows_a_group(guest: Guest) -> None:
    as_user = "runuser -u vagrant -- snapd-native"
    denied = guest.attempt(f"{as_user} ls")
    assert denied.returncode in (11, 12)
    guest.run(shell_block("rule"))
    try:
        guest.run("gpasswd -a vagrant builders; systemctl restart polkit")
        out = guest.run(f"{as_user} prepare theirs; {as_user} ls")
        assert "theirs" in out
        refused = guest.attempt(f"{as_user} mount theirs /mnt")
        assert refused.returncode in (11, 12)
        assert "org.snapdnative1.mount" in refused.stderr
    finally:
        guest.run(
            "rm /etc/polkit-1/rules.d/50-snapd-native.rules; groupdel builders;"
            " systemctl restart polkit"
        )
    assert guest.attempt(f"{as_user} ls").returncode == denied.returncode


def test_the_documented_exposure_command_works(machine: Guest) -> None:
    assert "Overall exposure level for snapd-native.service" in machine.run(shell_block("exposure"))
