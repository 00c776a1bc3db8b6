"""Commands that look after the service.

Commands import D-Bus and rich when they run, so that help comes at once.
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
@click.option("--repair", is_flag=True, help="Mend first what can be mended without losing data.")
@json_option
def check(repair: bool, as_json: bool) -> None:
    """Compare records, directories and mounts.

    Each line is something that is wrong, with tabs in it: what it is about, the snapshot, and a
    sentence that says what to do. The exit status is 1 then. What was mended is told on the
    standard error.
    """
    from snapd_native.cli import render

    with connected() as client:
        mended = client.repair() if repair else []
        found = client.check()
    for finding in mended:
        about = f"{quote(finding.key)}: " if finding.key else ""
        click.echo(f"snapd-native: mended: {about}{shown(finding.what)}", err=True)
    render.findings(found, as_json=as_json)
    if found:
        sys.exit(FINDINGS)


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@json_option
def verify(names: tuple[str, ...], as_json: bool) -> None:
    """Compare each committed snapshot NAME with the digest that was recorded by commit --digest.

    Without a NAME all are verified that have one. All of each is read, at idle priority. The digest
    and the name are printed of those that are as they were committed; the others are told on the
    standard error, and the exit status is that of the first. Ctrl-C cancels the work.
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
                    # It was removed since.
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
    """Print what the service is doing that takes long, and how far it is."""
    from snapd_native.cli import render

    with connected() as client:
        found = []
        for job in client.jobs():
            # It may end before it is asked.
            with suppress(NotFound):
                found.append((job, client.progress(job.id)))
    render.jobs(found, as_json=as_json)


@click.command()
@click.argument("ids", nargs=-1, required=True, type=click.IntRange(0), metavar="ID...")
def cancel(ids: tuple[int, ...]) -> None:
    """Cancel each job ID, and return when all it had done is undone."""
    with connected() as client:
        for id_ in ids:
            client.cancel(id_)


@click.command()
def cleanup() -> None:
    """Return when all that was removed is deleted."""
    with connected() as client:
        client.cleanup()
