"""What looks at drawn images: plug-ins of two methods, with local weights only.

``DETECTORS`` has those of the package by name. Nothing is downloaded, and nothing heavy is imported before one is made.
"""

from pecker_fast.detectors.classifier import Classifier
from pecker_fast.detectors.clip_score import ClipScore
from pecker_fast.detectors.detector import Detector, Pixels, sha256_of
from pecker_fast.detectors.external import External, load_detector
from pecker_fast.detectors.nudenet import NudeNet

DETECTORS = {"nudenet": NudeNet, "external": load_detector, "classifier": Classifier, "clip": ClipScore}

__all__ = [
    "DETECTORS",
    "Classifier",
    "ClipScore",
    "Detector",
    "External",
    "NudeNet",
    "Pixels",
    "load_detector",
    "sha256_of",
]
