"""The test kit for passes and rules; see `jisu.compiler.testing`."""

from jisu.compiler.testing import *  # noqa: F403
from jisu.compiler.testing import __all__ as __all__
