"""Bad arguments are refused in one line and with status 2, before any work."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from arguments import OneLineParser, output_folder, positive_integer, weight


def test_wrong_usage_is_one_line_and_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    parser = OneLineParser(prog="example.py")
    parser.add_argument("--steps", type=positive_integer)
    for arguments, expected in (["--steps", "0"], "'0'"), (["--step2", "1"], "--step2"):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(arguments)
        assert caught.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("example.py: error: ")
        assert expected in message
        assert message.count("\n") == 1


def test_positive_integers() -> None:
    assert positive_integer("12") == 12
    for text in ("0", "-1", "1.5", "", "many", "²"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
            positive_integer(text)


def test_weights() -> None:
    assert [weight(text) for text in ("0", "1e-3", "2")] == [0.0, 1e-3, 2.0]
    for text in ("-1e-3", "inf", "nan", "", "heavy"):
        with pytest.raises(argparse.ArgumentTypeError, match="finite number"):
            weight(text)


def test_output_folders_need_a_parent_and_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert output_folder(str(tmp_path)) == tmp_path
    assert output_folder(str(tmp_path / "new")) == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    monkeypatch.chdir(tmp_path)
    assert output_folder("new") == Path("new")
    (tmp_path / "file").write_text("")
    with pytest.raises(argparse.ArgumentTypeError, match="is a file"):
        output_folder(str(tmp_path / "file"))
    for text in (str(tmp_path / "absent" / "new"), str(tmp_path / "file" / "new")):
        with pytest.raises(argparse.ArgumentTypeError, match="no folder"):
            output_folder(text)
