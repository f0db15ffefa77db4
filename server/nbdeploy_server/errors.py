"""What can go wrong in a Replica, each with its HTTP status; this file imports nothing.

ServerError
├── BundleInvalid        the Bundle is damaged, too new, or for another Python (never reaches HTTP)
├── LoadFailed           the Bundle loads, its objects do not (never reaches HTTP)
├── SettingsInvalid      the process was started with settings that make no sense (never reaches HTTP)
└── RequestError         the request cannot be answered: rendered as application/problem+json
"""

from __future__ import annotations


class ServerError(Exception):
    """Base of every error that a Replica raises on purpose."""


class BundleInvalid(ServerError):  # noqa: N818 - a state of the Bundle, not a failure of the program
    """The Bundle must not be loaded; the message says which part and why."""


class LoadFailed(ServerError):  # noqa: N818 - as above
    """The captured objects could not be rebuilt; the message says which and why."""


class SettingsInvalid(ServerError):  # noqa: N818 - as above
    """The process was started with settings that cannot be followed; the message says which and what is allowed."""


class RequestError(ServerError):
    """A request that gets an error status.

    Attributes:
        status: HTTP status.
        detail: one sentence for the caller, without values of the request.
        errors: one entry per parameter at fault: {"parameter", "message"}.
        retry_after: seconds, for 429 and 503.
        kind: exception type that predict raised, for 500.
        traceback: the notebook's own lines, outermost first, for 500.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: tuple[dict[str, str], ...] = (),
        retry_after: int | None = None,
        kind: str = "",
        traceback: tuple[str, ...] = (),
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors
        self.retry_after = retry_after
        self.kind = kind
        self.traceback = traceback
