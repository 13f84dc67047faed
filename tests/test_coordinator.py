"""What a coordinator needs before it serves."""

from __future__ import annotations

from pathlib import Path

import pytest

import povfarm


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_farm_key_opens_nothing(text: str, tmp_path: Path) -> None:
    """Everybody could forge what is signed with it."""
    (tmp_path / "farm.key").write_text(text)
    with pytest.raises(povfarm.StoreError, match=r"farm\.key is empty: delete it"):
        povfarm.Coordinator(tmp_path, bind="127.0.0.1", durable=False)
