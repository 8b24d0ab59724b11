"""SimCLRv2's weights: lightly-ai's names, TensorFlow's variables, and files of both."""

import builtins

import pytest
import torch
from helpers.simclr import ARGS, LAYERS, Reader, Variables, as_file, make_image, make_lightly, restate

from sk_plugins.networks import SKResNetSimCLR
from sk_plugins.weights import CheckpointError, load_checkpoint, load_third_party, recognise_third_party, tensorflow
from sk_plugins.weights.convert import ThirdPartyWeights
from sk_plugins.weights.simclr import count_projection, from_lightly, from_tensorflow, is_lightly, to_lightly, to_own


def assert_identical(one, other):
    assert one.keys() == other.keys()
    for name in other:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


@pytest.fixture
def whole():
    """Weights with a contrastive head of three layers, the last without a ReLU."""
    _, weights = make_lightly(projection=2)
    width = len(weights['head.layers.4.weight'])
    weights['head.layers.6.weight'] = torch.randn(5, width, dtype=torch.float64)
    norm = {name: t[:5] if t.ndim else t for name, t in weights.items() if name.startswith('head.layers.4.')}
    weights |= {name.replace('layers.4', 'layers.7'): tensor.clone() for name, tensor in norm.items()}
    weights['head.layers.7.bias'] = torch.zeros(5, dtype=torch.float64)
    return weights


LIGHTLYS = {
    'net.0.0.weight': 'conv1.0.weight',
    'net.0.5.0.running_var': 'bn1.running_var',
    'net.3.blocks.1.net.1.0.bias': 'layer3.1.conv1.bn.bias',
    'net.1.blocks.0.projection.shortcut.2.weight': 'layer1.0.downsample.1.weight',
    'net.1.blocks.0.projection.bn.0.weight': 'layer1.0.downsample.2.weight',
    'net.1.blocks.0.net.2.mixing_conv.0.weight': 'layer1.0.conv2.attn.fc_reduce.weight',
    'net.1.blocks.0.net.2.mixing_conv.1.0.running_mean': 'layer1.0.conv2.attn.bn.running_mean',
    'net.1.blocks.0.net.2.mixing_conv.2.weight': 'layer1.0.conv2.attn.fc_select.weight',
    'net.1.blocks.0.net.3.weight': 'layer1.0.conv3.conv.weight',
    'net.1.blocks.0.net.4.0.weight': 'layer1.0.conv3.bn.weight',
    'fc.bias': 'fc.bias',
    'head.layers.0.weight': 'projection.0.weight',
    'head.layers.7.running_var': 'projection.7.running_var',
}


