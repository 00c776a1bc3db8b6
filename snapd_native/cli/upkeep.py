"""Commands that maintain the service.

Commands import D-Bus and rich only when they run, so that help appears at once.
"""

from __future__ import annotations

import sys
from contextlib import suppress

import click

from snapd_native.cli.exits import FINDINGS, status
from snapd_native.cli.options import connected, json_option
from snapd_native.errors import NotFound, SnapdError, Unavailable
from snapd_native.model import DIGEST_LABEL, quote, shown


@click.command()
@click.option(
    "--repair", is_flag=True, help="First repair what can be repaired without losing data."
)
@json_option
def check(repair: bool, as_json: bool) -> None:
    """Compare records, directories, mounts and modes.

    Each line is a problem: the kind of the problem, the snapshot and the remedy, separated by tabs.
    If there is a problem, the exit status is 1. Repairs are reported on the standard error output.
    """
    from snapd_native.cli import render

    with connected() as client:
        repaired = client.repair() if repair else []
        found = client.check()
    for finding in repaired:
        about = f"{quote(finding.key)}: " if finding.key else ""
        click.echo(f"snapd-native: repaired: {about}{shown(finding.what)}", err=True)
    render.findings(found, as_json=as_json)
    if found:
        sys.exit(FINDINGS)


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@json_option
def verify(names: tuple[str, ...], as_json: bool) -> None:
    """Compare snapshots with the digests of commit --digest.

    Without a NAME, verify all snapshots that have a digest. The service reads each one completely,
    at idle priority. The digests and names of intact snapshots are printed. The others are reported
    on the standard error output, and the exit status is that of the first error. Ctrl-C cancels the
    command.
    """
    from snapd_native.cli import render

    failed: list[SnapdError] = []
    verified = []
    every = f'kind==committed,labels."{DIGEST_LABEL}"'
    with connected() as client:
        for name in names or [info.name for info in client.walk([every])]:
            try:
                with render.progress("Verifying", name) as progress:
                    digest = client.verify(name, progress)
            except SnapdError as error:
                if isinstance(error, NotFound) and not names:
                    # It was removed after it was listed.
                    continue
                failed.append(error)
                click.echo(f"snapd-native: {error.message}", err=True)
                if isinstance(error, Unavailable):
                    break
            else:
                verified.append((name, digest))
                if not as_json:
                    render.verified(name, digest)
    if as_json:
        render.all_verified(verified)
    if failed:
        sys.exit(status(failed[0]))


@click.command()
@json_option
def jobs(as_json: bool) -> None:
    """Print the running jobs, such as copies, and their progress."""
    from snapd_native.cli import render

    with connected() as client:
        found = []
        for job in client.jobs():
            # It may end before its progress is read.
            with suppress(NotFound):
                found.append((job, client.progress(job.id)))
    render.jobs(found, as_json=as_json)


@click.command()
@click.argument("ids", nargs=-1, required=True, type=click.IntRange(0), metavar="ID...")
def cancel(ids: tuple[int, ...]) -> None:
    """Cancel each job ID, and wait until its work is undone."""
    with connected() as client:
        for id_ in ids:
            client.cancel(id_)


@click.command()
def cleanup() -> None:
    """Wait until the data of all removed snapshots is deleted."""
    with connected() as client:
        client.cleanup()
