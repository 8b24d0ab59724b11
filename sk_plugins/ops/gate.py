"""The one gate: which modules an engine may compute in one go, and by which engine.

A :class:`Fusable` module says in ``forward`` what it computes, and in ``fuse_forward`` the same by an engine. The gate
is asked when the module is called, once for a whole unit. It says yes only where every module inside is of a known
class and has no hooks, and no tracer, mode or transform is active. Elsewhere ``forward`` runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, product, starmap
from operator import attrgetter, contains, is_, itemgetter
from types import ModuleType
from weakref import ref

import torch
from torch import Tensor, nn

from . import cpu, gpu, operators, private, trial

__all__ = ['BACKENDS', 'Fusable', 'has_hooks', 'has_parts', 'register', 'stubbed_launches', 'ways']

BACKENDS = ('auto', 'plain', 'recompute', 'triton')

# These read a module's __dict__ and run in C: what is asked at every call must cost no Python calls.
_HOOKS = itemgetter(*private.HOOKS)
_CHILDREN, _PARAMETERS, _BUFFERS = itemgetter('_modules'), itemgetter('_parameters'), itemgetter('_buffers')
_TRAINING, _BACKEND, _PADDING = itemgetter('training'), itemgetter('backend'), itemgetter('padding_mode')
_DIM = itemgetter('dim')
_NORM = itemgetter('training', 'momentum', 'eps', 'track_running_stats', 'affine')
_CALLS = attrgetter('forward', '__call__')
_HELD = {
    nn.Conv2d: {'weight', 'bias'},
    nn.BatchNorm2d: {'weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'},
}
_TENSORS = {nn.Parameter, Tensor, type(None)}
_known = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Identity, nn.Softmax, nn.Sequential, nn.AvgPool2d]
_known += [nn.MaxPool2d, nn.ModuleList]
# A class that somebody patched before this was imported stays unknown.
_known = [cls for cls in _known if private.is_torchs_own(cls.forward, cls.__module__)]
_known_calls = list(map(_CALLS, _known))
_originals: dict[tuple[type, str], object] = {}  # by class and name, of Fusable's ``methods``
_stubbed = False


def register(cls: type) -> type:
    """Let modules of this class stand in what an engine computes, as long as its methods are what they are now."""
    _known.append(cls)
    _known_calls.append(_CALLS(cls))
    for name in getattr(cls, 'methods', ()):
        _originals[cls, name] = getattr(cls, name)
    return cls


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody's code runs when this module is called: hooks, a replaced method, or a compiled ``forward``."""
    return any(getattr(module, name, None) for name in private.HOOKS) or any(
        name in module.__dict__ for name in private.REPLACEMENTS
    )


def has_parts(module: nn.Module, **kinds: type | tuple[type, ...]) -> bool:
    """Whether a module's children have these names and exactly these classes."""
    children = private.children(module)
    return children.keys() == kinds.keys() and all(
        type(children[name]) in (kind if isinstance(kind, tuple) else (kind,)) for name, kind in kinds.items()
    )


