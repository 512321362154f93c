"""Loading encoders: the new head, the seed, the tokenizer's limits, label spaces, students made from layers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

import tiny
from experiments import edit_json
from kdlora.configfile import build_config
from kdlora.data.tasks import match_labels
from kdlora.deploy.predict import Classifier
from kdlora.distil.inference import hash_tokenizer
from kdlora.errors import ModelError
from kdlora.experiment.settle import look_at_models
from kdlora.models.encoders import (
    find_layers,
    load_encoder,
    load_fine_tuned,
    read_task,
    save_encoder,
    student_from_layers,
)
from kdlora.models.loading import Source, load_config

FRESH = {
    "bert": ("classifier",),
    "bert-without-pooler": ("bert.pooler.dense", "classifier"),
    "distilbert": ("pre_classifier", "classifier"),
    "roberta": ("classifier",),
    "deberta-v2": ("pooler", "classifier"),
    "electra": ("classifier",),
    "mpnet": ("classifier",),
    "modernbert": ("head", "classifier"),
    "llama": ("score",),
    "gpt2": ("score",),
}
FAMILIES = tiny.FAMILIES + tiny.VARIANTS + tiny.DECODERS
THREE = ("bad", "so-so", "good")
THREE_WAY = tiny.task(names=THREE)


def classifier_folder(source: Path, folder: Path, names=THREE) -> Path:
    """Save a model with a trained head, as a fine-tuning elsewhere leaves it."""
    save_encoder(load_encoder(str(source), tiny.task(names=names), seed=11), folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_random_module_is_named_fresh_and_comes_from_the_seed_alone(tiny_model_folder, family):
    """PEFT freezes what it does not know: DeBERTa's pooler and ModernBERT's head would stay random for ever."""
    source = str(tiny_model_folder(family))
    torch.manual_seed(1)
    encoder = load_encoder(source, THREE_WAY, seed=5)
    assert encoder.fresh == FRESH[family]
    stored = transformers.AutoModel.from_pretrained(source).state_dict()
    for name, value in encoder.model.base_model.state_dict().items():
        if not any(f"{encoder.model.base_model_prefix}.{name}".startswith(own) for own in encoder.fresh):
            assert torch.equal(value, stored[name]), name
    assert tiny.logits(encoder.model, encoder.tokenizer).shape == (2, 3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, other = (load_encoder(source, THREE_WAY, seed=seed).model.state_dict() for seed in (5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    first = encoder.model.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    changed = {name for name, value in first.items() if not torch.equal(value, other[name])}
    assert changed
    assert all(name.startswith(FRESH[family]) for name in changed)


@pytest.mark.parametrize(
    ("family", "names"), [("bert", THREE), *((family, ("negative", "positive")) for family in tiny.FAMILIES)]
)
def test_a_head_starts_anew_unless_the_model_is_the_teacher(tiny_model_folder, tmp_path, family, names):
    """One of the same shape would be kept, and an arm begin with another task's knowledge; a teacher's must stay."""
    folder = classifier_folder(tiny_model_folder(family), tmp_path / "other", names)
    original = load_encoder(str(tiny_model_folder(family)), tiny.task(names=names), seed=11)
    teacher, columns = load_fine_tuned(str(folder), tiny.task(names=names))
    assert columns == list(range(len(names)))
    assert torch.equal(tiny.logits(teacher.model, teacher.tokenizer), tiny.logits(original.model, original.tokenizer))
    again, trained = load_encoder(str(folder), tiny.task(), seed=0), teacher.model.classifier
    assert again.fresh == tuple(name for name in FRESH[family] if "." not in name)
    for (name, new), old in zip(again.model.classifier.named_parameters(), trained.parameters(), strict=True):
        assert new.shape != old.shape or name.endswith("bias") or not torch.equal(new, old)
    assert again.model.config.id2label == {0: "negative", 1: "positive"}


def test_a_half_precision_checkpoint_is_trained_in_fp32_and_saved_without_padding(tiny_model_folder, tmp_path):
    """Transformers 5 keeps the file's precision, and small updates to bf16 weights vanish."""
    model = transformers.BertModel.from_pretrained(tiny_model_folder("bert"), dtype=torch.bfloat16)
    shutil.copytree(tiny_model_folder("bert"), tmp_path / "half")
    model.save_pretrained(tmp_path / "half")
    encoder = load_encoder(str(tmp_path / "half"), tiny.task(), seed=0)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}
    # The last batch's padding would be stored, and a bare `tokenizers` reader apply it.
    encoder.tokenizer(["a", "the film"], padding="max_length", truncation=True, max_length=8)
    save_encoder(encoder, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"
    stored = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert stored["padding"] is stored["truncation"] is None


@pytest.mark.parametrize(
    ("family", "positions"),
    [("bert", 66), ("roberta", 64), ("mpnet", 64), ("modernbert", 66), ("distilbert", 66), ("deberta-v2", 66)],
)
def test_the_tokenizer_gives_what_the_model_takes(tiny_model_folder, tmp_path, family, positions):
    """RoBERTa has two positions fewer than its config says, and its second type is out of range: both index errors."""
    folder = Path(shutil.copytree(tiny_model_folder(family), tmp_path / "model"))
    tokenizer = tiny.train_tokenizer(family)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", model_max_length=10**30)
    encoder = load_encoder(str(folder), tiny.task(), seed=0)
    inputs = encoder.tokenizer("film " * 200, "a story", truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == encoder.tokenizer.model_max_length == positions
    assert set(inputs) - {"input_ids", "attention_mask"} == ({"token_type_ids"} if family == "bert" else set())
    assert family != "bert" or 1 in inputs["token_type_ids"], "both texts of a pair would be one to BERT"
    assert encoder.model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(("made", "positions"), [("Luke", 64), ("Yoso", 66)])
def test_other_tables_of_positions_are_no_limit(tmp_path, made, positions):
    """LUKE has one of entities, YOSO two rows that no text reaches: a longer text ended the training."""
    tokenizer, sizes = tiny.train_tokenizer("roberta"), {"num_hidden_layers": 1, "hidden_size": 32, "pad_token_id": 1}
    sizes |= {"vocab_size": len(tokenizer), "intermediate_size": 32, "num_attention_heads": 2}
    config = getattr(transformers, f"{made}Config")(max_position_embeddings=66, **sizes)
    getattr(transformers, f"{made}Model")(config).save_pretrained(tmp_path)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), tiny.task(), seed=0)
    assert encoder.tokenizer.model_max_length == positions
    inputs = encoder.tokenizer("film " * 200, truncation=True, return_tensors="pt")
    assert encoder.model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("family", ["roberta", "gpt2", "bert"])
