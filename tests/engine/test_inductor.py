"""Programs that inductor really compiles: what comes out, and how it is kept."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffloss_engine import BackendError, BackendUnavailableError, InputError, TensorSpec
from diffloss_engine.inductor import compile_program, has_bfloat16, open_compiled, package_key
from diffloss_engine.plan_cache import PlanCache

CPU = torch.device("cpu")
IMAGE = TensorSpec("image", "float32", (2, 4, 8, 8))
MEANS = TensorSpec("means", "float32", (2, 6))
SUM = TensorSpec("sum", "float32", (2,))


class Program(nn.Module):
    """A convolution whose weights are a buffer, and two results."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("kernel", torch.randn(6, 4, 3, 3, generator=generator))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        means = torch.tanh(F.conv2d(image, self.get_buffer("kernel"), padding=1)).mean((2, 3))
        return means, means.sum(1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a plan cache's folder, which is the user's."""
    monkeypatch.setenv("DIFFLOSS_CACHE", str(tmp_path / "plans"))
    return tmp_path / "plans"


@pytest.fixture(scope="module")
def package() -> bytes:
    """Return a compiled `Program`."""
    return compile_program(Program(), [torch.zeros(IMAGE.shape)])


def refuse() -> bytes:
    raise AssertionError("nothing was to be compiled")


KEY = package_key("a" * 64, "b" * 64, "float32", [IMAGE], CPU)


def test_a_compiled_program_computes_the_same(package: bytes) -> None:
    session = open_compiled(KEY, lambda: package, [IMAGE], [MEANS, SUM], CPU)
    assert session.backend == "inductor"
    # Not as it was compiled for: other strides, and a gradient asked for.
    image = torch.randn(2, 8, 8, 4).permute(0, 3, 1, 2).requires_grad_()
    found = session({"image": image})
    for name, expected in zip(("means", "sum"), Program()(image), strict=True):
        torch.testing.assert_close(found[name], expected.detach())
    assert not torch.allclose(found["sum"], Program(seed=1)(image)[1])
    again = session({"image": -image})
    assert not torch.equal(found["sum"], again["sum"])  # what was returned before is left alone
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session({"image": image})


def test_what_is_compiled_for_a_cpu_is_the_prepared_program(package: bytes) -> None:
    with zipfile.ZipFile(BytesIO(package)) as files:
        kernels = "".join(files.read(name).decode() for name in files.namelist() if name.endswith(".kernel.cpp"))
    assert ".exp()" in kernels
    assert "tanh()" not in kernels


class Residual(Program):
    """What convolutions are added to is read again afterwards: `read`, computed from it where it is used."""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        def convolve(x: Tensor) -> Tensor:
            kernel = self.get_buffer("kernel")[:4] / 6  # for results of order one, as the tolerances expect them
            result: Tensor = torch.ops.aten.convolution(x, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
            return result

        stream = torch.tanh(image)
        read = stream * stream + 1
        total = convolve(convolve(torch.tanh(read))) + stream
        return total, read * convolve(total)


def test_a_sum_does_not_overwrite_what_is_read_later() -> None:
    image = torch.randn(IMAGE.shape)
    results = [TensorSpec(name, "float32", IMAGE.shape) for name in ("total", "product")]
    session = open_compiled(KEY, lambda: compile_program(Residual(), [image]), [IMAGE], results, CPU)
    found = session({"image": image})
    for name, expected in zip(("total", "product"), Residual()(image), strict=True):
        torch.testing.assert_close(found[name], expected)


class FirstOfGroups(nn.Module):
    """The first 16 of 27 channels, in groups of 9, each times its group's factor."""

    def forward(self, image: Tensor, factors: Tensor) -> tuple[Tensor, ...]:
        factors = factors.expand(-1, -1, 9).reshape(2, 1, 27)
        return ((image * factors)[..., :16] + 1,)


@pytest.mark.slow
def test_a_loop_over_part_of_a_group_is_whole() -> None:
    inputs = {"image": torch.randn(2, 8, 27), "factors": torch.randn(2, 3, 1)}
    specs = [TensorSpec(name, "float32", tuple(tensor.shape)) for name, tensor in inputs.items()]
    result = TensorSpec("result", "float32", (2, 8, 16))
    session = open_compiled(KEY, lambda: compile_program(FirstOfGroups(), [*inputs.values()]), specs, [result], CPU)
    torch.testing.assert_close(session(inputs)["result"], *FirstOfGroups()(*inputs.values()))


def test_it_is_compiled_once(package: bytes, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiled = []

    def build() -> bytes:
        compiled.append(True)
        return package

    with caplog.at_level(logging.INFO):
        for _ in range(2):
            open_compiled(KEY, build, [IMAGE], [MEANS, SUM], CPU)
    assert len(compiled) == 1
    assert [record.getMessage() for record in caplog.records if record.name.startswith("diffloss")] == [
        "compiling a program with inductor, which takes minutes the first time"
    ]
    (path,) = folder.glob("*.plan")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_one_is_compiled_again(package: bytes, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    PlanCache().get(KEY, lambda: package)
    (path,) = folder.glob("*.plan")
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    open_compiled(KEY, lambda: package, [IMAGE], [MEANS, SUM], CPU)
    assert "content is not what was written" in caplog.text
    open_compiled(KEY, refuse, [IMAGE], [MEANS, SUM], CPU)


def of_another_system(package: bytes) -> bytes:
    """Return a compiled program whose library asks for a C library that no system has."""
    content, changed = BytesIO(package), BytesIO()
    with zipfile.ZipFile(content) as files, zipfile.ZipFile(changed, "w") as copy:
        for file in files.infolist():
            data = files.read(file)
            if file.filename.endswith(".so"):
                assert b"libc.so.6\0" in data
                data = data.replace(b"libc.so.6\0", b"libc.so.9\0")
            copy.writestr(file, data)
    return changed.getvalue()


@pytest.mark.parametrize("broken", [lambda _: b"nothing of the kind", of_another_system])
def test_one_that_cannot_be_loaded_is_compiled_again(
    broken: Callable[[bytes], bytes], package: bytes, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    PlanCache().get(KEY, lambda: broken(package))
    session = open_compiled(KEY, lambda: package, [IMAGE], [MEANS, SUM], CPU)
    image = torch.randn(IMAGE.shape)
    torch.testing.assert_close(session({"image": image})["sum"], Program()(image)[1])
    (said,) = [record.getMessage() for record in caplog.records if record.name == "diffloss_engine.plan_cache"]
    assert "is not used and set aside as" in said
    assert "it cannot be loaded: " in said
    open_compiled(KEY, refuse, [IMAGE], [MEANS, SUM], CPU)
    assert len(list(folder.glob("*.rejected"))) == 1


def test_one_that_does_not_fit_into_memory_stays(package: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled anew would be no smaller."""

    def load(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    PlanCache().get(KEY, lambda: package)
    with monkeypatch.context() as patch:
        patch.setattr("torch._inductor.aoti_load_package", load)
        with pytest.raises(BackendUnavailableError, match="cannot be loaded: CUDA out of memory"):
            open_compiled(KEY, refuse, [IMAGE], [MEANS, SUM], CPU)
    open_compiled(KEY, refuse, [IMAGE], [MEANS, SUM], CPU)
    assert not list(folder.glob("*.rejected"))


def test_what_is_no_compiled_program_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="cannot be loaded"):
        open_compiled(KEY, lambda: b"nothing of the kind", [IMAGE], [MEANS, SUM], CPU)


def test_another_number_of_results_is_an_error(package: bytes) -> None:
    session = open_compiled(KEY, lambda: package, [IMAGE], [MEANS], CPU)
    with pytest.raises(BackendError, match="inductor program returned 2 values, expected 1"):
        session({"image": torch.zeros(IMAGE.shape)})


def test_inputs_are_checked(package: bytes) -> None:
    session = open_compiled(KEY, lambda: package, [IMAGE], [MEANS, SUM], CPU)
    with pytest.raises(InputError, match="shape"):
        session({"image": torch.zeros(1, 4, 8, 8)})


@pytest.mark.parametrize(
    "other",
    [
        package_key("c" * 64, "b" * 64, "float32", [IMAGE], CPU),
        package_key("a" * 64, "c" * 64, "float32", [IMAGE], CPU),
        package_key("a" * 64, "b" * 64, "bfloat16", [IMAGE], CPU),
        package_key("a" * 64, "b" * 64, "float32", [MEANS], CPU),
    ],
    ids=["graph", "program", "precision", "inputs"],
)
def test_what_a_program_depends_on_is_in_its_key(other: dict[str, object], package: bytes) -> None:
    PlanCache().get(KEY, lambda: package)
    with pytest.raises(AssertionError, match="nothing was to be compiled"):
        PlanCache().get(other, refuse)


def test_key_names_version_and_processor() -> None:
    assert KEY["version"] == torch.__version__
    assert KEY["cpu"]["name"]
    assert KEY["gpu"] is None
    capabilities = torch.cpu.get_capabilities()
    assert set(KEY["cpu"]["features"]) == {name for name, value in capabilities.items() if value is True}


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16", None])
def test_has_bfloat16(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **({name: True} if name else {})})
    assert has_bfloat16(CPU) is (name is not None)


class Branching(Program):
    """Its result depends on a value, which no graph can say."""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return super().forward(image) if image.sum() > 0 else (image, image)


def test_what_the_compiler_says_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Such as which header is not installed; the first line of the error is "C++ compile error"."""
    import torch._inductor.config as config

    said = "model.h:15:10: fatal error: cuda.h: No such file or directory"
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in --version) echo g++ 14;; *) echo "{said}" >&2; exit 1;; esac\n')
    compiler.chmod(0o700)
    with (
        config.patch({"cpp.cxx": (str(compiler),)}),
        pytest.raises(BackendUnavailableError, match=rf"{said}$"),
    ):
        compile_program(Program(), [torch.zeros(IMAGE.shape)])


@pytest.mark.parametrize("traceable", [True, False], ids=["no compiler", "untraceable"])
def test_what_cannot_be_compiled_is_an_error(traceable: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._inductor.config as config

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(BackendUnavailableError, match=r"inductor cannot compile the program here: ."),
    ):
        compile_program(Program() if traceable else Branching(), [torch.zeros(IMAGE.shape)])
    assert not [path for path in tmp_path.iterdir() if path.name != "plans"]  # no hundreds of megabytes are left
