from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, fx, nn

import graphprune as gp
from graphprune.data import evaluate, load_data
from graphprune.errors import DataError
from graphprune.program import Program


class _Brightness(nn.Module):
    """Tells dark from bright; label 1 is bright."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


class _Tuple(_Brightness):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


def _program(module: nn.Module, shape: tuple[int, ...], *, dynamic_batch: bool) -> Program:
    return Program(
        module=fx.symbolic_trace(module),
        example_inputs=(torch.zeros(shape),),
        dialect="fx",
        dynamic_batch=dynamic_batch,
        source="test",
    )


def _two_tones(folder: Path, *, names: tuple[str, str] = ("dark", "light")) -> None:
    for name, value in zip(names, (0, 255), strict=True):
        (folder / name).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(
                folder / name / f"{index}.png"
            )


def test_digits_are_split_once_and_for_all() -> None:
    source = load_data("digits")
    assert (source.input_shape, source.num_classes) == ((1, 8, 8), 10)
    train = torch.cat([labels for _, labels in source.train(100, shuffle=False)])
    test = torch.cat([labels for _, labels in source.test(100)])
    assert (len(train), len(test)) == (1437, 360)
    assert test.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    images, _ = next(iter(source.test(360)))
    assert images.dtype == torch.float32
    assert (images.min().item(), images.max().item()) == (0.0, 1.0)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'graphprune\[demo\]'"):
        load_data("digits")


def test_the_seed_decides_the_order_and_the_chosen_samples() -> None:
    source = load_data("digits")

    def labels(seed: int, limit: int | None) -> list[int]:
        return torch.cat([batch for _, batch in source.train(64, seed=seed, limit=limit)]).tolist()

    assert labels(0, None) == labels(0, None)
    assert labels(0, None) != labels(1, None)
    assert labels(0, 100) == labels(0, 100)
    assert sorted(labels(0, 100)) != sorted(labels(1, 100))
    assert len(labels(0, 100)) == 100


def test_a_limited_test_set_is_spread_over_the_whole() -> None:
    source = load_data("digits")
    whole = torch.cat([labels for _, labels in source.test(360)])
    some = torch.cat([labels for _, labels in source.test(7, limit=36)])
    assert some.tolist() == whole[::10].tolist()


def test_normalize_and_size() -> None:
    plain, _ = next(iter(load_data("digits").test(8)))
    half, _ = next(iter(load_data("digits,normalize=0.5").test(8)))
    numbers, _ = next(iter(load_data("digits,normalize=0.25:0.5").test(8)))
    torch.testing.assert_close(half, (plain - 0.5) / 0.5)
    torch.testing.assert_close(numbers, (plain - 0.25) / 0.5)
    assert load_data("digits,size=16").input_shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digits,colour=red", "unknown option 'colour'; known: normalize, size"),
        ("digits,size=0", "expected size=N with N at least 1, found size=0"),
        ("digits,size=big", "found size=big"),
        ("digits,holdout=0", "a fraction that leaves samples in both parts of 1437, found 0.0"),
        ("digits,holdout=some", "expected holdout= to be a fraction, found 'some'"),
        ("digits,size=8,size=9", "option 'size' is given twice"),
        ("digits,normalize=imagenet", "gives 3 channels, the images have 1"),
        ("digits,normalize=often", "expected normalize= one of imagenet, .*found 'often'"),
        ("digits,normalize=0.5:0", "needs positive standard deviations"),
        ("cifar10", "expected cifar10:DIR, found 'cifar10'; the folder holds cifar-10-batches-py/"),
        ("cifar10:nowhere", "found no folder at 'nowhere'"),
        ("mnist:nowhere", "expected a folder with MNIST/raw/"),
        ("what", "expected data as one of cifar10:DIR, .*package.module:function, found 'what'"),
        ("no_such_module:make", "cannot import 'no_such_module'"),
        (
            "os.path:no_such_function",
            "module 'os.path' has no function or class 'no_such_function'",
        ),
        ("os.path:join,size=3", "a function takes no options, found size"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(spec)


@pytest.mark.parametrize("kind", ["cifar10", "mnist", "fashion-mnist", "imagefolder"])
def test_an_empty_folder_says_what_belongs_there(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected .* in "):
        load_data(f"{kind}:{tmp_path}")


def test_damaged_cifar10_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps({}))
    with pytest.raises(DataError, match="missing, incomplete or damaged"):
        load_data(f"cifar10:{tmp_path}")


def test_mnist_in_torchvisions_layout(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 3), ("t10k", 2)):
        header = np.array([2051, count, 28, 28], ">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + bytes([255]) * (count * 784))
        header = np.array([2049, count], ">i4").tobytes()
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + bytes(range(count)))
    source = load_data(f"mnist:{tmp_path},normalize=none")
    images, labels = next(iter(source.train(10, shuffle=False)))
    assert source.input_shape == (1, 28, 28)
    assert images.shape == (3, 1, 28, 28)
    assert images.unique().tolist() == [1.0]
    assert labels.tolist() == [0, 1, 2]


def test_an_image_folder_with_train_and_val(tmp_path: Path) -> None:
    folder = tmp_path / "with, comma"
    _two_tones(folder / "train")
    _two_tones(folder / "val")
    source = load_data(f"imagefolder:{folder},size=16,normalize=0.5")
    assert (source.input_shape, source.num_classes) == ((3, 16, 16), 2)
    images, labels = next(iter(source.test(6)))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images[:3].unique().tolist() == [-1.0]
    assert images[3:].unique().tolist() == [1.0]


def test_one_image_folder_serves_as_both(tmp_path: Path) -> None:
    _two_tones(tmp_path)
    source = load_data(f"imagefolder:{tmp_path}")
    assert source.input_shape == (3, 224, 224)
    assert source.split("train") is source.split("test")


def test_image_folders_must_agree(tmp_path: Path) -> None:
    _two_tones(tmp_path / "train")
    with pytest.raises(DataError, match=r"expected val/ or test/ beside"):
        load_data(f"imagefolder:{tmp_path}")
    _two_tones(tmp_path / "test", names=("dark", "bright"))
    with pytest.raises(DataError, match="expected the same class folders in both"):
        load_data(f"imagefolder:{tmp_path}")


def test_a_function_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_data_for_test.py").write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "def make():\n"
        "    x, y = torch.rand(6, 2, 4), torch.arange(6) % 3\n"
        "    return TensorDataset(x, y), TensorDataset(x[:3], y[:3])\n"
        "def wrong():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    source = load_data("my_data_for_test:make")
    assert (source.input_shape, source.num_classes) == ((2, 4), 3)
    assert [len(labels) for _, labels in source.train(4)] == [4, 2]
    with pytest.raises(
        DataError, match=r"expected wrong\(\) to return \(train_dataset, test_dataset\)"
    ):
        load_data("my_data_for_test:wrong")
    assert str(tmp_path) not in sys.path


def test_a_holdout_is_a_part_of_the_training_set() -> None:
    whole, part = load_data("digits,size=4"), load_data("digits,holdout=0.1,size=4")
    assert (part.name, part.input_shape) == ("digits,holdout=0.1,size=4", (1, 4, 4))
    train = torch.cat([x for x, _ in part.train(2000, shuffle=False)])
    held = torch.cat([x for x, _ in part.test(2000)])
    assert (len(train), len(held)) == (1293, 144)
    both, everything = torch.cat([train, held]), next(iter(whole.train(2000, shuffle=False)))[0]
    assert torch.equal(both.sum((1, 2, 3)).sort()[0], everything.sum((1, 2, 3)).sort()[0])
    assert [len(x) for x, _ in part.train(64, limit=100)] == [64, 36]


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_accuracy_of_modules_and_programs(tmp_path: Path, dynamic_batch: bool) -> None:
    _two_tones(tmp_path)
    loader = load_data(f"imagefolder:{tmp_path},size=16").test(4)
    module = _Brightness().train()
    assert evaluate(module, loader) == 1.0
    assert module.training
    # A batch of 4 does not divide 6 samples: the fixed program's last batch is filled up and cut again.
    shape = (4 if dynamic_batch else 3, 3, 16, 16)
    assert evaluate(_program(module.eval(), shape, dynamic_batch=dynamic_batch), loader) == 1.0
    assert evaluate(_Tuple().eval(), loader) == 1.0


def test_accuracy_counts_wrong_answers(tmp_path: Path) -> None:
    _two_tones(tmp_path, names=("z-dark", "a-bright"))
    loader = load_data(f"imagefolder:{tmp_path},size=16").test(4)
    assert evaluate(_Brightness(), loader) == 0.0


def test_samples_that_do_not_fit_the_model(tmp_path: Path) -> None:
    _two_tones(tmp_path)
    loader = load_data(f"imagefolder:{tmp_path},size=16").test(4)
    with pytest.raises(DataError, match="takes samples of shape 3x32x32, the data gives 3x16x16"):
        evaluate(_program(_Brightness(), (2, 3, 32, 32), dynamic_batch=True), loader)
    with pytest.raises(
        DataError, match=r"expected logits of shape \(4, classes\), found \(4, 3, 16, 16\)"
    ):
        evaluate(nn.Identity(), loader)
    with pytest.raises(DataError, match="found label 9, but the model tells 2 classes apart"):
        evaluate(_Brightness(), load_data("digits").test(64))
    with pytest.raises(
        DataError, match=r"one integer label per sample, found targets float32\[4, 1\]"
    ):
        evaluate(_Brightness(), load_data("tests.training.networks:regression_data").test(4))


def test_targets_that_are_no_labels_give_no_accuracy() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 1)).eval()
    result = gp.compile(
        model, torch.randn(1, 1, 8, 8), data="tests.training.networks:regression_data", export=False
    )
    assert result.report.after.accuracy is None


@pytest.mark.slow
def test_real_cifar10_comes_through_unchanged(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(shared_data / "cifar10"))
    unpack_cifar = importlib.import_module("unpack_cifar")
    archive = str(shared_data / "cifar10" / "cifar10.npz")
    unpack_cifar.write10(*unpack_cifar.read(archive), str(tmp_path))
    x_train, y_train, x_test, y_test = unpack_cifar.load(archive)
    source = load_data(f"cifar10:{tmp_path},normalize=none")
    assert (source.input_shape, source.num_classes) == ((3, 32, 32), 10)
    for loader, x, y in (
        (source.train(50, shuffle=False), x_train, y_train),
        (source.test(50), x_test, y_test),
    ):
        images, labels = next(iter(loader))
        assert torch.equal((images * 255).round().byte(), torch.as_tensor(x[:50]))
        assert labels.tolist() == list(y[:50])
    assert sum(len(labels) for _, labels in source.test(1000)) == 10_000
