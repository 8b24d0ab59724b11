"""What finetune, predict, export and push say of what they cannot do: one line, before anything is written."""

import re
import shutil

import pytest

pytest.importorskip('mmpretrain')

from PIL import Image

from sk_plugins.weights import CheckpointError, HubError

ERRORS = (CheckpointError, HubError, OSError, ValueError)


@pytest.fixture(scope='module')
def place(write_pictures, tmp_path_factory, narrow):
    """A folder with all that is wrong."""
    root = tmp_path_factory.mktemp('wrong')
    write_pictures(root / 'good', dict(red=4, blue=4))
    write_pictures(root / 'one', dict(red=4))
    write_pictures(root / 'single', dict(red=4, blue=1))
    write_pictures(root / 'empty', dict(red=4, blue=4))
    (root / 'empty' / 'green').mkdir()
    write_pictures(root / 'typo' / 'train', dict(red=2, blue=2))
    write_pictures(root / 'typo' / 'val', dict(red=1, bleu=1))
    write_pictures(root / 'odd' / 'train', dict(red=2))
    write_pictures(root / 'odd' / 'rest', dict(red=2))
    write_pictures(root / 'only_val' / 'val', dict(red=2, blue=2))
    write_pictures(root / 'nested' / 'data' / 'train', dict(red=2, blue=2))
    (root / 'loose').mkdir()
    Image.new('RGB', (8, 8)).save(root / 'loose' / '1.png')
    (root / 'texts' / 'red').mkdir(parents=True)
    (root / 'texts' / 'red' / 'a.heic').write_text('x')
    write_pictures(root / 'broken', dict(red=4, blue=4))
    for path in (root / 'broken' / 'red').iterdir():
        path.write_bytes(b'nothing')
    (root / 'list.txt').write_text('good/red/0.png red\n')
    (root / 'column.csv').write_text('image\ngood/red/0.png\n')
    (root / 'names.csv').write_text('imag,lable\ngood/red/0.png,red\n')
    (root / 'gone.csv').write_text('image,label\ngood/red/0.png,red\nnowhere.png,blue\n')
    (root / 'twice.csv').write_text('image,label\ngood/red/0.png,red\ngood/red/0.png,blue\n')
    (root / 'cells.csv').write_text('image,label\ngood/red/0.png,red,blue\n')
    (root / 'blank.csv').write_text('image,label\ngood/red/0.png,red\ngood/red/1.png,\n')
    (root / 'split.csv').write_text('image,label,split\ngood/red/0.png,red,holdout\n')
    (root / 'typo.csv').write_text('image,label,split\ngood/red/0.png,red,train\ngood/red/1.png,rde,val\n')
    (root / 'nothing.csv').write_text('')
    (root / 'bad.json').write_text('{')
    (root / 'word.json').write_text('"red"')
    (root / 'latin.csv').write_bytes(b'image,label\ngood/red/0.png,caf\xe9\n')
    shutil.copy(narrow, root / 'narrow.py')
    (root / 'foreign.py').write_text("model = dict(backbone=dict(type='ResNet', depth=18))\n")
    (root / 'weights.pth').write_bytes(b'no weights')
    (root / 'started').mkdir()
    (root / 'started' / 'config.py').write_text('')
    (root / 'hub').mkdir()
    (root / 'hub' / 'config.json').write_text('{}')
    return root


