"""The error a user can mend."""


class PushforwardError(ValueError):
    """Something the user can mend: a name, a file, an option or a shape that does not fit.

    The message is one sentence that says what was wrong, where, and what to do. The command line prints that
    sentence alone. Wrong arguments are a `ValueError` everywhere in Python, so this is one. A fault of the library
    itself raises anything else.
    """


class Diverged(PushforwardError):
    """Numbers that are not finite where they must be: another point, or more steps, may do."""


class FarOutside(Diverged, UserWarning):
    """A warning that images came out which no data can be near: finite, but of no use."""
