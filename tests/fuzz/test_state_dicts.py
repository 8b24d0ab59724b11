# ruff: noqa: PT017 - a file may load or not, and where it does not, the message has to be right
"""Checkpoints damaged in drawn ways, through every loader: exactly the right tensors, or one error that says what is
wrong and leaves the network as it was. Nothing that a file holds is ever run."""

import copy
import importlib
import io
import warnings

import pytest
import safetensors.torch
import timm
import torch
from helpers.fuzzing import fuzz, tally
from helpers.third_party_networks import SKConv
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sk_plugins  # noqa: F401 - registers the models
from sk_plugins._resources import ROOT
from sk_plugins.weights import CheckpointError, load_checkpoint, load_partial, load_third_party

MODELS = pytest.importorskip('mmpretrain.registry').MODELS
pytest.importorskip('sk_plugins.mmpretrain_models')

SHAPE = dict(
    layers=(1, 1, 1), channels=(4, 4, 4), cardinality=2, base_width=32, small_stem=True, sk_kwargs=dict(min_dim=4)
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('fuzz')
    Code.mark = folder / 'mark'
    return folder


def make_network():
    return timm.create_model('sknet26', num_classes=3, **SHAPE)


def make_state_dict(seed=0):
    torch.manual_seed(seed)
    network = make_network()
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if name.endswith('var') else tensor.normal_()
    return network.state_dict()


OWN = make_state_dict()
NAMES = sorted(name for name in OWN if not name.endswith('num_batches_tracked'))


class Code:
    """Unpickled, it would leave a file."""

    mark = None

    def __reduce__(self):
        return open, (str(Code.mark), 'w')


def write(kind, content):
    file = io.BytesIO()
    if kind == 'safetensors':
        return safetensors.torch.save(content)
    torch.save(content, file, _use_new_zipfile_serialization=kind == 'pth')
    return file.getvalue()


def same(tensors, expected):
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[k], expected[k]) for k in expected)


# Bytes.

FILES = {kind: write(kind, OWN) for kind in ('safetensors', 'pth', 'old.pth')}


@st.composite
def damaged(draw):
    kind = draw(st.sampled_from(sorted(FILES)))
    whole = FILES[kind]
    data = bytearray(whole)
    # The ends of a file say what is in it.
    near = st.integers(0, 400)
    place = draw(st.one_of(st.integers(0, len(data) - 1), near, near.map(lambda i: len(whole) - 1 - i)))
    damage = draw(st.sampled_from(['truncated', 'flipped', 'zeroed', 'cut', 'doubled']))
    length = draw(st.integers(1, 64))
    if damage == 'truncated':
        del data[place:]
    elif damage == 'flipped':
        data[place] ^= draw(st.integers(1, 255))
    elif damage == 'zeroed':
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif damage == 'cut':
        del data[place : place + length]
    else:
        data[place:place] = data[place : place + length]
    return kind, damage, bytes(data)


