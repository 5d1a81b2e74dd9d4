"""Predict the classes of images with a checkpoint or a repository of the Hub."""
from .predictor import Prediction, Predictor, predict

__all__ = ['Prediction', 'Predictor', 'predict']
