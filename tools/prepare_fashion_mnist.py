"""Fill data/fashion_mnist from a folder that holds Fashion-MNIST's four .gz files, such as Debian's package.

apt-get install dataset-fashion-mnist
python tools/prepare_fashion_mnist.py
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

from _arguments import Parser
from _common import run

from sk_plugins._files import write_atomically

DEBIAN = Path('/usr/share/datasets/fashion-mnist')
# Magic number, images and, for images, their sides.
HEADERS = {
    'train-images-idx3-ubyte.gz': (2051, 60000, 28, 28),
    'train-labels-idx1-ubyte.gz': (2049, 60000),
    't10k-images-idx3-ubyte.gz': (2051, 10000, 28, 28),
    't10k-labels-idx1-ubyte.gz': (2049, 10000),
}


def prepare(source: Path, out: Path) -> list[Path]:
    """Unpack the four files of ``source`` into ``out``.

    They are told by what they hold (IDX header and length), not by the archives' checksums, which differ between
    Debian's and the authors' packing of the same data.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is damaged, or not Fashion-MNIST's.
    """
    missing = [name for name in HEADERS if not (source / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f'--source {source}: no {", ".join(missing)} there; install the package dataset-fashion-mnist (Debian, '
            f'Ubuntu), or train with a network connection and mmpretrain downloads them'
        )
    contents = {name: _unpack(source / name, header) for name, header in HEADERS.items()}
    written = {out / name.removesuffix('.gz'): data for name, data in contents.items()}
    for path, data in written.items():
        with write_atomically(path) as partial:
            partial.write_bytes(data)
    return list(written)


def _unpack(path: Path, header: tuple[int, ...]) -> bytes:
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f'{path} is not a whole gzip file: {error}') from error
    start = struct.pack(f'>{len(header)}I', *header)
    size = len(start) + math.prod(header[1:])
    if not data.startswith(start) or len(data) != size:
        raise ValueError(f'{path} is not Fashion-MNIST: expected {size} bytes of IDX data with the header {header}')
    return data


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument('--source', type=Path, default=DEBIAN, help=f'folder of the .gz files (default: {DEBIAN})')
    parser.add_argument('--out', type=Path, default=Path('data/fashion_mnist'), help='default: data/fashion_mnist')
    args = parser.parse_args(argv)
    for path in prepare(args.source, args.out):
        print(path)


if __name__ == '__main__':
    run(main)
