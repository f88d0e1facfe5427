"""The one exception that stands for bad input, and what becomes of a pass that does something else than it says.

Every layer may import this module: it imports nothing.
"""


class UserError(ValueError):
    """Bad input, told in one line: what is wrong, where, what to do. The command line prints it and exits with 2."""


class BrokenPromise(UserError):
    """A pass did something else than it declares. Nobody's input is bad, but nothing can be made of it either."""

    def __init__(self, name: str, told: str) -> None:
        super().__init__(f"pass {name!r} breaks a promise: {told}; nothing was written, please report it")