def load(path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return load_checkpoint(path)[0]


@fuzz(quick=60, share=4)
@given(damaged())
def test_damaged_bytes(folder, sample):
    kind, damage, data = sample
    path = folder / f'bytes.{kind.replace("old.", "")}'
    path.write_bytes(data)
    try:
        tensors = load(path)
    except CheckpointError as error:
        assert str(error).startswith(f'{path}: ')
        assert '\n' not in str(error)
        tally(f'{kind}: refused')
        return
    if same(tensors, OWN):
        tally(f'{kind}: loaded whole')
        return
    # Neither safetensors nor torch's format before 1.6 has checksums, so that other bytes in their place are not seen.
    assert kind != 'pth'
    assert damage in ('flipped', 'zeroed') or (kind == 'old.pth' and damage in ('cut', 'doubled'))
    tally(f'{kind}: not to be seen')


@pytest.mark.parametrize('kind', sorted(FILES))
def test_truncated_files(kind, folder):
    """At places all over the file, each of them an error."""
    path = folder / f'short.{kind.replace("old.", "")}'
    data = FILES[kind]
    for place in range(0, len(data), len(data) // 40):
        path.write_bytes(data[:place])
        with pytest.raises(CheckpointError, match='short'):
            load(path)
        tally(f'{kind}: refused')


# Tensors.

OBJECTS = {
    'None': lambda t: None,
    'number': lambda t: 3,
    'text': lambda t: 'weights',
    'list': lambda t: t.tolist(),
    'dict': lambda t: {'weight': t},
    'code': lambda t: Code(),
}
TENSORS = {
    'integers': lambda t: t.round().long(),
    'booleans': lambda t: t > 0,
    'complex': lambda t: torch.complex(t, t + 1),
    'sparse': lambda t: t.to_sparse(),
    'meta': lambda t: t.to('meta'),
    'quantised': lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    'of other size': lambda t: torch.cat([t, t]),
    'flat': lambda t: t.reshape(1, -1, 1),
    'empty': lambda t: t[:0],
}
CAST = {
    'double': lambda t: t.double(),
    'half': lambda t: t.half(),
    'bfloat16': lambda t: t.bfloat16(),
    'strided': lambda t: torch.stack([t, t], -1)[..., 0],
    'parameter': lambda t: torch.nn.Parameter(t),
}
CONTAINERS = {
    'bare': lambda d: d,
    'state_dict': lambda d: {'state_dict': d},
    'model': lambda d: {'model': d, 'epoch': 3},
    'mmengine': lambda d: {'meta': {'epoch': 3}, 'state_dict': d, 'message_hub': Code()},
    'averaged': lambda d: {'state_dict': {k: torch.zeros(1) for k in d}, 'state_dict_ema': d},
    'twice': lambda d: {'state_dict': {'state_dict': d}},
    'listed': lambda d: [d],
}


class Sample:
    """What is wrong with a state dict, the tensor it is wrong with, and whether it should load all the same."""

    def __init__(self, what, name, content, tensors, fits):
        self.what, self.name, self.content, self.tensors, self.fits = what, name, content, tensors, fits

    def __repr__(self):
        return f'Sample({self.what!r}, {self.name!r})'


@st.composite
def tampered(draw):
    tensors = dict(OWN)
    name = draw(st.sampled_from(NAMES))
    what = draw(
        st.sampled_from(['nothing', 'removed', 'added', 'renamed', 'swapped', *OBJECTS, *TENSORS, *CAST, *CONTAINERS])
    )
    container, fits = 'bare', what in ('nothing', *CAST)
    if what == 'removed':
        del tensors[name]
    elif what == 'added':
        tensors[f'{name}.more'] = torch.zeros(2)
    elif what == 'renamed':
        tensors[draw(st.sampled_from([f'{name}_', f'x.{name}', name.upper()]))] = tensors.pop(name)
    elif what == 'swapped':
        other = draw(st.sampled_from([n for n in NAMES if OWN[n].shape != OWN[name].shape]))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif what in CONTAINERS:
        container, fits = what, what not in ('twice', 'listed')
    elif what != 'nothing':
        tensors[name] = {**OBJECTS, **TENSORS, **CAST}[what](tensors[name])
    prefix = draw(st.sampled_from(['', '', 'module.'])) if what != 'renamed' else ''
    content = CONTAINERS[container]({prefix + k: v for k, v in tensors.items()})
    return Sample(what, name, content, {k: v for k, v in tensors.items() if isinstance(v, Tensor)}, fits)


def through_load_partial(path):
    network = make_network()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    try:
        report = load_partial(network, path)
    except CheckpointError:
        assert same(network.state_dict(), before), 'a load that failed changed the network'
        raise
    return {name: tensor for name, tensor in network.state_dict().items() if name in report.loaded}


def through_pretrained_file(path):
    overlay = dict(file=str(path), num_classes=3, hf_hub_id=None)
    return timm.create_model(
        'sknet26', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, **SHAPE
    ).state_dict()


def through_init_cfg(path):
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    network = MODELS.build(dict(type='SKNet', depth=26, init_cfg=init_cfg, **SHAPE))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    try:
        network.init_weights()
    except Exception:
        assert same(network.state_dict(), before), 'a load that failed changed the network'
        raise
    return network.state_dict()


LOADERS = {
    'load_partial': through_load_partial,
    "timm's pretrained file": through_pretrained_file,
    'init_cfg': through_init_cfg,
}


@pytest.mark.parametrize('loader', LOADERS)
@fuzz(quick=12)
@given(tampered())
def test_tampered_tensors(loader, folder, sample):
    what, name, tensors, fits = sample.what, sample.name, sample.tensors, sample.fits
    path = folder / f'tampered-{loader[:4]}.pth'
    path.write_bytes(write('pth', sample.content))
    try:
        loaded = LOADERS[loader](path)
    except (CheckpointError, RuntimeError) as error:
        assert not Code.mark.exists(), f'{loader} ran code of the file'
        assert not fits, error
        assert path.name in str(error), f'{error} does not name the file'
        tally(f'{loader}: refused')
        return
    assert not Code.mark.exists(), f'{loader} ran code of the file'
    tally(f'{loader}: loaded')
    partly = loader == 'load_partial' and what in ('removed', 'added', 'renamed', 'swapped', *TENSORS)
    backbone = loader == 'init_cfg' and (what == 'added' or name.startswith('fc.'))
    assert fits or partly or backbone, f'{loader} loaded a state dict with {name} {what}'
    for loaded_name, tensor in loaded.items():
        if not loaded_name.endswith('num_batches_tracked'):
            assert torch.equal(tensor, tensors[loaded_name].to(tensor.dtype)), f'{loaded_name} is not the one given'


# Other projects' weights.

torch.manual_seed(0)
THIRD_PARTY = SKConv(8, 4, groups=2).eval()


@fuzz(quick=20)
@given(st.data())
def test_tampered_third_party_tensors(folder, data):
    tensors = dict(THIRD_PARTY.state_dict())
    names = sorted(name for name in tensors if not name.endswith('num_batches_tracked'))
    name = data.draw(st.sampled_from(names))
    what = data.draw(st.sampled_from(['nothing', 'removed', 'added', 'renamed', *OBJECTS, *TENSORS, *CAST]))
    if what == 'removed':
        del tensors[name]
    elif what == 'added':
        tensors[f'{name}.more'] = torch.zeros(2)
    elif what == 'renamed':
        tensors[f'x{name}'] = tensors.pop(name)
    elif what != 'nothing':
        tensors[name] = {**OBJECTS, **TENSORS, **CAST}[what](tensors[name])
    path = folder / 'third_party.pth'
    path.write_bytes(write('pth', tensors))
    try:
        layer = load_third_party(path)
    except CheckpointError as error:
        assert str(error).startswith(f'{path}: ')
        assert what not in ('nothing', *CAST), error
        assert not Code.mark.exists()
        tally('load_third_party: refused')
        return
    assert not Code.mark.exists()
    tally('load_third_party: loaded')
    assert what in ('nothing', *CAST) or (what == 'flat' and tensors[name].numel() == max(tensors[name].shape))
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer.double()(x), copy.deepcopy(THIRD_PARTY).double()(x), rtol=2e-2, atol=2e-2)


@pytest.fixture(scope='module')
def convert():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'tools'))
        yield importlib.import_module('convert_checkpoint').convert


@fuzz(quick=12)
@given(tampered(), st.sampled_from(['.safetensors', '.pth']))
def test_converted_tensors(convert, folder, sample, suffix):
    path, out = folder / 'convert.pth', folder / f'converted{suffix}'
    path.write_bytes(write('pth', sample.content))
    out.write_bytes(b'what was there before')
    try:
        convert(path, out, to='timm')
    except CheckpointError as error:
        assert not sample.fits, error
        assert str(error).startswith(f'{path}: ')
        assert out.read_bytes() == b'what was there before'
        tally('convert_checkpoint: refused')
        return
    finally:
        assert not Code.mark.exists(), "convert_checkpoint ran the file's code"
    tally('convert_checkpoint: converted')
    written = load(out)
    assert written.keys() == sample.tensors.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, sample.tensors[name]), f'{name} is not the one given'
    assert [other.name for other in folder.iterdir() if other.name.startswith('.converted')] == []
