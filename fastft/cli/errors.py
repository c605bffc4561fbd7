"""The error a user can act on: the command line prints its message without a traceback."""


class UserError(Exception):
    """Wrong input from the user; the message says what to change."""
