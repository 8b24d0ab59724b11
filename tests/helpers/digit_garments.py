"""scikit-learn's digits in the files of Fashion-MNIST, for tests that need garments and not 55 MB of them."""

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_garments(folder: Path, train: Iterable[int], test: Iterable[int], count: int = 50) -> Path:
    """The first ``count`` digits of the classes ``train`` and of the classes ``test``, 28x28, into ``folder``."""
    images, labels = load_digits(return_X_y=True)
    for split, classes in (('train', train), ('t10k', test)):
        chosen = np.flatnonzero(np.isin(labels, list(classes)))[:count]
        pixels = b''.join(
            Image.fromarray((15 * images[i].reshape(8, 8)).astype(np.uint8)).resize((28, 28)).tobytes() for i in chosen
        )
        (folder / f'{split}-images-idx3-ubyte').write_bytes(struct.pack('>4I', 2051, len(chosen), 28, 28) + pixels)
        values = labels[chosen].astype(np.uint8).tobytes()
        (folder / f'{split}-labels-idx1-ubyte').write_bytes(struct.pack('>2I', 2049, len(chosen)) + values)
    return folder
