"""What is read from folders and lists of images, how it is split, and what is said of it."""

import gc
import json
import time

import pytest

pytest.importorskip('mmpretrain')

from _finetune import checking, data
from PIL import Image

CATS_AND_DOGS = {('a.png', ('cat',)), ('b/c d.png', ('dog',)), ('e.png', ('cat',)), ('f.png', ('dog',))}
SEVERAL = {('a.png', ('cat', 'dog')), ('b/c d.png', ('dog',)), ('e.png', ()), ('f.png', ('cat',))}
NUMBERS = dict(cat=0, dog=1)


def pairs(items):
    return {(item.path, item.labels) for item in items}


@pytest.fixture
def listed(tmp_path, write_pictures):
    """``listed(name, text)``: what is read from a list of this name, beside four pictures."""
    (tmp_path / 'b').mkdir()
    for name in ('a.png', 'b/c d.png', 'e.png', 'f.png'):
        Image.new('RGB', (8, 8)).save(tmp_path / name)

    def read(name, text):
        (tmp_path / name).write_text(text)
        return data.read(tmp_path / name)

    return read


def test_class_folders(tmp_path, write_pictures):
    write_pictures(tmp_path, dict(red=3, blue=2))
    (tmp_path / 'red' / 'more').mkdir()
    (tmp_path / 'red' / '0.png').rename(tmp_path / 'red' / 'more' / '0.PNG')
    (tmp_path / '.cache').mkdir()
    (tmp_path / 'red' / 'notes.txt').write_text('x')
    (tmp_path / 'loose.png').write_bytes(b'')
    found = data.read(tmp_path)
    assert found.classes == ('blue', 'red')
    assert ('red/more/0.PNG', ('red',)) in pairs(found.train)
    assert [len(found.train), len(found.val), found.multi_label] == [5, 0, False]
    assert f'not used, since in no class folder: 1 image of {tmp_path}' in found.notes
    assert 'other files are not used: 1 .txt' in found.notes
    assert 'few images to learn from: blue (2), red (3)' in found.notes


@pytest.mark.parametrize(
    ('train', 'others', 'val'),
    [
        ('train', ['val'], 'val'),
        ('training', ['validation', 'test'], 'validation'),
        ('Train', ['test'], 'test'),
        ('train', ['valid', 'dev'], 'valid'),
    ],
)
def test_split_folders(tmp_path, write_pictures, train, others, val):
    for name in (train, *others):
        write_pictures(tmp_path / name, dict(red=2, blue=2))
    found = data.read(tmp_path)
    assert found.classes == ('blue', 'red')
    assert {item.path.split('/')[0] for item in found.train} == {train}
    assert {item.path.split('/')[0] for item in found.val} == {val}
    unused = set(others) - {val}
    assert [note for note in found.notes if 'not used' in note] == [
        f'{name}/ is not used: {val}/ is what is measured by' for name in unused
    ]


def test_train_alone_is_split(tmp_path, write_pictures):
    write_pictures(tmp_path / 'train', dict(red=4, blue=4))
    found = data.split(data.read(tmp_path))
    assert [len(found.train), len(found.val)] == [6, 2]


@pytest.mark.parametrize('where', ['top', 'splits'])
@pytest.mark.parametrize('ending', ['csv', 'jsonl'])
def test_image_folder_of_the_hub(tmp_path, write_pictures, where, ending):
    rows = {}
    for split in ('train', 'test'):
        write_pictures(tmp_path / split / 'data', dict(x=2))
        for i in range(2):
            rows[split, f'data/x/{i}.png'] = 'cat' if i else 'dog'

    def write(path, rows):
        if ending == 'csv':
            text = 'file_name,label\n' + ''.join(f'{name},{label}\n' for name, label in rows)
        else:
            text = ''.join(json.dumps(dict(file_name=name, label=label)) + '\n' for name, label in rows)
        (path / f'metadata.{ending}').write_text(text)

    if where == 'top':
        write(tmp_path, [(f'{split}/{name}', label) for (split, name), label in rows.items()])
    else:
        for split in ('train', 'test'):
            write(tmp_path / split, [(name, label) for (s, name), label in rows.items() if s == split])
    found = data.read(tmp_path)
    assert found.classes == ('cat', 'dog')
    assert pairs(found.train) == {('train/data/x/0.png', ('dog',)), ('train/data/x/1.png', ('cat',))}
    assert pairs(found.val) == {('test/data/x/0.png', ('dog',)), ('test/data/x/1.png', ('cat',))}


