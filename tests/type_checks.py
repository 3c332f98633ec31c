"""How the library's annotations are checked while tests run. Not imported outside of tests."""

from collections.abc import Callable
from typing import TypeVar

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintException

_Decorated = TypeVar("_Decorated", bound=Callable)
_decorate = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float


def checked(decorated: _Decorated) -> _Decorated:
    """`decorated` with its annotations checked at each call, as far as they can be checked at run time."""
    try:
        return _decorate(decorated)
    except BeartypeDecorHintException:
        return decorated
