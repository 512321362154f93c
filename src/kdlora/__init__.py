"""kdlora: distil a fine-tuned encoder into a small, fast classifier with LoRA."""

from __future__ import annotations
