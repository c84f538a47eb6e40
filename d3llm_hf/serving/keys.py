"""The key that clients of a server must send."""

import hmac

from .errors import ApiError


def check_key(key: str | None, authorization: str) -> None:
    """Refuses a request without the key, in a time that says nothing of it.

    Args:
        key (`str`, *optional*): of the server; every request is let in without one.
        authorization (`str`): the request's header, or an empty text.

    Raises:
        ApiError: 401.
    """
    if key is None:
        return
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
        raise ApiError(
            401, "The API key is missing or wrong. Send `Authorization: Bearer KEY`.", code="invalid_api_key"
        )
