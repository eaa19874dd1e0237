"""The command line from outside: exit codes, one sentence on failure, JSON that parses, no partial output."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy
import pytest
import torch

from rewright.tools import cli

MODELS = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x

def small():
    return Small(), (torch.randn(4, 64),)

def branches():
    return Branches(), (torch.randn(4, 64),)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.set_num_threads(1)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return int(done.value.code or 0), out, err


def test_a_dim_can_be_fixed_and_passes_go_in_front_of_a_recipe(capsys, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[[pass]]\nname = "quantize-linear"\nmin_weights = 100\n')
    given = ["-r", "mine.toml", "-p", "group-ffn", "--size", "batch=4", "-o", "out"]
    code, out, _ = run(capsys, "optimize", "py:my_models:small", *given, "--json")
    assert code == 0 and [p["name"] for p in json.loads(out)["passes"] if not p["canonical"]] == ["group-ffn", "quantize-linear"]
    assert '[sizes]\n"batch" = 4\n' in (tmp_path / "out" / "recipe.resolved.toml").read_text()
    code, out, _ = run(capsys, "inspect", "out", "--json")
    assert json.loads(out)["inputs"] == ["x: f32[4, 64]"]


def test_a_timm_model_says_that_its_weights_are_random(capsys) -> None:
    if importlib.util.find_spec("timm") is None:  # importorskip would import it, which asks for torchvision
        pytest.skip("timm is not installed")
    code, out, _ = run(capsys, "inspect", "timm:test_resnet", "--inputs", "x=float32[2,3,64,64]", "--json")
    assert code == 0 and "random weights" in " ".join(json.loads(out)["notes"])


def test_optimize_writes_onnx_and_reports_every_pass(capsys, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "optimize", "py:my_models:small", "-p", "quantize-linear:min_weights=100", "-o", "m.onnx", "--json")
    found = json.loads(out)
    assert code == 0
    assert (tmp_path / "m.onnx").exists()
    assert {"model", "target", "output", "passes", "verification"} <= set(found)
    last = found["passes"][-1]
    assert (last["name"], last["applied"], last["options"]["min_weights"]) == ("quantize-linear", 2, 100)
    assert {"matched", "declined", "predicted", "measured", "seconds"} <= set(last)


@pytest.mark.parametrize("out", ["result", "m.pt2"])
def test_other_outputs_load_back(capsys, tmp_path: Path, out: str) -> None:
    assert run(capsys, "optimize", "py:my_models:small", "-p", "group-ffn", "-o", out)[0] == 0
    code, text, _ = run(capsys, "verify", "py:my_models:small", out, "--json")
    assert code == 0
    assert json.loads(text)["relative_error"] < 1e-5
    if out == "result":
        assert {"weights.safetensors", "graph.json", "recipe.resolved.toml", "manifest.json"} == {f.name for f in (tmp_path / out).iterdir()}


def test_the_resolved_recipe_is_accepted_back(capsys, tmp_path: Path) -> None:
    run(capsys, "optimize", "py:my_models:small", "-p", "group-ffn:groups=4", "-o", "result")
    code, out, _ = run(capsys, "optimize", "py:my_models:small", "-r", "result/recipe.resolved.toml", "--json")
    assert code == 0
    assert json.loads(out)["passes"][-1]["options"] == {"groups": 4, "outliers": 0}


def test_set_overrides_a_recipe(capsys, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "group-ffn"\n')
    _, out, _ = run(capsys, "optimize", "py:my_models:small", "-r", "r.toml", "--set", "group-ffn.groups=8", "--json")
    assert json.loads(out)["passes"][-1]["options"] == {"groups": 8, "outliers": 0}


def test_a_broken_budget_is_undone_and_exits_4(capsys, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[verify]\nmin_cosine = 1.0\n[[pass]]\nname = "quantize-linear"\nmin_weights = 1\n')
    code, out, _ = run(capsys, "optimize", "py:my_models:small", "-r", "r.toml", "--json")
    found = json.loads(out)
    assert code == 4
    assert found["error"]["code"] == "promise-broken"
    assert "quantize-linear" in found["error"]["message"]
    assert found["verification"]["bit_equal"]


def test_a_required_pass_that_matches_nothing_exits_4_and_writes_nothing(capsys, tmp_path: Path) -> None:
    code, _, err = run(capsys, "optimize", "py:my_models:small", "-p", "fuse-add-layer-norm", "-o", "m.onnx")
    assert code == 4
    assert "matched nothing" in err
    assert not (tmp_path / "m.onnx").exists()


def test_a_model_that_cannot_be_captured_shows_the_users_own_line(capsys) -> None:
    code, _, err = run(capsys, "inspect", "py:my_models:branches")
    assert code == 3
    assert "my_models.py:" in err
    assert "if x.sum() > 0:" in err
    assert "Hint" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["optimize", "py:my_models:small", "-p", "group-fnn"], 2, "Did you mean 'group-ffn'"),
        (["optimize", "py:my_models:small", "-p", "group-ffn:group=2"], 2, "no option 'group'. Did you mean 'groups'"),
        (["optimize", "py:my_models:small", "-p", "group-ffn:groups=many"], 2, "groups: input should be a valid integer"),
        (["optimize", "py:my_models:small"], 2, "give a recipe (-r NAME"),
        (["optimize", "py:my_models:small", "-p", "group-ffn", "--size", "batch"], 2, "--size 'batch' is not DIM=SIZE"),
        (["optimize", "py:my_models:small", "-p", "group-ffn", "--size", "batsh=4"], 2, "Did you mean 'batch'"),
        (["optimize", "py:my_models:small", "-p", "group-ffn", "-o", "x.txt"], 2, "end it in .onnx or .pt2"),
        (["optimize", "py:my_models:small", "-p", "group-ffn", "--target", "h2000"], 2, "Did you mean 'h200'"),
        (["optimize", "py:my_models:nothing", "-p", "group-ffn"], 2, "has no 'nothing'"),
        (["optimize", "py:no_such_module:f", "-p", "group-ffn"], 2, "no module named"),
        (["optimize", "zoo:minilmm", "-p", "group-ffn"], 2, "Did you mean 'minilm'"),
        (["optimize", "nothing", "-p", "group-ffn"], 2, "is no model"),
        (["inspect", "timm:no_such_net"], 2, "timm has no model 'no_such_net'"),
        (["inspect", "missing.pt2"], 3, "no file missing.pt2"),
        (["inspect", "my_models.py"], 3, "a text file"),
        (["bench", "missing.onnx"], 3, "no file missing.onnx"),
        (["no-such-verb"], 2, "No such command"),
        (["optimize", "py:my_models:small", "-r", "vit-int8"], 2, "there is no calibration data; give some: --calibration FILE"),
        (["recipes", "encoder-int9"], 2, "Did you mean 'encoder-int8'"),
    ],
)
def test_errors_are_one_sentence_with_their_code(capsys, arguments: list[str], code: int, words: str) -> None:
    got, _, err = run(capsys, *arguments)
    assert got == code
    assert words in err
    assert "Traceback" not in err
    got, out, _ = run(capsys, *arguments, "--json")
    assert got == code
    assert set(json.loads(out)["error"]) == {"code", "message"}


@pytest.mark.parametrize(
    ("verb", "rest"),
    [("optimize", "-p outlier-migration"), ("plan", "-p outlier-migration"), ("bisect", "-p outlier-migration"), ("explain", "outlier-migration")],
)
def test_every_command_that_runs_passes_takes_calibration_data(capsys, tmp_path: Path, verb: str, rest: str) -> None:
    numpy.savez(tmp_path / "data.npz", x=numpy.random.default_rng(0).standard_normal((4, 8, 64), dtype=numpy.float32))
    command = [verb, "py:my_models:small", *rest.split()]
    code, _, err = run(capsys, *command)
    assert (code, "no calibration data; give some: --calibration FILE" in err) == (2, True)
    assert run(capsys, *command, "--calibration", "data.npz")[0] == 0


def test_interrupt_exits_130_and_leaves_the_old_file(capsys, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "m.onnx").write_text("precious")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rewright.backends.onnx.export._save", interrupted)
    code, _, err = run(capsys, "optimize", "py:my_models:small", "-p", "group-ffn", "-o", "m.onnx")
    assert code == 130
    assert "interrupted" in err
    assert (tmp_path / "m.onnx").read_text() == "precious"
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".m.onnx")]


def test_a_full_disk_exits_5_and_leaves_the_old_file(capsys, tmp_path: Path, monkeypatch) -> None:
    import errno

    (tmp_path / "m.onnx").write_text("precious")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rewright.backends.onnx.export._save", full)
    code, _, err = run(capsys, "optimize", "py:my_models:small", "-p", "group-ffn", "-o", "m.onnx")
    assert code == 5
    assert "the disk is full" in err
    assert (tmp_path / "m.onnx").read_text() == "precious"


def test_plan_writes_nothing_and_predicts(capsys, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    code, out, _ = run(capsys, "plan", "py:my_models:small", "-p", "quantize-linear:min_weights=1", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["weight_bytes"][1] < found["weight_bytes"][0] / 3
    assert found["passes"][-1]["predicted"]["weight_bytes"] < 0
    assert sorted(p for p in tmp_path.iterdir() if p.name != "__pycache__") == [p for p in before if p.name != "__pycache__"]


def test_explain_names_the_node_and_the_reason_of_a_miss(capsys, tmp_path: Path) -> None:
    (tmp_path / "norms.py").write_text(
        "import torch\nfrom torch import nn\nclass M(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.norm = nn.LayerNorm(8)\n"
        "    def forward(self, x):\n        return self.norm(torch.relu(x))\ndef m():\n    return M(), (torch.randn(2, 8),)\n"
    )
    code, out, _ = run(capsys, "explain", "py:norms:m", "fuse-add-layer-norm")
    assert code == 0
    assert "layer_norm (norm): relu (relu) stands where add was expected" in out


def test_bench_cost_diff_bisect_and_inspect_answer(capsys, tmp_path: Path) -> None:
    run(capsys, "optimize", "py:my_models:small", "-p", "group-ffn", "-o", "m.onnx")
    code, out, _ = run(capsys, "bench", "py:my_models:small", "m.onnx", "--shapes", "4", "--rounds", "5", "--json")
    assert code == 0
    assert set(json.loads(out)["shapes"]["4"]) == {"py:my_models:small", "m.onnx"}
    code, out, _ = run(capsys, "cost", "py:my_models:small", "--target", "h200", "--json")
    assert json.loads(out)["total"]["flops"] > 4 * 2 * 2 * 64 * 128
    found = [json.loads(run(capsys, "cost", "py:my_models:small", "--shape", str(rows), "--json")[1]) for rows in (3, 6)]
    assert [list(f["sizes"].values()) for f in found] == [[3], [6]]
    assert [sum(n["flops"] for n in f["nodes"] if n["op"] == "linear") for f in found] == [rows * 4 * 64 * 128 for rows in (3, 6)]
    code, out, _ = run(capsys, "cost", "py:my_models:small", "--shape", "6", "--most", "2", "--target", "cpu-avx512-vnni")
    assert "on cpu-avx512-vnni at batch 6: " in out and "the 2 dearest of 3 calls; --most lists more" in out
    kinds = [line.split() for line in out.partition("dearest")[0].splitlines() if line.startswith(("linear ", "relu "))]
    assert [line.split()[0] for line in out.partition("dearest")[2].splitlines()[1:]] == ["node", "linear", "linear_1"]
    assert [k[:2] for k in kinds] == [["linear", "2"], ["relu", "1"]] and [k[6:] for k in kinds] == [["%", "memory", "2"], ["%", "launch", "1"]]
    code, _, err = run(capsys, "cost", "py:my_models:small", "--shape", "6x2")
    assert (code, "shape '6x2' has 2 sizes; the model's dynamic dims are batch" in err) == (2, True)
    run(capsys, "optimize", "py:my_models:small", "-p", "group-ffn", "-o", "result")
    code, out, _ = run(capsys, "diff", "py:my_models:small", "result", "--json")
    assert json.loads(out)["ops"]["linear"] == [2, 4]
    code, out, _ = run(capsys, "bisect", "py:my_models:small", "-p", "group-ffn", "-p", "quantize-linear:min_weights=1", "--json")
    assert json.loads(out)["culprit"]["name"] == "quantize-linear"
    code, out, _ = run(capsys, "inspect", "m.onnx", "--json")
    assert json.loads(out)["inputs"][0].startswith("x:")
    code, out, _ = run(capsys, "inspect", "py:my_models:small", "--text")
    assert "relu(" in out


@pytest.mark.parametrize("verb", ["passes", "recipes", "targets", "doctor"])
def test_lists_answer_in_words_and_json(capsys, verb: str) -> None:
    code, out, _ = run(capsys, verb)
    assert code == 0
    assert len(out.splitlines()) > 1
    code, out, _ = run(capsys, verb, "--json")
    assert code == 0
    assert json.loads(out)


def test_finetune_recovers_a_saved_result_goes_on_when_interrupted_and_refuses_in_words(capsys, tmp_path: Path, monkeypatch) -> None:
    run(capsys, "optimize", "py:my_models:small", "-p", "quantize-linear:min_weights=1", "-o", "int8")
    numpy.savez(tmp_path / "data.npz", x=numpy.random.default_rng(0).standard_normal((8, 16, 64), dtype=numpy.float32))
    code, _, err = run(capsys, "finetune", "int8", "--original", "py:my_models:small", "-o", "out")
    assert (code, "no data to learn from: give --data FILE" in err) == (2, True)
    run(capsys, "optimize", "py:my_models:small", "-p", "ffn-width:ratio=0.5,selection=prefix,refit=none,round_to=1", "--calibration", "data.npz", "-o", "half")
    command = ["finetune", "half", "--original", "py:my_models:small", "--data", "data.npz", "-o", "out", "--steps", "12", "--rate", "0.003", "--judgings", "3"]

    def interrupted(bar: object) -> None:
        if (tmp_path / "out.checkpoint").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rewright.tools.training._Run.take_step", lambda self, share: interrupted(self))
        code, _, err = run(capsys, *command)
    assert (code, "the same command goes on from there" in err, (tmp_path / "out").exists()) == (130, True, False)
    code, out, err = run(capsys, *command, "--json")
    found = json.loads(out)
    assert code == 0 and "going on from out.checkpoint" in err and found["resumed_at"] == 0
    assert [row["step"] for row in found["curve"]] == [0, 4, 8, 12]
    assert found["improved"] and found["drift_came_back"] > 0.1
    assert not (tmp_path / "out.checkpoint").exists()
    drift = {name: json.loads(run(capsys, "verify", "py:my_models:small", name, "--json")[1])["relative_error"] for name in ("half", "out")}
    assert drift["out"] < drift["half"]
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert "seconds" in out and "drift: " in out and out.splitlines()[-1].split(" % of the loss came back in ")[0].isdigit()


def test_a_recipe_is_copied_by_name(capsys, tmp_path: Path) -> None:
    _, out, _ = run(capsys, "recipes", "clean")
    (tmp_path / "my.toml").write_text(out)
    assert run(capsys, "optimize", "py:my_models:small", "-r", "my.toml")[0] == 0


# -- plain .onnx files --------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A file that never was a model of ours: two inputs, one of a dtype and one of a rank that text models lack; and what clean-onnx makes of it."""
    import onnx

    body = """(float[n, 4, 6] pixels, uint8[n] kind) => (float[n, 4, 6] y)
        { a = Identity (pixels) k = Cast <to = 1> (kind) r = Reshape (k, s) b = Mul (a, r) y = Relu (b) }"""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> agraph {body}')
    model.graph.initializer.append(onnx.numpy_helper.from_array(numpy.array([-1, 1, 1]), "s"))
    onnx.save(model, tmp_path / "plain.onnx")
    return tmp_path / "plain.onnx"


