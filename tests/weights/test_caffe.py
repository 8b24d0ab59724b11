"""The authors' Caffe models: files written here byte by byte, against a restatement of the published prototxt."""

import struct
import sys

import pytest

pytest.importorskip('google.protobuf')

import torch
import torch.nn.functional as F
from helpers.protocol_buffers import field, varint
from helpers.tolerances import assert_close

from sk_plugins.weights import CheckpointError, caffe, convert, load_third_party, recognise_third_party


def encode_blob(tensor, legacy=False, double=False):
    values = tensor.flatten().tolist()
    if legacy:
        axes = [1] * (4 - tensor.ndim) + list(tensor.shape)
        shape = b''.join(field(number, size) for number, size in enumerate(axes, 1))
    else:
        shape = field(7, field(1, b''.join(varint(size) for size in tensor.shape)))
    kind, number = ('d', 8) if double else ('f', 5)
    return field(number, struct.pack(f'<{len(values)}{kind}', *values)) + shape


def write(path, weights, **options):
    """A .caffemodel of {layer: blobs}, with a layer without blobs and fields that the reader has no use for."""
    layers = []
    for name, blobs in weights.items():
        encoded = b''.join(field(7, encode_blob(blob, **options)) for blob in blobs)
        layers.append(field(1, name) + field(2, 'Convolution') + encoded)
    layers.insert(1, field(1, 'conv1/7x7_s2/relu') + field(2, 'ReLU') + field(3, 'bottom') + field(10, 0))
    path.write_bytes(field(1, 'sknet50_basic') + b''.join(field(100, layer) for layer in layers))
    return path


class Net:
    """The prototxt, layer by layer; weights {layer: blobs} are drawn the first time a layer is met."""

    def __init__(self, units=(1, 2, 1, 1), width=16, dims=(8, 4, 8, 8), groups=4, classes=5):
        self.units, self.width, self.dims, self.groups, self.classes = units, width, dims, groups, classes
        self.weights = {}
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, *shape, std=1.0, mean=0.0):
        return torch.randn(*shape, generator=self.generator) * std + mean

    def conv(self, name, x, out, kernel=1, stride=1, pad=0, dilation=1, groups=1):
        inputs = x.shape[1] // groups
        if name not in self.weights:
            self.weights[name] = [self.draw(out, inputs, kernel, kernel, std=(inputs * kernel**2) ** -0.5)]
        return F.conv2d(x, self.weights[name][0].to(x), None, stride, pad, dilation, groups)

    def norm(self, name, x):
        """CuDNNBatchNorm: scale, bias, mean and variance, with an epsilon of 1e-5."""
        shape = (1, x.shape[1], 1, 1)
        if name not in self.weights:
            scale, bias, mean = (
                self.draw(*shape, std=0.2, mean=1),
                self.draw(*shape, std=0.3),
                self.draw(*shape, std=0.3),
            )
            self.weights[name] = [scale, bias, mean, self.draw(*shape).square() + 0.5]
        scale, bias, mean, variance = (blob.to(x) for blob in self.weights[name])
        return (x - mean) / (variance + 1e-5).sqrt() * scale + bias

    def unit(self, name, x, width, dim, stride, project):
        u = F.relu(self.norm(f'{name}/1x1_reduce/bn', self.conv(f'{name}/1x1_reduce', x, width)))
        branches = []
        for layer, dilation in ((f'{name}/3x3g{self.groups}', 1), (f'{name}/3x3g{self.groups}d2', 2)):
            branch = self.conv(layer, u, width, 3, stride, dilation, dilation, self.groups)
            branches.append(F.relu(self.norm(f'{layer}/bn', branch)))
        pooled = (branches[0] + branches[1]).mean((2, 3), keepdim=True)
        z = F.relu(self.norm(f'{name}/B_fc1/bn', self.conv(f'{name}/B_fc1', pooled, dim)))
        logits = self.conv(f'{name}/B_fc2', z, 2 * width)
        slices = logits.reshape(len(x), 2, -1, 1).softmax(1)
        # The first slice scales the plain branch, and Axpy adds the dilated one times the second.
        v = slices[:, 0, :, :, None] * branches[0] + slices[:, 1, :, :, None] * branches[1]
        v = self.norm(f'{name}/1x1_increase/bn', self.conv(f'{name}/1x1_increase', v, 2 * width))
        if project:
            x = self.norm(f'{name}/1x1_proj/bn', self.conv(f'{name}/1x1_proj', x, 2 * width, 1, stride))
        return F.relu(v + x)

    def __call__(self, x):
        x = F.relu(self.norm('conv1/7x7_s2/bn', self.conv('conv1/7x7_s2', x, 64, 7, 2, 3)))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        for stage, (count, dim) in enumerate(zip(self.units, self.dims)):
            for i in range(count):
                stride = 2 if stage and i == 0 else 1
                x = self.unit(f'conv{stage + 2}_{i + 1}', x, self.width * 2**stage, dim, stride, i == 0)
        if 'classifier' not in self.weights:
            self.weights['classifier'] = [self.draw(self.classes, x.shape[1], std=0.1), self.draw(self.classes)]
        weight, bias = (blob.to(x) for blob in self.weights['classifier'])
        return x.mean((2, 3)) @ weight.T + bias


