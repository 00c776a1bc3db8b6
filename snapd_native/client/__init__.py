"""A typed client of the service.

`Client` is for programs with an event loop, `BlockingClient` for those without. Both raise the
exceptions of `snapd_native.errors`, as the engine does.
"""

from snapd_native.client.asynchronous import PAGE, Client
from snapd_native.client.blocking import BlockingClient
from snapd_native.client.values import Job, Progress, Service, Standby

__all__ = ["PAGE", "BlockingClient", "Client", "Job", "Progress", "Service", "Standby"]
