"""What a user gets who installs the wheel and has no checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip('hatchling')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp('wheel')
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob('sk_plugins-*.whl')
    return path


@pytest.fixture(scope='module')
def site(wheel, tmp_path_factory):
    """A folder with the wheel's contents, to go first on the path of a process that runs outside the checkout."""
    folder = tmp_path_factory.mktemp('site')
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def run_outside(run_python, site, tmp_path):
    """``run_outside(code)``: its output, where this package is the wheel's."""

    def run(code):
        done = run_python('-c', f'import sys; sys.path.insert(0, {str(site)!r}); {code}', cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_wheel_holds_configs_tools_and_model_index(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ('configs', 'tools'):
        for path in (ROOT / folder).rglob('*'):
            if path.suffix in ('.py', '.sh', '.yml'):
                assert f'sk_plugins/.mim/{path.relative_to(ROOT)}' in names
    assert 'sk_plugins/.mim/model-index.yml' in names
    assert not [name for name in names if name.startswith('tests/')]


def test_timm_models_from_the_wheel(run_outside, site):
    code = 'import sk_plugins, timm; print(sk_plugins.__file__, *timm.list_models(module="timm_models"))'
    file, *names = run_outside(code).split()
    assert Path(file).is_relative_to(site)
    assert len(names) == 28
    assert {'sknet50', 'skresnext101_64x4d', 'skshufflenetv2_x1_0', 'sknet29_16x32d'} <= set(names)


@pytest.mark.slow
def test_model_index_from_the_wheel(run_outside):
    pytest.importorskip('mmpretrain')
    code = (
        'import sk_plugins.mmpretrain_models, mmpretrain; '
        'model = mmpretrain.get_model("sknet26_in1k"); print(sum(p.numel() for p in model.parameters()))'
    )
    assert run_outside(code).split()[-1] == '16746408'


def test_segmentation_config_from_the_wheel(run_outside, site):
    """Whose bases are mmsegmentation's files."""
    pytest.importorskip('mmseg')
    code = (
        'from mmengine.config import Config; from sk_plugins._resources import find_config; '
        'path = find_config("upernet_sknet50_4xb4-80k_ade20k-512x512"); cfg = Config.fromfile(path); '
        'print(path, cfg.model.type, cfg.model.backbone.type, cfg.train_cfg.max_iters)'
    )
    path, *built = run_outside(code).splitlines()[-1].split()
    assert Path(path).is_relative_to(site)
    assert built == ['EncoderDecoder', 'mmpretrain.SKNet', '80000']


@pytest.mark.slow
def test_training_from_the_wheel(run_outside, tmp_path):
    pytest.importorskip('mmpretrain')
    code = (
        'import runpy; sys.argv = ["sk_plugins", "train", "sknet_digits", "--cfg-options", "train_cfg.max_epochs=1", '
        '"train_dataloader.dataset.indices=128"]; runpy.run_module("sk_plugins", run_name="__main__")'
    )
    run_outside(code)
    assert (tmp_path / 'work_dirs' / 'sknet_digits' / 'epoch_1.pth').is_file()


def test_benchmark_from_the_wheel(run_outside, site):
    """Its parts lie in a package beside it."""
    code = (
        'import runpy; sys.argv = ["sk_plugins", "benchmark", "--set", "host", "--blank"]; '
        'runpy.run_module("sk_plugins", run_name="__main__"); print(sys.modules["_benchmark"].__file__)'
    )
    *report, file = run_outside(code).splitlines()
    assert report[0] == "# SKNet-50's cost on the host"
    assert Path(file).is_relative_to(site)