def test_every_command_takes_a_plain_onnx_file(capsys, plain: Path, tmp_path: Path) -> None:
    assert run(capsys, "optimize", "plain.onnx", "-r", "clean-onnx", "-o", "clean.onnx")[0] == 0
    code, out, _ = run(capsys, "optimize", "plain.onnx", "-r", "clean-onnx", "--json")
    assert code == 0 and sum(p["predicted"]["nodes"] for p in json.loads(out)["passes"]) == -1
    assert json.loads(run(capsys, "plan", "plain.onnx", "-r", "clean-onnx", "--json")[1])["nodes"] == [5, 4]
    assert json.loads(run(capsys, "inspect", "plain.onnx", "--json")[1])["nodes"] == 5
    assert json.loads(run(capsys, "diff", "plain.onnx", "clean.onnx", "--json")[1])["calls"]
    assert json.loads(run(capsys, "cost", "plain.onnx", "--json")[1])
    found = json.loads(run(capsys, "verify", "plain.onnx", "clean.onnx", "--json")[1])
    assert found["bit_equal"] and found["inputs"] == 3
    timed = json.loads(run(capsys, "bench", "plain.onnx", "clean.onnx", "--shapes", "4", "--rounds", "5", "--json")[1])
    assert set(timed["shapes"]["4"]) == {"plain.onnx", "clean.onnx"}
    numpy.savez(tmp_path / "data.npz", pixels=numpy.ones((2, 3, 4, 6), numpy.float32), kind=numpy.ones((2, 3), numpy.uint8))
    code, out, _ = run(capsys, "evaluate", "plain.onnx", "--against", "clean.onnx", "--data", "data.npz", "--json")
    assert code == 0 and next(s["value"] for s in json.loads(out)["scores"] if s["name"] == "cosine") == pytest.approx(1)


def test_a_person_sees_what_became_of_the_nodes(capsys, plain: Path) -> None:
    code, out, _ = run(capsys, "optimize", "plain.onnx", "-r", "clean-onnx", "-o", "clean.onnx")
    assert code == 0 and "plain.onnx: 5 -> 4 nodes, opset 17 as it was" in out
    assert "end result: bit-equal to the file, in onnxruntime on 2 made inputs" in out and "wrote clean.onnx" in out


def test_verify_takes_given_inputs_and_says_what_they_lack(capsys, plain: Path, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "verify", "plain.onnx", "plain.onnx", "--inputs", "pixels=float32[2,4,6],kind=uint8[2]", "--json")
    assert code == 0 and json.loads(out)["inputs"] == 1
    code, _, err = run(capsys, "verify", "plain.onnx", "plain.onnx", "--inputs", "pixels=float32[2,4,6]")
    assert code == 2 and "plain.onnx reads kind, which --inputs lacks; it has pixels" in err
    code, _, err = run(capsys, "verify", "plain.onnx", "plain.onnx", "--inputs", "pixels=float32[2,4,6],kind=uint8[3]")
    assert code == 2 and "onnxruntime can't run plain.onnx on pixels [2, 4, 6], kind [3]" in err
