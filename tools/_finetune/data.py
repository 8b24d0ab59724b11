"""The images and labels of a folder or a list, and their split into training and validation."""

import csv
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from sk_plugins._text import counted, nearest, nearest_path, several

__all__ = ['SUFFIXES', 'ImageSet', 'Item', 'read', 'split']

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.ppm', '.pgm', '.tif', '.tiff', '.webp')
LISTS = ('.csv', '.tsv', '.json', '.jsonl')
# The names that splits and columns have in data sets that are about: torchvision's, Kaggle's, the Hub's.
SPLITS = {
    'train': ('train', 'training'),
    'val': ('val', 'valid', 'validation', 'dev', 'eval', 'test', 'testing'),
}
IMAGE_COLUMNS = ('image', 'file_name', 'filename', 'file', 'path', 'image_path', 'img_path', 'img', 'image_id', 'id')
LABEL_COLUMNS = ('label', 'labels', 'class', 'classes', 'class_name', 'category', 'categories', 'tag', 'tags', 'target')
SPLIT_COLUMNS = ('split', 'set', 'subset', 'partition')
METADATA = ('metadata.csv', 'metadata.jsonl')


class Item(NamedTuple):
    """An image, by its path from the set's root, and its labels: one, or in a multi-label set any number."""

    path: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class ImageSet:
    """Images to train on and to measure by.

    Attributes:
        root: what the items' paths start from.
        source: the folder or the list that was named.
        classes: in the classifier's order.
        train, val: the images; ``val`` is empty where the source has no split.
        multi_label: whether an image has any number of labels.
        notes: what a user should know, a line each.
    """

    root: Path
    source: Path
    classes: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...] = ()
    multi_label: bool = False
    notes: tuple[str, ...] = field(default=())

    def counts(self, items: Iterable[Item]) -> Counter[str]:
        return Counter(label for item in items for label in item.labels)


def read(source: Path) -> ImageSet:
    """What a folder of class folders, with or without splits, or a list of images and labels holds.

    Raises:
        FileNotFoundError: there is no such folder, or a list names images that are not there.
        ValueError: the layout, the columns or the classes are not what can be trained on; the message says what was
            found and what is expected.
    """
    if not source.exists():
        raise FileNotFoundError(f'{source}: no such folder or list{nearest_path(source)}')
    if source.is_file():
        if source.suffix.lower() not in LISTS:
            raise ValueError(f'{source}: must be a folder of class folders, or a list: {", ".join(LISTS)}')
        found = _read_list(source)
    else:
        found = _read_folder(source)
    return _check(found)


# Folders


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(('.', '__')))


def _files(folder: Path) -> list[Path]:
    """All below it, through links too."""
    walk = os.walk(folder, followlinks=True)
    return sorted(Path(top, name) for top, _, names in walk for name in names if not name.startswith('.'))


def _images(folder: Path) -> list[Path]:
    return [path for path in _files(folder) if path.suffix.lower() in SUFFIXES]


def _other_files(*folders: Path) -> str:
    """'3 .txt, 1 .heic', of what is no image."""
    counts = Counter(path.suffix.lower() for folder in folders for path in _files(folder))
    return several(f'{n} {suffix or "without suffix"}' for suffix, n in counts.most_common() if suffix not in SUFFIXES)


def _read_folder(root: Path) -> ImageSet:
    folders = _folders(root)
    found = {path: kind for path in folders for kind, names in SPLITS.items() if path.name.lower() in names}
    splits: dict[str, list[Path]] = {'train': [], 'val': []}
    for path, kind in found.items():
        splits[kind].append(path)
    has_splits = bool(splits['train']) and len(found) == len(folders)
    lists = [path / name for path in (root, *(found if has_splits else ())) for name in METADATA]
    lists = [path for path in lists if path.is_file()]
    if lists:
        return _read_metadata(root, lists)
    if not has_splits:
        if splits['train'] or splits['val']:
            odd = [path.name for path in folders if path not in found]
            lacking = 'train' if not splits['train'] else None
            said = f'and no folder {lacking}' if lacking else f'and beside it {several(odd)}, which is no split'
            raise ValueError(
                f'{root}: has {", ".join(path.name for path in found)} {said}: expected train/ and val/, each with a '
                'folder for each class, or class folders alone'
            )
        if len(folders) == 1 and any(path.name.lower() in SPLITS['train'] for path in _folders(folders[0])):
            raise ValueError(f'{root}: has the folder {folders[0].name} alone, which has the splits: name {folders[0]}')
        classes, items, notes = _read_classes(root, root)
        return ImageSet(root, root, classes, items, notes=notes)
    ((train, *_), vals) = splits['train'], splits['val']
    classes, items, notes = _read_classes(root, train)
    held_out: tuple[Item, ...] = ()
    if vals:
        # One named val goes before one named test, which is for the end.
        val = min(vals, key=lambda path: SPLITS['val'].index(path.name.lower()))
        val_classes, held_out, more = _read_classes(root, val)
        _compare_splits(root, train.name, classes, val.name, val_classes)
        notes += more + tuple(
            f'{path.name}/ is not used: {val.name}/ is what is measured by' for path in vals if path != val
        )
    return ImageSet(root, root, classes, items, held_out, notes=notes)


