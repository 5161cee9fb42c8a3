from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import diffloss_engine
from diffloss_engine import Bundle, BundleError, BundleWriter, Graph, InputError, IntegrityError

UNET = {"class": "U", "parameters": 1, "sha256": "0" * 64}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def commit(writer: BundleWriter, **changes: Any) -> Bundle:
    fields: dict[str, Any] = {
        "unet": UNET, "resolution": (1, 1), "batch_size": 1, "precision": "fp32", "graphs": [], **changes
    }  # fmt: skip
    return writer.commit(**fields)


def test_equal_exports_have_byte_identical_manifests(tmp_path: Path, write_bundle: Callable[..., Bundle]) -> None:
    manifests = [(write_bundle(tmp_path / name).path / "manifest.json").read_bytes() for name in ("first", "second")]
    assert manifests[0] == manifests[1]
    assert names(tmp_path) == {"first", "second"}


def test_order_of_graphs_and_fields_does_not_matter(tmp_path: Path, save_graph: Callable[..., Graph]) -> None:
    manifests = []
    for name in ("first", "second"):
        with BundleWriter(tmp_path / name) as writer:
            graphs = [save_graph(writer.path / f"{letter}.onnx", [], [], []) for letter in "ab"]
            graphs = [Graph(g.name, g.file, g.sha256, 1, (), (), ()) for g in graphs]
            order = 1 if name == "first" else -1
            unet = dict(list(UNET.items())[::order])
            manifests.append((commit(writer, graphs=graphs[::order], unet=unet).path / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]


def test_destination_is_empty_until_commit_and_readable_after(tmp_path: Path) -> None:
    destination = tmp_path / "bundle"
    with BundleWriter(destination) as writer:
        (writer.path / "a.bin").write_bytes(b"a")
        (writer.path / "a.bin").chmod(0o600)  # as safetensors does
        assert writer.path.parent == tmp_path
        assert not destination.exists()
        bundle = commit(writer)
        assert bundle.path == destination
        with pytest.raises(BundleError, match="before commit"):
            _ = writer.path
        with pytest.raises(BundleError, match="before commit"):
            commit(writer)
    bundle.verify_hashes()
    (tmp_path / "ordinary").mkdir()
    (tmp_path / "ordinary" / "file").write_bytes(b"")
    for made, ordinary in (("", ""), ("a.bin", "file"), ("manifest.json", "file")):
        modes = (stat.S_IMODE(path.stat().st_mode) for path in (destination / made, tmp_path / "ordinary" / ordinary))
        assert len(set(modes)) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def export() -> None:
        with BundleWriter(tmp_path / "bundle") as writer:
            (writer.path / "folder").mkdir()
            (writer.path / "folder" / "a.bin").write_bytes(b"a")
            raise error

    with pytest.raises(error):
        export()
    assert names(tmp_path) == set()


def test_block_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        (writer.path / "a.bin").write_bytes(b"a")
    assert names(tmp_path) == set()
    with pytest.raises(BundleError, match="inside the writer's with block"):
        _ = writer.path


def test_killed_process_leaves_no_bundle(tmp_path: Path, write_bundle: Callable[..., Bundle]) -> None:
    code = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(diffloss_engine.__file__).parents[1])!r})\n"
        "from diffloss_engine import BundleWriter\n"
        f"with BundleWriter({str(tmp_path / 'bundle')!r}) as writer:\n"
        "    (writer.path / 'conv.onnx').write_bytes(b'half')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        finally:
            process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "bundle").exists()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".bundle.partial-")
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle.open(leftover)
    write_bundle(tmp_path / "bundle").verify_hashes()


def test_existing_destination_is_refused_before_any_work(bundle: Bundle) -> None:
    before = (bundle.path / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="exists already"):
        BundleWriter(bundle.path)
    assert (bundle.path / "manifest.json").read_bytes() == before
    assert names(bundle.path.parent) == {"bundle"}


def test_overwriting_replaces_the_whole_bundle(tmp_path: Path, bundle: Bundle) -> None:
    with BundleWriter(bundle.path, overwrite=True) as writer:
        (writer.path / "new.bin").write_bytes(b"new")
        Bundle.open(bundle.path).verify_hashes()
        commit(writer)
    assert Bundle.open(bundle.path).files.keys() == {"new.bin"}
    assert names(tmp_path) == {"bundle"}


def test_overwriting_that_fails_keeps_the_old_bundle(tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="precision"), BundleWriter(bundle.path, overwrite=True) as writer:
        commit(writer, precision="int4")
    Bundle.open(bundle.path).verify_hashes()
    assert names(tmp_path) == {"bundle"}


@pytest.mark.parametrize("interrupted", [1, 2])
def test_ctrl_c_while_an_older_bundle_is_replaced_leaves_one_of_both(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    """Python raises when the system call returns, which by then has renamed."""
    rename, calls = Path.rename, []

    def interrupt(path: Path, target: Path) -> Path:
        calls.append(rename(path, target))
        if len(calls) == interrupted:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt), BundleWriter(bundle.path, overwrite=True) as writer:
        commit(writer)
    Bundle.open(bundle.path).verify_hashes()