class TestLightly:
    def test_names(self, whole):
        ours = from_lightly(whole)
        assert is_lightly(whole)
        assert not is_lightly(ours)
        for theirs, name in LIGHTLYS.items():
            assert ours[name] is whole[theirs], theirs
        both = whole['net.2.blocks.0.net.2.main_conv.0.weight']
        branches = [ours[f'layer2.0.conv2.paths.{m}.conv.weight'] for m in (0, 1)]
        assert torch.equal(torch.cat(branches), both)
        assert branches[1].untyped_storage().data_ptr() == both.untyped_storage().data_ptr(), 'they are copies'

    def test_round_trips(self, whole):
        assert_identical(to_lightly(from_lightly(whole)), whole)
        ours = from_lightly(whole)
        assert_identical(from_lightly(to_lightly(ours)), ours)

    @pytest.mark.parametrize('projection', [0, 1, 2])
    def test_of_a_network(self, whole, projection):
        ours = from_lightly(whole, projection)
        wanted = SKResNetSimCLR(**ARGS, projection=projection).state_dict()
        if projection:  # the classifier was trained on other features
            wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith('fc.')}
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in wanted.items()}

    def test_own_names_stay(self, whole):
        ours = from_lightly(whole, 0)
        assert_identical(to_own(whole), ours)
        assert_identical(to_own(ours), ours)

    @pytest.mark.parametrize('name', ['net.1.blocks.0.net.5.weight', 'net.5.weight', 'layer1.0.conv1.conv.weight'])
    def test_other_names(self, whole, name):
        with pytest.raises(ValueError, match=rf"^{name} is not part of lightly-ai's SimCLRv2$"):
            from_lightly({**whole, name: torch.zeros(1)})

    def test_file(self, tmp_path, whole):
        torch.save(as_file(whole), tmp_path / 'r50_1x_sk1.pth')
        weights, meta = load_checkpoint(tmp_path / 'r50_1x_sk1.pth')
        assert_identical(weights, {k: v.float() if v.is_floating_point() else v for k, v in whole.items()})
        assert meta == {}

    @torch.no_grad()
    def test_load_third_party(self, tmp_path, whole):
        torch.save(as_file(whole), tmp_path / 'r50_1x_sk1.pth')
        found = recognise_third_party(tmp_path / 'r50_1x_sk1.pth')
        assert found.origin == "lightly-ai's SimCLRv2"
        assert found.arguments == dict(ARGS, stem_width=6, width_factor=1)
        x = make_image(64, 64)
        expected = restate(whole, x)
        # The file is in float32.
        assert (found.build().double()(x) - expected).abs().max() < 1e-5 * expected.abs().max()
        fine = load_third_party(tmp_path / 'r50_1x_sk1.pth', projection=1)
        assert list(fine.projection.state_dict()) == [
            '0.weight', '1.weight', '1.bias', '1.running_mean', '1.running_var', '1.num_batches_tracked'
        ]  # fmt: skip
        assert torch.equal(fine.projection[0].weight, whole['head.layers.0.weight'].float())
        assert fine(x.float()).shape == (2, fine.num_features), 'features: the file has no classifier for them'

    def test_incomplete(self, whole):
        del whole['net.2.blocks.0.net.3.weight']
        with pytest.raises(CheckpointError, match=r"lightly-ai's SimCLRv2: not the weights of a whole network"):
            load_third_party(whole)

    def test_incomplete_unit(self, whole):
        del whole['net.3.blocks.0.net.4.0.bias']
        with pytest.raises(CheckpointError, match=r'layer3\.0\.conv3\.bn\.bias is missing'):
            load_third_party(whole)

    @pytest.mark.parametrize(('depth', 'units'), [(50, (3, 4, 6, 3)), (152, (3, 8, 36, 3))])
    def test_registered_names(self, depth, units):
        model = SKResNetSimCLR(units, 2, device='meta')
        found = recognise_third_party(to_lightly({k: torch.empty(v.shape) for k, v in model.state_dict().items()}))
        assert found.timm_model() == (f'skresnet{depth}x2_simclr', dict(num_classes=1000))
        assert found.openmmlab_backbone() == dict(type='SKResNetSimCLR', depth=depth, width_factor=2)

    def test_no_backbone_has_the_contrastive_head(self):
        arguments = dict(layers=(3, 4, 6, 3), width_factor=1, num_classes=1000)
        found = ThirdPartyWeights("Google's SimCLRv2", SKResNetSimCLR, {**arguments, 'projection': 1}, {})
        assert found.timm_model() == ('skresnet50x1_simclr', dict(projection=1, num_classes=1000))
        with pytest.raises(ValueError, match=r"which no backbone .* has; timm's skresnet50x1_simclr .* projection=1"):
            found.openmmlab_backbone()


