// Asks the endpoint that served this page, and shows what it streams: drafts, layers, and the answer as it is written.
// Text from the model is inserted as text, never as HTML.
"use strict";

const element = (id) => document.getElementById(id);
const root = document.documentElement.dataset.root;
let models = [];
let running = null; // the AbortController of the request under way

function made(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────

function headers() {
  const key = element("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function loadModels() {
  const response = await fetch(`${root}/v1/models`, { headers: headers() });
  if (!response.ok) {
    element("status").textContent = response.status === 401 ? "This server needs an API key." : "The server did not list its models.";
    return;
  }
  models = (await response.json()).data;
  const select = element("model");
  const before = select.value;
  select.replaceChildren(...models.map((model) => new Option(model.id, model.id)));
  const chosen = models.find((model) => model.id === before) || models.find((model) => model.aft.default);
  if (chosen) select.value = chosen.id;
  if (!before && chosen) {
    element("proposals").max = chosen.aft.max_num_proposals;
    element("layers").max = chosen.aft.max_num_layers;
    element("proposals").value = chosen.aft.num_proposals;
    element("layers").value = chosen.aft.num_layers;
  }
  element("status").textContent = "";
  showPlan();
}

function plan() {
  return { num_proposals: Number(element("proposals").value), num_layers: Number(element("layers").value) };
}

function showPlan() {
  const { num_proposals: width, num_layers: depth } = plan();
  element("proposals").disabled = depth === 0;
  element("proposals-value").textContent = depth ? width : "none";
  element("layers-value").textContent = depth;
  const answers = depth ? width * depth + 1 : 1;
  element("cost").textContent = answers === 1 ? "1 answer is written." : `${answers} answers are written.`;
}

// ── the run on the page ─────────────────────────────────────────────────────────────────────────────────────────────

const cards = new Map(); // "layer/index" -> card

function layerName(layer, last) {
  if (layer === last) return "Final answer";
  return layer === 0 ? "Drafts" : `Aggregations, layer ${layer}`;
}

function begin({ num_proposals: width, num_layers: depth }) {
  cards.clear();
  const sections = [];
  for (let layer = 0; layer < depth; layer += 1) {
    const section = made("section", "layer");
    const title = made("h2", "", layerName(layer, depth));
    title.id = `layer-${layer}`;
    section.setAttribute("aria-labelledby", title.id);
    const grid = made("div", "cards");
    for (let index = 0; index < width; index += 1) {
      const card = made("article", "card waiting");
      card.append(made("h3", "", `${layer ? "Aggregation" : "Draft"} ${index + 1}`), made("p", "facts", "waiting"));
      grid.append(card);
      cards.set(`${layer}/${index}`, card);
    }
    section.append(title, grid);
    sections.push(section);
  }
  element("drafts").replaceChildren(...sections);
  element("answer").replaceChildren();
  element("answer").setAttribute("aria-busy", "true");
  element("usage").hidden = true;
  element("error").hidden = true;
  element("run").hidden = false;
}

function showDraft(layer, draft) {
  const card = cards.get(`${layer}/${draft.index}`);
  if (!card) return;
  card.classList.remove("waiting");
  card.querySelector(".facts").textContent = draft.error ? `failed: ${draft.error.replace("_", " ")}` : `${draft.num_tokens} tokens`;
  if (draft.error) card.classList.add("failed");
  const text = made("p", "text", draft.text);
  text.tabIndex = 0;
  card.append(text);
}

function showProgress(progress) {
  const { layer, num_layers: last, num_done: done, num_proposals: width } = progress;
  if (progress.draft) showDraft(layer, progress.draft);
  element("status").textContent = progress.layer_usage
    ? `${layerName(layer, last)}: finished after ${progress.layer_usage.seconds.toFixed(1)} s.`
    : `${done} of ${width} ${layer ? "aggregations" : "drafts"} are done.`;
  if (progress.layer_usage) closeCards(layer, "cancelled");
}

// Marks the cards up to this layer that still wait for a draft: none will come.
function closeCards(upTo, why) {
  for (const [place, card] of cards) {
    if (Number(place.split("/")[0]) <= upTo && card.classList.contains("waiting")) card.querySelector(".facts").textContent = why;
  }
}

function showUsage(usage) {
  const layers = usage.aft.layers;
  const columns = ["num_answers", "num_failed", "num_cancelled", "prompt_tokens", "cached_tokens", "completion_tokens", "seconds"];
  const row = (name, values) => {
    const line = made("tr");
    const head = made("th", "", name);
    head.scope = "row";
    line.append(head, ...columns.map((c) => made("td", "", c === "seconds" ? values[c].toFixed(2) : values[c].toLocaleString("en"))));
    return line;
  };
  const total = Object.fromEntries(columns.map((c) => [c, layers.reduce((sum, layer) => sum + layer[c], 0)]));
  const rows = layers.map((layer) => {
    const how = layer.decided_by === "model" || layer.decided_by === undefined ? "" : `, by ${layer.decided_by}`;
    return row(layerName(layer.layer, layers.length - 1) + how, layer);
  });
  element("usage-rows").replaceChildren(...rows, row("All", total));
  element("usage").hidden = false;
}

function showError(message) {
  element("error").textContent = message;
  element("error").hidden = false;
}

// ── the stream ──────────────────────────────────────────────────────────────────────────────────────────────────────

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (data && data !== "data: [DONE]") yield JSON.parse(data.slice(6));
    }
  }
}

async function ask(question, asked, signal) {
  const response = await fetch(`${root}/v1/chat/completions`, {
    method: "POST",
    headers: headers(),
    signal,
    body: JSON.stringify({
      ...(element("model").value ? { model: element("model").value } : {}),
      messages: [{ role: "user", content: question }],
      stream: true,
      stream_options: { include_usage: true },
      aft: { ...asked, progress: true, include_proposals: true },
    }),
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.aft && event.aft.progress) showProgress(event.aft.progress);
    const piece = event.choices.length ? event.choices[0].delta.content : "";
    if (piece) element("answer").append(piece);
    if (event.usage) showUsage(event.usage);
  }
}

async function submit() {
  const question = element("question").value.trim();
  if (running || !question) return;
  const asked = plan();
  const started = performance.now();
  running = new AbortController();
  element("submit").disabled = true;
  element("stop").disabled = false;
  element("status").textContent = "Waiting for the drafts.";
  begin(asked);
  try {
    await ask(question, asked, running.signal);
    element("status").textContent = `Answered in ${((performance.now() - started) / 1000).toFixed(1)} s.`;
  } catch (error) {
    element("status").textContent = error.name === "AbortError" ? "Stopped." : "";
    if (error.name !== "AbortError") showError(error.message);
  } finally {
    closeCards(asked.num_layers, "not needed");
    running = null;
    element("submit").disabled = false;
    element("stop").disabled = true;
    element("answer").setAttribute("aria-busy", "false");
  }
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
element("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
});
element("stop").addEventListener("click", () => running && running.abort());
element("key").addEventListener("change", loadModels);
element("proposals").addEventListener("input", showPlan);
element("layers").addEventListener("input", showPlan);
showPlan();
loadModels();
