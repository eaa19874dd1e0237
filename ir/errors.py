"""The errors a user can meet: each carries its exit code (DESIGN 7) and says expected, got, what to do."""

from __future__ import annotations


class RewrightError(Exception):
    """Base of every error meant for a person. `code` is the CLI's exit code, `name` the JSON error code."""

    code = 1
    name = "internal"


class UsageError(RewrightError):
    """A wrong call: unknown pass, option, target, verb."""

    code = 2
    name = "usage"


class RecipeError(UsageError):
    """A recipe that can't be read or names something that does not exist."""

    name = "recipe"


class InputFileError(RewrightError):
    """A model file that is missing, damaged, of another kind, or unsafe."""

    code = 3
    name = "input-file"


class CaptureError(RewrightError):
    """A model that torch.export can't capture; the message holds the user's own line and a hint."""

    code = 3
    name = "capture"


class PromiseBroken(RewrightError):
    """Verification, a budget or `require_match` failed."""

    code = 4
    name = "promise-broken"


class ResourceError(RewrightError):
    """Disk, memory or time ran out, or the output can't be written."""

    code = 5
    name = "resource"


class Interrupted(RewrightError):
    """Ctrl-C during work that goes on later from where it stopped."""

    code = 130
    name = "interrupted"


def near(name: str, known: list[str] | tuple[str, ...]) -> str:
    """' Did you mean X?' for the known names closest to `name`, or nothing."""
    import difflib

    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
