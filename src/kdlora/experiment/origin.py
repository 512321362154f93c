"""What a run was made from, compared with the finished runs beside it: one folder never mixes two origins."""

from __future__ import annotations

from kdlora.distil.fingerprints import hash_json, hash_model, hash_tokenizer
from kdlora.distil.logits import TeacherLogits
from kdlora.errors import ArtifactError
from kdlora.evidence.records import ExperimentLayout, RunRecord, read_record
from kdlora.models.encoders import Encoder

_MEANING = {
    "data": "the data",
    "base": "the pretrained model, its weights or its tokenizer,",
    "teacher": "what the teacher says about the training rows",
}


def add_origin(
    record: RunRecord, encoder: Encoder, teacher: TeacherLogits | None, unlabelled: TeacherLogits | None = None
) -> RunRecord:
    """Add fingerprints of the pretrained model and of the teacher's logits to a record.

    Args:
        record: of the run, before its training.
        encoder: as it was loaded; its fresh modules, which depend on the seed, do not count.
        teacher: what will teach; None where nothing does.
        unlabelled: what it says about the unlabelled rows; None without any.
    """
    parts = [hash_model(encoder.model, without=encoder.fresh), hash_tokenizer(encoder.tokenizer)]
    found = {"base": hash_json(parts)}
    if teacher is not None:
        found["teacher"] = hash_json([one.fingerprint for one in (teacher, unlabelled) if one is not None])
    return record.model_copy(update={"fingerprints": record.fingerprints | found})


def check_origin(layout: ExperimentLayout, record: RunRecord) -> None:
    """Compare a run that is about to be trained with the finished ones of its experiment.

    Args:
        layout: the experiment folder.
        record: of the run, with its fingerprints.

    Raises:
        ArtifactError: data, pretrained model or teacher changed since one of them was trained.
    """
    for path in sorted(layout.runs.glob("*/run.json")):
        other = read_record(path)
        if other.status != "finished" or (other.arm, other.seed) == (record.arm, record.seed):
            continue
        for key, meaning in _MEANING.items():
            if key == "base" and other.model != record.model:
                continue
            found = {one.fingerprints.get(key) for one in (other, record)} - {None}
            if len(found) == 2:
                raise ArtifactError(
                    f"{meaning} changed since {other.arm} with seed {other.seed} was trained: {record.arm} with seed "
                    f"{record.seed} would not be comparable. Put back what was there, or name another folder with "
                    f"--out, or delete {layout.root}"
                )
