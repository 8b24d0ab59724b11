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


def write_blots(folder):
    """The same with blots: bright where the label says, with noise."""

    def draw(split, i):
        image = np.random.default_rng((split == 'test', i)).integers(32, 128, (28, 28), np.uint8)
        image[i % 10 * 2 : i % 10 * 2 + 8] += 120
        return image

    return write_fashion_mnist(folder, draw)
