"""What README.md and docs/ show works: Python blocks run, command lines name scripts, flags and attacks that exist."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import common
import eval_all

import pytest
import torch

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


def test_the_center_loss_of_adapt_md_is_a_change_of_one_file_that_trains_resumes_and_is_evaluated(cli, tmp_path):
    (diff,) = blocks(ROOT / "docs/adapt.md", "diff")
    (tmp_path / "train_pgd_center.py").write_text((ROOT / "train_pgd_he.py").read_text())
    subprocess.run(["git", "apply", "-p0", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    sys.path.insert(0, str(tmp_path))
    flags = "--limit 164 --batch-size 32 --steps 1 --schedule constant --epochs".split()
    try:
        for out, *more in (("whole", "2"), ("part", "1"), ("part", "2", "--resume")):
            code, _, err = cli("train_pgd_center", *flags, *more, "--out", tmp_path / out)
            assert code == 0, err
    finally:
        sys.path.remove(str(tmp_path))
    whole, part = (common.read_file(tmp_path / out / "last.pt") for out in ("whole", "part"))
    assert all(torch.equal(whole[name][key], part[name][key]) for name in ("model", "criterion") for key in whole[name])
    assert whole["criterion"]["centers"].shape == (10, 200)
    assert (whole["method"], whole["args"]["smoothing"]) == ("pgd_center_he", 0.1)
    code, _, err = cli("eval_all", tmp_path / "whole", "--attacks", "fgsm", "--num-images", "10")
    assert code == 0, err


@pytest.mark.parametrize("command", command_lines())
def test_command_lines_parse(command, monkeypatch):
    Parsed = type("Parsed", (Exception,), {})
    stop = mock.Mock(side_effect=Parsed)
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
