"""Makes a bare checkout importable as `rewright`, whatever the folder is called."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("rewright") is None:
    spec = importlib.util.spec_from_file_location("rewright", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rewright"] = module
    spec.loader.exec_module(module)
