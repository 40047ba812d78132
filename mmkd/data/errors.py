"""What can be wrong with data: an error that stops, a warning that does not."""

from __future__ import annotations

__all__ = ["DataError", "DataWarning"]


class DataError(ValueError):
    """A data file or array is not what it has to be; the message says where and what."""


class DataWarning(UserWarning):
    """The data can be used, but something in it was changed or will not take part."""
