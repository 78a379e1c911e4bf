"""The pages say what is: links, commands, keys, configurations and messages are those of the repository."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from axolotl_spft.tools.cli import spft
from integration.bench import page as bench_page

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for path in [ROOT / "README.md", *ROOT.glob("axolotl_spft/**/*.md"), *ROOT.glob("integration/**/*.md")]
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def text_of(page: Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchor_of(heading: str) -> str:
    """What a link to it has behind the #."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """(page, command): every line of the shell blocks, and every command in the text, but for bare names."""
    found = []
    for page in PAGES:
        text = text_of(page)
        for block in blocks(text, "sh"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(str(page), line) for line in lines if line.split("#")[0].strip()]
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        inline = re.findall(r"`((?:axolotl|make|python -m|accelerate launch) [^`]+|integration/\S+\.sh)`", prose)
        named = [" ".join(code.split()) for code in inline]
        found += [
            (str(page), code) for code in named if not re.fullmatch(r"(axolotl|python -m axolotl_)\s?spft( \w+)?", code)
        ]
    return list(dict.fromkeys(found))


def test_the_readme_takes_ten_minutes():
    assert len(README.splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [anchor_of(heading) for heading in headings], link


def test_every_page_is_in_the_readmes_table_of_contents():
    linked = set(re.findall(r"\]\(([^)#\s]+)", README))
    assert [str(page) for page in PAGES if str(page) not in {*linked, "README.md"}] == []


@pytest.mark.parametrize("page, command", commands())
def test_commands_are_those_of_the_repository(page, command):
    check_command(shlex.split(command, comments=True))


def check_command(words: list[str]) -> None:
    program, *rest = words
    if program == "accelerate":
        assert rest[0] == "launch"
        at = rest.index("-m")
        check_files(rest[1:at])
        program, rest = "python", rest[at:]
    if [program, *rest[:1]] == ["axolotl", "spft"]:
        check_spft(rest[1:])
    elif [program, *rest[:2]] == ["python", "-m", "axolotl_spft"]:
        check_spft(rest[2:])
    elif program == "axolotl":
        # the end-to-end tests run them
        assert (
            f'"{rest[0]}"'
            in (ROOT / "tests/e2e/commands.py").read_text() + (ROOT / "tests/e2e/test_verbs.py").read_text()
        )
        check_files(rest[1:])
    elif program == "python" and rest[:2] == ["-m", "axolotl.cli.train"]:
        check_files(rest[2:])
    elif program == "python" and rest[0] == "-m":
        module = ROOT / rest[1].replace(".", "/")
        source = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        text = source.read_text()
        assert all(f'"{word}"' in text for word in rest[2:] if word.startswith("--")), rest
        check_files(rest[2:])
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], "<page>", "exec")
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        assert rest[0] == "install"
        extras = re.fullmatch(r"\.(?:\[(\w+)\])?", rest[1])
        assert extras and (not extras[1] or f"\n{extras[1]} = [" in (ROOT / "pyproject.toml").read_text())
    elif program.endswith(".sh"):
        assert (ROOT / program).stat().st_mode & 0o100
    else:
        assert program in ("cd", "git", "mkdir"), words


def check_spft(words: list[str]) -> None:
    """Parse as click does, but for files that a reader has and the repository has not."""
    name, *rest = words
    command = spft.get_command(click.Context(spft), name)
    assert command is not None, name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(click.Path, "convert", lambda self, value, *_: value)
        try:
            command.make_context(name, list(rest))
        except click.exceptions.Exit:
            assert rest == ["--help"]
    check_files(rest)


def check_files(words: list[str]) -> None:
    for word in words:
        if re.match(r"(examples|integration)/[^<]+$", word):
            assert (ROOT / word).exists(), word


def test_commands_are_told_from_mistakes():
    for wrong in ("axolotl spft plan config.yml --gpu 8", "axolotl spft merge config.yml --onto both",
                  "axolotl spft mask config.yml", "make nothing", "axolotl nothing config.yml",
                  "python -m integration.engines.matrix --nothing", "pip install '.[nothing]'",
                  "axolotl spft plan examples/nothing.yml"):  # fmt: skip
        with pytest.raises((AssertionError, click.UsageError)):
            check_command(shlex.split(wrong))


