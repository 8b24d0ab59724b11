"""Weights from a loopback Hub, with the real clients: what loads, and what each fault says and leaves behind."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from helpers.hub_server import FAULTS, Fault
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from huggingface_hub import constants
from safetensors.torch import save

from sk_plugins.weights import hub as sk_hub

REPO = 'me/tiny'
TINY = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), cardinality=8, base_width=16, num_classes=10)
PUBLISHED = 'timm/skresnext50_32x4d.ra_in1k'


def create_tiny(seed=0, **kwargs):
    return randomise(timm.create_model('sknet26', **{**TINY, **kwargs}), seed)


def weights(model):
    return {'model.safetensors': save(model.state_dict())}


def saved_for_hf(model, folder, **kwargs):
    timm.models.save_for_hf(model, folder, **kwargs)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_state(state_dict, model):
    wanted = model.state_dict()
    return state_dict.keys() == wanted.keys() and all(torch.equal(state_dict[key], wanted[key]) for key in wanted)


def pretrained_tiny(repo=REPO, **kwargs):
    overlay = dict(hf_hub_id=repo, num_classes=10)
    return timm.create_model('sknet26', pretrained=True, pretrained_cfg_overlay=overlay, **{**TINY, **kwargs})


def assert_cache_is_whole(cache: Path):
    """Every blob is the file that the server's ETag names; only parts of downloads may lie beside them."""
    blobs = [path for path in cache.glob('models--*/blobs/*') if path.suffix != '.incomplete']
    for blob in blobs:
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    for pointer in cache.glob('models--*/snapshots/*/*'):
        assert pointer.exists(), f'{pointer} points nowhere'
    return blobs


LOADERS = {
    'load_state_dict': lambda repo=REPO: sk_hub.load_state_dict(repo),
    'timm': lambda repo=REPO: pretrained_tiny(repo).state_dict(),
}


@pytest.fixture(params=LOADERS)
def load(request):
    return LOADERS[request.param]


@pytest.fixture(scope='module')
def tiny():
    return create_tiny()


@pytest.fixture(scope='module')
def skresnext50():
    return randomise(timm.create_model('skresnext50_32x4d'))


@pytest.fixture(scope='module')
def published(skresnext50):
    return weights(skresnext50)


@pytest.mark.parametrize(
    ('repo', 'parts'),
    [
        ('me/tiny', ('me/tiny', None)),
        ('me/tiny@v1', ('me/tiny', 'v1')),
        ('timm/skresnext50_32x4d.ra_in1k@refs/pr/1', (PUBLISHED, 'refs/pr/1')),
    ],
)
def test_split_revision(repo, parts):
    assert sk_hub.split_revision(repo) == parts


@pytest.mark.parametrize('repo', ['', 'tiny', '/tiny', 'me/', 'me/tiny/x', 'me/tiny@', 'me/tiny@v1@v2', '@v1'])
def test_split_revision_refuses(repo):
    with pytest.raises(ValueError, match='OWNER/NAME') as error:
        sk_hub.split_revision(repo)
    assert repr(repo) in str(error.value)


