"""What TensorBoard calls first, by the entry point ``tensorboard_plugins``.

Nothing here may fail: TensorBoard does not start if a plugin cannot be imported or loaded. So this
module imports nothing of ours, and whatever is wrong with the rest costs only our tab.
"""

import logging

from tensorboard.plugins.base_plugin import TBContext, TBLoader, TBPlugin

logger = logging.getLogger(__name__)


class RankFlowLoader(TBLoader):
    """Makes the plugin, or tells why there is none."""

    def load(self, context: TBContext) -> TBPlugin | None:
        """Return the plugin; None, and a warning, if it cannot be made."""
        try:
            from rankflow.report.plugin.plugin import RankFlowPlugin

            return RankFlowPlugin(context)
        except Exception as error:  # a broken tab must not take the others with it
            logger.warning("the tab Rank flow is missing: %s: %s", type(error).__name__, error)
            return None
