import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from sk_plugins import timm_models, zoo
from sk_plugins.networks import SKResNet


def test_zoo_and_timm_name_the_same_models():
    assert set(timm_models.__all__) == set(zoo.MODELS)
    assert len(timm_models.__all__) == len(zoo.MODELS)
    for name in zoo.MODELS:
        assert timm.is_model(name)
        assert timm.model_entrypoint(name).__module__ == 'sk_plugins.timm_models'
        assert timm.model_entrypoint(name) is getattr(timm_models, name)


@pytest.mark.parametrize('spec', zoo.MODELS.values(), ids=zoo.MODELS.keys())
def test_row(spec):
    assert zoo.MODELS[spec.name] is spec
    assert spec.name == f'sknet{spec.depth}'
    # A unit has three convolutions one after the other; the stem and the classifier make two more layers.
    assert spec.depth == 3 * sum(spec.args['layers']) + 2
    for weights in spec.weights:
        assert weights.hf_hub_id.count('/') == 1
        assert '.' not in weights.tag
        assert 0 < weights.top1 < 100


@pytest.mark.parametrize('spec', zoo.MODELS.values(), ids=zoo.MODELS.keys())
def test_registered_model_is_the_row(spec):
    model = timm.create_model(spec.name, device='meta')
    assert isinstance(model, SKResNet)
    expected = SKResNet(**spec.args, device='meta')
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}


# The error figures need ImageNet; what can be counted is, and none of the paper's own deviates by more than 1 %.
@pytest.mark.parametrize('spec', [spec for spec in zoo.MODELS.values() if spec.paper], ids=lambda spec: spec.name)
def test_papers_figures(spec):
    model = timm.create_model(spec.name, device='meta').eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert spec.paper.parameters_m == pytest.approx(parameters / 1e6, rel=0.01)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device='meta'))
    assert spec.paper.gflops == pytest.approx(counter.get_total_flops() / 2e9, rel=0.01)
    assert spec.paper.top1_error_320 < spec.paper.top1_error_224


def test_which_rows_have_figures_and_weights():
    assert {name for name, spec in zoo.MODELS.items() if spec.paper} >= {'sknet50', 'sknet101'}
    # The paper has no SKNet-26.
    assert zoo.MODELS['sknet26'].paper is None
    assert zoo.with_weights() == ['sknet50.ra_in1k']
    assert zoo.with_weights() == timm.list_pretrained('sknet*')
    assert zoo.MODELS['sknet50'].weights[0].hf_hub_id == 'timm/skresnext50_32x4d.ra_in1k'
