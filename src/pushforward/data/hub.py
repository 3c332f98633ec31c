"""The hub that data sets and models of other libraries come from."""

from __future__ import annotations

from pathlib import Path

__all__ = ["check_hub", "check_model"]

_PATIENCE = 10.0  # seconds


def check_hub(name: str, kind: str = "model") -> None:
    """Raise at once if the hub gives no answer, which the libraries that read from it ask for half a minute.

    Args:
        name: name of a repository, known to the hub or not.
        kind: kind of the repository, `model` or `dataset`.

    Raises:
        ConnectionError: there is no answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=_PATIENCE)
    except (HfHubHTTPError, ValueError):  # an answer, or no name of a repository: the libraries say what is wrong
        return
    except Exception as error:
        raise ConnectionError(f"the hub gives no answer ({error})") from error


def check_model(place: str) -> None:
    """Raise at once if a model of `transformers` is neither a folder nor downloaded, and the hub gives no answer.

    Raises:
        ConnectionError: there is no answer.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        known = Path(place).exists() or isinstance(try_to_load_from_cache(place, "config.json"), str)
    except HFValidationError:
        return
    if not known:
        check_hub(place)
