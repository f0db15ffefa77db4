"""Every exception of nbdeploy, in one tree; this file imports nothing, so that every module can import it.

    NbdeployError
    ├── UsageError              an option, a name or an argument is wrong
    ├── ConfigError             a configuration file or NBDEPLOY_* variable is wrong
    ├── StoreError              the home or the Store cannot be used
    ├── CaptureError            the model or predict function cannot travel
    │   ├── UndefinedNameError
    │   ├── CannotTravelError
    │   ├── SampleError
    │   └── SecretError
    ├── BundleError             a Bundle is damaged, too new, or for another Python
    ├── DeployError             the deploy failed after capture
    │   ├── VerificationError   the clean process could not load or answer
    │   ├── ParityError         it answered something else
    │   ├── OwnershipError      the name belongs to another notebook
    │   ├── CancelledError
    │   └── EngineError         the Engine could not do it
    │       └── RegistryError   the image registry refused or cannot be reached
    ├── EndpointNotFoundError
    └── RemoteError             the Endpoint answered with an error
        ├── BusyError           429: its queue is full
        ├── UnreachableError    no answer at all
        ├── UnauthorizedError   401: no key, or a wrong one
        └── InvalidRequestError 422: the arguments do not fit the Signature

A message says what happened, to what, and what to do next, in the user's words.
"""

from __future__ import annotations


class NbdeployError(Exception):
    """Base of everything nbdeploy raises on purpose. In a notebook it shows as its message, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: what a cell shows and stores as its error output."""
        return [f"{type(self).__name__}: {self}"]


class UsageError(NbdeployError):
    """An option, a name or an argument is wrong."""


class ConfigError(NbdeployError):
    """A configuration file or an NBDEPLOY_* variable is wrong."""


class StoreError(NbdeployError):
    """The home of nbdeploy, or the Store in it, cannot be used."""


class CaptureError(NbdeployError):
    """The model or the predict function cannot be captured."""


class UndefinedNameError(CaptureError):
    """Predict uses a name that this notebook does not define."""


class CannotTravelError(CaptureError):
    """An object in reach of predict cannot leave this process."""


class SampleError(CaptureError):
    """The sample does not fit the function, or predict fails on it."""


class SecretError(CaptureError):
    """A secret would have travelled in the Bundle."""


class BundleError(NbdeployError):
    """A Bundle is damaged, too new, or made for another Python."""


class DeployError(NbdeployError):
    """A deploy failed after its capture."""


class VerificationError(DeployError):
    """The clean process could not load the Bundle or answer the sample."""


class ParityError(DeployError):
    """The clean process, or a Replica, answered something else than the notebook."""


class OwnershipError(DeployError):
    """The Endpoint belongs to another notebook or owner."""


class CancelledError(DeployError):
    """The deploy was cancelled."""


class EngineError(DeployError):
    """The Engine could not carry out the Revision."""


class RegistryError(EngineError):
    """The image registry refused, or cannot be reached."""


class EndpointNotFoundError(NbdeployError):
    """No Endpoint of this name."""


class RemoteError(NbdeployError):
    """An Endpoint answered with an error.

    Attributes:
        status: HTTP status, 0 where no answer came.
        remote_type: name of the exception that predict raised, or "".
        remote_traceback: the notebook's own lines of the remote traceback, outermost first.
    """

    def __init__(
        self, message: str, *, status: int = 0, remote_type: str = "", remote_traceback: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.remote_type = remote_type
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        lines = [super().__str__(), *self.remote_traceback]
        return "\n  ".join(lines)


class BusyError(RemoteError):
    """The Endpoint's queue is full (429)."""


class UnreachableError(RemoteError):
    """The Endpoint gave no answer."""


class UnauthorizedError(RemoteError):
    """The Endpoint wants a key, or another one (401)."""


class InvalidRequestError(RemoteError):
    """The arguments do not fit the Endpoint's Signature (422)."""