@pytest.mark.parametrize(
    ('name', 'text', 'items'),
    [
        ('x.csv', 'image,label\na.png,cat\nb/c d.png,dog\ne.png,cat\nf.png,dog\n', CATS_AND_DOGS),
        ('x.csv', '\ufefflabel;path\ncat;a.png\ndog;b/c d.png\ncat;e.png\ndog;f.png\n', CATS_AND_DOGS),
        ('x.csv', 'a.png,cat\nb/c d.png,dog\ne.png,cat\nf.png,dog\n', CATS_AND_DOGS),
        ('x.csv', 'path,label\na.png,cat\nb\\c d.png,dog\ne.png,cat\nf.png,dog\n', CATS_AND_DOGS),
        ('x.tsv', 'filename\tcategory\na.png\tcat\nb/c d.png\tdog\n\ne.png\tcat\nf.png\tdog\n', CATS_AND_DOGS),
        ('x.csv', 'image,cat,dog\na.png,1,0\nb/c d.png,0,1\ne.png,1,0\nf.png,0,1\n', CATS_AND_DOGS),
        ('x.json', json.dumps({path: labels[0] for path, labels in sorted(CATS_AND_DOGS)}), CATS_AND_DOGS),
        ('x.json', json.dumps([dict(img=p, label=list(names)) for p, names in sorted(CATS_AND_DOGS)]), CATS_AND_DOGS),
        ('x.csv', 'image,labels\na.png,cat;dog\nb/c d.png,dog\ne.png,\nf.png,cat|\n', SEVERAL),
        ('x.csv', 'image,cat,dog\na.png,1,1\nb/c d.png,0,1\ne.png,0,0\nf.png,1,0\n', SEVERAL),
        ('x.jsonl', '\n'.join(json.dumps(dict(image=p, tags=list(names))) for p, names in sorted(SEVERAL)), SEVERAL),
        (
            'x.json',
            json.dumps(
                dict(
                    metainfo=dict(classes=['cat', 'dog']),
                    data_list=[dict(img_path=p, gt_label=[NUMBERS[n] for n in ns]) for p, ns in sorted(SEVERAL)],
                )
            ),
            SEVERAL,
        ),
    ],
)
def test_lists(listed, name, text, items):
    found = listed(name, text)
    assert found.classes == ('cat', 'dog')
    assert pairs(found.train) == items
    assert found.multi_label is (items is SEVERAL)


def test_a_list_with_splits(listed):
    found = listed('x.csv', 'image,label,split\na.png,cat,train\nb/c d.png,dog,TRAIN\ne.png,cat,val\nf.png,dog,test\n')
    assert [sorted(item.path for item in items) for items in (found.train, found.val)] == [
        ['a.png', 'b/c d.png'],
        ['e.png', 'f.png'],
    ]


def test_other_columns_of_0_and_1_are_no_labels(listed):
    found = listed('x.csv', 'image,label,is_flipped\na.png,1,0\nb/c d.png,0,1\ne.png,1,1\nf.png,0,0\n')
    assert found.classes == ('0', '1')
    assert not found.multi_label
    assert pairs(found.train) == {('a.png', ('1',)), ('b/c d.png', ('0',)), ('e.png', ('1',)), ('f.png', ('0',))}


def test_numbers_are_in_their_order(listed):
    found = listed('x.csv', 'image,label\na.png,10\nb/c d.png,9\ne.png,10\nf.png,9\n')
    assert found.classes == ('9', '10')


def test_names_that_look_alike_are_noted(listed):
    found = listed('x.csv', 'image,label\na.png,Red Rose\nb/c d.png,red_rose\ne.png,Red Rose\nf.png,red_rose\n')
    assert "the classes 'Red Rose' and 'red_rose' have nearly one name: are they one?" in found.notes


def test_split_keeps_each_class(tmp_path, write_pictures):
    found = data.read(write_pictures(tmp_path, dict(red=50, blue=10, green=2)))
    first, again, other = (data.split(found, 0.2, seed) for seed in (0, 0, 1))
    assert found.counts(first.val) == dict(red=10, blue=2, green=1)
    assert found.counts(first.train) == dict(red=40, blue=8, green=1)
    assert first == again
    assert first.val != other.val
    assert not set(first.train) & set(first.val)


def test_split_of_several_labels(tmp_path):
    names = [('cat',), ('cat', 'dog'), ('cat', 'dog', 'cow'), (), ('dog',)]
    items = tuple(data.Item(f'{i}.png', names[i % 5]) for i in range(100))
    found = data.split(data.ImageSet(tmp_path, tmp_path, ('cat', 'cow', 'dog'), items, multi_label=True), 0.2)
    counts = found.counts(found.val)
    assert counts['cow'] == 4
    assert all(abs(counts[name] - 12) <= 1 for name in ('cat', 'dog'))
    assert sum(not item.labels for item in found.val) == 4
    assert len(found.train) + len(found.val) == 100


