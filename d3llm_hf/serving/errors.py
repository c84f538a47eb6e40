"""Errors in the format of OpenAI's API."""

from typing import Any


LONGEST = 1000
"""Characters of a message, which may quote what a client sent."""


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        status (`int`): of HTTP.
        message (`str`): what is wrong and the way out, for the user of the client.
        param (`str`, *optional*): the parameter at fault.
        code (`str`, *optional*): for programs.
        retry_after (`int`, *optional*): seconds after which another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        message = message if len(message) <= LONGEST else message[:LONGEST] + "..."
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the reply, which also stands in an event of a stream that had begun."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the reply."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def stopped() -> ApiError:
    """For requests that a server can no longer answer."""
    return ApiError(503, "The server is stopping. Try again later.", code="server_stopping")