SCRATCH = ['--model', 'narrow.py', '--from-scratch']
FINETUNE = [
    (['nowhere'], r'^nowhere: no such folder or list'),
    (['goodd'], r'^goodd: no such folder or list; near it are good, odd'),
    (['one'], r"^one: has one class, 'red': there is nothing to tell apart"),
    (
        ['single'],
        r"^single: the class 'blue' has 1 image: at least 2 are needed, one to train on and one to measure by",
    ),
    (['empty'], r'^empty/green: no images in this class folder; fill it or remove it'),
    (
        ['typo'],
        r'^typo/val/bleu: train/ has no class of this name; near it is blue: the classes of train/ and val/ must',
    ),
    (['odd'], r'^odd: has train and beside it rest, which is no split: expected train/ and val/'),
    (['only_val'], r'^only_val: has val and no folder train: expected train/ and val/'),
    (['nested'], r'^nested: has the folder data alone, which has the splits: name nested/data$'),
    (
        ['loose'],
        r'^loose: holds 1 images and no class folders: expected a folder for each class, such as loose/daisy/1',
    ),
    (['texts'], r'^texts: no images there, only 1 \.heic: expected a folder for each class'),
    (['broken'], r'^broken: 4 of 8 images cannot be read: red/0\.png \(no image that can be read\); .* and 1 more'),
    (['list.txt'], r'^list\.txt: must be a folder of class folders, or a list: \.csv, \.tsv, \.json, \.jsonl'),
    (['column.csv'], r"^column\.csv: has one column, 'image': expected image and label"),
    (['names.csv'], r"^names\.csv: has no column image, but 'imag', 'lable'; near it is imag"),
    (['gone.csv'], r'^gone\.csv: 1 of 2 images are not in \.: nowhere\.png'),
    (
        ['twice.csv'],
        r'^twice\.csv: good/red/0\.png is red in row 2 and blue in row 3: several labels of an image stand in',
    ),
    (['cells.csv'], r'^cells\.csv: row 2 has 3 cells and not 2'),
    (['blank.csv'], r'^blank\.csv: row 3: good/red/1\.png has no label'),
    (['split.csv'], r"^split\.csv: row 2: the split 'holdout' is neither train nor val"),
    (['typo.csv'], r"^typo\.csv: the class 'rde' has no images to train on; near it is red: at least 1 is needed$"),
    (['nothing.csv'], r'^nothing\.csv: lists no images'),
    (['bad.json'], r'^bad\.json: is not JSON: '),
    (['word.json'], r'^word\.json: must map images to labels, or be a list of records with image and label'),
    (['latin.csv'], r'^latin\.csv: is not text in UTF-8 \('),
    (
        ['good', '--model', 'sknet5'],
        r'^--model sknet5: neither a network of this project nor a config; near it are sknet50',
    ),
    (
        ['good', '--model', 'sknet_digit'],
        r'^--model sknet_digit: neither a network of this project nor a config; near it are sknet_digits',
    ),
    (
        ['good', '--model', 'hf-hub:me/x'],
        r'^--model hf-hub:me/x: neither a network of this project nor a config; weights of the Hub go with --weights',
    ),
    (['good', '--model', 'sknet50.foo'], r'^--model sknet50\.foo: sknet50 has the tags sknet50\.\w+'),
    (['good', '--model', 'sknet50.foo', '--from-scratch'], r'^--model sknet50\.foo: sknet50 has the tags sknet50\.\w+'),
    (['good', '--model', 'sknet26.foo', '--from-scratch'], r'^--model sknet26\.foo: sknet26 has no tags'),
    (['good', '--model', 'foreign.py'], r"^--model foreign\.py: its backbone is 'ResNet', and not one of this project"),
    (
        ['good', '--model', 'weights.pth'],
        r'^--model weights\.pth: is no config; a checkpoint to start from goes with --we',
    ),
    (
        ['good', '--model', 'sknet26'],
        r'^sknet26 has no published weights: --from-scratch trains from nothing, --weights',
    ),
    (
        ['good', '--model', 'skshufflenetv2_x1_0'],
        r'^skshufflenetv2_x1_0 has no published weights: .*, --warm-start takes what fits of its plain counterpart',
    ),
    (['good', '--model', 'sknet26', '--warm-start'], r'^--warm-start: no published weights fit into sknet26 in part'),
    (
        ['good'],
        r'^timm/skresnext50_32x4d\.ra_in1k: .*the Hub did not give it .*; --from-scratch trains without weights',
    ),
    (['good', '--model', 'narrow.py', '--weights', 'weights.pth'], r'^weights\.pth: .*; --from-scratch trains without'),
    (['good', '--model', 'narrow.py', '--weights', 'gone.pth'], r'^gone\.pth: no such checkpoint file; --from-scratch'),
    (['good', *SCRATCH, '--freeze', '1'], r'^--freeze 1: stages without weights would stay as they were initialised'),
    (['good', *SCRATCH, '--work-dir', 'started'], r'^started: holds a run already: --resume goes on with it'),
    (['good', *SCRATCH, '--resume'], r'^work_dirs/good: is no work dir of a finetune run'),
    (['good', *SCRATCH, '--amp'], r'^--amp: mmengine trains with mixed precision on GPUs'),
    (['good', *SCRATCH, '--device', 'cuda'], r'^--device cuda: torch \S+ finds no such GPU'),
    (['good', *SCRATCH, '--cfg-options', 'modle.x=1'], r'^modle\.x: the config has no modle; near it is model'),
]
OPTIONS = [
    (['finetune', 'good', '--epohcs', '3'], r'unrecognized arguments: --epohcs 3; near it are --epochs, --export'),
    (['finetune', 'good', '--learning-rate', '3'], r'unrecognized arguments: --learning-rate 3; it is called --lr'),
    (['finetune', 'good', '--engine', 'timm'], r'unrecognized arguments: --engine timm: the engine is mmengine; docs/'),
    (['finetune', 'good', '--epochs', '0'], r'argument --epochs: 0 must be at least 1'),
    (
        ['finetune', 'good', '--batch-size', '1'],
        r'argument --batch-size: 1 must be at least 2: the attention has a Batch',
    ),
    (['finetune', 'good', '--lr', '0'], r'argument --lr: 0\.0 must be above 0 and at most 10'),
    (['finetune', 'good', '--val-share', '1'], r'argument --val-share: 1\.0 must be above 0 and at most 0\.9'),
    (['finetune', 'good', '--device', 'gpu'], r"argument --device: 'gpu' must be cpu, cuda or cuda:N"),
    (['finetune', 'good', '--from-scratch', '--weights', 'x'], r'--weights and --from-scratch do not go together'),
    (['finetune', 'good', *SCRATCH, '--cfg-options', 'x'], r"argument --cfg-options: 'x' must be KEY=VALUE"),
    (['predict', 'sknet50', 'x.png', '--topk', '0'], r'argument --topk: 0 must be at least 1'),
    (['predict', 'sknet50', 'x.png', '--out', 'x.txt'], r'argument --out: x\.txt must end in \.csv or \.json'),
    (['push', 'hub', 'name'], r"argument OWNER/NAME: 'name' is not of this form"),
    (['finetune', 'good', '--from-scrach'], r'unrecognized arguments: --from-scrach; near it is --from-scratch$'),
    (['push', 'hub', 'me/x', '--privte'], r'unrecognized arguments: --privte; near it are --private, --update'),
    (
        ['train', 'sknet_digits', '--epochs', '3'],
        r'unrecognized arguments: --epochs 3: the config has them, --cfg-optio',
    ),
    (['train', 'sknet_digits', '--resum3', 'x'], r'unrecognized arguments: --resum3 x; near it is --resume'),
]
OTHERS = [
    ('predict', ['sknet50', 'nowhere.png'], r'^nowhere\.png: no such file or folder'),
    ('predict', ['sknet50', 'good/rde'], r'^good/rde: no such file or folder; near it is good/red$'),
    ('predict', ['sknet50', '*.tif'], r'^\*\.tif: no file matches'),
    ('predict', ['good/rde', 'loose'], r'^good/rde: no such folder; near it is good/red; a repository is hf-hub:good/'),
    ('predict', ['sknet50', 'texts'], r'^texts: no pictures in this folder'),
    (
        'predict',
        ['sknet5o', 'loose'],
        r"^model 'sknet5o' is no name of timm, no Hub repository .*; near it are sknet50",
    ),
    ('predict', ['loose/1.png', 'narrow.py'], r'^loose/1\.png: is neither a config nor a checkpoint .*; MODEL goes be'),
    ('predict', ['narrow.py', 'loose'], r'^narrow\.py: a config needs its --checkpoint'),
    ('predict', ['weights.pth', 'loose'], r'^weights\.pth: 2 configs lie beside this checkpoint: name its config'),
    ('predict', ['good', 'loose'], r'^good: is neither a folder for the Hub \(config\.json\) nor a work dir'),
    ('predict', ['started', 'loose'], r'^started: holds no checkpoint: no epoch of the run is over yet'),
    ('predict', ['sknet26', 'loose'], r'^sknet26: sknet26 has no published weights|^sknet26 has no published weights'),
    ('predict', ['me/nothing', 'loose'], r'^me/nothing: .*(not in the local cache|download failed)'),
    ('export', ['good', 'hub'], r'^good: is no work dir of a finetune run: it has no finetune\.json and config\.py'),
    ('push', ['nowhere', 'me/x'], r'^nowhere: no such folder'),
    (
        'push',
        ['good', 'me/x'],
        r'^good: is neither a folder for the Hub \(config\.json, model\.safetensors\) nor a work',
    ),
    ('push', ['hub', 'me/x'], r'^hub: has config\.json and no model\.safetensors'),
]


