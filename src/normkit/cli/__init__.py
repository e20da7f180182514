"""The command line: one file per verb, loaded only when its verb is typed.

A verb is a module with ``main(argv) -> int``. The first line that it prints is its answer in words, the last one the
next command to type. Exit status: 0 clean, 1 findings, 2 an error. What the user got wrong is a ``UserError`` and
prints as one message; anything else that escapes is a fault of normkit's own and keeps its traceback.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import traceback
from typing import NamedTuple

from normkit.cli.errors import UserError, missing_extra


class Verb(NamedTuple):
    module: str
    summary: str


VERBS = {
    "compare": Verb(
        "normkit.cli.compare", "train real networks with and without normalization, and say which is better"
    ),
    "report": Verb("normkit.cli.report", "make the page of a comparison again from its directory"),
    "list": Verb("normkit.cli.listing", "the norms, what each is invariant to, the backends, the tasks of compare"),
    "explain": Verb("normkit.cli.explain", "which backend runs a norm on a shape; what a rule of the doctor means"),
    "doctor": Verb("normkit.cli.doctor", "what is wrong with the normalization of a model or of a watched run"),
    "calibrate": Verb("normkit.cli.calibrate", "re-estimate the running statistics of a checkpoint from data"),
    "fold": Verb("normkit.cli.fold", "fold the norms of a checkpoint into the layers beside them"),
    "convert": Verb("normkit.cli.convert", "turn the norms of a checkpoint into norms of another kind"),
    "freeze": Verb("normkit.cli.freeze", "freeze the running statistics and the affine parameters of a model"),
    "sync": Verb("normkit.cli.sync", "let the batch norms of a model pool the batches of all processes"),
    "bench": Verb("normkit.cli.bench", "time the layers against torch's own"),
    "env": Verb("normkit.cli.environment", "versions and hardware: what a bug report needs"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line (``sys.argv`` by default) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        status = _dispatch(argv)
        sys.stdout.flush()  # so that a closed pipe shows here and not while the interpreter shuts down
        return status
    except SystemExit as stop:  # tyro has printed the help (0) or what is wrong with an argument (2)
        return stop.code if isinstance(stop.code, int) else 2
    except UserError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if message := missing_extra(error, " ".join(["normkit", *argv[:1]])):
            return _fail(message)
        return _own_fault()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `normkit list | head -1`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        return _own_fault()


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        return _help()
    if argv[0] in ("-V", "--version", "version"):
        return _version()
    if argv[0] not in VERBS:
        raise UserError(_unknown(argv[0]))
    return importlib.import_module(VERBS[argv[0]].module).main(argv[1:])


def _help() -> int:
    print(f"normkit {_installed()}: normalization for neural-network training in PyTorch\n")
    print("usage: normkit VERB [--help] ...\n")
    for name, verb in VERBS.items():
        print(f"  {name:<9} {verb.summary}")
    print("\nnext: normkit compare --quick")
    return 0


def _version() -> int:
    print(f"normkit {_installed()}")
    return 0


def _installed() -> str:
    from normkit import __version__

    return __version__


def _unknown(verb: str) -> str:
    near = difflib.get_close_matches(verb.lower(), VERBS, n=1, cutoff=0.5)
    suggestion = f"  did you mean: normkit {near[0]}\n" if near else ""
    return f"there is no verb {verb!r}.\n{suggestion}  choose from: {', '.join(VERBS)}"


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _own_fault() -> int:
    traceback.print_exc()
    print(
        "\nerror: this is a fault of normkit. Please report it with the lines above and the output of: normkit env",
        file=sys.stderr,
    )
    return 2
