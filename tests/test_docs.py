"""What README.md and docs/ show works: Python blocks run, command lines name scripts, flags and attacks that exist."""

import importlib
import re
from pathlib import Path

import common
import eval_all

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: Path, language: str) -> list[str]:
    """The fenced blocks of a language; "" are those without one."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text.read_text(), re.DOTALL | re.MULTILINE)


def command_lines() -> list[str]:
    lines = [line for text in TEXTS for block in blocks(text, "(?:sh)?") for line in block.splitlines()]
    commands = {command for line in lines for command in line.split(" && ")}
    return sorted(command for command in commands if re.match(r"(python|torchrun) [^/]*\w\.py", command))


@pytest.mark.parametrize("name", ["adapt", "evaluate"])
def test_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_all, "ATTACKS", dict(eval_all.ATTACKS))  # a block adds an attack
    namespace = {"__name__": name}
    for block in blocks(ROOT / f"docs/{name}.md", "python"):
        exec(block, namespace)
    assert namespace["result"]["attacks"]["worst case"]["n"] == 20


class Parsed(Exception):
    """The script has read its flags and begins to work."""


@pytest.mark.parametrize("command", command_lines())
def test_command_lines_parse(command, monkeypatch):
    def stop(*_):
        raise Parsed

    monkeypatch.setattr(common, "load_data", stop)
    monkeypatch.setattr(eval_all, "load_models_and_data", stop)
    script, *argv = re.search(r"\w+\.py.*", command)[0].split("#")[0].split()
    with pytest.raises((Parsed, SystemExit)) as stopped:
        importlib.import_module(script.removesuffix(".py")).main(argv)
    assert not getattr(stopped.value, "code", 0)  # 0 after --help
    for name in argv[argv.index("--attacks") + 1].split(",") if "--attacks" in argv else ():
        assert name in {*eval_all.PRESETS, "paper"} or eval_all.find_attack(name)


def test_tables_name_every_attack_and_every_script():
    table = (ROOT / "docs/evaluate.md").read_text().partition("## AutoAttack")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == {*eval_all.ATTACKS}
    scripts = re.findall(r"^\| `(train_\w+\.py)`", TEXTS[0].read_text(), re.MULTILINE)
    assert sorted(scripts) == sorted(path.name for path in ROOT.glob("train_*.py"))
