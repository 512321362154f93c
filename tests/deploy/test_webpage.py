"""A page for the browser: its files and refusals; in Chromium, its answers beside Python's, and its use by all."""

import contextlib
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import replace

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from tokenizers import Tokenizer, normalizers

import tiny
from chromium import NEEDS_CHROMIUM, axe_faults, look, open_browser, serve_folder, show, weak_texts
from deploy_folders import LONG, PROBLEMS, TEXTS, build_classifier
from experiments import edit_json
from kdlora.deploy import webpage
from kdlora.deploy.decisions import Decisions, write_decisions
from kdlora.deploy.export import export_onnx
from kdlora.deploy.folder import CONFIG_FILE, EXPORT_RECORD, TOKENIZER, read_model_folder
from kdlora.deploy.predict import Classifier
from kdlora.deploy.webpage import write_web_page
from kdlora.errors import ArtifactError, ModelError
from kdlora.evidence.defer import Promise
from sentences import SENTENCES, texts_of_scripts

HOSTILE = ("<img src=x onerror=document.title=1>", "plain", "“quoted” & more")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An int8 export whose vocabulary has twelve scripts, and labels that are markup."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "OTHER_TEXT", (*tiny.OTHER_TEXT, *SENTENCES.values(), *texts_of_scripts(4, seed=1)))
        model = build_classifier("bert", root / "model", names=HOSTILE)
    return export_onnx(model, root / "onnx", texts=TEXTS, min_agreement=0.5).folder


def foreign(folder, copy, *, tokenizer=None, **config):
    """Copy an export as another tool would have made it, with another tokenizer or other settings."""
    shutil.copytree(folder, copy)
    (copy / EXPORT_RECORD).unlink()
    if tokenizer is not None:
        tokenizer.save(str(copy / TOKENIZER))
    edit_json(copy / CONFIG_FILE, **config)
    return copy


def pack(content):
    """Make an archive as the npm registry has them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name in content:
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    return file.getvalue()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry on this machine with small archives of the right form."""
    shelf = tmp_path / "registry"
    small = []
    for package in webpage._PACKAGES:
        content = pack(package.files)
        place = shelf / package.name / "-" / f"{package.name.split('/')[-1]}-{package.version}.tgz"
        place.parent.mkdir(parents=True)
        place.write_bytes(content)
        small.append(replace(package, sha256=hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(webpage, "_PACKAGES", tuple(small))
    monkeypatch.setenv("KDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with serve_folder(shelf) as server:
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"{server.address}/")
        server.shelf = shelf
        yield server


def test_the_packages_are_fetched_once_and_the_page_can_be_written_again(registry, world, tmp_path, cli):
    """A page that lacks a file shows nothing but `loading`; 33 MB that are fetched for every page."""
    folder, page = world, tmp_path / "page"
    for _ in range(2):
        done = cli("export", folder, "--to", page, "--web")
    assert len(registry.asked) == len(webpage._PACKAGES)
    assert {path.name for path in page.iterdir()} == webpage._NAMES
    assert (page / "ort.js").read_text() == "dist/ort.wasm.bundle.min.mjs"
    assert (page / "model.onnx").read_bytes() == (folder / "model_quantized.onnx").read_bytes()
    assert "http.server" in done.out
    (page / "thesis.txt").touch()
    with pytest.raises(ArtifactError, match=r"thesis\.txt is no file of a page"):
        write_web_page(folder, page)
    with pytest.raises(ArtifactError, match="not empty"):
        write_web_page(folder, folder)


def test_an_exchanged_archive_is_not_opened_and_a_missing_one_is_told(registry, world, tmp_path, monkeypatch):
    """Somebody's script in every page; a server without a network, and nobody knows which files to copy where."""
    for archive in registry.shelf.rglob("*.tgz"):
        archive.write_bytes(archive.read_bytes() + b"!")
    with pytest.raises(ArtifactError, match="expected SHA-256"):
        write_web_page(world, tmp_path / "page")
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "page").exists()
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"{registry.address}/nowhere")
    for offline in (True, False):
        monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
        registry.asked.clear()
        with pytest.raises(ArtifactError) as caught:
            write_web_page(world, tmp_path / "page")
        for part in ("npm pack onnxruntime-web@", "@huggingface/tokenizers@", str(tmp_path / "cache" / "web")):
            assert part in str(caught.value)
        assert ("HF_HUB_OFFLINE is set" in str(caught.value)) == offline
        assert len(registry.asked) == (0 if offline else 1)


