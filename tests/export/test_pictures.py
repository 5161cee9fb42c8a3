"""Pictures appear whole, or what was there stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffloss_engine.errors import InputError
from diffloss_export.pictures import check_place, write_picture


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("too many pixels")])
def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, error: Exception) -> None:
    def save(path: Path) -> None:
        assert path.suffix == ".png"
        path.write_text("half")
        raise error

    picture = tmp_path / "picture.png"
    picture.write_text("before")
    with pytest.raises(InputError, match=r"picture\.png cannot be written: (No space left|too many pixels)"):
        write_picture(picture, save)
    assert picture.read_text() == "before"
    assert list(tmp_path.iterdir()) == [picture]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    picture, link = tmp_path / "picture.png", tmp_path / "link.png"
    link.symlink_to(picture)
    write_picture(link, lambda path: path.write_text("picture"))
    assert link.is_symlink()
    assert picture.read_text() == "picture"
    assert sorted(tmp_path.iterdir()) == [link, picture]


def test_where_no_file_can_be_made_is_known_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_place(tmp_path / "picture.png", None)
    with pytest.raises(InputError, match="it is a folder"):
        check_place(tmp_path, None)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(InputError, match="is not writable"):
        check_place(tmp_path / "picture.png", None)
