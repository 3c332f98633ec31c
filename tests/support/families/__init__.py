"""Pipelines made tiny, by family: each a function that makes one, and the arguments of its call."""

from support.families import dits, sounds, stages, transformers, unets, videos

__all__ = ["FAMILIES"]

FAMILIES = {
    **unets.FAMILIES,
    **stages.FAMILIES,
    **transformers.FAMILIES,
    **dits.FAMILIES,
    **videos.FAMILIES,
    **sounds.FAMILIES,
}
