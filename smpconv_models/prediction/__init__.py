"""Classes of images, by checkpoints and repositories of the Hub."""
from .predictor import Prediction, Predictor, predict

__all__ = ['Prediction', 'Predictor', 'predict']
