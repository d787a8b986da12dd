"""Settings of the base pipeline, re-exported under the package's name."""

from config.settings import *  # noqa: F403