def _read_classes(root: Path, folder: Path) -> tuple[tuple[str, ...], tuple[Item, ...], tuple[str, ...]]:
    """The classes of a folder, their images, and notes on what else is there."""
    folders = _folders(folder)
    images = {path.name: _images(path) for path in folders}
    loose = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    expected = f'expected a folder for each class, such as {folder / "daisy" / "1.jpg"}'
    if not any(images.values()):
        if loose:
            raise ValueError(
                f'{folder}: holds {len(loose)} images and no class folders: {expected}, or a list of images and labels'
            )
        others = _other_files(folder)
        said = f', only {others}' if others else ''
        raise ValueError(f'{folder}: no images there{said}: {expected}; read are {", ".join(SUFFIXES)}')
    empty = [name for name, paths in images.items() if not paths]
    if empty:
        raise ValueError(f'{folder / empty[0]}: no images in this class folder; fill it or remove it')
    notes = []
    if loose:
        notes.append(f'not used, since in no class folder: {counted(len(loose), "image")} of {folder}')
    if others := _other_files(*folders):
        notes.append(f'other files are not used: {others}')
    items = tuple(Item(path.relative_to(root).as_posix(), (name,)) for name, paths in images.items() for path in paths)
    return tuple(images), items, tuple(notes)


def _compare_splits(root: Path, train: str, classes: Sequence[str], val: str, val_classes: Sequence[str]) -> None:
    for name in val_classes:
        if name not in classes:
            raise ValueError(
                f'{root / val / name}: {train}/ has no class of this name{nearest(name, classes)}: the classes of '
                f'{train}/ and {val}/ must be the same'
            )


# Lists


def _read_metadata(root: Path, lists: list[Path]) -> ImageSet:
    """``metadata.csv`` or ``.jsonl`` of the Hub's image folders, at the top or in each split."""
    parts = []
    for path in lists:
        part = _read_list(path)
        prefix = path.parent.relative_to(root).as_posix()
        kind = next((kind for kind, names in SPLITS.items() if path.parent.name.lower() in names), None)
        items = [Item(f'{prefix}/{i.path}'.removeprefix('./'), i.labels) for i in (*part.train, *part.val)]
        if path.parent == root and not part.val:  # the split is the first folder of a path
            vals = [i for i in items if i.path.partition('/')[0].lower() in SPLITS['val']]
            parts.append((part, [i for i in items if i not in vals], vals))
        elif kind == 'val':
            parts.append((part, [], items))
        elif kind == 'train':
            parts.append((part, items, []))
        else:
            parts.append((part, items[: len(part.train)], items[len(part.train) :]))
    classes = sorted({name for part, *_ in parts for name in part.classes})
    return ImageSet(
        root,
        root,
        tuple(classes),
        tuple(item for _, train, _ in parts for item in train),
        tuple(item for _, _, val in parts for item in val),
        any(part.multi_label for part, *_ in parts),
        tuple(dict.fromkeys(note for part, *_ in parts for note in part.notes)),
    )


def _read_list(path: Path) -> ImageSet:
    rows = _read_rows(path)
    items: dict[str, list[tuple[int, str, tuple[str, ...]]]] = {'train': [], 'val': []}
    for number, image, labels, kind in rows:
        known = 'train' if kind is None else next((k for k, names in SPLITS.items() if kind.lower() in names), None)
        if known is None:
            raise ValueError(f'{path}: row {number}: the split {kind!r} is neither train nor val')
        items[known].append((number, _with_slashes(path.parent, image), labels))
    every = [*items['train'], *items['val']]
    if not every:
        raise ValueError(f'{path}: lists no images')
    missing = [image for _, image, _ in every if not (path.parent / image).is_file()]
    if missing:
        raise FileNotFoundError(
            f'{path}: {len(missing)} of {len(every)} images are not in {path.parent}: {several(missing)}'
        )
    multi_label = any(len(labels) != 1 for *_, labels in every)
    seen: dict[str, tuple[int, tuple[str, ...]]] = {}
    for number, image, labels in every:
        if not multi_label and not labels[0]:
            raise ValueError(f'{path}: row {number}: {image} has no label')
        if image in seen:
            first, others = seen[image]
            said = (
                f'is in rows {first} and {number}'
                if others == labels
                else f'is {", ".join(others)} in row {first} and {", ".join(labels)} in row {number}: several labels '
                'of an image stand in one row, cat;dog'
            )
            raise ValueError(f'{path}: {image} {said}')
        seen[image] = (number, labels)
    classes = sorted({label for *_, labels in every for label in labels})
    if all(re.fullmatch(r'\d+', name) for name in classes):
        classes.sort(key=int)
    return ImageSet(
        path.parent,
        path,
        tuple(classes),
        *(tuple(Item(image, labels) for _, image, labels in items[kind]) for kind in ('train', 'val')),
        multi_label,
    )


