"""The command as a user types it: what it prints, where, and its exit status; children are real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from diffloss_engine.bundle import MANIFEST, Bundle, file_sha256
from diffloss_engine.bundle_writer import BundleWriter
from diffloss_engine.errors import BundleError
from diffloss_export.cli import main
from diffloss_trt import __version__
from diffloss_trt.contract import UNET_WEIGHTS
from exports import Exported, edit_json, rehash, repoint, without_gradient

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """(*arguments) -> exit status, stdout, stderr of the command in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def refusal(stderr: str) -> str:
    """Return the one line that says what is wrong, without the lines that say what is being done."""
    (line,) = (line for line in stderr.splitlines() if not line.startswith("["))
    assert line.startswith("diffloss-export")
    return line


def child(command: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    # Another order of sets than here, and as many threads, by which sums may be rounded differently.
    environment = os.environ | {"PYTHONHASHSEED": "4321", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


@pytest.fixture(scope="session")
def exported_by_command(
    command: list[str], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    destination = tmp_path_factory.mktemp("by_command") / "bundle"
    return destination, child(command, "onnx", model_folder, "-o", destination, "--batch-size", 2)


def test_onnx_writes_a_bundle_and_says_what_it_is(
    exported_by_command: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    destination, done = exported_by_command
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{destination}: 4 graphs, fp32, 16x16, batch 2; replayed on onnxruntime, worst difference")
    stages = [line.partition("] ")[2] for line in done.stderr.splitlines()]
    assert stages[0].startswith("loading ")
    assert stages[1:] == [
        "writing the UNet",
        "exporting the encoder graph",
        "exporting the noise_head graph",
        "exporting the gradient graph",
        "exporting the semantic_gradient graph",
        "widening the UNet to float64",
        "computing what the gradient graph should return",
        "computing what the semantic_gradient graph should return",
        "checking hashes",
        "replaying the encoder graph",
        "replaying the noise_head graph",
        "replaying the gradient graph",
        "replaying the semantic_gradient graph",
        "comparing loss and gradient of PyTorch's backward",
    ]
    Bundle.open(destination).verify_hashes()


def test_another_process_writes_the_same_bytes(
    exported_by_command: tuple[Path, subprocess.CompletedProcess[str]], bundle: Bundle, model_folder: Path
) -> None:
    """As this one did, of a UNet that had never been in a file, with another order of sets."""
    folders = exported_by_command[0], bundle.path
    one, other = ({str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
    assert one == other
    for content in one.values():
        assert str(model_folder.parent).encode() not in content
        assert str(Path.home()).encode() not in content or str(Path.home()) == "/"


def wait_for(stderr: Iterator[str], stage: str) -> None:
    assert any(stage in line for line in stderr), f"the child ended before {stage!r}"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_interrupted_export_leaves_no_bundle(
    command: list[str], model_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    destination = tmp_path / "bundle"
    # A shell starts jobs in the background with SIGINT ignored, and children inherit that.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [*command, "onnx", str(model_folder), "-o", str(destination), "--batch-size", "1"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, handler)
    with process:
        assert process.stderr is not None
        assert process.stdout is not None
        wait_for(iter(process.stderr), "exporting the encoder graph")
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.stdout.read() == ""
    assert not destination.exists()
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        # Where it arrives in a weak reference's callback Python says so, and the next step ends the command.
        assert rest.splitlines()[-1] == "diffloss-export: interrupted, no bundle was written"
        assert "exporting the gradient graph" not in rest
        assert list(tmp_path.iterdir()) == []
        return
    assert process.returncode == -signal.SIGKILL
    (part,) = tmp_path.iterdir()
    assert part.name.startswith(".bundle.partial-")
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        Bundle.open(part)
    # Nor is it in the way of the next attempt.
    BundleWriter(destination)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interrupt_that_a_library_takes_for_its_own_failure(
    run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify_bundle(*_: object, **__: object) -> NoReturn:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise BundleError("it is damaged") from error
        raise AssertionError

    monkeypatch.setattr("diffloss_export.verify.verify_bundle", verify_bundle)
    assert run("verify", bundle.path) == (143, "", "diffloss-export: interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_what_is_ignored_stays_ignored(run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C is where a script has started the command in the background."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}

    def verify_bundle(*_: object, **__: object) -> NoReturn:
        for number in numbers:
            signal.raise_signal(number)
        raise BundleError("and it went on")

    monkeypatch.setattr("diffloss_export.verify.verify_bundle", verify_bundle)
    try:
        assert run("verify", bundle.path) == (2, "", "diffloss-export: and it went on\n")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def test_help_and_wrong_options_do_not_wait_for_torch() -> None:
    code = (
        "import sys, contextlib\nfrom diffloss_export.cli import main\n"
        "for arguments in (['--help'], ['onnx', '--help'], ['onnx', 'builtin'], ['bench']):\n"
        "    with contextlib.suppress(SystemExit): main(arguments)\n"
        "sys.exit(bool({'torch', 'diffusers', 'onnx', 'rich', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "onnx" in done.stdout
    assert "--precision" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["onnx", "builtin"], "required: -o/--output"),
        (["onnx", "builtin", "-o", "x", "--precision", "int8"], "invalid choice: 'int8'"),
        (["onnx", "builtin", "-o", "x", "--batch-size", "two"], "invalid int value: 'two'"),
        (["onnx", "builtin", "-o", "x", "--resolution", "16x"], "'16x' is not a resolution such as 256 or 192x256"),
        (["onnx", "builtin", "-o", "x", "--resolution", "-16"], "resolution"),
        (["verify"], "required: BUNDLE"),
        (["verify", "x", "--backend", "abacus"], "invalid choice: 'abacus'"),
        (["inspect", "x", "--yaml"], "unrecognized arguments: --yaml"),
        (["onnx", "builtin", "-o", ""], "argument -o/--output: the path is empty"),
        (["onnx", "x.pt", "-o", "x", "--adm-flags", ""], "argument --adm-flags: the path is empty"),
        *(
            ([name, ""], "argument BUNDLE: the path is empty")
            for name in ("build", "verify", "bench", "profile", "inspect", "doctor")
        ),
        (["build", "x", "--timing-cache", ""], "argument --timing-cache: the path is empty"),
        (["profile", "x", "-o", ""], "argument -o/--output: the path is empty"),
        (["explain", "--restored", ""], "argument --restored: the path is empty"),
        (["explain", "--target", ""], "argument --target: the path is empty"),
        (["explain", "--bundle", ""], "argument --bundle: the path is empty"),
    ],
)
def test_wrong_usage_is_one_line(run: Run, arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in refusal(err)


@pytest.mark.parametrize("damage", ["batch size", "no ONNX Runtime"])
def test_what_no_model_could_mend_is_refused_before_one_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    options = ["--batch-size", 0] if damage == "batch size" else []
    if not options:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, out, err = run("onnx", tmp_path / "no model", "-o", tmp_path / "bundle", *options)
    assert (status, out) == (2, "")
    assert ("batch size is 0" if options else "onnxruntime") in refusal(err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", 0], "batch size is 0; expected 1 to 4096"),
        (["--batch-size", -3], "batch size is -3; expected 1 to 4096"),
        (["--resolution", 17], "resolution is 17x17; this UNet takes heights and widths that are multiples of 8"),
        (["--resolution", "16x9"], "resolution is 16x9; this UNet takes heights and widths that are multiples of 8"),
        (["--resolution", 0], "resolution is 0x0"),
        (["--revision", "main"], "revision"),
        (["--allow-pickle"], "allow_pickle is for diffusers folders and Hub ids only; the model is 'builtin'"),
    ],
)
def test_settings_that_do_not_fit_the_model(run: Run, tmp_path: Path, options: list[object], message: str) -> None:
    status, out, err = run("onnx", "builtin", "-o", tmp_path / "bundle", *options)
    assert (status, out) == (2, "")
    assert message in refusal(err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workspace", [-1, 0, 2**43, 99999999999999])
def test_a_workspace_that_no_builder_takes(run: Run, bundle: Bundle, workspace: int) -> None:
    """Its bytes are a number of 64 bits."""
    status, out, err = run("build", bundle.path, "--workspace", workspace)
    assert (status, out) == (2, "")
    assert "MiB; expected 1 to 8796093022207" in refusal(err)


@pytest.mark.parametrize("model", ["no-such-model", "./no/such/folder", "/nonexistent", ""])
def test_unknown_model(run: Run, tmp_path: Path, model: str) -> None:
    status, out, err = run("onnx", model, "-o", tmp_path / "bundle")
    assert (status, out) == (2, "")
    assert model in refusal(err)
    assert list(tmp_path.iterdir()) == []


def test_destination_is_refused_before_the_model_is_looked_for(run: Run, bundle: Bundle, tmp_path: Path) -> None:
    status, out, err = run("onnx", "no-such-model", "-o", bundle.path)
    assert (status, out) == (2, "")
    assert err == f"diffloss-export: {bundle.path} exists already, and overwriting was not asked for (--overwrite)\n"
    status, _, err = run("onnx", "no-such-model", "-o", tmp_path / "missing" / "bundle")
    assert (status, "does not exist" in refusal(err)) == (2, True)
    (tmp_path / "notes.txt").write_text("mine")
    status, _, err = run("onnx", "no-such-model", "-o", tmp_path, "--overwrite")
    assert (status, "is not overwritten, because it is not a bundle" in refusal(err)) == (2, True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwrite_replaces_a_bundle(run: Run, model_folder: Path, copied: Callable[..., Path]) -> None:
    folder = copied()
    options = ("--overwrite", "--batch-size", 3, "--precision", "fp16", "--resolution", "8x16", "--no-gradient")
    status, out, _ = run("onnx", model_folder, "-o", folder, *options)
    assert status == 0
    assert f"{folder}: 2 graphs, fp16, 8x16, batch 3; replayed on onnxruntime" in out
    replaced = Bundle.open(folder)
    assert (replaced.batch_size, replaced.precision, replaced.resolution) == (3, "fp16", (8, 16))
    assert list(folder.parent.iterdir()) == [folder]


def test_verify_prints_every_comparison(run: Run, bundle: Bundle) -> None:
    status, out, _ = run("verify", bundle.path, "--device", "cpu")
    assert status == 0
    assert "onnxruntime against float64 eager PyTorch" in out
    for word in ("encoder", "noise_head", "bottleneck", "naturalness", "semantic", "gradient"):
        assert word in out
    assert "FAILED" not in out


def test_verify_cuts_no_number_on_a_narrow_terminal(run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    status, out, _ = run("verify", bundle.path, "--device", "cpu")
    assert status == 0
    assert "2e-05" in out
    assert "…" not in out


def test_verify_as_json(run: Run, bundle: Bundle) -> None:
    status, out, _ = run("verify", bundle.path, "--device", "cpu", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["passed"]
    assert found["backend"] == "onnxruntime"
    assert found["rows"]
    for row in found["rows"]:
        assert row.keys() == {"check", "quantity", "error", "tolerance", "passed"}
        assert row["passed"] == (row["error"] <= row["tolerance"])


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_whoever_reads_the_output_may_stop(command: list[str], bundle: Bundle) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as output:
        done = subprocess.run([*command, "inspect", str(bundle.path)], stdout=output, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes, whatever their encoding")
@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", b"b\\u0101\\xfc\\udcff"), ("utf-8", b"b\xc4\x81\xc3\xbc\\udcff")]
)
def test_a_path_that_stdout_cannot_write_is_escaped(
    command: list[str], bundle: Bundle, tmp_path: Path, encoding: str, printed: bytes
) -> None:
    path = os.fsencode(tmp_path / "bāü") + b"\xff"
    os.symlink(os.fsencode(bundle.path), path)
    done = subprocess.run(
        [*command, "inspect", path], capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}, check=True
    )
    assert done.stdout.startswith(os.fsencode(tmp_path) + b"/" + printed + b": format ")
    assert done.stderr == b""


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
def test_streams_that_are_closed(command: list[str], bundle: Bundle, tmp_path: Path) -> None:
    def run(redirection: str, *arguments: object) -> tuple[int, str, str]:
        done = child(["sh", "-c", f'exec "$@" {redirection}', "sh", *command], *arguments)
        return done.returncode, done.stdout, done.stderr

    # Python prints to stdout what is for a stderr that is closed.
    assert run("2>&-", "inspect", tmp_path / "none", "--json") == (2, "", "")
    assert run(">&-", "inspect", bundle.path) == (0, "", "")


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX")
def test_files_do_not_get_the_numbers_of_closed_streams(command: list[str]) -> None:
    code = (
        "import os, sys\nfrom diffloss_export.cli import main\n"
        "try: main(['--version'])\n"
        "finally: os.write(1, b'%d' % os.open(os.devnull, os.O_RDONLY))"
    )
    done = child(["sh", "-c", 'exec "$@" <&- 2>&-', "sh", sys.executable, "-c", code])
    assert int(done.stdout.splitlines()[-1]) > 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["verify", "--help"], ["inspect"]])
def test_full_disk_at_stdout(command: list[str], bundle: Bundle, arguments: list[str]) -> None:
    more = [bundle.path] if arguments == ["inspect"] else []
    done = child(["sh", "-c", 'unset PYTHONUNBUFFERED; exec "$@" >/dev/full', "sh", *command], *arguments, *more)
    assert done.returncode == 2
    assert "No space left on device" in refusal(done.stderr)


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_backend_that_cannot_run_here(run: Run, bundle: Bundle, command: str) -> None:
    status, out, err = run(command, bundle.path, "--backend", "onnxruntime-tensorrt", "--device", "cpu")
    assert (status, out) == (2, "")
    assert "onnxruntime-tensorrt is not used on device cpu" in refusal(err)


def test_verify_fails_where_graph_and_unet_disagree(run: Run, copied: Callable[..., Path]) -> None:
    folder = copied()
    repoint(folder / "encoder.onnx", "mid_block.resnets.0.conv1.weight")
    rehash(folder)
    status, out, err = run("verify", folder, "--device", "cpu")
    assert status == 1
    assert "FAILED" in out
    assert "the error against float64 is" in refusal(err)


def test_inspect_prints_one_object(run: Run, bundle: Bundle) -> None:
    status, out, err = run("inspect", bundle.path, "--json")
    assert (status, err) == (0, "")
    description = json.loads(out)
    assert description["format_version"] == 1
    assert description["unet"]["class"] == "UNet2DModel"
    assert description["unet"]["parameters"] == bundle.unet["parameters"]
    assert description["unet"]["sha256"] == file_sha256(bundle.path / UNET_WEIGHTS)
    assert (description["resolution"], description["batch_size"], description["precision"]) == ([16, 16], 2, "fp32")
    assert description["plans"] == {}
    assert description["graphs"].keys() == {"encoder", "noise_head", "gradient", "semantic_gradient"}
    for name, graph in description["graphs"].items():
        assert graph["sha256"] == file_sha256(bundle.path / f"{name}.onnx")
        assert graph["nodes"] > 50
        assert {"name", "dtype", "shape"} == graph["inputs"][0].keys() == graph["outputs"][0].keys()
    # The manifest itself does not change with the plans that a machine makes.
    assert "plans" not in json.loads((bundle.path / MANIFEST).read_text())


def test_inspect_in_words(run: Run, bundle: Bundle) -> None:
    status, out, err = run("inspect", bundle.path)
    assert (status, err) == (0, "")
    assert "format 1, all hashes match" in out
    assert "16x16, batch 2, fp32" in out
    assert "in  noisy float32 [2, 3, 16, 16]" in out
    assert "out noise float32 [2, 3, 16, 16]" in out


def forget_a_file(folder: Path) -> None:
    (folder / "schedule.json").unlink()


def alter_a_file(folder: Path) -> None:
    path = folder / "noise_head.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def truncate_a_file(folder: Path) -> None:
    (folder / UNET_WEIGHTS).write_bytes(b"short")


def add_a_file(folder: Path) -> None:
    (folder / "unet" / "extra.bin").write_bytes(b"")


@pytest.mark.parametrize("subcommand", ["inspect", "verify", "bench"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (forget_a_file, "'schedule.json' is missing"),
        (alter_a_file, "noise_head.onnx was altered"),
        (truncate_a_file, "has 5 bytes, expected"),
        (add_a_file, "'unet/extra.bin' does not belong to the bundle"),
    ],
)
def test_damaged_bundle_is_a_failed_check(
    run: Run, copied: Callable[..., Path], subcommand: str, damage: Callable[[Path], None], message: str
) -> None:
    folder = copied()
    damage(folder)
    status, out, err = run(subcommand, folder)
    assert (status, out) == (1, "")
    assert message in refusal(err)


def newer(manifest: dict[str, object]) -> None:
    manifest["format_version"] = 2


@pytest.mark.parametrize("subcommand", ["inspect", "verify", "bench"])
def test_what_is_not_a_bundle_is_wrong_input(
    run: Run, copied: Callable[..., Path], tmp_path: Path, subcommand: str
) -> None:
    folder = copied()
    edit_json(folder / MANIFEST, newer)
    for path, message in (
        (tmp_path / "missing", "does not exist"),
        (tmp_path, "is not a bundle: it has no manifest.json"),
        (folder / MANIFEST, "is not a folder"),
        (folder, "format version 2, and this diffloss-trt reads up to 1: upgrade"),
    ):
        status, out, err = run(subcommand, path)
        assert (status, out) == (2, "")
        assert message in refusal(err)


@pytest.mark.parametrize("subcommand", ["verify", "bench"])
def test_unknown_device(run: Run, bundle: Bundle, subcommand: str) -> None:
    status, out, err = run(subcommand, bundle.path, "--device", "abacus")
    assert (status, out) == (2, "")
    assert "device is 'abacus'; expected 'cpu', 'cuda' or 'cuda:N'" in refusal(err)


def test_notes_are_printed(run: Run, exported: Callable[..., Exported], tmp_path: Path) -> None:
    folder = without_gradient(exported(precision="bf16").bundle.path, tmp_path / "bundle")
    status, out, _ = run("verify", folder, "--device", "cpu")
    assert status == 0
    assert out.count("note: ") == 2
    assert "ONNX Runtime has no bfloat16 kernels for the CPU" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"diffloss-export {__version__}\n"


def test_memory_that_there_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination = str(tmp_path / "bundle")
    assert main(["onnx", "builtin", "-o", destination, "--batch-size", "4096", "--resolution", "16384"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffloss-export: ")]
    assert "there is not enough memory: " in line
    assert not list(tmp_path.iterdir())
