"""The one exception that stands for bad input, and what becomes of a pass that does something else than it says.

Every layer may import this module: it imports nothing.
"""


class UserError(ValueError):
    """Bad input, told in one line: what is wrong, where, what to do. The command line prints it and ends with its code.

    exit_code: 0 is success, 1 a broken verdict, 2 bad input, 70 a bug (EX_SOFTWARE), 130 an interrupt, 141 a reader
    that went away.
    """

    exit_code = 2


class Verdict(UserError):
    """A bound that was asked for does not hold: the input is sound, and what came of it is not good enough.

    document: what was found all the same, for --json.
    """

    exit_code = 1

    def __init__(self, told: str, document: object = None) -> None:
        super().__init__(told)
        self.document = document


class BrokenPromise(UserError):
    """A pass did something else than it declares. Nobody's input is bad, but nothing can be made of it either."""

    exit_code = 70

    def __init__(self, name: str, told: str) -> None:
        super().__init__(f"pass {name!r} breaks a promise: {told}; no output was written, please report it")
