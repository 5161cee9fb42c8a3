from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import FunctionProto, NodeProto, TensorProto, helper

from diffloss_engine import (
    Bundle,
    BundleError,
    BundleWriter,
    Graph,
    InputTypeError,
    IntegrityError,
    TensorSpec,
    file_sha256,
)

X = TensorSpec("x", "float32", (4,))
SHA256 = "0" * 64


def edit(bundle: Bundle, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Apply `change` to the bundle's manifest and return the bundle's folder."""
    manifest = bundle.path / "manifest.json"
    fields = json.loads(manifest.read_text())
    change(fields)
    manifest.write_text(json.dumps(fields))
    return bundle.path


def test_opens_what_was_written(bundle: Bundle) -> None:
    opened = Bundle.open(str(bundle.path))
    assert opened.path == bundle.path
    assert opened.format_version == 1
    assert opened.unet == {"class": "UNet2DModel", "parameters": 84, "sha256": SHA256, "config": {"layers": 2}}
    assert (opened.resolution, opened.batch_size, opened.precision) == ((8, 8), 2, "fp32")
    assert opened.graphs.keys() == {"conv"}
    assert opened.graphs["conv"].weights == ("conv.weights",)
    assert opened.files.keys() == {"conv.onnx", "conv.weights", "unet/config.json"}
    weights = bundle.path / "conv.weights"
    assert opened.files["conv.weights"] == (file_sha256(weights), weights.stat().st_size)
    opened.verify_hashes()
    assert opened.file("unet/config.json").read_text() == '{"layers": 2}'
    assert opened.read_json("unet/config.json") == {"layers": 2}
    assert opened.graph_file("conv") == bundle.path / "conv.onnx"


def test_a_relative_path_is_that_of_the_folder_it_was_opened_in(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that changes its working directory goes on reading files, and what it pickles is found again."""
    monkeypatch.chdir(bundle.path.parent)
    opened = Bundle.open(bundle.path.name)
    with pytest.raises(
        BundleError, match=r"^none does not exist; 'diffloss-export onnx MODEL -o BUNDLE' makes a bundle$"
    ):
        Bundle.open("none")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    opened.verify_hashes()
    assert opened.path == bundle.path


def test_a_pickled_bundle_verifies_its_files_anew(bundle: Bundle) -> None:
    bundle.verify_hashes()
    pickled = pickle.dumps(bundle)
    pickle.loads(pickled).verify_hashes()
    weights = bundle.path / "conv.weights"
    content = bytearray(weights.read_bytes())
    content[5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"conv\.weights was altered"):
        pickle.loads(pickled).verify_hashes()
    edit(bundle, lambda manifest: manifest["files"]["conv.weights"].update(sha256=file_sha256(weights)))
    with pytest.raises(IntegrityError, match="holds another bundle than when this was pickled"):
        pickle.loads(pickled)


def test_description_is_json_with_what_inspect_prints(bundle: Bundle) -> None:
    description = json.loads(json.dumps(bundle.description()))
    assert description["format_version"] == 1
    assert {"class", "parameters", "sha256"} <= description["unet"].keys()
    assert (description["resolution"], description["batch_size"], description["precision"]) == ([8, 8], 2, "fp32")
    graph = description["graphs"]["conv"]
    assert graph["nodes"] == 2
    assert graph["sha256"] == file_sha256(bundle.path / "conv.onnx")
    assert graph["inputs"][0] == {"name": "image", "dtype": "float32", "shape": [2, 3, 8, 8]}
    assert [spec["name"] for spec in graph["outputs"]] == ["features", "scaled"]


def test_a_link_to_the_folder_itself_is_followed(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle.path, target_is_directory=True)
    Bundle.open(tmp_path / "link").verify_hashes()


def test_what_is_no_bundle_says_why(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        Bundle.open(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(tmp_path / "file")
    with pytest.raises(BundleError, match=r"not a bundle: it has no manifest\.json"):
        Bundle.open(tmp_path)


def test_what_is_no_bundle_is_not_looked_through(tmp_path: Path) -> None:
    """A project's folder has links in it, and a home is large."""
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json; 'diffloss-export onnx"):
        Bundle.open(tmp_path)
    (tmp_path / "manifest.json").symlink_to(tmp_path / "nothing")
    with pytest.raises(BundleError, match="is a symbolic link, which a bundle may not hold"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("path", ["~nosuchuser/bundle", "x" * 5000])
def test_paths_that_no_system_opens_say_why(path: str) -> None:
    with pytest.raises(BundleError, match="cannot be opened: "):
        Bundle.open(path)


@pytest.mark.parametrize("path", [None, 3, b"bundle"])
def test_what_is_no_path_is_named(path: Any) -> None:
    with pytest.raises(InputTypeError, match=f"the bundle is {path!r}, a {type(path).__name__}; expected the path"):
        Bundle.open(path)


def test_file_altered_at_equal_size_is_found_at_first_use(bundle: Bundle) -> None:
    path = bundle.path / "conv.weights"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    opened = Bundle.open(bundle.path)
    opened.file("conv.onnx")
    for use in (opened.verify_hashes, lambda: opened.file("conv.weights"), lambda: opened.graph_file("conv")):
        with pytest.raises(IntegrityError, match=r"conv\.weights was altered.*expected"):
            use()


def test_hash_is_verified_once(bundle: Bundle) -> None:
    bundle.file("conv.weights")
    (bundle.path / "conv.weights").write_bytes(b"changed by a running process's owner")
    bundle.file("conv.weights")


def test_missing_resized_and_foreign_files_are_named(bundle: Bundle) -> None:
    weights = bundle.path / "conv.weights"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match=rf"'conv.weights' has {len(content) - 1} bytes, expected {len(content)}"):
        Bundle.open(bundle.path)
    weights.unlink()
    with pytest.raises(IntegrityError, match=r"'conv.weights' is missing"):
        Bundle.open(bundle.path)
    weights.write_bytes(content)
    (bundle.path / "unet" / "evil.bin").touch()
    with pytest.raises(IntegrityError, match=r"'unet/evil.bin' does not belong"):
        Bundle.open(bundle.path)


def test_file_that_vanishes_after_opening_is_named(bundle: Bundle) -> None:
    (bundle.path / "conv.weights").unlink()
    with pytest.raises(IntegrityError, match=r"conv\.weights cannot be read"):
        bundle.file("conv.weights")


def test_unknown_names_are_refused(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"no file '\.\./secret'"):
        bundle.file("../secret")
    with pytest.raises(BundleError, match=r"no graph 'gradient'; it has \['conv'\]"):
        bundle.graph_file("gradient")
    with pytest.raises(BundleError, match="not valid JSON"):
        bundle.read_json("conv.weights")


@pytest.mark.parametrize("name", ["conv.weights", "unet", "manifest.json"])
def test_links_below_the_folder_are_refused(bundle: Bundle, tmp_path: Path, name: str) -> None:
    shutil.move(bundle.path / name, tmp_path / "moved")
    (bundle.path / name).symlink_to(tmp_path / "moved")
    with pytest.raises(BundleError, match=f"'{name}' is a symbolic link"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("name", ["manifest.json", "conv.weights"])
def test_pipes_are_refused_and_not_waited_for(bundle: Bundle, name: str) -> None:
    (bundle.path / name).unlink()
    os.mkfifo(bundle.path / name)
    with pytest.raises(BundleError, match=f"'{name}' is not a regular file"):
        Bundle.open(bundle.path)


def test_newer_version_says_which_one_is_needed_before_anything_else(bundle: Bundle) -> None:
    path = edit(bundle, lambda fields: fields.update(format_version=7, graphs=None, plans={}))
    with pytest.raises(BundleError, match=r"format version 7, .* reads up to 1: upgrade .* reads format version 7"):
        Bundle.open(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"format": NaN}', "NaN"),
        (b'{"format": 1e999}', "1e999"),
        (b'{"format": "a", "format": "diffloss-bundle"}', "repeats a key"),
        (b"[]", "is an array, expected an object"),
        (b"{}", "format is None, expected 'diffloss-bundle'"),
        (b" " * (16 * 1024 * 1024 + 1), "larger than"),
    ],
    ids=["empty", "cut", "not UTF-8", "deep", "NaN", "beyond a float", "repeated", "array", "no format", "large"],
)
def test_malformed_manifest_is_refused(bundle: Bundle, content: bytes, message: str) -> None:
    (bundle.path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle.path)
    assert str(bundle.path) in str(caught.value)


PATHS = ["../x", "a/../x", "/etc/passwd", "a\\b", "C:x", "", ".", "a//b", "a/", "./a", ".hidden", "*/_M_/*", "a\0", "é"]


@pytest.mark.parametrize("path", [*PATHS, "manifest.json"])
def test_paths_that_leave_the_folder_are_refused(bundle: Bundle, path: str) -> None:
    with pytest.raises(BundleError, match=r"files: .*is not a path inside a bundle"):
        Bundle.open(edit(bundle, lambda fields: fields["files"].update({path: {"sha256": SHA256, "bytes": 0}})))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", ["file", "weights"])
def test_graph_paths_that_leave_the_folder_are_refused(bundle: Bundle, field: str, path: str) -> None:
    value = [path] if field == "weights" else path
    with pytest.raises(BundleError, match=f"graph 'conv': {field}: .*is not a path inside a bundle"):
        Bundle.open(edit(bundle, lambda fields: fields["graphs"]["conv"].update({field: value})))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["format"], "zip", "format is 'zip'"),
        (["format_version"], "1", "format_version is a string"),
        (["format_version"], True, "format_version is a boolean"),
        (["format_version"], 0, "format_version is 0"),
        (["surprise"], 1, r"unknown fields \['surprise'\]"),
        (["unet"], [], "unet is an array"),
        (["unet", "class"], 1, "unet: class is an integer"),
        (["unet", "class"], "UNet\x1b[2J", r"unet: class 'UNet\\x1b\[2J': the name may hold letters, digits"),
        (["unet", "parameters"], 1.5, "unet: parameters is a number"),
        (["unet", "sha256"], "ABC", "unet: sha256 is 'ABC'"),
        (["resolution"], 8, "resolution is an integer"),
        (["resolution"], [8], "resolution has 1 numbers"),
        (["resolution"], [8, -8], "width is -8"),
        (["resolution"], [8, 2**31], "width is 2147483648, expected at most"),
        (["batch_size"], 10**9, "batch_size is 1000000000, expected at most"),
        (["batch_size"], 0, "batch_size is 0"),
        (["batch_size"], None, "batch_size is null"),
        (["precision"], "int8", "precision is 'int8', expected one of fp32, fp16, bf16"),
        (["graphs"], [], "graphs is an array"),
        (["graphs", "../x"], {}, r"graph '../x': the name may hold"),
        (["graphs", "conv"], None, "graph 'conv' is null"),
        (["graphs", "conv", "nodes"], "2", "graph 'conv': nodes is a string"),
        (["graphs", "conv", "inputs"], {}, "graph 'conv': inputs is an object"),
        (["graphs", "conv", "inputs"], [X.to_json(), X.to_json()], "a name occurs twice"),
        (["graphs", "conv", "inputs"], [X.to_json() | {"name": "x\ny"}], r"inputs: tensor 'x\\ny': the name may hold"),
        (["graphs", "conv", "weights"], "conv.weights", "graph 'conv': weights is a string"),
        (["graphs", "conv", "weights"], ["other"], "'other', which is not among the files"),
        (["graphs", "conv", "sha256"], SHA256, "different sha256 values"),
        (["files"], [], "files is an array"),
        (["files", "conv.onnx"], "x", "file 'conv.onnx' is a string"),
        (["files", "conv.onnx", "bytes"], -1, "file 'conv.onnx': bytes is -1"),
        (["files", "conv.onnx", "sha256"], None, "file 'conv.onnx': sha256 is null"),
    ],
)
def test_every_field_is_checked(bundle: Bundle, keys: list[str], value: object, message: str) -> None:
    def change(fields: dict[str, Any]) -> None:
        for key in keys[:-1]:
            fields = fields[key]
        fields[keys[-1]] = value

    with pytest.raises(BundleError, match=message):
        Bundle.open(edit(bundle, change))


