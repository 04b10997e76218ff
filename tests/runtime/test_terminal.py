"""Names never control a terminal, rich or matplotlib."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from rich.table import Table

from cpn_fast import cli
from cpn_fast.runtime import terminal

WIPE = "\x1b[2J\x1b]0;title\x07x"


@given(st.text())
def test_what_is_shown_is_printable_and_plain_text_stays(text: str) -> None:
    found = terminal.shown(text)
    assert all(c.isprintable() or c in "\t\n" or ord(c) > 0x9F for c in found)
    assert not set(found) & set("\x1b\x07\r\x9b\u202e\u2066\u200f")
    found.encode()
    if text.isprintable():
        assert found == text


def test_printed_names_are_escaped_and_names_that_are_no_text_do_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with terminal.escaping():
        print(f"a {WIPE} b\udce9")
        print("c\rd", file=sys.stderr)
        terminal.console().print(Table(WIPE, title="[/b]"))
    assert sys.stdout is out
    out.flush(), err.flush()
    said = out.buffer.getvalue().decode()
    assert r"a \x1b[2J\x1b]0;title\x07x b\udce9" in said
    assert "\x1b" not in said
    assert "[/b]" in said
    assert err.buffer.getvalue() == b"c\\rd\n"


def test_markup_and_emoji_codes_in_tables_are_text() -> None:
    file = io.StringIO()
    console = terminal.console()
    console.file = file
    table = Table("[bold]x", "y")
    table.add_row("[/b]", ":smile:")
    console.print(table)
    assert {"[bold]x", "[/b]", ":smile:"} <= set(file.getvalue().replace("┃", " ").replace("│", " ").split())


@pytest.mark.parametrize("name", ["$x^$", "$a", "$", "a$b$c", "x^2_y"])
def test_names_in_plots_are_no_formulas(name: str) -> None:
    figure = Figure()
    figure.add_subplot().set_title(terminal.plotted(name))
    figure.savefig(io.BytesIO())
    assert not is_math_text(terminal.plotted(name))


def test_commands_show_names_of_lists_and_classes_as_they_are(
    tiny_config, small_voc: Path, monkeypatch: pytest.MonkeyPatch, capfd, tmp_path: Path
) -> None:
    def entered(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["cpn-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        if isinstance(ended.value.code, str):
            print(ended.value.code)
        said = "".join(capfd.readouterr())
        assert "\x1b" not in said
        return said

    (tmp_path / "list.txt").write_text(f"{WIPE}\n")
    listed = f"data.train_list={tmp_path / 'list.txt'}"
    assert r"\x1b[2J" in entered("superpixels", tiny_config(), "--set", listed)
    path = tiny_config(train={"steps": 1})
    tree = yaml.safe_load(path.read_text())
    old = tree["classes"][0]
    tree["classes"][0] = "[/b]$x^$"
    tags = tmp_path / "tags.csv"
    ids = (small_voc / tree["data"]["train_list"]).read_text().split()
    tags.write_text("".join(f"{id_},{tree['classes'][k % 2]}\n" for k, id_ in enumerate(ids)))
    tree["data"]["labels"] = str(tags)
    path.write_text(yaml.safe_dump(tree))
    run = Path(tree["out"]) / tree["name"]
    for arguments in (("train", path), ("cam", path), ("evaluate", path, "--cams", run / "cams/train/seeds")):
        said = entered(*arguments)
        assert "Next: " in said, said
    assert "[/b]$x^$" in said
    assert old not in said
    assert "Next: " in entered("report", run)
    assert "[/b]$x^$" in (run / "report.html").read_text()
