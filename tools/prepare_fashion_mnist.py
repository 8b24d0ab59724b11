"""Fill data/fashion_mnist from a folder that holds Fashion-MNIST's four .gz files, such as Debian's package.

apt-get install dataset-fashion-mnist
python tools/prepare_fashion_mnist.py
"""

import argparse
import gzip
import hashlib
import os
import shutil
from pathlib import Path

from _common import run
from mmpretrain.datasets import FashionMNIST

DEBIAN = Path('/usr/share/datasets/fashion-mnist')


def prepare(source: Path, out: Path) -> list[Path]:
    """Unpack the four files of ``source`` into ``out``, each checked against the data set's MD5.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is not Fashion-MNIST's.
    """
    files = FashionMNIST.train_list + FashionMNIST.test_list
    missing = [name for name, _ in files if not (source / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f'--source {source}: no {", ".join(missing)} there; install the package dataset-fashion-mnist (Debian, '
            f'Ubuntu), or train with a network connection and mmpretrain downloads them'
        )
    for name, md5 in files:
        found = hashlib.md5((source / name).read_bytes()).hexdigest()
        if found != md5:
            raise ValueError(f'{source / name}: MD5 {found} is not Fashion-MNIST ({md5})')
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, _ in files:
        target = out / name.removesuffix('.gz')
        part = target.with_suffix('.part')
        with gzip.open(source / name) as packed, part.open('wb') as unpacked:
            shutil.copyfileobj(packed, unpacked)
        os.replace(part, target)
        written.append(target)
    return written


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--source', type=Path, default=DEBIAN, help=f'folder of the .gz files (default: {DEBIAN})')
    parser.add_argument('--out', type=Path, default=Path('data/fashion_mnist'), help='default: data/fashion_mnist')
    args = parser.parse_args(argv)
    for path in prepare(args.source, args.out):
        print(path)


if __name__ == '__main__':
    run(main)
