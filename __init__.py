"""rewright: makes neural networks smaller and faster by rewriting their graphs, with no silent step."""

# Nothing is imported here at load: `import rewright` and `rewright --help` stay quick, and pytest, which imports this
# file once more under the folder's name, can't register our ops a second time.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import passes as passes
    from .ir.energy import energy as energy
    from .ir.errors import CaptureError as CaptureError
    from .ir.errors import InputFileError as InputFileError
    from .ir.errors import PromiseBroken as PromiseBroken
    from .ir.errors import RecipeError as RecipeError
    from .ir.errors import ResourceError as ResourceError
    from .ir.errors import RewrightError as RewrightError
    from .ir.errors import UsageError as UsageError
    from .ir.graph import Graph as Graph
    from .passes.pipeline import Pipeline as Pipeline
    from .tools.calibration import calibration as calibration
    from .tools.evaluate import evaluate as evaluate
    from .tools.finetune import finetune as finetune
    from .tools.optimize import Result as Result
    from .tools.optimize import bisect as bisect
    from .tools.optimize import capture as capture
    from .tools.optimize import cost as cost
    from .tools.optimize import diff as diff
    from .tools.optimize import explain as explain
    from .tools.optimize import load as load
    from .tools.optimize import optimize as optimize
    from .tools.optimize import verify as verify

__version__ = "0.1.0"

# public name -> where it lives below this package; "" is the module itself
PUBLIC = {
    "capture": "tools.optimize:capture",
    "optimize": "tools.optimize:optimize",
    "load": "tools.optimize:load",
    "cost": "tools.optimize:cost",
    "energy": "ir.energy:energy",
    "evaluate": "tools.evaluate:evaluate",
    "finetune": "tools.finetune:finetune",
    "calibration": "tools.calibration:calibration",
    "verify": "tools.optimize:verify",
    "diff": "tools.optimize:diff",
    "bisect": "tools.optimize:bisect",
    "explain": "tools.optimize:explain",
    "Result": "tools.optimize:Result",
    "Pipeline": "passes.pipeline:Pipeline",
    "Graph": "ir.graph:Graph",
    "passes": "passes:",
    "RewrightError": "ir.errors:RewrightError",
    "UsageError": "ir.errors:UsageError",
    "RecipeError": "ir.errors:RecipeError",
    "InputFileError": "ir.errors:InputFileError",
    "CaptureError": "ir.errors:CaptureError",
    "PromiseBroken": "ir.errors:PromiseBroken",
    "ResourceError": "ir.errors:ResourceError",
}


def __getattr__(name: str) -> Any:
    """A public name, loaded on first use (PEP 562)."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = PUBLIC[name].split(":")
    loaded = import_module(f".{module}", __name__)
    return getattr(loaded, attribute) if attribute else loaded


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
