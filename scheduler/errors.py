"""Errors that a user may see. The class decides the HTTP status; the message says what to do."""

from __future__ import annotations


class RemaskError(Exception):
    """Base of every error that remask raises on purpose."""


class InvalidRequest(RemaskError, ValueError):
    """The caller asked for something that cannot be done (4xx).

    Attributes:
        parameter: name of the field or file at fault.
        value: what was given.
    """

    def __init__(self, parameter: str, value: object, problem: str) -> None:
        self.parameter, self.value, self.problem = parameter, value, problem
        shown = repr(value)
        super().__init__(
            f"{parameter}: {problem} (got {shown if len(shown) <= 120 else shown[:117] + '...'})"
        )

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, object, str]]:
        return type(self), (self.parameter, self.value, self.problem)

    def at(self, place: str) -> InvalidRequest:
        """The same error with the place it came from (a prompt's index) in front of the parameter."""
        return InvalidRequest(f"{place}: {self.parameter}", self.value, self.problem)


class EngineDead(RemaskError):
    """The engine was closed or has failed; make a new one (5xx)."""