class TestLoading:
    def test_load_state_dict(self, hub, tiny, tmp_path):
        old, branch = create_tiny(seed=1), create_tiny(seed=2)
        commit = hub.add(REPO, weights(old), 'v1')
        hub.add(REPO, weights(branch), 'refs/pr/1')
        hub.add(REPO, weights(tiny))
        assert same_state(sk_hub.load_state_dict(REPO), tiny)
        assert same_state(sk_hub.load_state_dict(f'{REPO}@main'), tiny)
        assert same_state(sk_hub.load_state_dict(f'{REPO}@v1'), old)
        assert same_state(sk_hub.load_state_dict(f'{REPO}@{commit}'), old)
        assert same_state(sk_hub.load_state_dict(f'{REPO}@refs/pr/1'), branch)
        assert [request.method for request in hub.requests].count('GET') == 3
        assert len(assert_cache_is_whole(hub.cache)) == 3

        elsewhere = tmp_path / 'elsewhere'
        assert same_state(sk_hub.load_state_dict(REPO, cache_dir=elsewhere), tiny)
        assert len(assert_cache_is_whole(elsewhere)) == 1

    @pytest.mark.parametrize('name', ['sknet50', 'sknet50.ra_in1k'])
    def test_pretrained_is_timms(self, hub, skresnext50, published, name):
        hub.add(PUBLISHED, published)
        model = timm.create_model(name, pretrained=True).eval()
        assert same_state(model.state_dict(), skresnext50)
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert_close(model(x), skresnext50(x), length=skresnext50)

    @pytest.mark.parametrize('kwargs', [dict(num_classes=10), dict(in_chans=1), dict(features_only=True)], ids=str)
    def test_pretrained_adapts_as_timms(self, hub, published, kwargs):
        hub.add(PUBLISHED, published)
        ours = timm.create_model('sknet50', pretrained=True, **kwargs).eval()
        timms = timm.create_model('skresnext50_32x4d', pretrained=True, **kwargs).eval()
        x = torch.randn(2, kwargs.get('in_chans', 3), 64, 64)
        with torch.no_grad():
            if 'num_classes' in kwargs:  # whose new classifier is random
                assert ours(x).shape == (2, 10)
                outputs, expected = ours.forward_features(x), timms.forward_features(x)
            else:
                outputs, expected = ours(x), timms(x)
        assert_close(outputs, expected, length=ours)

    @pytest.mark.parametrize('safe', [True, False, 'both'], ids=['safetensors', 'pickle', 'both'])
    def test_saved_for_hf(self, hub, tmp_path, tiny, safe):
        old = create_tiny(seed=1)
        hub.add('me/mine', saved_for_hf(old, tmp_path / 'old', safe_serialization=safe), 'v1')
        hub.add('me/mine', saved_for_hf(tiny, tmp_path / 'new', safe_serialization=safe))
        assert same_state(timm.create_model('hf-hub:me/mine', pretrained=True).state_dict(), tiny)
        assert same_state(timm.create_model('hf-hub:me/mine@v1', pretrained=True).state_dict(), old)
        kinds = {'safetensors' if safe else 'bin', 'json'}
        assert {request.path.rpartition('.')[2] for request in hub.requests if request.method == 'GET'} == kinds

    @pytest.mark.slow
    def test_as_a_user(self, hub, skresnext50, published):
        """In a process of its own, by environment alone."""
        hub.add(PUBLISHED, published)
        script = (
            'import torch, timm, sk_plugins\n'
            "model = timm.create_model('sknet50', pretrained=True).eval()\n"
            'print(*model(torch.ones(1, 3, 64, 64))[0, :5].tolist())\n'
        )
        path = os.pathsep.join([str(Path(sk_hub.__file__).parents[2]), os.environ.get('PYTHONPATH', '')])
        done = subprocess.run(
            [sys.executable, '-c', script],
            env={**os.environ, 'PYTHONPATH': path},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        with torch.no_grad():
            expected = skresnext50(torch.ones(1, 3, 64, 64))[0, :5]
        outputs = torch.tensor([float(value) for value in done.stdout.split()])
        assert_close(outputs, expected, length=skresnext50)
        assert len(assert_cache_is_whole(hub.cache)) == 1

    def test_from_the_cache_when_the_hub_is_gone(self, hub, tiny, load):
        hub.add(REPO, weights(tiny))
        load()
        hub.stop()
        assert same_state(load(), tiny)
        hub.start()
        hub.faults['*'] = FAULTS['down']
        assert same_state(load(), tiny)

    def test_published_pickle_is_not_read(self, hub, tmp_path, tiny):
        hub.add(PUBLISHED, saved_for_hf(tiny, tmp_path / 'pickle'))
        for load in (sk_hub.load_state_dict, lambda repo: timm.create_model('sknet50', pretrained=True)):
            with pytest.raises(sk_hub.HubError, match=r'the repository has no model\.safetensors'):
                load(PUBLISHED)
        assert not any('.bin' in request.path for request in hub.requests)


# What an error says, besides the repository's name.
CAUSES = {
    'missing': 'repository not found, or private .*HTTP 404: Repository not found',
    'unauthorized': 'repository not found, or private .*HTTP 401: Invalid username or password',
    'bad-token': 'HTTP 401: Invalid credentials',
    'gated': 'access to this repository must be asked for',
    'busy': 'HTTP 429: Too many requests',
    'disabled': 'HTTP 403: Access to this resource is disabled',
    'down': 'HTTP 500: Internal Error',
    'download-down': 'the download failed: HTTP 500',
    'truncated': r'the download failed: .*(peer closed connection|IncompleteRead|Connection broken)',
    'short': 'the download failed: .*should be of size',
    'flipped': "model.safetensors is not the Hub's: its SHA-256 differs; it was removed from the cache",
    'garbage': 'model.safetensors is not a safetensors file .*header.*removed from the cache',
}


def fails(load, repo, cause):
    with pytest.raises(sk_hub.HubError, match=cause) as error:
        load(repo)
    message = str(error.value)
    assert message.startswith(f'{repo}: ')
    assert '\n' not in message
    assert len(message) < 600
    return message


class TestFaults:
    @pytest.mark.parametrize('fault', CAUSES)
    def test_fault(self, hub, tiny, load, fault):
        hub.add(REPO, weights(tiny))
        hub.faults[REPO] = FAULTS[fault]
        fails(load, REPO, CAUSES[fault])
        assert assert_cache_is_whole(hub.cache) == []

        del hub.faults[REPO]
        assert same_state(load(), tiny)
        assert [blob.read_bytes() for blob in assert_cache_is_whole(hub.cache)] == [*weights(tiny).values()]

    def test_refused(self, hub, tiny, load):
        hub.add(REPO, weights(tiny))
        hub.stop()
        fails(load, REPO, 'not in the local cache and the Hub did not give it .*[Cc]onnection refused.*HF_ENDPOINT')
        hub.start()
        assert same_state(load(), tiny)

    @pytest.mark.skipif(huggingface_hub.__version__.startswith('0.'), reason='clients that read HF_HUB_OFFLINE once')
    def test_offline(self, hub, tiny, load, monkeypatch):
        hub.add(REPO, weights(tiny))
        with monkeypatch.context() as patch:
            patch.setattr(constants, 'HF_HUB_OFFLINE', True)
            said = fails(load, REPO, 'model.safetensors is not in the local cache .*offline mode is enabled')
            assert str(hub.cache) in said
            for advice in ('load it once without HF_HUB_OFFLINE', 'copy the cache', 'name a local file'):
                assert advice in said
        assert hub.requests == []
        assert same_state(load(), tiny)

        hub.requests.clear()
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        assert same_state(load(), tiny)
        assert hub.requests == []

    def test_wrong_endpoint(self, hub, load, monkeypatch):
        for prefix, cause in (
            ('localhost', 'the download failed: .*(protocol|scheme)'),
            (f'{hub.url}/x', 'X-Repo-Commit|404'),
        ):
            template = prefix + '/{repo_id}/resolve/{revision}/{filename}'
            monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
            monkeypatch.setattr(huggingface_hub.file_download, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False)
            fails(load, REPO, cause)

    def test_unknown_revision(self, hub, tiny, load):
        hub.add(REPO, weights(tiny))
        fails(load, f'{REPO}@v2', 'no such revision')
        fails(load, f'{REPO}@{"0" * 40}', 'no such revision')
        hub.add(REPO, weights(tiny), 'v2')
        assert same_state(load(f'{REPO}@v2'), tiny)

    def test_no_weights(self, hub, tiny, load):
        hub.add(REPO, {'README.md': b'# soon'})
        fails(load, REPO, 'the repository has no model.safetensors')
        hub.add(REPO, weights(tiny))
        assert same_state(load(), tiny)

    def test_invalid_name(self, hub, load):
        fails(load, 'me/-tiny-', 'not a valid repository name')
        assert hub.requests == []

    def test_break_within_a_download_is_resumed(self, hub, tiny, load, monkeypatch):
        # The client keeps whole chunks of a broken download only.
        monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 2**16)
        hub.add(REPO, weights(tiny))
        hub.faults[REPO] = Fault(cut=0.5, once=True)
        try:
            state_dict = load()
        except sk_hub.HubError:  # clients that leave the second try to the user
            state_dict = load()
        assert same_state(state_dict, tiny)
        assert [blob.read_bytes() for blob in assert_cache_is_whole(hub.cache)] == [*weights(tiny).values()]
        assert [request.range for request in hub.requests if request.method == 'GET'][-1].startswith('bytes=')

    # With 7 classes timm drops the classifier, and loads the rest loosely.
    @pytest.mark.parametrize('num_classes', [10, 7])
    @pytest.mark.parametrize(
        ('saved', 'built', 'cause'),
        [
            (dict(layers=(1, 2, 1, 1)), {}, r'layer2.1.conv1.*not part of it; .* and \d+ more$'),
            ({}, dict(layers=(1, 1, 1, 2)), r'layer4.1.conv1.* is missing; .* and \d+ more$'),
            (dict(channels=(16, 32, 64, 96)), {}, r'layer4.0.conv1.*\(192, .*not \(256, 256, 1, 1\); '),
        ],
        ids=['unexpected', 'missing', 'narrower'],
    )
    def test_wrong_shapes(self, hub, saved, built, cause, num_classes):
        def load(repo=REPO):
            return pretrained_tiny(repo, **{**built, 'num_classes': num_classes})

        hub.add(REPO, weights(create_tiny(**saved)))
        message = fails(load, REPO, f'^{REPO}: the weights do not fit this network: .*{cause}')
        assert 'removed' not in message
        assert len(assert_cache_is_whole(hub.cache)) == 1
        hub.add(REPO, weights(create_tiny(**built)))
        assert load().fc.weight.shape[0] == num_classes

    def test_wrong_classifier(self, hub):
        hub.add(REPO, weights(create_tiny(num_classes=7)))
        fails(pretrained_tiny, REPO, r'size mismatch for fc.weight: .*\[7, 512\].*\[10, 512\]')

    @pytest.mark.parametrize('name', ['tiny.safetensors', 'tiny.bin'])
    def test_damaged_file_of_another_name_in_another_cache(self, hub, tmp_path, tiny, name):
        def load(repo=REPO):
            overlay = dict(hf_hub_id=repo, hf_hub_filename=name, num_classes=10)
            return timm.create_model(
                'sknet26', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'elsewhere', **TINY
            )

        files = saved_for_hf(tiny, tmp_path / 'saved', safe_serialization='both')
        hub.add(REPO, {name: files['model.safetensors' if name.endswith('safetensors') else 'pytorch_model.bin']})
        hub.faults[REPO] = FAULTS['garbage']
        fails(load, REPO, f'{name} is not a .*removed from the cache')
        assert assert_cache_is_whole(tmp_path / 'elsewhere') == []
        hub.faults.clear()
        assert same_state(load().state_dict(), tiny)
        assert len(assert_cache_is_whole(tmp_path / 'elsewhere')) == 1
        assert not hub.cache.exists()


