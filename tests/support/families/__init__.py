"""Families of pipelines of `diffusers`, made tiny, with random weights."""