def test_what_has_no_page_is_refused(world, tmp_path, cli):
    """A page of a model that it cannot run, or that shows labels of texts where the model has those of words."""
    with pytest.raises(ModelError, match=r"kdlora export .* --to FOLDER"):
        write_web_page(world.with_name("model"), tmp_path / "page")
    windows = tiny.task(names=HOSTILE).to_dict() | {"windows": {"stride": None, "pool": "mean"}}
    with_table = Tokenizer.from_file(str(world / TOKENIZER))
    with_table.normalizer = normalizers.Precompiled(bytes((4, 0, 0, 0, 0, 0, 0, 0, 0)))
    for name, wanted, change in (
        ("tags", "kdlora redact", {"architectures": ["BertForTokenClassification"]}),
        ("long", "in windows", {"kdlora_task": windows}),
        ("piece", "table of characters", {"tokenizer": with_table}),
    ):
        with pytest.raises(ModelError, match=wanted):
            write_web_page(foreign(world, tmp_path / name, **change), tmp_path / "page")
    done = cli("export", world, "--to", tmp_path / "page", "--web", "--format", "onnx", code=2)
    assert "leave --data and --format out" in done.err
    assert not (tmp_path / "page").exists()


ASK = (
    "const [texts, done] = arguments; import('./classify.js').then(async ({load}) => { const model = await load();"
    "const found = []; for (const one of texts) found.push(await model.answer(one)); done(found) })"
    ".catch(error => done(String(error)))"
)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The files of the real archives, which npm fetches or has."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "web").mkdir()
    wanted = [f"{package.name}@{package.version}" for package in webpage._PACKAGES]
    npm = shutil.which("npm")
    command = [npm, "pack", "--prefer-offline", "--silent", "--pack-destination", str(cache / "web"), *wanted]
    if npm is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"needs npm, and a registry that has {' and '.join(wanted)}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLORA_CACHE", str(cache))
        return {package.name: webpage._read_package(package) for package in webpage._PACKAGES}


@pytest.fixture
def unpacked(packages, monkeypatch):
    """Take the files as they were read before: to unpack them takes a second."""
    monkeypatch.setattr(webpage, "_read_package", lambda package: packages[package.name])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("chromium")) as driver:
        driver.set_script_timeout(60)
        yield driver


@pytest.fixture
def page(unpacked, browser, tmp_path):
    """`page(folder)` writes a page, serves it and opens it; it gives the server."""
    with contextlib.ExitStack() as stack:

        def give(folder):
            write_web_page(folder, tmp_path / "page")
            server = stack.enter_context(serve_folder(tmp_path / "page"))
            browser.get_log("browser")
            show(browser, f"{server.address}/index.html", 1280)
            wait(browser, "Ready.")
            return server

        yield give


def _state(browser):
    return browser.find_element(By.ID, "state").text


def wait(browser, *expected):
    """Wait until the page says one of these."""

    def said(_):
        state = _state(browser)
        assert "does not work" not in state, state
        return any(one in state for one in expected) and state

    return WebDriverWait(browser, 30).until(said)


