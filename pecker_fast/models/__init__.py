"""Networks that the package brings along, and their folders on the disk."""

from pecker_fast.models.classifier import DigitsClassifier
from pecker_fast.models.ddpm import DDPMUNet
from pecker_fast.models.resnet import ImageClassifier
from pecker_fast.models.storage import classes_in, generate, load, load_config, save

__all__ = ["DDPMUNet", "DigitsClassifier", "ImageClassifier", "classes_in", "generate", "load", "load_config", "save"]