class Fusable(nn.Module):
    """A module that an engine may compute in one go, in place of ``forward``.

    A subclass has ``forward(x)``, ``parts(folded)`` and ``fuse_forward(engine, x, parts)``.

    Attributes:
        backend: one of ``BACKENDS``.
        fuses_on_cpu: whether the CPU's engine, which serves training alone, knows how.
        has_operator: whether there is an operator of ``torch.library`` for it: it is an SK convolution.
        num_branches: of an SK convolution, more of which than an engine takes must go another way.
        methods: those whose arithmetic ``fuse_forward`` repeats; where another one is put in place, it runs.
    """

    fuses_on_cpu = False
    has_operator = False
    num_branches = 1
    methods: tuple[str, ...] = ('forward',)
    _plan = None
    _way = 'plain'
    _trained_way = None  # of the last call with gradients

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.backend = 'auto'

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            if self.has_operator and self.backend == 'triton' and self._goes_by_operators():
                parts = self.parts(False)
                # Asked in the graph, which is compiled again where a norm changes.
                if _agree(parts[1] if parts[2] is None else [*parts[1], parts[2][1]]):
                    return self.fuse_forward(operators, x, parts)
            return super().__call__(x, *args, **kwargs)
        engine = None if args or kwargs else _choose(self, x)
        own = self.__dict__
        own['_way'] = way = 'plain' if engine is None else engine.NAME
        # A reentrant checkpoint has gradients in the backward pass alone, and is free to go another way there.
        if torch.is_grad_enabled() and private.graph_task() == -1:
            own['_trained_way'] = way
        if engine is None:
            return super().__call__(x, *args, **kwargs)
        return self.fuse_forward(engine, x, self._plan.parts)

    def parts(self, folded: bool) -> tuple | None:
        """The modules that ``fuse_forward`` computes with, looked up once; None where they are not what it computes.

        Where every BatchNorm is ``folded`` into the convolution before it, an identity is in its place.
        """
        raise NotImplementedError

    def fused_modules(self) -> list[nn.Module]:
        """The modules that ``fuse_forward`` does without calling, and itself."""
        return list(self.modules())

    def fuse_forward(self, engine: ModuleType, x: Tensor, parts: tuple) -> Tensor:
        """``forward`` by an engine's passes."""
        raise NotImplementedError

    @torch.compiler.assume_constant_result  # Dynamo asks in Python, in place of tracing what it cannot
    def _goes_by_operators(self) -> bool:
        # A compiler fuses the plain modules itself, so that its graph has operators only where they are asked for.
        goes = False
        if not trial.is_refused(next(self.parameters()).device):
            plan = _Plan(self, traced=True)  # whose parameters may be fake
            goes = plan.parts is not None and plan.norm != 'folded' and plan.fits_gpu and not plan.has_hooks(self)
        self.__dict__['_way'] = operators.NAME if goes else 'plain'
        return goes


def _agree(norms: list[nn.BatchNorm2d]) -> bool:
    """Whether norms are affine, keep running statistics, and have the same settings."""
    first = norms[0]
    return all(
        (norm.training, norm.momentum, norm.eps) == (first.training, first.momentum, first.eps)
        and norm.affine
        and norm.weight is not None
        and norm.bias is not None
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_batches_tracked is not None
        and norm.num_batches_tracked.device == norm.running_mean.device
        for norm in norms
    )


class _Plan:
    """What was found of a module and of all modules in it, for as long as that is so.

    The module keeps it. It holds what is inside the module but not the module, which would keep itself alive.
    """

    def __init__(self, module: Fusable, traced: bool = False) -> None:
        modules = module.fused_modules()
        inner = [m for m in modules if m is not module]
        self.module = ref(module)
        self.modules = inner
        self.states = [m.__dict__ for m in inner]
        self.replacements = list(product(self.states, private.REPLACEMENTS))
        fusables = [m for m in inner if isinstance(m, Fusable)]
        self.methods = [(type(m), name) for m in (module, *fusables) for name in m.methods]
        own = [(m.__dict__, name) for m in fusables for name in m.methods if name not in private.REPLACEMENTS]
        self.replacements += own
        self.norms = [m.__dict__ for m in inner if isinstance(m, nn.BatchNorm2d)]
        self.convs = [m.__dict__ for m in inner if isinstance(m, nn.Conv2d)]
        self.fusables = [m.__dict__ for m in fusables]
        self.softmaxes = [m.__dict__ for m in inner if type(m) is nn.Softmax]
        self.signature = self._look(module)
        norms = [m for m in inner if isinstance(m, nn.BatchNorm2d)]
        # What the norms take: the statistics of the batch, the running ones, or none where they were folded.
        self.norm = 'folded' if not norms else 'batch' if norms[0].training else 'running'
        fits = (
            all(type(m) in _known for m in modules)
            and (traced or {type(p) for m in modules for p in m._parameters.values()} <= _TENSORS)
            and all(m._parameters.get('weight') is not None for m in modules if type(m) is nn.Conv2d)
            # What an engine reads there may have been put elsewhere, as an attribute that something computes.
            and all(_HELD[type(m)] <= m._parameters.keys() | m._buffers.keys() for m in modules if type(m) in _HELD)
            and all(map(is_, starmap(getattr, self.methods), map(_originals.get, self.methods)))
            and all(m.padding_mode == 'zeros' for m in modules if type(m) is nn.Conv2d)
            and not any(name in module.__dict__ for name in module.methods)
            and (not norms or _agree(norms))
            and all(buffer is not None for m in norms for buffer in m._buffers.values())
        )
        self.parts = module.parts(not norms) if fits else None
        self.fits_gpu = all(m.num_branches <= gpu.MAX_BRANCHES for m in (module, *fusables))

    def _look(self, module: Fusable) -> tuple[list, ...]:
        """What would change the answer. Modules are compared as objects, which tells of replaced ones."""
        own = module.__dict__
        states = [own, *self.states]
        return (
            type(module),
            list(starmap(getattr, self.methods)),
            list(map(own.__contains__, module.methods)),
            module.backend,
            list(chain.from_iterable(map(dict.values, map(_CHILDREN, states)))),
            list(map(type, self.modules)),
            list(map(_TRAINING, states)),
            list(chain.from_iterable(map(_PARAMETERS, states))),
            list(map(type, chain.from_iterable(map(dict.values, map(_PARAMETERS, states))))),
            list(chain.from_iterable(map(_BUFFERS, self.norms))),
            list(map(type, chain.from_iterable(map(dict.values, map(_BUFFERS, self.norms))))),
            list(map(_NORM, self.norms)),
            list(map(_PADDING, self.convs)),
            list(map(_DIM, self.softmaxes)),
            list(map(_BACKEND, self.fusables)),
        )

    def holds(self, module: Fusable) -> bool:
        """Whether nothing has changed since."""
        return self.module() is module and self._look(module) == self.signature

    def has_hooks(self, module: Fusable) -> bool:
        """:func:`has_hooks` of the module and of every one inside."""
        own = module.__dict__
        return (
            any(chain.from_iterable(map(_HOOKS, [own, *self.states])))
            or any(map(own.__contains__, private.REPLACEMENTS))
            or any(starmap(contains, self.replacements))
        )

    def __reduce__(self):
        """A copied or pickled module looks for itself."""
        return type(None), ()


