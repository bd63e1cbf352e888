"""What happens to images and tensors that cannot be read: the run ends, or they are counted and listed.

Entry: `SkippedImages`.
"""

import logging
from typing import Literal

from nf_pipeline.errors import DataError

MAX_LISTED = 100

_logger = logging.getLogger(__name__)


class SkippedImages:
    """Counts and lists images, or tensors, that are left out.

    Args:
        policy: "error" refuses the first one.

    Attributes:
        num_images: left out so far.
        listed: the first `MAX_LISTED`, one line for each.
    """

    def __init__(self, policy: Literal["error", "skip"]) -> None:
        self._policy = policy
        self.num_images = 0
        self.listed: list[str] = []

    def check(self, where: str, reason: str) -> None:
        """Refuses an image unless skipping is allowed, without counting it.

        Args:
            where: names file, row and column.
            reason: why it cannot be read.

        Raises:
            DataError: the policy is "error".
        """
        if self._policy == "error":
            raise DataError(
                f"{where}: the sample cannot be read: {reason}",
                "replace or remove it, or --on-bad-image skip",
            )

    def add(self, where: str, reason: str) -> None:
        """Counts an image, or refuses it as `check` does."""
        self.check(where, reason)
        self.num_images += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(f"{where}: {reason}")
            _logger.warning("skipped %s: %s", where, reason)

    def summary(self) -> str:
        """Returns one line: how many, and the first of them."""
        if not self.listed:
            return "no sample was skipped"
        return f"{self.num_images} samples skipped that cannot be read, the first: {self.listed[0]}"
