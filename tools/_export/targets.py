"""The runtimes: how a file for each is written, and how it is run again.

A target's library is imported when it is asked for, and no sooner.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sk_plugins._resources import how_to_install
from sk_plugins._text import first_lines

from .deployable import Deployable

__all__ = [
    'TARGETS', 'Target', 'beside', 'can_build_engines', 'exported', 'import_', 'require', 'slice_splits', 'trtexec',
]  # fmt: skip

Runner = Callable[[Tensor], list[np.ndarray]]
BOTH = frozenset({'batch', 'size'})
MOST_IN_BATCH = 64  # of targets that plan their memory
# ONNX Runtime's convolutions on a CPU work in blocks of 16 channels (AVX-512), or 8. Narrower groups, and depthwise
# convolutions of another number of channels, are computed by slower ones.
GROUP_WIDTH = 16


@dataclass(frozen=True)
class Target:
    """A runtime.

    Attributes:
        title: the runtime's name.
        suffix: of the file, or folder.
        write: writes it.
        load: gives what runs it with so many threads; None where this machine cannot.
        inspect: says what the file holds, where it cannot be run.
        packages: what has to be importable, by module.
        dynamic: what may stay open in a file.
        extra: of this project, which installs the packages.
        environment: what the packages need that the extra cannot say.
        needs: beside packages: programs.
        runs: what it is that ``load`` runs, where that is not the file itself.
        uint8: whether ``--preprocess`` fits, or why not.
    """

    title: str
    suffix: str
    write: Callable[[Deployable, Path], Any]
    load: Callable[[Path, int], Runner] | None
    packages: tuple[str, ...] = ()
    dynamic: frozenset[str] = BOTH
    extra: str = ''
    environment: str = ''
    needs: tuple[str, ...] = ()
    inspect: Callable[[Deployable, Path], str] | None = None
    runs: str = ''
    uint8: str = ''

    def run(self, path: Path, threads: int) -> Runner:
        """What runs a file.

        Raises:
            ValueError: the runtime cannot load it.
        """
        assert self.load is not None
        try:
            return self.load(path, threads)
        except ValueError:
            raise
        except Exception as error:  # each runtime's own kinds
            raise ValueError(f'{self.title} cannot load the file: {first_lines(error)}') from error

    def require(self) -> None:
        """Raise ValueError, which says what to install, unless the target's packages can be imported."""
        require(*self.packages, extra=self.extra, environment=self.environment)
        missing = [name for name in self.needs if shutil.which(name) is None]
        if missing:
            raise ValueError(f'{self.title} needs {", ".join(missing)} on the PATH')


def require(*packages: str, extra: str, environment: str = '') -> None:
    """Raise ValueError, which says what to install, unless these can be imported."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'{", ".join(missing)} not installed: {environment or how_to_install(extra)}')


def import_(name: str) -> ModuleType:
    """A module that is there, but may not fit this torch."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a library raises that was made for another torch
        raise ValueError(
            f'{name} cannot be imported beside torch {torch.__version__}: {first_lines(error) or type(error).__name__}'
        ) from error


def exported(deployable: Deployable, most: int | None = None) -> torch.export.ExportedProgram:
    shapes: dict[int, Any] = {}
    if 'batch' in deployable.dynamic:
        shapes[0] = torch.export.Dim('batch', max=most)
    if 'size' in deployable.dynamic:
        first = 1 if deployable.uint8 else 2
        shapes.update({first: torch.export.Dim.AUTO, first + 1: torch.export.Dim.AUTO})
    with torch.no_grad():
        return torch.export.export(deployable.model, (deployable.image,), dynamic_shapes=(shapes,) if shapes else None)


def _traced(deployable: Deployable) -> torch.jit.ScriptModule:
    with torch.no_grad():
        return torch.jit.trace(deployable.model, deployable.image, check_trace=False)