def _with_slashes(folder: Path, image: str) -> str:
    """The path of an image in a list that Windows may have written."""
    return image if '\\' not in image or (folder / image).is_file() else image.replace('\\', '/')


_Row = tuple[int, str, tuple[str, ...], str | None]


def _read_rows(path: Path) -> list[_Row]:
    """Number, image, labels and split of every row."""
    try:
        text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: is not text in UTF-8 ({error.reason} at byte {error.start})') from error
    if path.suffix.lower() in ('.csv', '.tsv'):
        return _rows_of_table(path, text)
    try:
        if path.suffix.lower() == '.jsonl':
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'{path}: is not JSON: {error}') from error
    if isinstance(records, Mapping) and isinstance(records.get('data_list'), list):  # OpenMMLab's own
        names = (records.get('metainfo') or {}).get('classes') or ()
        records = [
            {'image': r.get('img_path'), 'label': _named(path, r.get('gt_label'), names)} for r in records['data_list']
        ]
    if isinstance(records, Mapping):
        records = [{'image': image, 'label': label} for image, label in records.items()]
    if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
        raise ValueError(f'{path}: must map images to labels, or be a list of records with image and label')
    if not records:
        return []
    columns = _columns(path, list(dict.fromkeys(str(key) for record in records for key in record)))
    image, label, kind = (columns[name] for name in ('image', 'label', 'split'))
    rows: list[_Row] = []
    for number, record in enumerate(records, start=1):
        labels = record.get(label)
        labels = labels if isinstance(labels, list) else _split_labels(labels)
        if not isinstance(record.get(image), str):
            raise ValueError(f'{path}: row {number}: {image}={record.get(image)!r} is no path of an image')
        rows.append((number, record[image], tuple(dict.fromkeys(map(str, labels))), kind and str(record.get(kind))))
    return rows


def _named(path: Path, label: Any, names: Sequence[str]) -> Any:
    try:
        return [names[i] for i in label] if isinstance(label, list) else names[label]
    except (IndexError, TypeError) as error:
        raise ValueError(f'{path}: gt_label={label!r} is no number of its {len(names)} classes') from error


def _rows_of_table(path: Path, text: str) -> list[_Row]:
    head = text.partition('\n')[0]
    delimiter = '\t' if path.suffix.lower() == '.tsv' or '\t' in head else ',' if ',' in head else ';'
    table = [row for row in csv.reader(text.splitlines(), delimiter=delimiter) if any(cell.strip() for cell in row)]
    if not table:
        return []
    header, first = [cell.strip() for cell in table[0]], 2
    if header[0].lower().endswith(SUFFIXES):  # the first row is an image's
        header, first, table = ['image', 'label', 'split'][: len(header)], 1, [[], *table]
    if len(header) < 2:
        raise ValueError(f'{path}: has one column, {header[0]!r}: expected image and label, separated by commas')
    rest = [i for i in range(len(header)) if header[i].lower() not in (*SPLIT_COLUMNS, *IMAGE_COLUMNS)]
    body = table[1:]
    for number, row in enumerate(body, start=first):
        if len(row) != len(header):
            raise ValueError(f'{path}: row {number} has {len(row)} cells and not {len(header)}')
    has_labels = any(name.lower() in LABEL_COLUMNS for name in header)
    binary = all(row[i].strip() in ('0', '1', '0.0', '1.0') for row in body for i in rest)
    one_hot = binary and len(rest) > 1 and not has_labels
    columns = _columns(path, header, one_hot)
    image, kind = header.index(columns['image']), columns['split'] and header.index(columns['split'])
    rows: list[_Row] = []
    for number, row in enumerate(body, start=first):
        if one_hot:
            labels = tuple(header[i] for i in rest if float(row[i]))
        else:
            labels = _split_labels(row[header.index(columns['label'])])
        rows.append((number, row[image].strip(), labels, None if kind is None else row[kind].strip()))
    return rows


