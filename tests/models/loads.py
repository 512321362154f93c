"""What the tests of loading run in a process of its own."""

from transformers import conversion_mapping

import kdlora.models.loading  # noqa: F401 - its preparation is what is looked at


def has_patterns() -> bool:
    return conversion_mapping._checkpoint_conversion_mapping_cache is not None
