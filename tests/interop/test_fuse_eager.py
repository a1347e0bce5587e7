"""What torch.ao's own tests of its fuse_modules ask for, asked of fusecli's: a user changes the import, and
puts to_torch_ao behind the call where torch.ao goes on with the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusecli import fuse_modules, fuse_modules_qat
from fusecli.interop.torch_ao import to_torch_ao
from tests import torch_ao_qat
from tests.nets import images, randomise

ENGINES = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
X1 = images(4, 3, 6)  # for what begins with a Conv1d
X2 = images(2, 3, 8, 8)

pytestmark = pytest.mark.skipif(
    not {"fbgemm", "x86"} & set(ENGINES), reason="torch was built without the integers of fbgemm"
)


@pytest.fixture
def ao() -> Any:
    return torch_ao_qat.torch_ao("quantization")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with torch_ao_qat.quietly():
        yield


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = request.param
    yield request.param
    torch.backends.quantized.engine = before


class Block(nn.Module):
    """Two modules in a row."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


class Mixed(nn.Module):
    """Convolutions of one, two and three dimensions between stubs; `sub2` and `fc` stay as they are."""

    def __init__(self, ao: Any, qconfig: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2, 1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(2), nn.ReLU(inplace=True)
        self.sub1 = Block(conv=nn.Conv2d(2, 2, 1, bias=False), bn=nn.BatchNorm2d(2))
        self.sub2 = Block(conv=nn.Conv2d(2, 2, 1, bias=False), relu=nn.ReLU(inplace=False))
        self.fc = nn.Linear(10, 5)
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
        self.conv2, self.relu2 = nn.Conv3d(3, 3, 1, bias=False), nn.ReLU(inplace=False)
        self.bn2, self.relu3 = nn.BatchNorm3d(3), nn.ReLU(inplace=True)
        self.conv3, self.bn3, self.relu4 = nn.Conv1d(3, 3, 2), nn.BatchNorm1d(3), nn.ReLU(inplace=True)
        self.qconfig = qconfig
        self.sub2.qconfig = None  # type: ignore[assignment]
        self.fc.qconfig = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu4(self.bn3(self.conv3(self.quant(x))))
        x = x[:, :, None, None]
        x = self.relu3(self.bn2(self.relu2(self.conv2(x))))
        x = self.relu1(self.bn1(self.conv1(x.squeeze(2))))
        x = self.dequant(self.sub1(x))
        out: Tensor = self.fc(self.sub2(x).flatten(1))
        return out


class Rows(nn.Module):
    """Layers in containers, some without names of their own, between stubs."""

    def __init__(self, ao: Any) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=False)
        triples = (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3))
        self.features = nn.Sequential(*triples)
        self.classifier = nn.Sequential(nn.Linear(3 * 64, 10), nn.ReLU(inplace=False))
        self.seq = nn.Sequential()
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(self.relu1(self.conv1(self.quant(x))))
        out: Tensor = self.dequant(self.seq(self.classifier(torch.reshape(x, (-1, 3 * 64)))))
        return out


ROWS = [
    ["conv1", "relu1"],
    *([f"features.{i}.{j}" for j in range(3)] for i in range(3)),
    ["classifier.0", "classifier.1"],
]


def types(model: nn.Module, *paths: str) -> list[str]:
    found = (type(model.get_submodule(path)) for path in paths)
    return [f"{kind.__module__.removeprefix('torch.')}.{kind.__name__}" for kind in found]


def kinds(model: nn.Module, *paths: str) -> list[str]:
    """The classes, and of what torch.ao makes the part of it that they are from."""
    prefixes = {
        "ao.nn.intrinsic.qat.": "niqat.",
        "ao.nn.intrinsic.quantized.": "niq.",
        "ao.nn.intrinsic.": "ni.",
        "ao.nn.quantized.": "nq.",
    }
    return [
        next((short for long, short in prefixes.items() if name.startswith(long)), "")
        + name.rpartition(".")[2]
        for name in types(model, *paths)
    ]


