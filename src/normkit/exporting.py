"""Whether a program is being exported."""

from __future__ import annotations

import torch


def exporting() -> bool:
    """Whether ``torch.export`` traces.

    It looks at the flag behind ``torch.compiler.is_exporting()``: Dynamo before torch 2.13 takes that function for true
    in everything it compiles.
    """
    return torch.compiler._is_exporting_flag
