"""The command line: one thin command a function. Data on stdout, all else on stderr; --json prints one object, also on failure."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..ir.errors import RewrightError, UsageError

app = typer.Typer(
    name="rewright",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make neural networks smaller and faster by rewriting their graphs, with no silent step.",
)

WrongUsage: Any = typer.BadParameter.__bases__[0]  # click's UsageError, which some versions of typer bring along under another name

Model = Annotated[str, typer.Argument(help=".onnx, .pt2, saved result folder, hf:NAME_OR_FOLDER, timm:NAME, py:module:callable, zoo:NAME")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Inputs = Annotated[str | None, typer.Option(help="Example inputs: an .npz file or 'name=int64[2,16],...'.")]
RecipeName = Annotated[str | None, typer.Option("-r", "--recipe", help="Shipped recipe or .toml file.")]
PassNames = Annotated[list[str] | None, typer.Option("-p", "--pass", help="PASS[:option=value,...]; repeat for several. In front of a recipe's.")]
TargetName = Annotated[str | None, typer.Option(help="cpu, h200, a100, cuda:sm_90 or a .toml file.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="pass.option=value, over the recipe's.")]
CalibrationFile = Annotated[str | None, typer.Option(help="Batches of inputs: .npz (leading axis of batches), .jsonl or .txt.")]
Sizes = Annotated[list[str] | None, typer.Option("--size", help="DIM=SIZE: fix a dynamic dim, as merging tokens needs; repeat for several.")]
Tokenizer = Annotated[str | None, typer.Option(help="For calibration text: a tokenizer's folder or tokenizer.json.")]


@app.command()
def optimize(
    model: Model,
    recipe: RecipeName = None,
    passes: PassNames = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="model.onnx, model.pt2 or a folder.")] = None,
    target: TargetName = None,
    inputs: Inputs = None,
    settings: Settings = None,
    calibration: CalibrationFile = None,
    tokenizer: Tokenizer = None,
    size: Sizes = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Module path no lossy pass may touch.")] = None,
    profile: Annotated[str, typer.Option(help="ONNX operators: ort (com.microsoft where faster) or pure.")] = "ort",
    opset: Annotated[int | None, typer.Option(help="ONNX opset of an .onnx output; default an .onnx file's own, else 20, or 23 for Attention.")] = None,
    backend: Annotated[str | None, typer.Option(help="Also compile: torch, onnx, tvm, triton, kernels, or auto (the fastest here).")] = None,
    verify: Annotated[bool, typer.Option(help="Check every pass against the original.")] = True,
    as_json: Json = False,
) -> None:
    """Rewrite MODEL by a recipe or passes, verify every step, write the result."""
    from . import present
    from .finetune import checkpoint_of
    from .optimize import optimize as run
    from .stages import checkpoints, remove_checkpoints

    plan, checkpoint = _recipe(recipe, passes, settings, size), None
    if out is not None:
        _check_out(out)
        if any(p.trains for p in plan.passes):
            checkpoint = checkpoint_of(out)
            for there in checkpoints(checkpoint):
                print(f"going on from {there}", file=sys.stderr)
    with present.progress() as bar:
        given: dict[str, Any] = {"recipe": plan, "target": target, "verify": verify, "ignore": ignore or (), "checkpoint": checkpoint}
        result = run(_subject(model, plan, inputs, calibration, tokenizer), progress=bar, **given)
        lowering = result.lower(backend, target) if backend is not None else None
        written = _write(result, out, profile, opset, lowering) if out is not None else None
    if checkpoint is not None:
        remove_checkpoints(checkpoint)
    payload = {
        "model": model,
        "target": target or plan.target,
        "output": written,
        "passes": [r.as_dict() for r in result.records],
        "verification": result.verification,
    }
    if lowering is not None:
        payload["lowering"] = lowering.as_dict()
    undone = [f"{r.name}: {r.undone}" for r in result.records if r.undone]
    if undone:
        payload["error"] = {"code": "promise-broken", "message": f"undone: {'; '.join(undone)}"}
    _print(payload, as_json, lambda: present.result(result, model, written, lowering))
    if undone:
        raise typer.Exit(4)


@app.command()
def plan(
    model: Model,
    recipe: RecipeName = None,
    passes: PassNames = None,
    target: TargetName = None,
    inputs: Inputs = None,
    settings: Settings = None,
    calibration: CalibrationFile = None,
    tokenizer: Tokenizer = None,
    size: Sizes = None,
    as_json: Json = False,
) -> None:
    """A dry run: what would match, be declined and why, and what it is predicted to buy. Writes nothing."""
    from . import present
    from .optimize import optimize as run

    chosen = _recipe(recipe, passes, settings, size)
    with present.progress() as bar:
        subject = _subject(model, chosen, inputs, calibration, tokenizer)
        result = run(subject, recipe=chosen, target=target, verify=False, train=False, progress=bar)
    _print(present.plan_payload(result, target or chosen.target), as_json, lambda: present.plan(result, target or chosen.target))


@app.command()
def inspect(
    model: Model, inputs: Inputs = None, text: Annotated[bool, typer.Option("--text", help="Print the whole program as Python.")] = False, as_json: Json = False
) -> None:
    """What MODEL is: inputs, blocks, ops, weights; what was not understood."""
    from . import facts

    if model.endswith(".onnx"):
        found = facts.onnx_facts(Path(model))
        return _print(found, as_json, lambda: facts.aligned(found))
    graph = _canonical(model, inputs)
    found = facts.graph_facts(graph, model)
    _print(found, as_json, lambda: facts.aligned(found))
    if text and not as_json:
        from ..ir.show import show

        print(show(graph))


@app.command()
def explain(
    model: Model,
    name: Annotated[str, typer.Argument(help="Pass name.")],
    inputs: Inputs = None,
    calibration: CalibrationFile = None,
    tokenizer: Tokenizer = None,
    most: int = 5,
    as_json: Json = False,
) -> None:
    """Where a pass applies in MODEL, what it declines and why, and what came closest to matching."""
    from .optimize import explain as run

    found = run(_load(model, inputs, calibration, tokenizer), name, most)
    _print(
        {"name": found.name, "applied": found.applied, "declined": [vars(d) for d in found.declined], "misses": [str(m) for m in found.misses]},
        as_json,
        lambda: print("\n".join(found.lines())),
    )


@app.command()
def diff(a: Model, b: Model, inputs: Inputs = None, as_json: Json = False) -> None:
    """What changed between two models: ops, weights, cost, and the program text."""
    from dataclasses import asdict

    from . import present
    from .optimize import diff as run

    found = run(_canonical(a, inputs), _canonical(b, inputs))
    _print({**asdict(found), "equal": found.equal}, as_json, lambda: present.difference(found))


@app.command()
def verify(
    a: Model,
    b: Model,
    inputs: Inputs = None,
    min_cosine: float = 0.999,
    max_error: Annotated[float | None, typer.Option(help="Largest relative error.")] = None,
    as_json: Json = False,
) -> None:
    """Run two models (a .onnx file may be one) on the same inputs at several shapes; exit code 4 if they differ by more than allowed."""
    from . import facts
    from .compare import compare_models

    found = compare_models(a, b, inputs)
    ok = found.cosine >= min_cosine and (max_error is None or found.relative_error <= max_error)
    payload: dict[str, Any] = {"a": a, "b": b, **found.as_dict(), "ok": ok}
    if not ok:
        found_text = f"cosine {found.cosine:.5f}, relative error {found.relative_error:.2g}"
        payload["error"] = {"code": "promise-broken", "message": f"{found_text}: more than allowed (min cosine {min_cosine}, max error {max_error})"}
    _print(payload, as_json, lambda: facts.aligned(payload))
    if not ok:
        raise typer.Exit(4)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Saved result folder, .onnx file or any MODEL.")],
    on: Annotated[str | None, typer.Option(help="zoo:NAME or py:module:function; default: the zoo model it came from.")] = None,
    against: Annotated[str | None, typer.Option(help="Another MODEL to agree with, on --data.")] = None,
    data: Annotated[str | None, typer.Option(help="Inputs for --against: .npz, .jsonl or .txt.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="For text: a tokenizer's folder or tokenizer.json.")] = None,
    backend: Annotated[str, typer.Option(help="torch, compile, onnx, tvm, or a target to lower for.")] = "torch",
    most: Annotated[int | None, typer.Option(help="Only so many held-out items.")] = None,
    as_json: Json = False,
) -> None:
    """Score MODEL on its own metric, or its agreement with another, each with a 95 % confidence interval."""
    from . import present
    from .calibration import calibration
    from .evaluate import evaluate as run

    batches = calibration(data, tokenizer=tokenizer) if data is not None else None
    found = run(model, on, against, batches, backend, most)
    _print(found.as_dict(), as_json, lambda: present.evaluation(found))


@app.command()
def finetune(
    student: Annotated[str, typer.Argument(help="Saved result folder.")],
    original: Annotated[str, typer.Option(help="What it was made of: hf:NAME_OR_FOLDER, zoo:NAME, .pt2 ... or its saved folder.")],
    out: Annotated[str, typer.Option("-o", "--out", help="Folder of the recovered result; OUT.checkpoint lies beside it until then.")],
    data: Annotated[str | None, typer.Option(help="Batches of inputs: .npz, .jsonl or .txt; zoo models have their own.")] = None,
    tokenizer: Tokenizer = None,
    inputs: Inputs = None,
    steps: Annotated[int | None, typer.Option(help="End after so many steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="End after so much wall time (10 without --steps).")] = None,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    loss: Annotated[str, typer.Option(help="auto, kl, mse, cosine or attention.")] = "auto",
    temperature: Annotated[float, typer.Option(help="Of the logits.")] = 1.0,
    hidden: Annotated[float, typer.Option(help="Weight of the residual stream's relative error in the loss.")] = 0.0,
    lora: Annotated[int, typer.Option(help="Rank of the updates that chosen matrices get, merged in the end; 0: they are trained themselves.")] = 0,
    trainable: Annotated[list[str] | None, typer.Option(help="all, rewritten, attention, or a path of weights; repeat for several.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile both models.")] = False,
    seed: int = 0,
    judgings: Annotated[int, typer.Option(help="Looks at held-out data on the way.")] = 10,
    as_json: Json = False,
) -> None:
    """Recover a rewritten model by distillation from its original; a run that stopped goes on from its checkpoint."""
    from . import present
    from .calibration import calibration
    from .finetune import checkpoint_of, finetune_folder
    from .models import load_model

    _check_folder(out)
    batches = calibration(data, tokenizer=tokenizer) if data is not None else ()
    if checkpoint_of(out).exists():
        print(f"going on from {checkpoint_of(out)}", file=sys.stderr)
    options: dict[str, Any] = {"steps": steps, "minutes": minutes, "rate": rate, "loss": loss, "temperature": temperature, "hidden": hidden}
    options |= {"lora": lora, "trainable": trainable or "all", "precision": precision, "compiled": compiled, "seed": seed, "judgings": judgings}
    with present.progress() as bar:
        found = finetune_folder(student, load_model(original, inputs), out, batches, progress=bar, **options)
    _print({"student": student, "original": original, "output": out, **found.as_dict()}, as_json, lambda: present.recovery(found, out))


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help="Models or .onnx files; the first is the reference.")],
    inputs: Inputs = None,
    shapes: Annotated[str, typer.Option(help="batch x sequence (or the model's own dims), comma separated.")] = "1x32,8x128",
    threads: int = 1,
    rounds: int = 15,
    as_json: Json = False,
) -> None:
    """Time models against each other: one process, alternating runs, median, spread and ratio to the first."""
    from . import present
    from .compare import bench_models

    found = bench_models(models, shapes, inputs, threads, rounds)
    _print(found, as_json, lambda: present.timings(found))


@app.command()
def cost(
    model: Model,
    target: TargetName = "cpu",
    inputs: Inputs = None,
    shape: Annotated[str | None, typer.Option(help="Sizes of the model's dynamic dims, such as 8x128; default: those of its example.")] = None,
    most: Annotated[int, typer.Option(help="Calls to list.")] = 15,
    energy: Annotated[bool, typer.Option("--energy", help="Modelled energy instead of time: picojoules on an ASIC, from a published table.")] = False,
    as_json: Json = False,
) -> None:
    """Bytes, FLOPs and predicted time of every call on a target, the dearest first. No device is needed."""
    from . import present
    from .compare import dim_sizes
    from .optimize import cost as run

    graph = _canonical(model, inputs)
    sizes = {name: dim.example for name, dim in graph.dims.items()} if shape is None else dim_sizes(graph, shape)
    if energy:
        from ..ir.energy import energy as modelled

        calls = modelled(graph, sizes)
        return _print(present.energy_payload(calls), as_json, lambda: present.energies(calls, most))
    rows = run(graph, target or "cpu", sizes)
    payload = present.cost_payload(rows, target or "cpu", sizes)
    _print(payload, as_json, lambda: present.costs(rows, payload, most))


@app.command()
def bisect(
    model: Model,
    recipe: RecipeName = None,
    passes: PassNames = None,
    inputs: Inputs = None,
    settings: Settings = None,
    calibration: CalibrationFile = None,
    tokenizer: Tokenizer = None,
    limit: float | None = None,
    as_json: Json = False,
) -> None:
    """Run a recipe without verification; if the end result is off, name the pass and the layer that did it."""
    from .optimize import bisect as run
    from .optimize import optimize as rewrite

    result = rewrite(_load(model, inputs, calibration, tokenizer), recipe=_recipe(recipe, passes, settings), verify=False, train=False)
    found = run(result, limit)
    payload = {"culprit": None if found is None else vars(found)}
    _print(payload, as_json, lambda: print(found or "the end result is within the limit; no pass is at fault"))


@app.command()
def export(
    model: Model,
    out: Annotated[str, typer.Argument(help="model.onnx")],
    profile: str = "ort",
    opset: int | None = None,
    inputs: Inputs = None,
    as_json: Json = False,
) -> None:
    """Write MODEL as ONNX, checked in onnxruntime at several shapes before the file gets its name."""
    from .optimize import optimize as run

    _check_out(out)
    done = run(_load(model, inputs), recipe=[]).export(out, _profile(profile), opset)
    payload = {**vars(done), "path": str(done.path), "parity": done.parity.as_dict() if done.parity else None}
    _print(
        payload,
        as_json,
        lambda: print(
            f"{done.path}: {done.nodes} nodes, {done.bytes / 1e6:.1f} MB, opset {done.opset}, onnxruntime within {done.parity.relative_error:.1e} of the graph"
            if done.parity
            else done.path
        ),
    )


@app.command()
def passes(as_json: Json = False) -> None:
    """All passes with their options and what each rewrites."""
    from . import facts

    rows = facts.pass_rows()
    _print({"passes": rows}, as_json, lambda: facts.passes(rows))


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe, to copy and edit.")] = None, as_json: Json = False) -> None:
    """Shipped recipes; with a NAME its text (`rewright recipes NAME > my.toml`)."""
    from . import facts

    if name is not None:
        text = facts.recipe_text(name)
        return _print({"name": name, "toml": text}, as_json, lambda: print(text, end=""))
    rows = facts.recipe_rows()
    _print({"recipes": rows}, as_json, lambda: facts.named(rows))


@app.command()
def targets(as_json: Json = False) -> None:
    """Hardware descriptions that come with rewright."""
    from . import facts

    rows = facts.target_rows()
    _print({"targets": rows}, as_json, lambda: facts.targets(rows))


@app.command()
def doctor(
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine instead: what a target file says of it, half a minute.")] = False,
    device: Annotated[str | None, typer.Option(help="What --measure is for: cpu or cuda; default: cuda where torch sees a device.")] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="Write what was measured to this .toml file, for --target.")] = None,
    as_json: Json = False,
) -> None:
    """What is installed, what this machine can run, and what is missing for the rest."""
    from . import facts

    if measure:
        from . import present
        from .measure import measure as run

        with present.progress() as bar:
            measured = run(device, out=out, progress=bar)
        return _print({**vars(measured), "output": out}, as_json, lambda: facts.measured(measured, out))
    if device or out:
        raise UsageError("--device and -o say what `rewright doctor --measure` measures and where it writes it; add --measure")
    found = facts.doctor_facts()
    _print(found, as_json, lambda: facts.aligned(found))


@app.command()
def demo(out: str = "minilm-int8.onnx", quick: Annotated[bool, typer.Option(help="Fewer rounds and texts.")] = False, as_json: Json = False) -> None:
    """The main job on a real model: MiniLM to 8 bits, written as ONNX, with a table of what it cost and bought."""
    from . import present
    from .demo import demo as run

    _check_out(out)
    with present.progress() as bar:
        found = run(Path(out), quick, bar)
    _print(found.payload, as_json, lambda: present.demo(found))


@app.command()
def matrix(
    names: Annotated[list[str] | None, typer.Argument(help="Architectures or families; all without one.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Only the subset that CI runs.")] = False,
    out: Annotated[str | None, typer.Option("-o", "--out", help="Also write the JSON to this file, and the table beside it as .txt.")] = None,
    as_json: Json = False,
) -> None:
    """Capture, save, export, re-export and differentiate small models of many architectures; exit code 4 if any answer is no."""
    from . import matrix, present
    from .architectures import find_architectures
    from .present_matrix import show

    asked = find_architectures(names or (), fast)
    with present.progress() as bar:
        rows = matrix.run_matrix(asked, bar)
    if out is not None:
        matrix.write(rows, Path(out))
    failed = [f"{r.name}: {sentence}" for r in rows for sentence in r.sentences]
    found = {**matrix.payload(rows), **({"error": {"code": "promise-broken", "message": "; ".join(failed)}} if failed else {})}
    _print(found, as_json, lambda: show(rows, present.console))
    if failed:
        raise typer.Exit(4)


# -- shared ---------------------------------------------------------------------------------------------------------


def _print(payload: dict[str, Any], as_json: bool, human: Callable[[], Any]) -> None:
    if as_json:
        print(json.dumps(_plain(payload), default=str, allow_nan=False))
    else:
        human()


def _plain(value: Any) -> Any:
    """JSON knows no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _load(model: str, inputs: str | None, data: str | None = None, tokenizer: str | None = None, sizes: dict[str, int] | None = None) -> Any:
    """The model with its inputs, and those of a calibration file behind them; texts no longer than the model will be fixed at."""
    from ..ir.sizes import token_count
    from .calibration import LENGTH, calibration
    from .models import as_flat, load_model

    loaded = load_model(model, inputs)
    if data is not None:
        length = token_count(loaded.graph, sizes) or LENGTH
        loaded.inputs += [as_flat(loaded.graph, batch) for batch in calibration(data, tokenizer=tokenizer, length=length)]
    return loaded