def check_answers(browser, folder, texts):
    """Compare the page's answers with Python's, text by text: int8 rounds a batch otherwise than its texts."""
    model = Classifier.load(folder, threads=1)
    found = browser.execute_async_script(ASK, [[one] if isinstance(one, str) else one for one in texts])
    assert isinstance(found, list), found
    expected = [model.predict([text])[0] for text in texts]
    for answer, one, text in zip(found, expected, texts, strict=True):
        values = list(one.probabilities.values()) or [float(value) for value in one.label]
        assert answer["values"] == pytest.approx(values, abs=1e-3), text
        assert bool(answer["deferred"]) == bool(one.deferred), text
        if one.probabilities and not one.deferred:
            assert answer["chosen"] == ([one.label] if isinstance(one.label, str) else list(one.label)), text
    return expected


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_the_answers_are_those_of_python_in_twelve_scripts(page, browser, world):
    """A tokenizer that reads Greek capitals or Thai vowels otherwise gives a confident answer to another text."""
    page(world)
    found = check_answers(browser, world, [*texts_of_scripts(), *TEXTS[:10], LONG, "[CLS] what a [MASK] film"])
    assert len({one.label for one in found}) > 1
    assert len({round(max(one.probabilities.values()), 2) for one in found}) > 20, "the texts are told apart"


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_pairs_and_a_promised_error_rate(page, browser, world, tmp_path):
    """A pair whose longer text is cut in another place; an answer where the model promised to give none."""
    task = tiny.task(names=HOSTILE).to_dict() | {"text": ["premise", "hypothesis"]}
    folder = foreign(world, tmp_path / "foreign", kdlora_task=task, kdlora_temperature=1.7)
    texts = texts_of_scripts(4)
    pairs = [*zip(texts, texts[::-1], strict=True), (LONG, texts[0]), (texts[0], LONG), (LONG, f"a {LONG}")]
    sure = sorted(max(one.probabilities.values()) for one in Classifier.load(folder).predict(pairs))
    promise = Promise(0.1, 0.9, "margin", sure[len(sure) // 2] / 2, 100, 50, 1)
    write_decisions(read_model_folder(folder), Decisions(promise))
    page(folder)
    found = check_answers(browser, folder, pairs)
    assert {bool(one.deferred) for one in found} == {True, False}
    for field, text in zip(browser.find_elements(By.TAG_NAME, "textarea"), pairs[0], strict=True):
        field.send_keys(text.replace("😀👩‍💻", ""))
    wait(browser, "%", "No answer: too uncertain")


@pytest.mark.slow
@NEEDS_CHROMIUM
@pytest.mark.parametrize("kind", ["multi-label", "regression"])
def test_several_labels_by_thresholds_and_numbers(page, browser, world, tmp_path, kind):
    """Labels by 0.5 where others are fitted; a number that is shown as a probability."""
    folder = foreign(world, tmp_path / "foreign", problem_type=PROBLEMS[kind], kdlora_temperature=0.6)
    if kind == "multi-label":
        fitted = dict(zip(HOSTILE, (0.05, 0.9, 0.3), strict=True))
        write_decisions(read_model_folder(folder), Decisions(thresholds=fitted))
    page(folder)
    check_answers(browser, folder, TEXTS[:40])
    browser.switch_to.active_element.send_keys("the film was wonderful")
    assert ("%" in wait(browser, " ms)", "labels")) == (kind == "multi-label")


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_everybody_can_use_the_page(page, browser, world):
    """A page for the mouse alone, pale text in the dark, a label that runs as a script, a request to elsewhere."""
    server = page(world)
    assert axe_faults(browser) == []
    text, model = "the film was wonderful <b>indeed</b>", Classifier.load(world, threads=1)
    browser.switch_to.active_element.send_keys(text)
    state = wait(browser, *HOSTILE)
    assert " ms)" in state
    WebDriverWait(browser, 30).until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, "#words tr")) >= 4)
    rows = [row.text for row in browser.find_elements(By.CSS_SELECTOR, "#values tr")]
    assert all(any(row.startswith(name) for row in rows) for name in HOSTILE)
    with_it, without = (model.predict([one])[0].probabilities for one in (text, text.replace("wonderful", "")))
    top = max(with_it, key=with_it.__getitem__)
    effects = dict(row.text.rsplit(" ", 2)[:2] for row in browser.find_elements(By.CSS_SELECTOR, "#words tr"))
    effect = float(effects["wonderful"].replace("\N{MINUS SIGN}", "-"))
    assert effect == pytest.approx(100 * (with_it[top] - without[top]), abs=0.15)
    assert browser.find_element(By.ID, "marked").text == text
    assert browser.execute_script("return document.querySelectorAll('main img, main b').length") == 0
    assert browser.find_elements(By.TAG_NAME, "mark")
    for width, scheme in ((1280, "light"), (390, "dark")):
        look(browser, width, scheme)
        assert axe_faults(browser) == []
        assert weak_texts(browser) == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (int(back.split("(")[1].split(",")[0]) < 100) == (scheme == "dark")
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [one for one in fetched if not one.startswith((server.address, "data:"))] == []
    field = browser.find_element(By.TAG_NAME, "textarea")
    browser.execute_script("arguments[0].value = 'film '.repeat(160)", field)
    field.send_keys("!")
    some = "(the first 150 words; 10 more were not tried)"
    WebDriverWait(browser, 30).until(lambda _: some in browser.find_element(By.CSS_SELECTOR, "#words caption").text)
    assert browser.get_log("browser") == [], "nothing that the page's own policy refused"


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_a_page_that_reads_other_tokens_says_so(unpacked, browser, world, tmp_path):
    """Wrong answers that look right, where a browser and Python do not agree on the tokens."""
    write_web_page(world, tmp_path / "page")
    place = tmp_path / "page" / "settings.json"
    settings = json.loads(place.read_text(encoding="utf-8"))
    settings["checks"][3]["ids"][1] += 1
    place.write_text(json.dumps(settings), encoding="utf-8")
    with serve_folder(tmp_path / "page") as server:
        show(browser, f"{server.address}/index.html", 1280)
        WebDriverWait(browser, 30).until(lambda _: "other tokens than Python" in _state(browser))
        assert not browser.find_elements(By.TAG_NAME, "textarea")
