"""Errors that the user can fix, and a warning."""


class PushforwardError(ValueError):
    """Something the user can fix: a name, a file, an option or a shape that does not fit.

    The message is one sentence that says what is wrong, where, and what to do. The command line prints only that
    sentence. Python raises `ValueError` for wrong arguments, so this is one. A bug in the library raises another error.
    """


class Diverged(PushforwardError):
    """Numbers became infinite or NaN: another starting point or more steps may help."""


class FarOutside(Diverged, UserWarning):
    """A warning that the images are finite but far outside the range of any data, and so useless."""
