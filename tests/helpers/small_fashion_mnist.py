"""Fashion-MNIST's files with a few garments of one's own."""

import struct

import numpy as np

GARMENTS = {'train': 48, 'test': 24}
FILES = {'train': 'train', 'test': 't10k'}


def write_fashion_mnist(folder, draw):
    """The four files of a small set, whose garment number i of a split is ``draw(split, i)``, (28, 28) uint8."""
    folder.mkdir()
    for split, count in GARMENTS.items():
        images = np.stack([draw(split, i) for i in range(count)])
        header = struct.pack('>4I', 2051, count, 28, 28)
        (folder / f'{FILES[split]}-images-idx3-ubyte').write_bytes(header + images.tobytes())
        labels = bytes(i % 10 for i in range(count))
        (folder / f'{FILES[split]}-labels-idx1-ubyte').write_bytes(struct.pack('>2I', 2049, count) + labels)
    return str(folder)
