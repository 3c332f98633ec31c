"""Networks, models, and where models come from."""

from pushforward.model.load import load
from pushforward.model.model import Model
from pushforward.model.network import Network
from pushforward.model.prediction import PREDICTIONS, Prediction, denoising
from pushforward.model.storage import load_model, save_model
from pushforward.model.trained import trained

__all__ = [
    "PREDICTIONS", "Model", "Network", "Prediction", "denoising", "load", "load_model",
    "save_model", "trained",
]  # fmt: skip
