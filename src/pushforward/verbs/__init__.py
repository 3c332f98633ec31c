"""What can be done with a model: functions, which are the methods of `Model`, too."""

from pushforward.verbs.changes import edit, inpaint, translate
from pushforward.verbs.codes import decode, encode, invert, sample
from pushforward.verbs.evaluating import evaluate, log_likelihood
from pushforward.verbs.model import Model, from_pipeline, load
from pushforward.verbs.samplers import diffusion, plan
from pushforward.verbs.training import train
from pushforward.verbs.watermarks import read_watermark, watermark
from pushforward.verbs.wishes import guide, steer

__all__ = [
    "Model", "decode", "diffusion", "edit", "encode", "evaluate", "from_pipeline", "guide", "inpaint", "invert", "load",
    "log_likelihood", "plan", "read_watermark", "sample", "steer", "train", "translate", "watermark",
]  # fmt: skip