class TestSavedForHf:
    """`hf-hub:`, of which timm itself reads config.json before any of our code runs."""

    @staticmethod
    def load(repo='me/mine'):
        return timm.create_model(f'hf-hub:{repo}', pretrained=True).state_dict()

    @pytest.mark.parametrize('fault', ['short', 'garbage', 'download-down'])
    @pytest.mark.parametrize('safe', [True, False], ids=['safetensors', 'pickle'])
    def test_damaged_weights(self, hub, tmp_path, tiny, fault, safe):
        files = saved_for_hf(tiny, tmp_path / 'saved', safe_serialization=safe)
        name = next(name for name in files if name != 'config.json')
        hub.add('me/mine', files)
        hub.faults[f'me/mine/{name}'] = FAULTS[fault]
        cause = f'{name} is not a .*removed from the cache' if fault == 'garbage' else 'the download failed'
        fails(self.load, 'me/mine', cause)
        assert len(assert_cache_is_whole(hub.cache)) == 1  # config.json
        hub.faults.clear()
        assert same_state(self.load(), tiny)

    @pytest.mark.parametrize('safe', [True, False], ids=['safetensors', 'pickle'])
    def test_truncated_in_the_cache(self, hub, tmp_path, tiny, safe):
        """As a full disk or a client of old leaves it: torch says so in other words than of garbage."""
        hub.add('me/mine', saved_for_hf(tiny, tmp_path / 'saved', safe_serialization=safe))
        self.load()
        blob = max(assert_cache_is_whole(hub.cache), key=lambda path: path.stat().st_size)
        for damaged in (blob.read_bytes()[:-1000], b''):
            blob.write_bytes(damaged)
            fails(self.load, 'me/mine', 'is not a (safetensors file|pickle of tensors) .*removed from the cache')
            assert same_state(self.load(), tiny)

    @pytest.mark.parametrize('fault', ['missing', 'unauthorized', 'gated'])
    def test_config_that_cannot_be_had(self, hub, fault):
        hub.faults['*'] = FAULTS[fault]
        with pytest.raises(OSError, match=f'{hub.url}/me/nope/resolve/main/config.json'):
            self.load('me/nope')

    def test_unknown_revision(self, hub, tmp_path, tiny):
        hub.add('me/mine', saved_for_hf(tiny, tmp_path / 'saved'))
        with pytest.raises(OSError, match=f'{hub.url}/me/mine/resolve/v2/config.json'):
            self.load('me/mine@v2')

    def test_refused(self, hub):
        hub.stop()
        # The client's own words, which name no repository: timm asks it before it knows that the model is ours.
        with pytest.raises(OSError, match='cannot find the requested files in the local cache'):
            self.load('me/nope')