@pytest.mark.parametrize(
    "key", ["unet", "resolution", "batch_size", "precision", "graphs", "files", "format", "format_version"]
)
def test_every_field_is_required(bundle: Bundle, key: str) -> None:
    with pytest.raises(BundleError, match=key):
        Bundle.open(edit(bundle, lambda fields: fields.pop(key)))


def nested_in_subgraphs(node: NodeProto) -> NodeProto:
    """Return a node that runs `node`, which makes y, in a subgraph of a subgraph."""
    for _ in range(2):
        branch = helper.make_graph([node], "b", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    return node


@pytest.fixture
def hostile(
    tmp_path: Path, save_graph: Callable[..., Graph], external_tensor: Callable[..., TensorProto]
) -> Callable[..., Bundle]:
    """(nested=False, **external data) -> Bundle whose one graph's weight has that external data; it has 16 bytes."""

    def hostile(*, nested: bool = False, **entries: int | str) -> Bundle:
        with BundleWriter(tmp_path / "hostile") as writer:
            (writer.path / "w.bin").write_bytes(bytes(16))
            (writer.path / "other.bin").write_bytes(bytes(16))
            weight = external_tensor("w", "float32", (4,), **entries)
            if nested:
                constant = helper.make_node("Constant", [], ["y"])
                constant.attribute.append(helper.make_attribute("value", weight))
                nodes, initializers = (
                    [nested_in_subgraphs(constant)],
                    [helper.make_tensor("c", TensorProto.BOOL, [], [True])],
                )
            else:
                nodes, initializers = [helper.make_node("Add", ["x", "w"], ["y"])], [weight]
            graph = save_graph(
                writer.path / "g.onnx", nodes, [X], [TensorSpec("y", "float32", (4,))], initializers, ("w.bin",)
            )
            return writer.commit(
                unet={"class": "U", "parameters": 1, "sha256": SHA256},
                resolution=(1, 1),
                batch_size=1,
                precision="fp32",
                graphs=[graph],
            )

    return hostile


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("entries", [{}, {"offset": 0, "length": 16}, {"offset": 16, "length": 0}, {"length": "016"}])
def test_external_data_inside_its_file_is_accepted(
    hostile: Callable[..., Bundle], nested: bool, entries: dict[str, int | str]
) -> None:
    assert hostile(nested=nested, location="w.bin", **entries).graph_file("g").name == "g.onnx"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "x/../w.bin", "./w.bin", "other.bin", "absent", ""])