def test_overwriting_through_a_link_replaces_the_folder_and_keeps_the_link(tmp_path: Path, bundle: Bundle) -> None:
    link = tmp_path / "link"
    link.symlink_to(bundle.path)
    with BundleWriter(link, overwrite=True) as writer:
        commit(writer)
    assert link.is_symlink()
    assert Bundle.open(bundle.path).files == {}


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_that_is_no_bundle_is_never_overwritten(tmp_path: Path, overwrite: bool) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "one.jpg").write_bytes(b"precious")
    with pytest.raises(InputError, match="photographs"):
        BundleWriter(folder, overwrite=overwrite)
    with pytest.raises(InputError, match=r"one\.jpg"):
        BundleWriter(folder / "one.jpg", overwrite=overwrite)
    assert (folder / "one.jpg").read_bytes() == b"precious"


def test_bundle_with_other_peoples_files_is_not_overwritten(bundle: Bundle) -> None:
    (bundle.path / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match=r"'notes.txt' does not belong"):
        BundleWriter(bundle.path, overwrite=True)


def test_file_that_appears_during_the_work_is_not_overwritten(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        (tmp_path / "bundle").write_text("precious")
        with pytest.raises(InputError, match="exists already"):
            commit(writer)
    assert (tmp_path / "bundle").read_text() == "precious"
    assert names(tmp_path) == {"bundle"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_empty_folder_is_taken(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "bundle").mkdir()
    with BundleWriter(tmp_path / "bundle", overwrite=overwrite) as writer:
        commit(writer)
    Bundle.open(tmp_path / "bundle")
    assert names(tmp_path) == {"bundle"}


def test_unusable_destination_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing does not exist"):
        BundleWriter(tmp_path / "missing" / "bundle")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file does not exist"):
        BundleWriter(tmp_path / "file" / "bundle")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="loop"):
        BundleWriter(tmp_path / "loop")
    with pytest.raises(InputError, match="cannot be written"), BundleWriter(tmp_path / ("x" * 250)):
        pass


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder like another, which cannot be replaced."""
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(InputError, match="a file system is mounted there; name a folder inside it"):
        BundleWriter(tmp_path)
    BundleWriter(tmp_path / "bundle")


def test_folder_in_a_bundle_is_refused_before_any_work(tmp_path: Path, bundle: Bundle) -> None:
    """It would belong to that bundle's files, of which the manifest knows all."""
    (bundle.path / "empty").mkdir()
    for destination in (bundle.path / "second", bundle.path / "empty" / "second"):
        with pytest.raises(InputError, match=r"second is not written: it would be in the bundle .*/bundle, which"):
            BundleWriter(destination)
    Bundle.open(bundle.path)
    (tmp_path / "manifest.json").write_text('{"name": "an extension of a browser"}')
    BundleWriter(tmp_path / "second")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_parent_that_is_not_writable_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(InputError, match="not writable"):
        BundleWriter(tmp_path / "locked" / "bundle")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": {"class": "U"}}, "unet: parameters"),
        ({"unet": {**UNET, "scale": float("nan")}}, "cannot be written"),
        ({"unet": {**UNET, "path": Path("x")}}, "cannot be written"),
        ({"resolution": (0, 1)}, "height"),
        ({"batch_size": 0}, "batch_size"),
        ({"graphs": [Graph("g", "g.onnx", "0" * 64, 1, (), (), ())]}, r"'g.onnx', which is not among the files"),
        ({"graphs": [Graph("g", "../g.onnx", "0" * 64, 1, (), (), ())]}, "not a path inside a bundle"),
        ({"graphs": [Graph("g", "g", "0" * 64, 1, (), (), ())] * 2}, "two graphs are named 'g'"),
    ],
)
def test_what_would_not_open_is_not_committed(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message), BundleWriter(tmp_path / "bundle") as writer:
        commit(writer, **changes)
    assert names(tmp_path) == set()


def test_graph_with_a_hash_that_is_not_its_files_is_not_committed(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        (writer.path / "g.onnx").write_bytes(b"g")
        with pytest.raises(IntegrityError, match="different sha256"):
            commit(writer, graphs=[Graph("g", "g.onnx", "0" * 64, 1, (), (), ())])
    assert names(tmp_path) == set()


def test_links_and_hidden_files_are_not_committed(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"w")
    with BundleWriter(tmp_path / "bundle") as writer:
        (writer.path / "weights").symlink_to(tmp_path / "weights")
        with pytest.raises(BundleError, match="symbolic link"):
            commit(writer)
        (writer.path / "weights").unlink()
        (writer.path / ".DS_Store").touch()
        with pytest.raises(BundleError, match=r"\.DS_Store"):
            commit(writer)
    assert names(tmp_path) == {"weights"}