def _choose(module: Fusable, x: Tensor) -> ModuleType | None:
    """The engine for this call of a module; None for its ``forward``."""
    backend = module.backend
    # A checkpoint computes again, in the backward pass, what it once let plain torch compute: then as plain torch does,
    # though whoever watched, or whatever mode there was, may be gone. It must save the same tensors.
    if module._trained_way == 'plain' and private.graph_task() != -1:
        return None
    if backend == 'plain' or (type(x) is not Tensor and type(x) is not nn.Parameter):
        return None
    on_gpu = x.is_cuda or _stubbed or gpu.INTERPRETS
    # The CPU's engine was not timed on a GPU: there it runs only where it is asked for by name.
    may_recompute = module.fuses_on_cpu and cpu.pays() and (backend == 'recompute' or x.is_cpu)
    if not on_gpu and not may_recompute:
        return None
    # A tracer, asked first, would keep the answers about the map.
    if not private.is_ordinary() or x.ndim != 4 or x.layout != torch.strided or x.numel() == 0:
        return None
    plan = module._plan
    if plan is None or not plan.holds(module):
        plan = module.__dict__['_plan'] = _Plan(module)
    if plan.parts is None or plan.has_hooks(module) or list(map(_CALLS, _known)) != _known_calls:
        return None
    if plan.norm == 'folded' and torch.is_grad_enabled():  # folded modules are for inference
        return None
    of_norms = chain(map(_PARAMETERS, plan.norms), map(_BUFFERS, plan.norms))
    if (
        on_gpu
        and backend != 'recompute'
        and plan.fits_gpu
        # The kernels take a norm's values one after another.
        and all(map(Tensor.is_contiguous, chain.from_iterable(map(dict.values, of_norms))))
        and (_stubbed or trial.accepts(x, plan.norm, backend == 'triton'))
    ):
        if gpu.kernels is None:
            gpu.load()
        return gpu
    return cpu if may_recompute else None


def ways(model: nn.Module) -> dict[str, int]:
    """How many SK convolutions of a model went which way when it last ran in eager mode: {'triton': 16}, say."""
    counts: dict[str, int] = {}
    way_of: dict[nn.Module, str] = {}
    for module in model.modules():  # a unit comes before its parts
        if isinstance(module, Fusable):
            way = way_of.get(module) or module._way
            if way != 'plain':
                way_of.update(dict.fromkeys(module.fused_modules(), way))
            if module.has_operator:
                counts[way] = counts.get(way, 0) + 1
    return counts


@contextmanager
def stubbed_launches() -> Iterator[None]:
    """Within it, the GPU's engine runs on CPU tensors and starts no kernel: outputs are allocated, nothing is computed.

    It is for measuring what the host has to do.
    """
    global _stubbed
    gpu.load()
    launch = gpu.kernels.launch
    _stubbed, gpu.kernels.launch = True, lambda *args, **constants: None
    try:
        yield
    finally:
        _stubbed, gpu.kernels.launch = False, launch
