"""torch.compile, torch.export, AOTInductor and ONNX with fastbn's modules, compared with torch's modules."""

import copy
import subprocess
import sys

import pytest
import torch
from nets import assert_same_step, images, nets
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastbn
from fastbn.functional import batch_norm

training = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
inductor = pytest.param("inductor", marks=pytest.mark.slow)
compilers = pytest.mark.parametrize("compiler", ["aot_eager", inductor])


@pytest.fixture
def compile_model():
    """torch.compile with fullgraph, from a clean slate."""
    torch._dynamo.reset()
    yield lambda model, compiler, **kwargs: torch.compile(model, backend=compiler, fullgraph=True, **kwargs)
    torch._dynamo.reset()


@training
@compilers
@pytest.mark.parametrize("kwargs", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_compile_fullgraph(compile_model, compiler, training, kwargs):
    """momentum=None breaks torch's own graph (pt#194504), ours not. Running statistics move as well."""
    ours, torchs = (model.train(training) for model in nets(**kwargs))
    compiled = compile_model(ours, compiler)
    for _ in range(3):
        assert_same_step(compiled, torchs, images())
    if training and kwargs.get("track_running_stats", True):
        assert ours.bn2.num_batches_tracked == 3


@compilers
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_compile_dynamic_batch(compile_model, compiler, dynamic):
    """No compilation for each of four batch sizes, and no more than torch's own modules need: one for the first, and
    one for all others."""
    # below 16, where torch's convolution takes another way
    batches, counts = [images(batch) for batch in (4, 7, 9, 5)], []
    for model, twin in (nets(), nets()[::-1]):
        torch._dynamo.reset()  # the first compilation of a code object takes more attempts than those after it
        counter = CompileCounterWithBackend(compiler)
        compiled = compile_model(model, counter, dynamic=dynamic)
        for x in batches:
            assert_same_step(compiled, twin, x)
        counts.append(counter.frame_count)
    assert counts[0] <= counts[1] <= 2


@compilers
@training
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_compile_functional(compile_model, compiler, training, channels_last):
    def ours(x, mean, var, weight, bias):
        return batch_norm(x * 2, mean, var, weight, bias, training).relu()

    x = images()
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    arguments = x, torch.zeros(3), torch.ones(3), torch.randn(3), torch.randn(3)
    stats = [a.clone() for a in arguments]
    expected = ours(*stats)
    found = compile_model(ours, compiler)(*arguments)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(arguments[1:3], tuple(stats[1:3]))


def test_compile_switches_between_train_and_eval(compile_model):
    ours, torchs = nets()
    compiled = compile_model(ours, "aot_eager")
    for mode in (True, False, True):
        ours.train(mode), torchs.train(mode)
        assert_same_step(compiled, torchs, images())


class Block(nn.Module):
    """Batch norm + ReLU, and batch norm + add + ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


class FusedBlock(Block):
    """The same with the activation in the module."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = fastbn.BatchNormAct2d(3), fastbn.BatchNormAct2d(3)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), x)


@compilers
@training
@pytest.mark.parametrize("make", [lambda: fastbn.convert(Block(), fuse=True), FusedBlock], ids=["fuse=True", "modules"])
def test_compile_fused(compile_model, compiler, training, make):
    """What convert fused gives way to the forward that the class has, whose operations the compiler sees."""
    ours, torchs = make().train(training), Block().train(training)
    torchs.load_state_dict(ours.state_dict())
    counter = CompileCounterWithBackend(compiler)
    compiled = compile_model(ours, counter)
    for _ in range(3):
        assert_same_step(compiled, torchs, images())
    assert counter.frame_count == 1
    assert ours.bn1.num_batches_tracked == ours.bn2.num_batches_tracked == 3 * training
    if type(ours) is not FusedBlock:  # and eager calls are fused
        assert_same_step(ours, torchs, images())
        assert fastbn.report(ours).fused == {"bn1": "batch_norm + relu", "bn2": "batch_norm + add + relu"}


def test_update_of_statistics_is_in_the_graph_once(compile_model):
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compile_model(nets()[0], backend)(images())
    assert sum(target == "fastbn.batch_norm.default" for target in seen) == 2, seen


class OutsideTorch(nn.BatchNorm1d):
    def forward(self, input):
        return super().forward(input)


@training
@pytest.mark.parametrize("kwargs", [{}, {"momentum": None}], ids=str)
def test_export(training, kwargs):
    ours, torchs = (model.train(training) for model in nets(**kwargs))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(copy.deepcopy(ours), (images(),), dynamic_shapes={"x": {0: batch}})
    exported = program.module()
    for size in (4, 6):
        x = images(size)
        torch.testing.assert_close(exported(x), torchs(x))
    expected = dict(torchs.named_buffers())
    if torch.__version__ < (2, 9):
        # torch 2.6 leaves out the buffers that the mode does not use, for all modules outside torch.nn.
        twin = OutsideTorch(2).train(training)
        kept = dict(torch.export.export(twin, (torch.randn(4, 2),)).module().named_buffers())
        expected = {name: t for name, t in expected.items() if name.rpartition(".")[2] in kept}
        assert len(expected) == len(torchs.state_dict()) - len(list(torchs.parameters())) - 2 * (not training)
    torch.testing.assert_close(dict(exported.named_buffers()), expected)


@pytest.mark.slow
def test_aot_inductor_package(tmp_path):
    """The package calls fastbn's operators: who loads it imports fastbn first."""
    ours, torchs = (model.eval() for model in nets())
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(ours, (images(),), dynamic_shapes={"x": {0: batch}})
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    inputs = [images(size) for size in (4, 7)]
    torch.save(inputs, tmp_path / "inputs.pt")
    load = (
        "import sys, torch, fastbn\n"
        "model = torch._inductor.aoti_load_package(sys.argv[1])\n"
        "torch.save([model(x) for x in torch.load(sys.argv[2])], sys.argv[3])\n"
    )
    arguments = [path, str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
    subprocess.run([sys.executable, "-c", load, *arguments], check=True, cwd=tmp_path)
    for x, y in zip(inputs, torch.load(tmp_path / "outputs.pt"), strict=True):
        torch.testing.assert_close(y, torchs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuse", [False, True])
def test_onnx_by_way_of_revert(tmp_path, fuse):
    """BatchNormalization nodes, and the numbers of the model that was converted."""
    onnx = pytest.importorskip("onnx", reason="needs onnx and onnxscript")
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    from onnx.reference import ReferenceEvaluator

    model, x = fastbn.convert(nn.Sequential(nets()[1], nn.BatchNorm1d(2), nn.ReLU()), fuse=fuse).eval(), images()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(m.running_var, 0.5, 2), nn.init.normal_(m.running_mean), nn.init.normal_(m.weight)
    path = tmp_path / "net.onnx"
    # optimize=True folds them into convolutions and linear layers, where there are some before them
    torch.onnx.export(fastbn.revert(copy.deepcopy(model)), (x,), path, dynamo=True, optimize=False, verbose=False)
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count("BatchNormalization") == 3, nodes
    (found,) = ReferenceEvaluator(str(path)).run(None, {onnx.load(path).graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)
    assert type(model[1]) is fastbn.BatchNorm1d, "the copy was reverted"
