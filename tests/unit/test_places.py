"""Jobs of several users share the places in which they work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from snapd_native.errors import Cancelled
from snapd_native.jobs import Job, Places
from tests.support.waiting import WAIT_TIMEOUT, wait_until, wait_until_equal

BUSY, OTHER, THIRD = 1000, 1001, 1002
"""The uids of three users."""


class Users:
    """Users whose jobs work until a test ends them."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._ended = {uid: threading.Semaphore(0) for uid in (BUSY, OTHER, THIRD)}
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(32)
        self.worked: list[int] = []
        """The uids of the jobs that have got a place, in their order."""

    def begin(self, uid: int) -> None:
        """Begin a job, and return when it works or waits for a place."""
        settled = threading.Event()

        def check() -> None:
            settled.set()
            if self._stopping.is_set():
                raise Cancelled("the test has ended")

        def work() -> None:
            with self.places.turn(uid, check):
                self.worked.append(uid)
                settled.set()
                self._ended[uid].acquire()

        self._pool.submit(work)
        assert settled.wait(WAIT_TIMEOUT)

    def end(self, uid: int) -> None:
        """End one of the working jobs of a user."""
        self._ended[uid].release()

    def close(self) -> None:
        self._stopping.set()
        for ended in self._ended.values():
            ended.release(32)
        self._pool.shutdown()


@pytest.fixture
def users() -> Iterator[Users]:
    """Yield users that share four places, of which one user gets at most two."""
    made = Users(Places(4, 2))
    yield made
    made.close()


def test_jobs_of_one_user_take_at_most_half_of_the_places(users: Users) -> None:
    for _ in range(6):
        users.begin(BUSY)
    assert users.worked == [BUSY, BUSY]
    users.begin(OTHER)
    assert users.worked == [BUSY, BUSY, OTHER]


def test_users_whose_jobs_wait_take_turns(users: Users) -> None:
    for uid in (BUSY, OTHER):
        for _ in range(5):
            users.begin(uid)
    for _ in range(2):
        users.begin(THIRD)
    assert users.worked == [BUSY, BUSY, OTHER, OTHER]
    for count in range(5, 8):
        users.end(BUSY if count < 7 else OTHER)
        wait_until_equal(lambda: len(users.worked), count)
    # The third user has had no turn, then the turn of BUSY is longer ago than that of OTHER.
    assert users.worked[4:] == [THIRD, BUSY, OTHER]


def test_a_cancelled_job_gives_up_its_wait(users: Users) -> None:
    for _ in range(2):
        users.begin(BUSY)
    waiting = Job(places=users.places, uid=BUSY)
    waiting.cancel()
    with pytest.raises(Cancelled), waiting.turn():
        pass
    assert not users.places._waiting
    users.end(BUSY)
    users.begin(BUSY)
    assert users.worked == [BUSY] * 3


def test_places_forget_users_without_jobs(users: Users) -> None:
    for uid in (BUSY, OTHER, THIRD):
        users.begin(uid)
        users.end(uid)
    wait_until(lambda: not users.places._held)
    assert not users.places._last_turns