def test_external_data_elsewhere_is_refused(hostile: Callable[..., Bundle], location: str, nested: bool) -> None:
    bundle = hostile(nested=nested, location=location)
    with pytest.raises(BundleError, match=r"'w' has its data in .*not one of the graph's weights \['w\.bin'\]"):
        bundle.graph_file("g")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": 0, "length": 17}, "ends at byte 17 of 'w.bin', which has 16 bytes"),
        ({"offset": 8, "length": 16}, "ends at byte 24"),
        ({"offset": 17}, "ends at byte 17"),
        ({"offset": 2**63, "length": 16}, "ends at byte"),
        ({"offset": -1}, "'-1', expected a number of bytes"),
        ({"length": "1_6"}, "'1_6', expected"),
        ({"length": " 16"}, "' 16', expected"),
        ({"offset": "٣"}, "expected a number of bytes"),
        ({"offset": "9" * 5000}, "expected a number of bytes"),
        ({"prepacked_1": "x|8;64;0"}, "external data with the key 'prepacked_1'"),
    ],
)
def test_external_data_beyond_its_file_is_refused(
    hostile: Callable[..., Bundle], entries: dict[str, int | str], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        hostile(location="w.bin", **entries).graph_file("g")


@pytest.fixture
def bundle_of(tmp_path: Path, save_graph: Callable[..., Graph]) -> Callable[..., Bundle]:
    """(nodes, functions=()) -> Bundle whose one graph has these; from x [4] it makes y [4]."""

    def bundle_of(nodes: list[NodeProto], functions: Sequence[FunctionProto] = ()) -> Bundle:
        with BundleWriter(tmp_path / "foreign") as writer:
            file = writer.path / "g.onnx"
            graph = save_graph(file, nodes, [X], [TensorSpec("y", "float32", (4,))])
            model = onnx.load(file)
            model.functions.extend(functions)
            file.write_bytes(model.SerializeToString())
            return writer.commit(
                unet={"class": "U", "parameters": 1, "sha256": SHA256},
                resolution=(1, 1),
                batch_size=1,
                precision="fp32",
                graphs=[replace(graph, sha256=file_sha256(file))],
            )

    return bundle_of


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("domain", ["com.microsoft", "ai.onnx.ml", "AI.ONNX", " "])
def test_operations_that_are_not_onnxs_own_are_refused(
    bundle_of: Callable[..., Bundle], domain: str, wrapped: bool
) -> None:
    node = helper.make_node("EPContext", ["x"], ["y"], name="engine", domain=domain)
    # An engine of TensorRT, which ONNX Runtime would run.
    node.attribute.append(helper.make_attribute("ep_cache_context", "machine code"))
    bundle = bundle_of([nested_in_subgraphs(node) if wrapped else node])
    with pytest.raises(BundleError, match=rf"g\.onnx: node 'engine' is the operation 'EPContext' of '{domain}'"):
        bundle.graph_file("g")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_onnxs_own_operations_are_accepted(bundle_of: Callable[..., Bundle], domain: str, wrapped: bool) -> None:
    node = helper.make_node("Neg", ["x"], ["y"], domain=domain)
    assert bundle_of([nested_in_subgraphs(node) if wrapped else node]).graph_file("g").name == "g.onnx"


@pytest.mark.parametrize("domain", ["", "ai.onnx", "own"])
def test_functions_are_refused(bundle_of: Callable[..., Bundle], domain: str) -> None:
    """Under the name of an operation that is known by its name alone, whatever it is made of."""
    function = helper.make_function(
        domain, "EPContext", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], [helper.make_opsetid("", 22)]
    )
    bundle = bundle_of([helper.make_node("EPContext", ["x"], ["y"])], [function])
    with pytest.raises(BundleError, match=r"g\.onnx: it defines the function 'EPContext'; expected no functions"):
        bundle.graph_file("g")


@pytest.mark.parametrize("content", [b"", b"no protobuf at all", b"\x08"])
def test_graph_that_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        file = writer.path / "g.onnx"
        file.write_bytes(content)
        bundle = writer.commit(
            unet={"class": "U", "parameters": 1, "sha256": SHA256},
            resolution=(1, 1),
            batch_size=1,
            precision="fp32",
            graphs=[Graph("g", "g.onnx", file_sha256(file), 1, (X,), (X,), ())],
        )
    with pytest.raises(BundleError, match=r"g\.onnx"):
        bundle.graph_file("g")
