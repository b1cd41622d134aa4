"""The one exception that the program shows to its user."""


class MlxSfError(Exception):
    """Something the user can act on, said in one line: what is wrong, where, what was found, what to do.

    The command line prints it without a traceback and exits with status 1. Library callers may catch it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # one line, whatever was quoted inside