def name(value):
    return ' '.join(value) if isinstance(value, list) else ''


@pytest.fixture
def here(place, monkeypatch):
    """In the folder of what is wrong, without a GPU and without waiting for the Hub; nothing may be written there."""
    from huggingface_hub import file_download

    for name in ('_DEFAULT_RETRY_ON_EXCEPTIONS', '_DEFAULT_RETRY_ON_STATUS_CODES'):
        monkeypatch.setattr(file_download, name, (), raising=False)
    monkeypatch.chdir(place)
    before = sorted(place.rglob('*'))
    yield place
    assert sorted(place.rglob('*')) == before


@pytest.mark.parametrize(('words', 'said'), FINETUNE, ids=name)
def test_finetune(here, finetune, words, said):
    with pytest.raises(ERRORS, match=said) as caught:
        finetune(words)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('words', 'said'), OPTIONS, ids=name)
def test_options(here, load_tool, capsys, words, said):
    tool, *words = words
    with pytest.raises(SystemExit) as caught:
        load_tool(tool).main(words)
    assert caught.value.code == 2
    assert re.search(said, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(('tool', 'words', 'said'), OTHERS, ids=name)
def test_others(here, load_tool, tool, words, said):
    with pytest.raises(ERRORS, match=said) as caught:
        load_tool(tool).main(words)
    assert '\n' not in str(caught.value)