def assert_observed(model: nn.Module, *, below: tuple[str, ...]) -> None:
    """Every layer but those `below` has something that looks at its output."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        layer = hasattr(module, "weight") and "Norm" not in kind and not name.startswith(below)
        inside = name.rpartition(".")[0]
        outer = model.get_submodule(inside) if inside else None
        if layer and not (outer is not None and hasattr(outer, "activation_post_process")):
            assert hasattr(module, "activation_post_process"), name


def assert_no_qconfig(model: nn.Module) -> None:
    assert [name for name, module in model.named_modules() if hasattr(module, "qconfig")] == []


def mixed(ao: Any, qconfig: Any) -> Any:
    return randomise(Mixed(ao, qconfig), 0)


def evaluate(model: nn.Module, batches: Sequence[Tensor] = (X1,)) -> None:
    with torch.no_grad():
        for batch in batches:
            model(batch)


def train(model: nn.Module, batches: Sequence[Tensor] = (X1,)) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def test_fuse_module_train(ao: Any) -> None:
    def qat(model: nn.Module, names: Any) -> Any:
        return to_torch_ao(fuse_modules_qat(model, names), inplace=True)

    def assert_quantized(model: nn.Module) -> None:
        assert kinds(model, "conv1", "bn1", "relu1") == ["niq.ConvReLU2d", "Identity", "Identity"]
        assert kinds(model, "sub1.conv", "sub1.bn") == ["nq.Conv2d", "Identity"]
        assert kinds(model, "sub2.conv", "sub2.relu") == ["Conv2d", "ReLU"]
        # bn3 was left alone, and torch has no norm of integers behind a convolution.
        with pytest.raises(NotImplementedError, match="native_batch_norm"):
            model(X1)

    model = mixed(ao, ao.default_qat_qconfig).train()
    # Step by step: the second call finds a model that has torch.ao's containers.
    model = qat(model, ["conv1", "bn1", "relu1"])
    model = qat(model, ["sub1.conv", "sub1.bn"])
    assert kinds(model, "conv1", "bn1", "relu1") == ["ni.ConvBnReLU2d", "Identity", "Identity"]
    assert kinds(model, "sub1.conv", "sub1.bn") == ["ni.ConvBn2d", "Identity"]
    assert kinds(model, "sub2.conv", "sub2.relu") == ["Conv2d", "ReLU"]
    model = ao.prepare_qat(model)
    assert_observed(model, below=("sub2", "fc"))
    assert kinds(model, "conv1", "bn1", "relu1") == ["niqat.ConvBnReLU2d", "Identity", "Identity"]
    assert kinds(model, "sub1.conv", "sub1.bn") == ["niqat.ConvBn2d", "Identity"]
    assert kinds(model, "sub2.conv", "sub2.relu") == ["Conv2d", "ReLU"]
    train(model)
    assert_quantized(ao.convert(model.eval()))

    model = qat(
        mixed(ao, ao.default_qat_qconfig).train(), [["conv1", "bn1", "relu1"], ["sub1.conv", "sub1.bn"]]
    )
    assert_quantized(ao.quantize_qat(model, train, [[X1]]))


EVAL = [
    ["conv3", "bn3", "relu4"],
    ["conv1", "bn1", "relu1"],
    ["conv2", "relu2"],
    ["bn2", "relu3"],
    ["sub1.conv", "sub1.bn"],
]


def test_fuse_module_eval(ao: Any) -> None:
    def assert_quantized(model: nn.Module) -> None:
        assert kinds(model, "conv3", "conv1", "bn1", "relu1") == [
            *("niq.ConvReLU1d", "niq.ConvReLU2d", "Identity", "Identity")
        ]
        assert kinds(model, "sub1.conv", "sub1.bn") == ["nq.Conv2d", "Identity"]
        assert kinds(model, "sub2.conv", "sub2.relu", "bn2") == ["Conv2d", "ReLU", "niq.BNReLU3d"]
        evaluate(model)
        assert_no_qconfig(model)

    original = mixed(ao, ao.default_qconfig)
    model: Any = to_torch_ao(fuse_modules(original, EVAL), inplace=True)
    assert torch.allclose(model(X1), original(X1), rtol=1e-4, atol=1e-4)
    assert kinds(model, "conv1", "conv1.0", "conv1.1") == ["ni.ConvReLU2d", "Conv2d", "ReLU"]
    assert kinds(model, "bn1", "relu1") == ["Identity", "Identity"]
    assert kinds(model, "conv2", "conv2.0", "conv2.1") == ["ni.ConvReLU3d", "Conv3d", "ReLU"]
    assert kinds(model, "relu2", "bn2", "relu3") == ["Identity", "ni.BNReLU3d", "Identity"]
    assert kinds(model, "conv3", "conv3.0", "conv3.1") == ["ni.ConvReLU1d", "Conv1d", "ReLU"]
    assert kinds(model, "bn3", "sub1.conv", "sub1.bn") == ["Identity", "Conv2d", "Identity"]
    assert kinds(model, "sub2.conv", "sub2.relu") == ["Conv2d", "ReLU"]
    model = ao.prepare(model)
    assert_observed(model, below=("sub2", "fc"))
    evaluate(model)
    assert_quantized(ao.convert(model))

    model = to_torch_ao(fuse_modules(mixed(ao, ao.default_qconfig), EVAL[1:] + EVAL[:1]), inplace=True)
    assert_quantized(ao.quantize(model, evaluate, [[X1]]))


def assert_rows(model: nn.Module, layer: str, triple: str, linear: str) -> None:
    assert kinds(model, "conv1", "relu1") == [layer, "Identity"]
    for number in range(3):
        paths = (f"features.{number}.{name}" for name in range(3))
        assert kinds(model, *paths) == [triple, "Identity", "Identity"]
    assert kinds(model, "classifier.0", "classifier.1") == [linear, "Identity"]


def test_fusion_sequential_model_train(ao: Any, engine: str) -> None:
    model: Any = randomise(Rows(ao), 0).train()
    to_torch_ao(fuse_modules_qat(model, ROWS, inplace=True), inplace=True)
    assert_rows(model, "ni.ConvReLU2d", "ni.ConvBnReLU2d", "ni.LinearReLU")
    assert kinds(model, "conv1.0", "conv1.1") == ["Conv2d", "ReLU"]
    model.qconfig = ao.get_default_qat_qconfig(engine)
    ao.prepare_qat(model, inplace=True)
    assert_observed(model, below=("none",))
    model(X2)
    assert_rows(model, "niqat.ConvReLU2d", "niqat.ConvBnReLU2d", "niqat.LinearReLU")
    model(X2)
    ao.convert(model.eval(), inplace=True)
    model(X2)
    assert_rows(model, "niq.ConvReLU2d", "niq.ConvReLU2d", "niq.LinearReLU")


def test_fusion_sequential_model_eval(ao: Any, engine: str) -> None:
    model: Any = randomise(Rows(ao), 0)
    expected = model(X2)
    to_torch_ao(fuse_modules(model, ROWS, inplace=True), inplace=True)
    assert torch.allclose(model(X2), expected, rtol=1e-4, atol=1e-3)
    assert_rows(model, "ni.ConvReLU2d", "ni.ConvReLU2d", "ni.LinearReLU")
    assert kinds(model, "conv1.0", "conv1.1") == ["Conv2d", "ReLU"]
    model.qconfig = ao.get_default_qconfig(engine)
    ao.prepare(model, inplace=True)
    assert_observed(model, below=("none",))
    model(X2)
    ao.convert(model, inplace=True)
    model(X2)
    assert_rows(model, "niq.ConvReLU2d", "niq.ConvReLU2d", "niq.LinearReLU")


def test_fusion_conv_with_bias(ao: Any, engine: str) -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 2, 5, bias=True), nn.BatchNorm2d(2)
            self.relu1 = nn.ReLU(inplace=True)
            self.conv2, self.bn2 = nn.Conv2d(2, 2, 1, bias=True), nn.BatchNorm2d(2)
            self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu1(self.bn1(self.conv1(self.quant(x))))
            out: Tensor = self.dequant(self.bn2(self.conv2(x)))
            return out

    original: Any = randomise(Biased(), 0).train()
    reference = copy.deepcopy(original)
    expected = reference(X2)
    original.qconfig = ao.QConfig(activation=nn.Identity, weight=nn.Identity)
    fused = fuse_modules_qat(original, [["conv1", "bn1", "relu1"], ["conv2", "bn2"]])
    model: Any = to_torch_ao(fused, inplace=True)
    prepared = ao.prepare_qat(model, inplace=False)
    torch.testing.assert_close(prepared(X2), expected)
    for norm, inside in ((reference.bn1, prepared.conv1.bn), (reference.bn2, prepared.conv2.bn)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            torch.testing.assert_close(getattr(inside, name), getattr(norm, name))
    model.qconfig = ao.get_default_qat_qconfig(engine)
    ao.prepare_qat(model, inplace=True)
    model(X2)
    assert kinds(model, "conv1", "bn1", "relu1") == ["niqat.ConvBnReLU2d", "Identity", "Identity"]
    assert kinds(model, "conv2", "bn2") == ["niqat.ConvBn2d", "Identity"]


def assert_same_after_training_steps(model: Any, shape: tuple[int, ...], groups: Any, norms: Any) -> None:
    model.train()
    model(images(*shape, seed=2))  # for statistics of its own
    model.eval()
    expected = model(images(*shape))
    fused = fuse_modules(model, groups)
    assert kinds(fused, *norms) == ["Identity"] * len(norms)
    torch.testing.assert_close(fused(images(*shape)), expected, rtol=1e-4, atol=1e-4)


def test_fusion_linear_bn_eval() -> None:
    model = randomise(Block(fc=nn.Linear(20, 10), bn=nn.BatchNorm1d(10)), 0)
    assert_same_after_training_steps(model, (8, 20), [["fc", "bn"]], ["bn"])


def test_fusion_convtranspose_bn_eval() -> None:
    class Rising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.ConvTranspose1d(3, 3, 1), nn.BatchNorm1d(3)
            self.conv2, self.bn2 = nn.ConvTranspose2d(3, 3, 1), nn.BatchNorm2d(3)
            self.conv3, self.bn3 = nn.ConvTranspose3d(3, 3, 1), nn.BatchNorm3d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn1(self.conv1(x))
            x = self.bn2(self.conv2(x.unsqueeze(2)))
            out: Tensor = self.bn3(self.conv3(x.unsqueeze(2)))
            return out

    groups = [["conv1", "bn1"], ["conv2", "bn2"], ["conv3", "bn3"]]
    assert_same_after_training_steps(randomise(Rising(), 0), (8, 3, 16), groups, ["bn1", "bn2", "bn3"])


@pytest.mark.parametrize("groups", [[["fc1"]], ["fc1"]])
@pytest.mark.parametrize(("fuse", "is_qat"), [(fuse_modules, False), (fuse_modules_qat, True)])
def test_fuse_function_customization(fuse: Callable[..., nn.Module], is_qat: bool, groups: Any) -> None:
    model: Any = randomise(Block(fc1=nn.Linear(5, 5)), 0)
    seen: list[Any] = []

    def fuser(modules: Any, qat: bool, mapping: Any) -> list[nn.Module]:
        seen.append((modules, qat, mapping))
        return [nn.Identity()]

    fused: Any = fuse(model, groups, fuser_func=fuser)
    assert [type(module) for module in (fused.fc1, model.fc1)] == [nn.Identity, nn.Linear]
    (((layer,), qat, mapping),) = seen
    assert (type(layer), qat, mapping) == (nn.Linear, is_qat, {})


def test_a_fuser_for_one_class_takes_a_group_of_one() -> None:
    model: Any = randomise(Block(fc1=nn.Linear(5, 4), act=nn.Tanh()), 0)
    mapping = {(nn.Linear,): lambda is_qat, layer: nn.Sequential(layer, nn.Dropout())}
    fused: Any = fuse_modules(
        model, [["fc1"]], fuse_custom_config_dict={"additional_fuser_method_mapping": mapping}
    )
    assert [type(module) for module in fused.fc1] == [nn.Linear, nn.Dropout]
    assert torch.equal(fused(images(2, 5)), model(images(2, 5)))


@pytest.mark.parametrize("inplace", [False, True])
def test_forward_hooks_preserved(ao: Any, inplace: bool) -> None:
    model = mixed(ao, ao.default_qat_qconfig).train()
    counts = {"pre": 0, "post": 0}
    expected: dict[str, type] = {}

    def counting(kind: str, unit: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            assert not expected or type(module) is expected[unit]
            counts[kind] += 1

        return hook

    model.conv1.register_forward_pre_hook(counting("pre", "conv1"))
    model.sub1.conv.register_forward_pre_hook(counting("pre", "sub1"))
    model.relu1.register_forward_hook(counting("post", "conv1"))
    model.sub1.bn.register_forward_hook(counting("post", "sub1"))
    evaluate(model)
    assert counts == {"pre": 2, "post": 2}
    model = to_torch_ao(fuse_modules_qat(model, ["conv1", "bn1", "relu1"], inplace), inplace=True)
    model = to_torch_ao(fuse_modules_qat(model, ["sub1.conv", "sub1.bn"], inplace), inplace=True)
    intrinsic = torch_ao_qat.torch_ao("nn.intrinsic")
    expected |= {"conv1": intrinsic.ConvBnReLU2d, "sub1": intrinsic.ConvBn2d}
    evaluate(model)
    assert counts == {"pre": 4, "post": 4}