def _subject(model: str, recipe: Any, *given: Any) -> Any:
    """What `optimize` works on: an .onnx file's own name where the recipe only tidies its nodes, else the model captured."""
    return model if recipe.only_tidies and model.endswith(".onnx") else _load(model, *given, sizes=recipe.sizes)


def _canonical(model: str, inputs: str | None) -> Any:
    from ..passes.pipeline import Pipeline

    return Pipeline([], verify=False).run(_load(model, inputs).graph).graph


def _recipe(recipe: str | None, passes: list[str] | None, settings: list[str] | None, sizes: list[str] | None = None) -> Any:
    from ..passes.recipe import from_command_line

    return from_command_line(recipe, passes or [], settings or [], sizes or [])


def _profile(name: str) -> Any:
    if name not in ("ort", "pure"):
        raise UsageError(f"no ONNX profile {name!r}; there are ort and pure")
    return name


def _check_out(out: str) -> None:
    from ..ir.files import check_writable

    path = Path(out)
    if path.suffix not in ("", ".onnx", ".pt2"):
        raise UsageError(f"can't tell what to write from {out!r}: end it in .onnx or .pt2, or name a folder")
    check_writable(path)


def _check_folder(out: str) -> None:
    if Path(out).suffix in (".onnx", ".pt2"):
        raise UsageError(f"{out} is not a folder: the recovered result is saved as one, and `rewright export` or `optimize -o` make other formats of it")
    _check_out(out)