# Processes


def in_a_process(load, *args):
    """``load(*args)`` in a child of this process, which has imported all already; its result is in the queue."""
    context = multiprocessing.get_context('fork')
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(load(*args)))
    process.start()
    return process, queue


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='no fork here')
class TestProcesses:
    @staticmethod
    def digest(repo=REPO):
        torch.set_num_threads(1)
        return hashlib.sha256(save(dict(sorted(sk_hub.load_state_dict(repo).items())))).hexdigest()

    def test_two_at_once(self, hub, tiny):
        """Both ask for the file before either has it: it is downloaded once, and both have all of it."""
        hub.add(REPO, weights(tiny))
        hub.faults[REPO] = Fault(pause=1)
        started = [in_a_process(self.digest) for _ in range(2)]
        expected = hashlib.sha256(save(dict(sorted(tiny.state_dict().items())))).hexdigest()
        for process, queue in started:
            process.join(60)
            assert process.exitcode == 0
            assert queue.get() == expected
        assert [request.method for request in hub.requests].count('HEAD') == 2
        assert [request.method for request in hub.requests].count('GET') == 1
        assert len(assert_cache_is_whole(hub.cache)) == 1

    def test_killed_within_a_download(self, hub, tiny):
        hub.add(REPO, weights(tiny))
        hub.faults[REPO] = Fault(pause=30)
        process, _ = in_a_process(self.digest)
        deadline = time.monotonic() + 30
        while not list(hub.cache.glob('models--*/blobs/*.incomplete')) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        process.kill()
        process.join()
        assert assert_cache_is_whole(hub.cache) == []
        hub.faults.clear()
        assert same_state(sk_hub.load_state_dict(REPO), tiny)
        assert [blob.read_bytes() for blob in assert_cache_is_whole(hub.cache)] == [*weights(tiny).values()]

    @pytest.mark.slow
    def test_offline_by_the_environment(self, hub, skresnext50, published):
        """HF_HUB_OFFLINE=1, as users set it: timm's and OpenMMLab's door open on a filled cache, or say what to do."""
        pytest.importorskip('mmpretrain')
        hub.add(PUBLISHED, published)
        sk_hub.load_state_dict(PUBLISHED)
        hub.requests.clear()
        script = (
            'import timm, sk_plugins.mmpretrain_models as m\n'
            'def at_timms(repo):\n'
            "    return timm.create_model('sknet50', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=repo))\n"
            'def at_openmmlabs(repo):\n'
            "    net = m.SKNet(50, init_cfg=dict(type='Pretrained', checkpoint=f'hf-hub:{repo}'))\n"
            '    net.init_weights()\n'
            '    return net\n'
            f"for repo in ({PUBLISHED!r}, 'me/other'):\n"
            '    for load in (at_timms, at_openmmlabs):\n'
            '        try:\n'
            "            print('loaded', load(repo).layer4[0].conv1.conv.weight.double().sum().item())\n"
            '        except Exception as error:\n'
            '            print(type(error).__name__, error)\n'
        )
        path = os.pathsep.join([str(Path(sk_hub.__file__).parents[2]), os.environ.get('PYTHONPATH', '')])
        env = {**os.environ, 'PYTHONPATH': path, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
        done = subprocess.run([sys.executable, '-c', script], env=env, capture_output=True, text=True, timeout=120)
        said = [line for line in done.stdout.splitlines() if line.startswith(('loaded', 'HubError'))]
        assert len(said) == 4, done.stdout + done.stderr
        expected = skresnext50.layer4[0].conv1.conv.weight.double().sum().item()
        for line in said[:2]:
            assert float(line.removeprefix('loaded ')) == expected
        for line in said[2:]:
            assert line.startswith('HubError me/other: model.safetensors is not in the local cache')
            assert 'load it once without HF_HUB_OFFLINE' in line
        assert hub.requests == []