def test_what_is_saved_takes_what_the_model_takes(tiny_model_folder, tmp_path, family):
    """A BERT tokenizer beside a model without types: a pair was an index error after training, or another answer.

    Transformers 5 lost ALBERT's name of types, and others': both texts of a pair were one to such a model.

    One that cuts on the left: the end of a text was trained on and scored, and its beginning was read in use.
    """
    folder = Path(shutil.copytree(tiny_model_folder(family), tmp_path / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if key != "model_input_names"}
    names, kind = ["input_ids", "attention_mask"], {"tokenizer_class": "BertTokenizer"}
    if family == "bert":
        names, kind = [*names, "token_type_ids"], {}
    left = {**kind, "truncation_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | left))
    encoder = load_encoder(str(folder), tiny.task(), seed=0)
    save_encoder(encoder, tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.model_input_names == encoder.tokenizer.model_input_names == names
    assert saved.truncation_side == "right"
    (tmp_path / "saved" / "tokenizer_config.json").write_text(json.dumps(settings | kind))
    edit_json(tmp_path / "saved" / "config.json", transformers_version="4.57.1")
    encoder.model.eval()
    for pair in (("the film was a story", "a story"), ("the film was " + "a story " * 60, "a story")):
        with torch.no_grad():
            expected = encoder.model(**encoder.tokenizer(*pair, truncation=True, return_tensors="pt")).logits
        found = Classifier.load(tmp_path / "saved").predict_logits([pair])
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
    # What transformers 5 tuned did not see them, and stored logits of it are another tokenizer's.
    known, _ = load_fine_tuned(str(tmp_path / "saved"), tiny.task())
    edit_json(tmp_path / "saved" / "config.json", transformers_version="5.0.0")
    later, _ = load_fine_tuned(str(tmp_path / "saved"), tiny.task())
    assert "token_type_ids" not in later.tokenizer.model_input_names
    assert (hash_tokenizer(known.tokenizer) != hash_tokenizer(later.tokenizer)) == (family == "bert")


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_a_decoder_answers_by_the_last_token_of_the_text(tiny_model_folder, tmp_path, family):
    """A padding token that is read for the text's last one makes an answer depend on the texts beside it."""
    encoder = load_encoder(str(tiny_model_folder(family)), THREE_WAY, seed=0)
    save_encoder(encoder, tmp_path)
    again, columns = load_fine_tuned(str(tmp_path), THREE_WAY)
    assert (again.fresh, columns) == (("score",), [0, 1, 2])
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (stored["pad_token"], stored["padding_side"]) == ("[SEP]", "right")
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == encoder.tokenizer.pad_token_id
    texts = ["what a film", "the story was wonderful and I stayed until the end"]
    model, tokenizer = again.model, again.tokenizer
    with torch.no_grad():
        alone = torch.cat([model(**tokenizer([text], return_tensors="pt")).logits for text in texts])
        for side in ("right", "left"):
            tokens = tokenizer(texts, padding=True, return_tensors="pt", padding_side=side)
            if side == "left":  # as transformers' own generation does; ours pad on the right
                tokens["position_ids"] = (tokens["attention_mask"].cumsum(1) - 1).clamp(min=0)
            assert torch.allclose(model(**tokens).logits, alone, atol=1e-5), side
        last = model.base_model(**tokenizer(texts[:1], return_tensors="pt")).last_hidden_state[0, -1]
        assert torch.allclose(model.score(last), alone[0], atol=1e-6)


def test_a_tokenizer_may_have_the_token_of_images_beyond_the_table(tiny_model_folder, tmp_path):
    """Gemma 3 of 270M and 1B share the tokenizer of the larger ones, and were called a wrong pair."""
    folder = Path(shutil.copytree(tiny_model_folder("llama"), tmp_path / "model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"extra{index}" for index in range(len(tokenizer), rows)])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(folder)
    encoder = load_encoder(str(folder), THREE_WAY, seed=0)
    assert len(encoder.tokenizer) == encoder.model.get_input_embeddings().num_embeddings + 1
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="do not belong together"):
        load_encoder(str(folder), THREE_WAY, seed=0)


def test_a_sparse_attention_that_goes_at_a_short_text_is_full_from_the_start(tmp_path):
    """BigBird changed for good at its first short batch; a teacher labelled long texts as it had not been trained."""
    tokenizer, sizes = tiny.train_tokenizer(), {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    sparse = {"block_size": 2, "num_random_blocks": 1, "max_position_embeddings": 66, "num_attention_heads": 2}
    config = transformers.BigBirdConfig(vocab_size=len(tokenizer), **sizes, **sparse)
    transformers.BigBirdForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_encoder(str(tmp_path), THREE_WAY, seed=0).model.eval()
    long, short = (torch.arange(5, 5 + length)[None] for length in (40, 8))
    with torch.no_grad():
        before = model(long).logits
        model(short)
        assert torch.equal(model(long).logits, before)


def test_a_model_of_characters_is_refused(tmp_path):
    """It was a traceback of transformers, whose embeddings are of hashes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CanineConfig(num_hash_buckets=64, max_position_embeddings=128, **sizes)
    transformers.CanineModel(config).save_pretrained(tmp_path)
    transformers.CanineTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'canine' model, which has no plain table.*Choose another encoder"):
        load_encoder(str(tmp_path), THREE_WAY, seed=0)


def test_decoders_that_cannot_answer_are_refused(tmp_path, tiny_model_folder):
    """XLNet reads the last place of a row, which is padding in all rows but the longest."""
    tokenizer = tiny.train_tokenizer("llama")
    config = transformers.XLNetConfig(vocab_size=len(tokenizer), d_model=32, n_layer=1, n_head=2, d_inner=32)
    transformers.XLNetModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="depends on the padding"):
        load_encoder(str(tmp_path), THREE_WAY, seed=0)

    (tmp_path / "fnet").mkdir()
    transformers.FNetConfig().save_pretrained(tmp_path / "fnet")
    (tmp_path / "fnet" / "model.safetensors").touch()
    with pytest.raises(ModelError, match="reads padding as text"):
        load_encoder(str(tmp_path / "fnet"), THREE_WAY, seed=0)
    with pytest.raises(ModelError, match="reads padding as text"):  # what is only predicted with
        load_config(Source(str(tmp_path / "fnet"), local=True))

    # A model of texts and images has no width of its own: a traceback after gigabytes of its weights.
    (tmp_path / "both").mkdir()
    transformers.Gemma3Config().save_pretrained(tmp_path / "both")
    (tmp_path / "both" / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"a 'gemma3' model, which reads more than texts.*Choose such a sibling"):
        load_encoder(str(tmp_path / "both"), THREE_WAY, seed=0)

    # Its head has no bias for the mean of the targets: refused after hours of training, or off by the mean.
    with pytest.raises(ModelError, match=r"no bias.*Choose an encoder for a regression"):
        load_encoder(str(tiny_model_folder("llama")), tiny.task("regression"), seed=0)


def test_generic_names_need_the_users_order(tiny_model_folder, tmp_path):
    """LABEL_0 may be any label; guessing is right half the time."""
    folder = classifier_folder(tiny_model_folder("bert"), tmp_path / "teacher", ("LABEL_0", "LABEL_1", "LABEL_2"))
    with pytest.raises(ModelError, match=r"teacher\.label_names"):
        load_fine_tuned(str(folder), THREE_WAY)
    encoder, columns = load_fine_tuned(str(folder), THREE_WAY, label_names=("good", "bad", "so-so"))
    assert columns == [1, 2, 0]
    assert encoder.model.config.id2label == {0: "good", 1: "bad", 2: "so-so"}
    named = classifier_folder(tiny_model_folder("bert"), tmp_path / "named", ("good", "bad", "so-so"))
    with pytest.raises(ModelError, match=r"in another order than its config\.json \(good, bad, so-so\)"):
        load_fine_tuned(str(named), THREE_WAY, label_names=("bad", "good", "so-so"))
    with pytest.raises(ModelError, match=r"teacher\.label_names, or --label-name, has 2 names .* 3 outputs"):
        load_fine_tuned(str(folder), THREE_WAY, label_names=("good", "bad"))
    assert match_labels(("LABEL_1", "LABEL_0"), ("LABEL_0", "LABEL_1"), "a task may really have them", "") == [1, 0]

    # The first of several columns would pass for the score.
    with pytest.raises(ModelError, match="regression needs a teacher with one"):
        load_fine_tuned(str(folder), tiny.task("regression"))
    save_encoder(load_encoder(str(tiny_model_folder("bert")), tiny.task("regression"), seed=0), tmp_path / "one")
    assert load_fine_tuned(str(tmp_path / "one"), tiny.task("regression"))[1] == [0]

    # Names for a reranker's one output were asked for, and then refused.
    for given in (None, ("negative", "positive")):
        with pytest.raises(ModelError, match=r"has one output, a score, and the task has 2 labels.* teacher\.logits"):
            load_fine_tuned(str(tmp_path / "one"), tiny.task(), label_names=given)


def test_what_was_not_fine_tuned_is_not_a_teacher(tiny_model_folder, tmp_path):
    """A random head teaches dice; ModernBERT's token classifier even loads without a missing key."""
    folder = Path(shutil.copytree(tiny_model_folder("bert"), tmp_path / "model"))
    edit_json(folder / "config.json", architectures=None, id2label={"0": "negative", "1": "positive"})
    with pytest.raises(ModelError, match=r"not fine-tuned: it has no weights for classifier\.bias, classifier\.weight"):
        load_fine_tuned(str(folder), tiny.task())
    folder = classifier_folder(tiny_model_folder("modernbert"), tmp_path / "tagger")
    edit_json(folder / "config.json", architectures=["ModernBertForTokenClassification"])
    with pytest.raises(ModelError, match="not a fine-tuned text classifier"):
        load_fine_tuned(str(folder), THREE_WAY)
    edit_json(folder / "config.json", id2label={"1": "bad", "2": "so-so", "3": "good"})
    with pytest.raises(ModelError, match=r"id2label in its config.json names the outputs \[1, 2, 3\]; number them 0"):
        read_task(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chosen_layers_are_kept_in_order_and_load_again(tiny_model_folder, tmp_path, family):
    """A student of layers 0 and 1, or without relative positions or a pooler, trains as well, and nobody sees it."""
    source = str(tiny_model_folder(family, layers=4))
    for chosen in ([0, 3], [0, 1, 2, 3]):
        whole = load_encoder(source, THREE_WAY, seed=2)
        parent, _, child = find_layers(whole.model)[0].rpartition(".")
        layers = whole.model.get_submodule(f"{parent}.{child}")
        cut = nn.ModuleList([layers[number] for number in chosen])
        setattr(whole.model.get_submodule(parent), child, cut)  # in place
        student = student_from_layers(load_encoder(source, THREE_WAY, seed=2), chosen)
        expected = tiny.logits(whole.model, whole.tokenizer)
        assert torch.allclose(tiny.logits(student.model, student.tokenizer), expected, atol=1e-6)
        assert student.fresh == whole.fresh
        assert student.model.config.num_hidden_layers == len(chosen)
    # ModernBERT's first layer has no norm: cut in place, the student would be another model once reloaded.
    if family == "modernbert" and Version(transformers.__version__) < Version("5.20"):
        pytest.skip("some transformers before 5.20 refuse the ModernBERT config that they have written themselves")
    student = student_from_layers(load_encoder(source, THREE_WAY, seed=2), [1, 3])
    save_encoder(student, tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(again, student.tokenizer), tiny.logits(student.model, student.tokenizer))


def test_settings_of_layers_are_cut_with_them_and_others_left_alone(tiny_model_folder, tmp_path):
    """A layer pretrained on a window of tokens would be run over the whole text; DeBERTa's two kinds are no layers."""
    source = str(tiny_model_folder("modernbert", layers=4))
    student = student_from_layers(load_encoder(source, THREE_WAY, seed=0), [0, 1, 3]).model
    assert student.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    source = str(tiny_model_folder("deberta-v2", layers=2))
    student = student_from_layers(load_encoder(source, THREE_WAY, seed=0), [1]).model
    assert student.config.pos_att_type == ["p2c", "c2p"]
    folder = shutil.copytree(tiny_model_folder("llama"), tmp_path / "smollm3")  # a layer in four has no positions
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    size |= {"vocab_size": json.loads((folder / "config.json").read_text())["vocab_size"], "pad_token_id": 0}
    whole = transformers.SmolLM3ForSequenceClassification(transformers.SmolLM3Config(num_hidden_layers=4, **size))
    whole.save_pretrained(folder)
    student = student_from_layers(load_encoder(str(folder), THREE_WAY, seed=0), [0, 3]).model
    assert student.config.no_rope_layers == [1, 0]
    kinds = {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 2, "hidden_size": 16}
    config = transformers.GPTNeoConfig(**kinds, vocab_size=size["vocab_size"])
    transformers.GPTNeoForCausalLM(config).save_pretrained(folder)
    student = student_from_layers(load_encoder(str(folder), THREE_WAY, seed=0), [1, 2, 3])
    save_encoder(student, tmp_path / "saved")  # it was refused, after the training
    assert transformers.AutoConfig.from_pretrained(tmp_path / "saved").attention_layers == ["local", "global", "local"]


def test_impossible_choices_are_refused(tiny_model_folder):
    """Python would take -1 for the last layer, and slicing forgive the rest."""
    whole = load_encoder(str(tiny_model_folder("bert")), THREE_WAY, seed=0)
    for layers, fitting in (([-1], [0]), ([1, 0], [0, 1]), ([0, 0], [0])):
        with pytest.raises(ModelError, match="layers 0 to 1; expected increasing indices without repetition") as fault:
            student_from_layers(whole, layers)
        assert str(fault.value).endswith(f"such as {fitting}")
    sizes = {"vocab_size": 64, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 16}
    config = transformers.AlbertConfig(**sizes, num_hidden_layers=4, num_attention_heads=2)
    with pytest.raises(ModelError, match="expected one list of 4 layers, found none"):  # it runs one layer many times
        find_layers(transformers.AlbertForSequenceClassification(config))


OWN_CODE = """
from transformers import BertConfig, BertForSequenceClassification
class OwnConfig(BertConfig):
    model_type = "own"
class OwnForSequenceClassification(BertForSequenceClassification):
    config_class = OwnConfig
"""


def test_own_code_with_leave_is_loaded_like_any_other(tiny_model_folder, tmp_path):
    """The one switch must be enough, and the new head must still come from the seed."""
    folder = Path(shutil.copytree(tiny_model_folder("bert"), tmp_path / "model"))
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnForSequenceClassification"}
    edit_json(folder / "config.json", model_type="own", auto_map=code)
    (folder / "own.py").write_text(OWN_CODE)
    encoder = load_encoder(str(folder), tiny.task(), seed=0, trust_remote_code=True)
    again = load_encoder(str(folder), tiny.task(), seed=0, trust_remote_code=True)
    assert type(encoder.model).__name__ == "OwnForSequenceClassification"
    assert encoder.fresh == ("classifier",)
    assert torch.equal(encoder.model.classifier.weight, again.model.classifier.weight)

    # As a student it was trained to the end, and then nothing could open it.
    named = {"model": str(folder), "trust_remote_code": True}
    config = {"data": {"train": "t.csv"}, "task": {"text": "text", "label": "label"}, "teacher": named}
    texts = {"text": ["what a film"]}
    looks = look_at_models(build_config(config | {"run": {"arms": ["fft"]}}), tiny.task(), texts, timed=False)
    assert set(looks) == {"teacher"}
    with pytest.raises(ModelError, match=r"its OwnForSequenceClassification is Python.*As a teacher it may stay"):
        look_at_models(build_config(config | {"student": named}), tiny.task(), texts, timed=False)