def beside(path: Path, metadata: dict[str, str]) -> None:
    """A target whose file holds no metadata has them in a file beside it."""
    path.with_name(path.name + '.json').write_text(json.dumps(metadata, indent=1) + '\n', encoding='utf-8')


def _arrays(outputs: Any) -> list[np.ndarray]:
    if isinstance(outputs, Tensor):
        return [outputs.detach().numpy()]
    return [output.detach().numpy() for output in outputs]


def write_onnx(deployable: Deployable, path: Path, opset: int | None = None, width: int = GROUP_WIDTH) -> None:
    """With at least ``width`` channels in a group of a convolution, and whole blocks of them in depthwise ones."""
    from .blocks import in_blocks
    from .graphs import write

    model = in_blocks(deployable.model, width, min(width, GROUP_WIDTH))
    write(dataclasses.replace(deployable, model=model), path, opset)


def load_onnx(path: Path, threads: int) -> Runner:
    onnxruntime = import_('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait by spinning take the cores of whatever is timed beside.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    (image,) = session.get_inputs()
    return lambda images: session.run(None, {image.name: images.numpy()})


def convert_openvino(deployable: Deployable) -> Any:
    """openvino's model of the network."""
    openvino = import_('openvino')
    shape = list(deployable.image.shape)
    first = 1 if deployable.uint8 else 2
    if 'batch' in deployable.dynamic:
        shape[0] = -1
    if 'size' in deployable.dynamic:
        shape[first : first + 2] = -1, -1
    with torch.no_grad():
        model = openvino.convert_model(deployable.model, example_input=deployable.image, input=[tuple(shape)])
    model.inputs[0].get_tensor().set_names({'image'})
    for output, name in zip(model.outputs, deployable.outputs):
        output.get_tensor().set_names({name})
    for key, value in deployable.metadata.items():
        model.set_rt_info(value, ['sk_plugins', key])
    return model


def write_openvino(deployable: Deployable, path: Path) -> None:
    import_('openvino').save_model(convert_openvino(deployable), path, compress_to_fp16=False)


def load_openvino(path: Path, threads: int) -> Runner:
    openvino = import_('openvino')
    settings = {'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}
    compiled = openvino.compile_model(path, 'CPU', settings)
    return lambda images: list(compiled(images.numpy()).to_tuple())


def write_torchscript(deployable: Deployable, path: Path) -> None:
    module = torch.jit.freeze(_traced(deployable).eval())
    torch.jit.save(module, str(path), _extra_files={'metadata.json': json.dumps(deployable.metadata)})


def load_torchscript(path: Path, threads: int) -> Runner:
    torch.set_num_threads(threads)
    module = torch.jit.load(str(path))

    def run(images: Tensor) -> list[np.ndarray]:
        with torch.no_grad():
            return _arrays(module(images))

    return run


def write_aoti(deployable: Deployable, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(
        exported(deployable),
        package_path=str(path),
        inductor_configs={'aot_inductor.metadata': deployable.metadata},
    )


def load_aoti(path: Path, threads: int) -> Runner:
    torch.set_num_threads(threads)
    package = torch._inductor.aoti_load_package(str(path))

    def run(images: Tensor) -> list[np.ndarray]:
        with torch.no_grad():
            return _arrays(package(images))

    return run


def write_executorch(deployable: Deployable, path: Path) -> None:
    exir = import_('executorch.exir')
    partitioner = import_('executorch.backends.xnnpack.partition.xnnpack_partitioner').XnnpackPartitioner()
    program = exported(deployable, MOST_IN_BATCH)
    slice_splits(program.graph)
    program = exir.to_edge_transform_and_lower(program, partitioner=[partitioner])
    path.write_bytes(program.to_executorch().buffer)
    beside(path, deployable.metadata)


def slice_splits(graph: torch.fx.Graph) -> None:
    """Slices in place of splits, whose outputs ExecuTorch takes for tensors of the example's batch."""
    aten = torch.ops.aten
    for split in graph.find_nodes(op='call_function', target=aten.split_with_sizes.default):
        x, sizes, dim = (*split.args, 0)[:3]
        for part in list(split.users):
            end = sum(sizes[: part.args[1] + 1])
            with graph.inserting_before(part):
                piece = graph.call_function(aten.slice.Tensor, (x, dim, end - sizes[part.args[1]], end))
            piece.meta = part.meta
            part.replace_all_uses_with(piece)
            graph.erase_node(part)
        graph.erase_node(split)


def load_executorch(path: Path, threads: int) -> Runner:
    runtime = import_('executorch.runtime').Runtime.get()
    method = runtime.load_program(path).load_method('forward')
    return lambda images: _arrays([output.clone() for output in method.execute([images])])


def write_coreml(deployable: Deployable, path: Path) -> None:
    coremltools = import_('coremltools')
    shape = list(deployable.image.shape)
    if 'batch' in deployable.dynamic:
        shape[0] = coremltools.RangeDim(1, MOST_IN_BATCH, default=1)
    model = coremltools.convert(
        _traced(deployable),
        inputs=[coremltools.TensorType('image', shape=tuple(shape))],
        outputs=[coremltools.TensorType(name) for name in deployable.outputs],
        convert_to='mlprogram',
        minimum_deployment_target=coremltools.target.iOS16,
        compute_precision=coremltools.precision.FLOAT32,
    )
    for key, value in deployable.metadata.items():
        model.user_defined_metadata[key] = value
    model.save(str(path))


def inspect_coreml(deployable: Deployable, path: Path) -> str:
    """What the file says of its inputs and outputs.

    Raises:
        ValueError: that is not what the network has.
    """
    spec = import_('coremltools').models.utils.load_spec(str(path))
    ((image, shape),) = ((i.name, list(i.type.multiArrayType.shape)) for i in spec.description.input)
    outputs = [output.name for output in spec.description.output]
    wanted = [1 if 'batch' in deployable.dynamic else len(deployable.image), *deployable.image.shape[1:]]
    if shape != wanted or outputs != deployable.outputs:
        raise ValueError(f'--check: the file takes {shape} and gives {outputs}, not {wanted} and {deployable.outputs}')
    return f'{image} {"x".join(map(str, shape))} to {", ".join(outputs)}'


def write_ncnn(deployable: Deployable, path: Path) -> None:
    pnnx = import_('pnnx')
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        before = os.getcwd()
        os.chdir(folder)
        try:
            pnnx.export(deployable.model, f'{folder}/net.pt', (deployable.image,), fp16=False)
        finally:
            os.chdir(before)
        path.mkdir(parents=True, exist_ok=True)
        for name in ('net.ncnn.param', 'net.ncnn.bin'):
            if not Path(folder, name).is_file():
                raise ValueError(f'pnnx wrote no {name}')
            shutil.copy(Path(folder, name), path / name)
    (path / 'metadata.json').write_text(json.dumps(deployable.metadata, indent=1) + '\n', encoding='utf-8')


def load_ncnn(path: Path, threads: int) -> Runner:
    ncnn = import_('ncnn')
    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = threads
    for name in ('fp16_storage', 'fp16_packed', 'fp16_arithmetic', 'bf16_storage'):
        setattr(net.opt, f'use_{name}', False)
    if net.load_param(str(path / 'net.ncnn.param')) or net.load_model(str(path / 'net.ncnn.bin')):
        raise ValueError(f'{path}: ncnn cannot load it')
    names = sorted(net.output_names(), key=lambda name: int(name.removeprefix('out')))  # not in the order of layers

    def run(images: Tensor) -> list[np.ndarray]:
        found: list[list[np.ndarray]] = []
        for image in images:  # ncnn's maps have no batch
            extractor = net.create_extractor()
            extractor.input('in0', ncnn.Mat(image.numpy()).clone())
            found.append([np.array(extractor.extract(name)[1]) for name in names])
        return [np.stack(outputs) for outputs in zip(*found)]

    return run


def write_litert(deployable: Deployable, path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # its progress
        litert_torch = import_('litert_torch')
        litert_torch.convert(deployable.model, (deployable.image,)).export(str(path))
    beside(path, deployable.metadata)


def load_litert(path: Path, threads: int) -> Runner:
    interpreter = import_('ai_edge_litert.interpreter').Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    (image,), outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def run(images: Tensor) -> list[np.ndarray]:
        interpreter.set_tensor(image['index'], images.numpy())
        interpreter.invoke()
        return [interpreter.get_tensor(output['index']) for output in outputs]

    return run


def write_tensorrt(deployable: Deployable, path: Path, opset: int | None = None) -> None:
    """The ONNX file, and the engine where TensorRT and a GPU are."""
    onnx = path.with_suffix('.onnx')
    write_onnx(deployable, onnx, opset, width=1)
    if can_build_engines():
        done = subprocess.run(trtexec(deployable, onnx, path), capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f'trtexec failed: {done.stderr.strip().splitlines()[-1:]}')


def load_tensorrt(path: Path, threads: int) -> Runner:
    """The ONNX file, which is what engines are built of."""
    return load_onnx(path.with_suffix('.onnx'), threads)


def can_build_engines() -> bool:
    """Whether there are a GPU and TensorRT's ``trtexec``."""
    return torch.cuda.is_available() and shutil.which('trtexec') is not None


def trtexec(deployable: Deployable, onnx: Path, path: Path) -> list[str]:
    """The command that builds an engine from the ONNX file."""
    line = ['trtexec', f'--onnx={onnx}', f'--saveEngine={path}']
    if deployable.dynamic:
        height, width = deployable.size
        for name, batch, scale in (('min', 1, 1), ('opt', 8, 1), ('max', MOST_IN_BATCH, 2)):
            scale = scale if 'size' in deployable.dynamic else 1
            batch = batch if 'batch' in deployable.dynamic else len(deployable.image)
            sides = f'{height * scale}x{width * scale}'
            shape = f'{batch}x{sides}x3' if deployable.uint8 else f'{batch}x{deployable.image.shape[1]}x{sides}'
            line.append(f'--{name}Shapes=image:{shape}')
    return line


TARGETS = {
    'onnx': Target('ONNX Runtime', '.onnx', write_onnx, load_onnx, ('onnx', 'onnxscript'), BOTH, 'onnx'),
    'openvino': Target('OpenVINO', '.xml', write_openvino, load_openvino, ('openvino',), BOTH, 'openvino'),
    'torchscript': Target('TorchScript', '.ts', write_torchscript, load_torchscript),
    'aoti': Target(
        'AOTInductor', '.pt2', write_aoti, load_aoti, dynamic=frozenset({'batch'}), needs=('g++',)
    ),
    'executorch': Target(
        'ExecuTorch (XNNPACK)', '.pte', write_executorch, load_executorch, ('executorch',), frozenset({'batch'}),
        'executorch',
    ),
    'coreml': Target(
        'Core ML', '.mlpackage', write_coreml, None, ('coremltools',), frozenset({'batch'}), 'coreml',
        inspect=inspect_coreml, uint8='coreml has no uint8 tensors; its images are float32, normalised',
    ),
    'ncnn': Target(
        'ncnn', '', write_ncnn, load_ncnn, ('pnnx', 'ncnn'), frozenset(), 'ncnn',
        uint8='ncnn has no uint8 input; its Mat::from_pixels and substract_mean_normalize do it',
    ),
    'litert': Target(
        'LiteRT', '.tflite', write_litert, load_litert, ('litert_torch', 'ai_edge_litert'), frozenset(), 'litert',
        "in an environment of its own: python3 -m venv .venv-litert && .venv-litert/bin/pip install '.[litert]'",
    ),
    'tensorrt': Target(
        'TensorRT', '.engine', write_tensorrt, load_tensorrt, ('onnx', 'onnxscript'), BOTH, 'onnx',
        runs='the ONNX file in ONNX Runtime',
    ),
}  # fmt: skip
