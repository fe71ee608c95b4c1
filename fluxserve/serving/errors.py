"""fluxserve's errors → Triton's status codes: the one place where they meet.

Over gRPC the codes arrive as they are. Triton's HTTP frontend (2.51) has a status for some of them only and answers 400
for the rest, so the message of those begins with the code's name in brackets, over both protocols.
"""

import traceback
from concurrent.futures import Future
from typing import Any

import triton_python_backend_utils as pb_utils

from fluxserve import errors

_CODES = (
    (errors.InvalidRequest, "INVALID_ARG"),
    (errors.ShapeError, "INVALID_ARG"),
    (errors.RequestIdInUse, "ALREADY_EXISTS"),
    (errors.Refused, "UNAVAILABLE"),
    (errors.Cancelled, "CANCELLED"),
)


_UNKNOWN_TO_HTTP = ("ALREADY_EXISTS", "CANCELLED")


def code(error: Exception) -> str:
    """The name of the Triton status for an error: the first of its classes in the table, else INTERNAL."""
    return next((name for cls, name in _CODES if isinstance(error, cls)), "INTERNAL")


def as_text(words: str) -> str:
    """What Triton takes: UTF-8. Of bytes that are no text, as a path may have them, their numbers."""
    return words.encode(errors="surrogateescape").decode(errors="backslashreplace")


def log(error: BaseException) -> None:
    """With its traceback, in Triton's log."""
    pb_utils.Logger.log_error(as_text("".join(traceback.format_exception(error))))


def of_loading(error: Exception) -> Exception:
    """An error that Triton's stub can report as the reason why a model did not load.

    The stub ends without a word where the message, or a path in the traceback, is no text. A traceback that helps is
    logged here.
    """
    message = as_text(" ".join(str(error).splitlines()))
    if isinstance(error, errors.FluxserveError):
        error.args = (message,)
        return error.with_traceback(None)
    log(error)
    return errors.ServerError(f"{type(error).__name__}: {message}")


def report(finished: "Future[None]") -> None:
    """Log an error of a thread that no caller waits for: its answer could not even be sent."""
    if error := finished.exception():
        log(error)


def response(error: Exception) -> Any:
    """An InferenceResponse that carries the error. What the caller did not cause is logged with its traceback."""
    name = code(error)
    if name == "INTERNAL":
        log(error)
        message = f"internal error: {type(error).__name__}: {error}"
    else:
        message = f"[{name}] {error}" if name in _UNKNOWN_TO_HTTP else str(error)
    code_of = getattr(pb_utils.TritonError, name)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(as_text(message), code_of))