def table(text: str, header: str) -> list[list[str]]:
    """The cells of a table's rows."""
    lines = text[text.index(header) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def test_the_table_of_keys_is_that_of_the_configuration():
    from axolotl_spft.config import SpftConfig, option_names
    from axolotl_spft.config_rules import DEFAULT_DENSITY

    rows = table(text_of(Path("axolotl_spft/README.md")), "| key | default | meaning |")
    config = SpftConfig()
    assert [row[0] for row in rows] == [f"`{name}`" for name in option_names()]
    assert {row[0].strip("`"): yaml.safe_load(row[1]) for row in rows} == {
        name: DEFAULT_DENSITY if name == "density" else getattr(config, name) for name in option_names()
    }


def test_configurations_in_the_pages_are_accepted():
    from axolotl_spft.plugin.args import check_run

    found = [(page, yaml.safe_load(block)) for page in PAGES for block in blocks(text_of(page), "yaml")]
    assert found and all(check_run(cfg) == [] for _, cfg in found if "adapter" in cfg)
    assert found[0][1]["adapter"] == "spft" and found[0][0] == Path("README.md")


def test_python_in_the_pages_imports_what_there_is():
    import axolotl_spft

    for page in PAGES:
        for block in blocks(text_of(page), "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module == "axolotl_spft":
                    assert {alias.name for alias in node.names} <= set(axolotl_spft.__all__), page


def test_the_messages_of_the_troubleshooting_page_are_the_programs():
    texts = [text for path in ROOT.glob("axolotl_spft/**/*.py") for text in literals(path)]
    page = text_of(Path("axolotl_spft/TROUBLESHOOTING.md"))
    messages = [row.split("|")[1].strip() for row in re.findall(r"^\|.*\|$", page, re.MULTILINE)]
    messages = [text for text in messages if text not in ("message", "---", "KeyError: 'SPFT'")]
    assert len(messages) > 30
    for message in messages:
        parts = [re.escape(part) for part in message.split("...")]
        assert any(re.search(".*?".join(parts), text, re.DOTALL) for text in texts), message


def literals(path: Path) -> list[str]:
    """The strings of a file, with `...` for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_the_page_of_the_benchmark_holds_every_record():
    assert bench_page.PAGE.read_text(encoding="utf-8") == bench_page.page(), "run `python -m integration.bench.page`"
    headings = re.findall(r"^### (.+)$", bench_page.page(), re.MULTILINE)
    assert sorted(headings) == sorted(path.stem for path in bench_page.RESULTS.glob("*.json"))


def test_the_figures_beside_lora_are_those_of_the_records():
    record = seeds = ""
    for what, ours, theirs, source in table(README, "| | spft, 0.5% |"):
        if "integration/evidence" in source:
            heading = re.search(r"#([\w-]+)", source)[1]
            parts = re.split(r"^## ", (ROOT / "integration" / "evidence" / "README.md").read_text(), flags=re.MULTILINE)
            part = next(each for each in parts if anchor_of(each.split("\n")[0]) == heading)
            before = re.search(r"\(([\d.]+)", what)[1]
            # a row without a count of its own has that of the row above
            seeds = (re.search(r"(\d+) seeds", what) or [None, seeds])[1]
            for figure in (ours.split(",")[0], theirs.split(",")[0]):
                assert re.search(rf"\*\*[\d.]+\*\* .*\| {seeds} \| {figure} ±", part), (heading, figure)
            assert f"| {before} |" in part
            continue
        record = re.search(r"#([\w-]+)", source)[1] if source != "same" else record
        rows = {row["method"]: row for row in json.loads((bench_page.RESULTS / f"{record}.json").read_text())["rows"]}
        for cell, row in ((ours, rows["spft-gradient"]), (theirs, rows["lora"])):
            figures = {f"{1000 * row['median_seconds']:.0f} ms", f"{row['median_seconds']:.2f} s"}
            sizes = [row[name] or 0 for name in ("peak_bytes", "kept_bytes", "kept_by_adapted_bytes", "file_bytes")]
            figures |= {f"{size / 2**30:.1f} GiB" for size in sizes} | {f"{size / 2**20:.0f} MiB" for size in sizes}
            assert re.match(r"[\d.]+ \w+", cell)[0] in figures, (record, cell)
