"""Which nodes get a kernel written for GPUs: a table from ops to choosers. A chooser returns None where the generic kernel has to do."""

from __future__ import annotations

from jisu.targets.steps import Choosers

CHOOSERS: Choosers = {}
"""Choosers by op; see `jisu.targets.cuda.lowering.lower`."""
