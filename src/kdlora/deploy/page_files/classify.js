// Answers as kdlora's Classifier does in Python: the same tokens, the same file, the same decisions.
import * as runtime from "./ort.js";
import { Tokenizer } from "./tokenizers.js";

const here = (name) => new URL(name, import.meta.url).href;
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

async function read(name) {
  const response = await fetch(here(name), { cache: "no-cache" });
  if (!response.ok) throw new Error(`${name} cannot be read (status ${response.status})`);
  return response;
}

// Give how many tokens are kept of each text: of a pair the longer one is cut first.
function cut(lengths, room) {
  if (sum(lengths) <= room) return lengths;
  if (lengths.length === 1) return [room];
  const less = Math.min(...lengths, Math.floor(room / 2));
  return lengths[0] > lengths[1] ? [room - less, less] : [less, room - less];
}

function encode(tokenizer, settings, texts) {
  const lengths = texts.map((text) => tokenizer.encode(text, { add_special_tokens: false }).ids.length);
  const whole = tokenizer.encode(texts[0], { text_pair: texts[1] ?? null, return_token_type_ids: true });
  const kept = cut(lengths, settings.max_length - whole.ids.length + sum(lengths));
  const places = [];
  let place = 0;
  lengths.forEach((length, part) => {
    const end = place + settings.before[part] + kept[part];
    while (place < end) places.push(place++);
    place += length - kept[part];
  });
  while (place < whole.ids.length) places.push(place++);
  return {
    input_ids: places.map((one) => whole.ids[one]),
    attention_mask: places.map(() => 1),
    token_type_ids: places.map((one) => whole.token_type_ids?.[one] ?? 0),
  };
}

/** Write a number with the digits, four at least, that tell it from 0, 1 and another. */
function toldApart(value, other) {
  for (let digits = 4; digits < 17; digits += 1) {
    const text = value.toPrecision(digits);
    if (![0, 1, Number(other.toPrecision(digits))].includes(Number(text))) return text;
  }
  return String(value);
}

function decide(settings, logits) {
  const { kind, labels, temperature, offsets, promise } = settings;
  if (kind === "regression") return { values: logits, chosen: labels, deferred: "" };
  const scaled = logits.map((value) => value / temperature);
  const most = Math.max(...scaled);
  const total = sum(scaled.map((value) => Math.exp(value - most)));
  const several = kind === "multi-label";
  const values = scaled.map((value) => (several ? 1 / (1 + Math.exp(-value)) : Math.exp(value - most) / total));
  const shifted = logits.map((value, column) => value - offsets[column]);
  const best = shifted.indexOf(Math.max(...shifted));
  const chosen = labels.filter((_, column) => (several ? shifted[column] > 0 : column === best));
  if (promise === null) return { values, chosen, deferred: "" };
  const [first, second] = [...values].sort((one, other) => other - one);
  const energy = temperature * (most + Math.log(total));
  const sure = { probability: first, margin: first - second, energy }[promise.sureness];
  const least = promise.threshold;
  const why = `${promise.sureness} ${toldApart(sure, least)} is below ${toldApart(least, sure)}`;
  return { values, chosen, deferred: sure >= least ? "" : why };
}

/** Load what lies beside this file. `answer(texts)` takes a list of one text, or of the two of a pair. */
export async function load() {
  const names = ["settings.json", "tokenizer.json", "tokenizer_config.json"];
  const [settings, ...content] = await Promise.all(names.map(async (name) => (await read(name)).json()));
  const tokenizer = new Tokenizer(...content);
  const lowers = /"lowercase":true|"type":"Lowercase"/.test(JSON.stringify(content[0].normalizer));
  // JavaScript writes a capital sigma at a word's end as ς, Python's tokenizers everywhere as σ.
  const tokens = (texts) => encode(tokenizer, settings, lowers ? texts.map((text) => text.replaceAll("Σ", "σ")) : texts);
  for (const { texts, ids } of settings.checks) {
    if (String(tokens(texts).input_ids) !== String(ids)) {
      throw new Error(`this browser reads “${texts[0]}” as other tokens than Python does, so answers would be wrong`);
    }
  }
  runtime.env.wasm.numThreads = 1; // more need headers that not every server sends
  runtime.env.wasm.wasmPaths = { wasm: here("ort.wasm") };
  const file = new Uint8Array(await (await read("model.onnx")).arrayBuffer());
  const session = await runtime.InferenceSession.create(file, { graphOptimizationLevel: settings.optimise });

  async function answer(texts) {
    const start = performance.now();
    const arrays = tokens(texts);
    const tensor = (values) => new runtime.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const feeds = Object.fromEntries(session.inputNames.map((name) => [name, tensor(arrays[name])]));
    const logits = Array.from((await session.run(feeds))[session.outputNames[0]].data);
    return { ...decide(settings, logits), milliseconds: performance.now() - start };
  }
  await answer(settings.checks.at(-1).texts); // the first run is slower than those that follow
  return { settings, answer };
}
