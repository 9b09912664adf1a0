"""The one exception a person is meant to read."""


class UserError(Exception):
    """Something the user can mend. Its text is one line: what is wrong, where (file, key, line), what to do.

    The CLI prints it without a traceback (unless --debug) and exits with 2.
    """


class AgreedError(UserError):
    """A UserError that every process of a run stops with at once; only the first one tells it."""
