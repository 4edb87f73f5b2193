"""Every attack's verdicts on two small networks, image by image, as recorded in golden/verdicts.json."""

import json
from functools import partial
from pathlib import Path

import common
import eval_all

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
ENTRIES = json.loads((GOLDEN / "verdicts.json").read_text())


def load(name):
    return common.load_checkpoint(GOLDEN / f"{name}.pt")[0]


def craft(model, attack, options):
    """Whether the first 40 test images are classified correctly; `attack` is one of eval_all.py's, or common.pgd."""
    data = common.load_data("digits")
    dtype = torch.float64 if attack == "zoo" else torch.float32  # float32 rounds its differences as the processor does
    x, y = common.to_float(data.x_test[:40]).to(dtype), data.y_test[:40]
    net, options = load(model).to(dtype), dict(options)
    function = eval_all.ATTACKS["noise"].run if attack == "noise" else getattr(eval_all, attack, None)
    if attack == "common.pgd":
        function = partial(common.pgd, loss=common.margin_ce)
        if options.pop("start", None) == "x":
            options["start"] = x
    if attack == "transferred":
        crafted = getattr(eval_all, options.pop("attack"))
        if "steps" in options:  # a point that fools the source early may not transfer yet
            crafted = partial(crafted, early_stop=False)
        options |= {"source": load(options["source"]), "attack": crafted}
    torch.manual_seed(0)
    with common.frozen_eval(net):
        return net(function(eval_all.Observed(net, x), x, y, **options).detach()).argmax(1) == y


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e['model']}-{e['attack']}-{e['options'].get('norm', '')}")
def test_verdicts_are_those_recorded(entry):
    assert craft(entry["model"], entry["attack"], entry["options"]).int().tolist() == [*map(int, entry["correct"])]