@pytest.mark.parametrize('seed', range(20))
def test_split_keeps_an_image_to_train_on_of_every_label(tmp_path, seed):
    """Both images of ``both`` might be held out, one for the sake of ``a`` and one for that of ``b``."""
    labels = [('a', 'both'), ('a',), ('b', 'both'), ('b',)]
    items = tuple(data.Item(f'{i}.png', names) for i, names in enumerate(labels))
    found = data.split(data.ImageSet(tmp_path, tmp_path, ('a', 'b', 'both'), items, multi_label=True), 0.5, seed)
    assert found.counts(found.train).keys() == {'a', 'b', 'both'}
    assert {'a', 'b'} <= found.counts(found.val).keys()


def test_images_are_looked_at(tmp_path, write_pictures):
    write_pictures(tmp_path, dict(red=12, blue=12))
    (tmp_path / 'red' / 'broken.png').write_bytes((tmp_path / 'red' / '0.png').read_bytes()[:60])
    (tmp_path / 'blue' / 'copy.png').write_bytes((tmp_path / 'red' / '1.png').read_bytes())
    found, facts = checking.check_images(data.read(tmp_path), progress=False)
    assert [len(found.train), facts.side, facts.grey] == [25, 24, False]
    assert any(note.startswith('left out, since unreadable: 1 image: red/broken.png (') for note in found.notes)
    (twice,) = (note for note in found.notes if 'different labels' in note)
    assert twice == 'twice there with different labels: 1 image: blue/copy.png and red/1.png'
    mean_red, mean_green, mean_blue = facts.mean
    assert mean_red == pytest.approx((12 * 200 + 12 * 40 + 200) / 25, abs=3)
    assert mean_green == pytest.approx((12 * 40 + 12 * 60 + 40) / 25, abs=3)
    assert mean_blue == pytest.approx((12 * 40 + 12 * 200 + 40) / 25, abs=3)


def test_an_image_in_both_splits_is_noted(tmp_path, write_pictures):
    write_pictures(tmp_path / 'train', dict(red=3, blue=3))
    write_pictures(tmp_path / 'val', dict(red=1, blue=3), start=500)
    (tmp_path / 'val' / 'red' / '0.png').write_bytes((tmp_path / 'train' / 'red' / '2.png').read_bytes())
    found, facts = checking.check_images(data.read(tmp_path), progress=False)
    (note,) = checking.find_leaks(found, facts)
    assert note.endswith('train/red/2.png and val/red/0.png')


def test_an_image_in_both_parts_of_the_tools_split_is_noted(tmp_path, write_pictures):
    write_pictures(tmp_path, dict(red=6, blue=6))
    for i in range(6):
        (tmp_path / 'red' / f'copy{i}.png').write_bytes((tmp_path / 'red' / f'{i}.png').read_bytes())
    found, facts = checking.check_images(data.read(tmp_path), progress=False)
    assert checking.find_leaks(found, facts) == []  # there is no split yet
    found = data.split(found, 0.2)
    (note,) = checking.find_leaks(found, facts)
    held_out = {item.path for item in found.val}
    copies = [(f'red/{i}.png', f'red/copy{i}.png') for i in range(6)]
    leaked = [f'{a} and {b}' for a, b in copies if (a in held_out) != (b in held_out)]
    images = '1 image' if len(leaked) == 1 else f'{len(leaked)} images'
    assert note.startswith(f'in training and in validation, which flatters the score: {images}: ')
    assert note.partition(f'{images}: ')[2].partition(', ')[0] in leaked


def test_split_of_many_images_and_classes(tmp_path):
    """Twice as many images and classes take twice as long, not four times."""

    def measure(number):
        names = tuple(f'{i:04}' for i in range(number // 50))
        items = tuple(data.Item(f'{i}.png', (names[i % len(names)],)) for i in range(number))
        images = data.ImageSet(tmp_path, tmp_path, names, items)
        times = []
        gc.disable()  # a collection goes through all that other tests left
        try:
            for _ in range(3):
                start = time.process_time()
                found = data.split(images, 0.2)
                times.append(time.process_time() - start)
        finally:
            gc.enable()
        assert {*found.counts(found.val).values()} == {10}
        return min(times)

    assert measure(40_000) < 8 * measure(10_000) + 0.1


def test_grey_images(tmp_path):
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new('L', (10, 10), 40 * i).save(tmp_path / name / f'{i}.png')
    _, facts = checking.check_images(data.read(tmp_path), progress=False)
    assert facts.grey
    assert facts.mean == (20.0, 20.0, 20.0)
