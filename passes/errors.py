"""The one exception that stands for bad input.

Every layer may import this module: it imports nothing.
"""


class UserError(ValueError):
    """Bad input, told in one line: what is wrong, where, what to do. The command line prints it and exits with 2."""
