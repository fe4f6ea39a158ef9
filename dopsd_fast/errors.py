"""The one exception whose text is meant for the person at the keyboard."""

import sys


class UserError(Exception):
    """Something the user can put right. The text is one line: what is wrong, where, and what to do about it.

    The entry point prints it without a traceback and exits with a code that is not 0.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def require_platform() -> None:
    """UserError on native Windows, where neither DeepSpeed's launcher nor this program's file locks exist."""
    if sys.platform == "win32":
        raise UserError("native Windows is not supported (DeepSpeed's launcher, Triton and file locks need Linux): use WSL 2, "
                        "https://learn.microsoft.com/windows/wsl, and run the same command there")


class AgreedError(UserError):
    """A UserError that every rank raises with the same text, so that rank 0 alone needs to say it."""
