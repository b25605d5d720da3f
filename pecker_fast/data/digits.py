"""The 8x8 handwritten digits that come with scikit-learn: real images without a download."""

import torch

from pecker_fast.data.images import ImageData


def load_digits() -> ImageData:
    """Load the 1797 digits (UCI Optical Recognition of Handwritten Digits, test part).

    Returns:
        Images (1797, 1, 8, 8) float32 in [-1, 1], labels int64, class names "0" to "9".

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load_sklearn_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed; run: pip install pecker_fast[demo]"
        ) from error
    bunch = load_sklearn_digits()
    # Stored as grey levels 0 to 16.
    images = torch.from_numpy(bunch.images).float().div_(8).sub_(1).unsqueeze(1)
    return ImageData(images, torch.from_numpy(bunch.target).long(), tuple("0123456789"))