@pytest.fixture(scope='module')
def images():
    """Of such a size that Caffe's pooling and torch's differ in size too: 33 rows become 16 and 17."""
    return torch.randn(2, 3, 65, 47, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def net(images):
    net = Net()
    net(images)
    return net


@pytest.mark.parametrize('options', [{}, dict(legacy=True), dict(double=True)], ids=['', 'legacy', 'double'])
def test_outputs_are_those_of_the_prototxt(net, images, tmp_path, options):
    model = load_third_party(write(tmp_path / 'sknet.caffemodel', net.weights, **options)).double()
    expected = net(images.double())
    assert expected.std() > 0.1
    assert_close(model(images.double()), expected, length=model)


def test_arguments_and_notes(net, tmp_path):
    found = recognise_third_party(write(tmp_path / 'sknet.caffemodel', net.weights))
    assert found.origin == "the authors' Caffe SKNet"
    assert found.arguments['layers'] == (1, 2, 1, 1)
    assert found.arguments['num_classes'] == 5
    assert found.ceil_pool
    # The second stage's d lies below the floor in SKNet-101, as it does here.
    assert found.notes[0] == 'stage 2: z padded from 4 to 8 channels'
    assert 'pools as Caffe does' in found.notes[1]
    assert 'blue, green, red' in found.notes[2]
    with pytest.raises(ValueError, match=r"Caffe SKNet: the stem's pooling is Caffe's, which no registered model has"):
        found.timm_model()


@pytest.mark.parametrize(
    ('units', 'dims', 'parameters'),
    [
        pytest.param((3, 4, 6, 3), (32, 32, 32, 64), 27_479_784, id='sknet50'),
        pytest.param((3, 4, 23, 3), (32, 16, 32, 64), 48_736_040, id='sknet101', marks=pytest.mark.slow),
    ],
)
def test_published_sizes(units, dims, parameters):
    """The published definitions, whose parameters PAPER.md counts; 48,686,760 of SKNet-101 before the padding."""
    net = Net(units, 128, dims, groups=32, classes=1000)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    net(x)
    found = convert.recognise(
        {f'{name}.{i}': blob for name, blobs in net.weights.items() for i, blob in enumerate(blobs)}
    )
    assert found.arguments == dict(layers=units, num_classes=1000)
    model = found.build()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert_close(model(x), net(x), length=model)


# What a swap would do: each wrong reading is far from equal.


@pytest.mark.parametrize(
    'wrong',
    ['the halves of B_fc2', 'mean and scale', "torch's pooling"],
)
def test_wrong_readings_show(net, images, wrong):
    weights = {name: [*blobs] for name, blobs in net.weights.items()}
    if wrong == 'the halves of B_fc2':
        weights['conv2_1/B_fc2'] = [weights['conv2_1/B_fc2'][0].roll(16, 0)]
    elif wrong == 'mean and scale':
        scale, bias, mean, variance = weights['conv3_2/3x3g4d2/bn']
        weights['conv3_2/3x3g4d2/bn'] = [mean, bias, scale, variance]
    model = convert.recognise(
        {f'{k}.{i}': blob for k, blobs in weights.items() for i, blob in enumerate(blobs)}
    ).build()
    if wrong == "torch's pooling":
        model.maxpool = torch.nn.MaxPool2d(3, 2, 1)
    assert (model(images) - net(images)).abs().max() > 1e-3


def test_reader_keeps_names_and_shapes(tmp_path):
    blobs = {'a/b': [torch.arange(6.0).reshape(1, 2, 3, 1), torch.tensor([0.5])], 'c': [torch.zeros(2, 2)]}
    read = caffe.read(write(tmp_path / 'x.caffemodel', blobs))
    assert {k: v.shape for k, v in read.items()} == {'a/b.0': (1, 2, 3, 1), 'a/b.1': (1,), 'c.0': (2, 2)}
    assert torch.equal(read['a/b.0'], blobs['a/b'][0])
    assert read['a/b.1'].item() == 0.5


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        (b'\xff\xff\xff', 'not a .caffemodel, or a damaged one'),
        (b'', 'holds no layer with weights'),
        (field(1, 'only a name'), 'holds no layer with weights'),
        (field(100, field(1, 'fc') + field(7, field(5, b'\0' * 12) + field(7, field(1, b'\x02\x02')))),
         r"layer 'fc' has a blob of 12 bytes for torch\.float32 of shape \(2, 2\)"),
    ],
    ids=['damaged', 'empty', 'no layers', 'wrong size'],
)  # fmt: skip
def test_bad_files(tmp_path, content, said):
    path = tmp_path / 'sknet.caffemodel'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf'sknet\.caffemodel: .*{said}'):
        load_third_party(path)


def test_missing_file_and_layer(net, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.caffemodel: no such checkpoint file'):
        load_third_party(tmp_path / 'none.caffemodel')
    weights = {name: blobs for name, blobs in net.weights.items() if name != 'conv3_2/3x3g4d2/bn'}
    path = write(tmp_path / 'sknet.caffemodel', weights)
    with pytest.raises(
        CheckpointError, match=r'sknet\.caffemodel: recognised as the authors.* is missing; .* and 1 more'
    ):
        load_third_party(path)


def test_without_protobuf(monkeypatch, tmp_path):
    (tmp_path / 'sknet.caffemodel').write_bytes(b'')
    monkeypatch.setitem(sys.modules, 'google.protobuf', None)
    monkeypatch.delitem(sys.modules, 'google.protobuf.message', raising=False)
    with pytest.raises(
        CheckpointError,
        match=r"sknet\.caffemodel: a \.caffemodel is read with protobuf: pip install '\.\[caffe\]' in a clone",
    ):
        load_third_party(tmp_path / 'sknet.caffemodel')
