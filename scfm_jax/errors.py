"""What a user's mistake looks like: one line that names the file, the field and the mend."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, told in one line: where it is, what is wrong with which field, and how to mend it.

    Parameters
    ----------
    where
        The file, folder, recipe or flag at fault.
    problem
        What is wrong, naming the field.
    mend
        What the user can do about it.
    """

    def __init__(self, where: object, problem: str, mend: str) -> None:
        self.where, self.problem, self.mend = str(where), problem, mend
        super().__init__(" ".join(f"{self.where}: {problem}; {mend}".split()))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # An exception is rebuilt from its message alone, on the way from a worker process.
        return type(self), (self.where, self.problem, self.mend)


def check_least(config: object, least: float, *fields: str) -> None:
    """Raise ValueError for the first of a config's fields that is below `least`, or no number."""
    for field in fields:
        value = getattr(config, field)
        try:
            good = least <= value < float("inf")
        except TypeError:
            good = False
        if not good:
            raise ValueError(f"{field} is {value!r}, not a number from {least:g}")


class DataWarning(UserWarning):
    """Input that can be used but probably is not what the user means; the command prints it."""
