"""What a fine-tuned model says about its task."""

from __future__ import annotations

from collections.abc import Sequence

from kdlora.data.tasks import DEFAULT_METRICS, PROBLEM_TYPES, Task
from kdlora.errors import ModelError
from kdlora.models.checkpoints import open_source, read_config
from kdlora.models.encoders import GENERIC_LABEL


def read_task(
    source: str,
    *,
    label_names: Sequence[str] | None = None,
    text: Sequence[str] = ("text",),
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Task:
    """Read kind and labels of a fine-tuned classifier from its config, without loading its weights.

    Args:
        source: a folder or a Hub id.
        label_names: names of its columns in their order, where its config only says LABEL_0, LABEL_1, …
        text: text columns, where the model was not made by kdlora, which notes them.
        revision: commit, tag or branch on the Hub.
        trust_remote_code: let the checkpoint's own Python code run.

    Raises:
        ModelError: it cannot be read, or its labels have no names.
    """
    config = read_config(open_source(source, revision, trust_remote_code))
    noted = getattr(config, "kdlora_task", None)
    if noted is not None and label_names is None:
        return Task.from_dict(noted)
    found = [str(config.id2label[column]) for column in range(config.num_labels)]
    problem = config.problem_type or ("regression" if len(found) == 1 else "single_label_classification")
    kind = next(kind for kind, name in PROBLEM_TYPES.items() if name == problem)
    names = tuple(label_names or found)
    if kind != "regression" and any(GENERIC_LABEL.fullmatch(name) for name in names):
        raise ModelError(
            f"{source} calls its labels {', '.join(names)}, which says nothing; name them in the order of its outputs "
            "with --label-name, once for each"
        )
    if len(names) != len(found):
        raise ModelError(f"{source} has {len(found)} outputs ({', '.join(found)}), but {len(names)} names were given")
    return Task(kind, tuple(text), ("label",), names, DEFAULT_METRICS[kind])