def _write(result: Any, out: str, profile: str, opset: int | None, lowering: Any = None) -> str:
    path = Path(out)
    if lowering is not None and lowering.lowered.backend == "tvm":
        from ..backends.tvm.runtime import FOLDER

        if path.suffix in (".onnx", ".pt2"):
            raise UsageError(f"a program compiled by tvm is a folder: -o {path.with_suffix('')}, or another --backend for {path}")
        lowering.lowered.run.check_complete()
        result.save(path)
        lowering.lowered.run.save(path / FOLDER)
        return str(path)
    if path.suffix == ".onnx":
        result.export(path, _profile(profile), opset)
    elif path.suffix == ".pt2":
        result.export_pt2(path)
    else:
        result.save(path)
    return str(path)


def main(argv: list[str] | None = None) -> None:
    """Entry point: every failure is one sentence and an exit code (DESIGN 7)."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = app(arguments, standalone_mode=False) or 0
        if code == 130:  # some versions of typer swallow Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except RewrightError as error:
        code, name, message = error.code, error.name, str(error)
    except (KeyboardInterrupt, typer.Abort):
        code, name, message = 130, "interrupted", "interrupted; nothing was written"
    except WrongUsage as error:
        code, name, message = 2, "usage", error.format_message()
    except MemoryError:
        code, name, message = 5, "resource", "out of memory; use smaller example inputs or a smaller calibration set"
    except OSError as error:
        code, name, message = 5, "resource", str(error)
    except Exception as error:  # our bug
        code, name, message = 1, "internal", f"a bug in rewright ({type(error).__name__}: {error}); please report it with the command you ran"
    if "--json" in arguments:
        print(json.dumps({"error": {"code": name, "message": message}}))
    print(f"rewright: {message}", file=sys.stderr)
    sys.exit(code)