class TestTensorFlow:
    def test_variables(self, whole):
        variables = Variables(whole)
        assert 'base_model/conv2d_8/kernel' in variables
        kernels = [name for name in variables if name.startswith('base_model') and name.endswith('kernel')]
        assert len(kernels) == 3 + 4 + 5 * sum(LAYERS), 'the stem, shortcuts, and units'
        ours, expected = from_tensorflow(variables), from_lightly(whole)
        assert_identical(ours, {k: torch.tensor(0) if k.endswith('tracked') else v for k, v in expected.items()})
        assert all(tensor.is_contiguous() for tensor in ours.values())

    def test_norm_without_a_shift(self, whole):
        """The contrastive head's last layer."""
        variables = Variables(whole)
        del variables['head_contrastive/nl_2/batch_normalization/beta']
        assert_identical(from_tensorflow(variables), from_tensorflow(Variables(whole)))

    @pytest.mark.parametrize(
        ('trained', 'layers'),
        [
            (None, None),
            (('base_model', 'head_contrastive'), 0),  # pretrained
            (('base_model', 'head_contrastive', 'head_supervised'), 0),
            (('head_supervised',), 0),  # linear evaluation
            (('base_model', 'head_supervised'), None),  # fine-tuned
        ],
        ids=str,
    )
    @torch.no_grad()
    def test_classifiers_place(self, whole, trained, layers):
        variables = Variables(whole, trained=trained)
        assert count_projection(variables) == layers
        found = recognise_third_party(variables)
        assert found.origin == "Google's SimCLRv2"
        assert 'projection' not in found.arguments
        assert any('taken as on the features' in note for note in found.notes) == (layers is None)
        x = make_image(65, 64)
        expected = restate(whole, x)
        assert (found.build()(x) - expected).abs().max() <= 1e-12 * expected.abs().max()

    @torch.no_grad()
    def test_classifiers_place_by_hand(self, whole):
        model = load_third_party(Variables(whole), projection=2)
        x = make_image(65, 64)
        expected = restate(whole, x, projection=2)
        assert (model(x) - expected).abs().max() <= 1e-12 * expected.abs().max()

    @pytest.mark.parametrize(
        ('folder', 'layers'),
        [('finetuned_1pct', 1), ('finetuned_10pct', 1), ('finetuned_100pct', 0), ('pretrained', 0)],
    )
    def test_classifiers_place_by_googles_folders(self, tmp_path, monkeypatch, whole, folder, layers):
        path = tmp_path / folder / 'r50_1x_sk1'
        path.mkdir(parents=True)
        (path / 'model.ckpt-7.index').touch()
        monkeypatch.setattr(tensorflow, 'read', lambda path: dict(Variables(whole)))
        assert load_third_party(path / 'model.ckpt-7').projection_layers == layers
        assert load_third_party(path / 'model.ckpt-7', projection=2).projection_layers == 2

    def test_without_a_contrastive_head(self):
        """Google's supervised networks."""
        _, weights = make_lightly()
        assert count_projection(Variables(weights, trained='base_model')) == 0

    def test_reader(self, tmp_path, whole):
        variables = Variables(whole, trained='base_model')
        opened = []
        found = tensorflow.read(tmp_path / 'model.ckpt-7', load=lambda path: opened.append(path) or Reader(variables))
        assert opened == [str(tmp_path / 'model.ckpt-7')]
        assert found.keys() == variables.keys()
        for name, tensor in found.items():
            assert tensor.is_meta if name.endswith('/Momentum') else torch.equal(tensor, variables[name]), name

    @pytest.mark.parametrize(
        ('name', 'said'),
        [
            ('base_model/conv2d_5/kernel', r'base_model/conv2d_5 is missing'),
            ('base_model/batch_normalization_3/gamma', r'base_model/batch_normalization_3 is missing'),
            ('base_model/batch_normalization_3/moving_mean', r'batch_normalization_3.*running_mean is missing'),
        ],
    )
    def test_missing(self, whole, name, said):
        variables = Variables(whole)
        del variables[name]
        with pytest.raises(CheckpointError, match=said):
            load_third_party(variables)

    def test_without_selective_kernels(self, whole):
        """Google's ``sk0`` networks."""
        variables = Variables(whole)
        variables['base_model/conv2d_5/kernel'] = variables['base_model/conv2d_5/kernel'][:1, :1]
        with pytest.raises(CheckpointError, match='begins no unit with an SK convolution'):
            load_third_party(variables)

    @pytest.mark.parametrize('name', ['model.ckpt-7', '.'])
    def test_not_installed(self, tmp_path, monkeypatch, name):
        (tmp_path / 'model.ckpt-7.index').touch()
        (tmp_path / 'checkpoint').touch()
        own_import = builtins.__import__

        def no_tensorflow(module, *args, **kwargs):
            if module == 'tensorflow':
                raise ImportError
            return own_import(module, *args, **kwargs)

        monkeypatch.setattr(builtins, '__import__', no_tensorflow)
        with pytest.raises(CheckpointError, match=r'a TensorFlow checkpoint is read with tensorflow: .*\[tf\]'):
            load_third_party(tmp_path / name)

    def test_unreadable(self, tmp_path):
        def load(path):
            raise RuntimeError('not an sstable')

        with pytest.raises(ValueError, match=r'model\.ckpt-7: cannot be read .*: not an sstable'):
            tensorflow.read(tmp_path / 'model.ckpt-7', load)