def _columns(path: Path, header: Sequence[str], one_hot: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for what, names in (('image', IMAGE_COLUMNS), ('label', LABEL_COLUMNS), ('split', SPLIT_COLUMNS)):
        found[what] = next((name for known in names for name in header if name.lower() == known), None)
    for what in ('image', 'label'):
        if found[what] is None and not (one_hot and what == 'label'):
            near = nearest(what, [name for name in header if name])
            raise ValueError(f'{path}: has no column {what}, but {", ".join(map(repr, header))}{near}')
    return found


def _split_labels(cell: Any) -> tuple[str, ...]:
    """'cat;dog' or 'cat|dog' as (cat, dog)."""
    if cell is None:
        return ('',)
    words = [word.strip() for word in re.split(r'[;|]', str(cell))]
    return tuple(dict.fromkeys(word for word in words if word)) if len(words) > 1 else (words[0],)


# What holds of all


def _check(found: ImageSet) -> ImageSet:
    """Raise for what cannot be trained on, and note what is doubtful."""
    if found.multi_label:
        blank = tuple(_without_blanks(item) for item in found.train), tuple(_without_blanks(item) for item in found.val)
        found = replace(found, train=blank[0], val=blank[1], classes=tuple(name for name in found.classes if name))
    if not found.train:
        raise ValueError(f'{found.source}: has no images to train on')
    if len(found.classes) < 2:
        one = found.classes[0] if found.classes else None
        raise ValueError(f'{found.source}: has one class, {one!r}: there is nothing to tell apart')
    counts, held_out = found.counts(found.train), found.counts(found.val)
    least = 1 if found.val else 2
    for name in found.classes:
        if counts[name] < least:
            where = ' to train on' if found.val else ''
            raise ValueError(
                f'{found.source}: the class {name!r} has {counts[name] or "no"} image{"" if counts[name] == 1 else "s"}'
                f'{where}{"" if counts[name] else nearest(name, counts)}: at least {least}'
                + (' are needed, one to train on and one to measure by' if least == 2 else ' is needed')
            )
    notes = list(found.notes)
    tiny = [f'{name} ({counts[name]})' for name in found.classes if counts[name] < 10]
    if tiny:
        notes.append(f'few images to learn from: {several(tiny)}')
    if found.val:
        unseen = [name for name in found.classes if not held_out[name]]
        if unseen:
            notes.append(f'nothing to measure {several(unseen)} by: no images of it in validation')
    for first, second in _look_alike(found.classes):
        notes.append(f'the classes {first!r} and {second!r} have nearly one name: are they one?')
    return replace(found, notes=tuple(notes))


def _without_blanks(item: Item) -> Item:
    return Item(item.path, tuple(label for label in item.labels if label))


def _look_alike(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of classes that differ in case, spaces or marks alone, as typing errors in a list do."""
    plain: dict[str, str] = {}
    pairs = []
    for name in classes:
        key = re.sub(r'[\W_]+', '', name).lower()
        if key and key in plain:
            pairs.append((plain[key], name))
        plain.setdefault(key, name)
    return pairs


def split(images: ImageSet, share: float = 0.2, seed: int = 0) -> ImageSet:
    """Hold out ``share`` of each class, at least one image and never all; the same for the same seed.

    Where labels of a multi-label set stand together so that not both can be, each keeps an image to train on.

    The rarest class comes first, so that in a multi-label set each keeps its share too (Sechidis et al., 2011, with
    one label an image at a time).
    """
    rng = random.Random(seed)
    left = sorted(images.train)
    rng.shuffle(left)
    of_class: dict[str, list[Item]] = {name: [] for name in images.classes}
    for item in left:
        for label in item.labels:
            of_class[label].append(item)
    remaining = Counter({name: len(items) for name, items in of_class.items()})
    has: Counter[str] = Counter()
    held_out: set[Item] = set()
    train: set[Item] = set()
    for name in sorted(images.classes, key=lambda name: (len(of_class[name]), name)):
        wanted = max(1, round(share * len(of_class[name]))) - has[name]
        chosen = 0
        for item in of_class[name]:
            if item in held_out or item in train:
                continue
            # Each of its labels keeps an image to train on.
            if chosen < wanted and all(remaining[label] > 1 for label in item.labels):
                chosen += 1
                remaining.subtract(item.labels)
                has.update(item.labels)
                held_out.add(item)
            else:
                train.add(item)
    rest = [item for item in left if item not in held_out and item not in train]  # without any label
    held_out.update(rest[: round(share * len(rest))])
    return replace(
        images,
        train=tuple(item for item in images.train if item not in held_out),
        val=tuple(item for item in images.train if item in held_out),
    )
