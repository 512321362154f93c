// The page: what is typed is classified, then again without each word.
import { load } from "./classify.js";

const PAUSE = 300; // milliseconds without a key
const MOST_WORDS = 150;
const SHOWN = 8;
const element = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)}%`;

function fill(table, caption, rows) {
  table.caption.textContent = caption;
  table.tBodies[0].replaceChildren(
    ...rows.map(([name, value, share = 0]) => {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.dir = "auto";
      head.textContent = name;
      row.append(head);
      row.insertCell().textContent = value;
      row.style.setProperty("--share", `${100 * share}%`);
      return row;
    }),
  );
}

function say(settings, found) {
  const time = ` (${found.milliseconds.toFixed(1)} ms)`;
  if (found.deferred) return `No answer: too uncertain, since ${found.deferred}${time}`;
  if (settings.kind === "regression") return found.values.map((value) => value.toFixed(3)).join(", ") + time;
  const told = found.chosen.map((name) => `${name} ${percent(found.values[settings.labels.indexOf(name)])}`);
  return (told.join(", ") || "none of the labels") + time;
}

function showValues(settings, { values }) {
  const rows = settings.labels.map((name, column) => [name, percent(values[column]), values[column]]);
  rows.sort((one, other) => other[2] - one[2]);
  const caption = rows.length > SHOWN ? `Probabilities, the largest ${SHOWN} of ${rows.length}` : "Probabilities";
  fill(element("values"), caption, rows.slice(0, SHOWN));
  element("values").hidden = settings.kind === "regression";
}

// Classify again without each word: what the value loses is what the word did for it.
async function weigh(model, texts, found, isLatest) {
  const column = found.values.indexOf(Math.max(...found.values));
  const segmenter = new Intl.Segmenter(undefined, { granularity: "word" });
  const words = texts.flatMap((text, part) =>
    [...segmenter.segment(text)].filter((one) => one.isWordLike).map(({ segment, index }) => ({ part, segment, index })),
  );
  for (const word of words.slice(0, MOST_WORDS)) {
    const without = [...texts];
    const text = texts[word.part];
    without[word.part] = text.slice(0, word.index) + text.slice(word.index + word.segment.length);
    if (!without[word.part].trim()) continue;
    word.effect = found.values[column] - (await model.answer(without)).values[column];
    await new Promise((resume) => setTimeout(resume)); // keys go first
    if (!isLatest()) return null;
  }
  const tried = words.filter((word) => word.effect !== undefined);
  return { name: model.settings.labels[column], words: tried, untried: words.length - MOST_WORDS };
}

function showWords(settings, texts, { name, words, untried }) {
  const most = Math.max(1e-9, ...words.map((word) => Math.abs(word.effect)));
  const isShare = settings.kind !== "regression";
  const paragraphs = texts.map((text, part) => {
    const paragraph = document.createElement("p");
    let place = 0;
    for (const word of words.filter((one) => one.part === part && Math.abs(one.effect) > most / 20)) {
      const mark = document.createElement("mark");
      mark.className = word.effect > 0 ? "for" : "against";
      mark.style.setProperty("--share", `${(45 * Math.abs(word.effect)) / most}%`);
      mark.textContent = word.segment;
      paragraph.append(text.slice(place, word.index), mark);
      place = word.index + word.segment.length;
    }
    paragraph.append(text.slice(place));
    return paragraph;
  });
  element("marked").replaceChildren(...paragraphs);
  const ranked = [...words].sort((one, other) => Math.abs(other.effect) - Math.abs(one.effect)).slice(0, SHOWN);
  const told = (effect) => (effect < 0 ? "−" : "+") + (isShare ? `${Math.abs(100 * effect).toFixed(1)} points` : Math.abs(effect).toFixed(3));
  const some = untried > 0 ? ` (the first ${MOST_WORDS} words; ${untried} more were not tried)` : "";
  const adds = `What each word adds to “${name}”: the value with it, less the value without it${some}`;
  const caption = words.length ? adds : "No word can be left out.";
  fill(element("words"), caption, ranked.map((word) => [word.segment, told(word.effect)]));
}

function makeField(settings, column, number) {
  const isOnly = settings.columns.length === 1;
  const label = document.createElement("label");
  label.htmlFor = `text-${number}`;
  label.textContent = isOnly ? "Text" : column;
  const field = document.createElement("textarea");
  const maxLength = Math.max(20000, 100 * settings.max_length); // of the rest Python reads nothing, either
  Object.assign(field, { id: label.htmlFor, rows: isOnly ? 4 : 3, maxLength, dir: "auto" });
  element("texts").append(label, field);
  return field;
}

async function start() {
  const model = await load();
  const { settings } = model;
  document.title = document.querySelector("h1").textContent = `Try ${settings.title}`;
  const fields = settings.columns.map((column, number) => makeField(settings, column, number));
  let latest = 0;
  async function classify(number) {
    const texts = fields.map((field) => field.value);
    const isWhole = texts.every((text) => text.trim());
    element("answer").hidden = !isWhole;
    if (!isWhole) return void (element("state").textContent = "Ready.");
    const found = await model.answer(texts);
    if (number !== latest) return;
    element("state").textContent = say(settings, found);
    showValues(settings, found);
    element("marked").replaceChildren(); // what stands there is of another text
    fill(element("words"), "One moment …", []);
    const weighed = await weigh(model, texts, found, () => number === latest);
    if (weighed) showWords(settings, texts, weighed);
  }
  const guarded = (number) => classify(number).catch(fail);
  for (const field of fields) {
    field.addEventListener("input", () => {
      const number = ++latest;
      setTimeout(() => number === latest && guarded(number), PAUSE);
    });
  }
  element("state").textContent = "Ready.";
  fields[0].focus();
}

function fail(error) {
  element("answer").hidden = true;
  element("state").textContent = `It does not work here: ${error.message ?? error}.`;
}

start().catch(fail);
