// A chat with the model of this server, and who guessed the tokens of its answers.
// What a model or a person wrote goes into the page as text nodes, never as HTML.
"use strict";

const WHO = { none: "the model itself", text: "the text", recycling: "recycled", heads: "heads", model: "a model that drafts" };
const PLAIN = {
  "this answer": "timed in this answer",
  "answers before": "timed in answers before",
  calibration: "calibrated when the model was loaded, maybe under another load",
};
const REDRAW = 100; // ms between two states of the curve

const byId = (id) => document.getElementById(id);
const question = byId("question");
const talk = byId("talk");

let messages = JSON.parse(sessionStorage.getItem("entmtp-talk") ?? "[]");
let writing = null; // AbortController of the answer that is being written
let last = null; // answer on the page
let shown = null; // what the tree is drawn for: draws it again

// -- pieces of the page --

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawing(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const first = (source) => source[0] ?? "none"; // of those that guessed the same, the one that counts
const and = (words) => words.join(" and ").replace(/ and (?=.* and )/g, ", ");
const decimals = (number, n = 2) => number.toFixed(n);

/** A token's text in a small space, its white space visible. */
function label(text) {
  const seen = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";
  return [...seen].length > 16 ? [...seen].slice(0, 15).join("") + "…" : seen;
}

// -- an answer: its tokens, the curve below them, its figures --

class Answer {
  constructor() {
    this.tokens = [];
    this.steps = new Map();
    this.content = "";
    this.thinks = false;
    this.drawn = 0; // when the curve was, ms
    this.text = element("div", { class: "tokens", role: "group", "aria-label": "Answer. Arrow keys move from token to token" });
    this.line = drawing("polyline", { class: "running" });
    this.points = drawing("g");
    this.svg = drawing("svg", { role: "img" }, this.line, this.points);
    this.top = element("span");
    this.wide = element("div", { class: "wide" }, this.svg);
    this.curve = element("div", { class: "curve", hidden: "" },
      element("div", { class: "scale", "aria-hidden": "true" }, this.top, element("span", {}, "0")), this.wide);
    this.figures = element("div", { class: "figures" });
    this.again = element("button", { type: "button", hidden: "" }, "Regenerate");
    this.again.addEventListener("click", regenerate);
    this.node = element("article", { class: "answer", "aria-label": "Answer" }, this.text, this.curve,
      element("div", { class: "facts" }, this.figures, this.again));
    this.text.addEventListener("keydown", (event) => this.move(event));
    this.text.addEventListener("focusin", (event) => this.show(this.index(event.target)));
    this.text.addEventListener("pointerover", (event) => this.show(this.index(event.target)));
    this.svg.addEventListener("pointermove", (event) => {
      this.show(Math.floor((event.clientX - this.svg.getBoundingClientRect().left) / this.slot));
    });
  }

  index(target) {
    return target === this.text ? -1 : [...this.text.children].indexOf(target);
  }

  /** The next chunk of the stream. */
  add(chunk) {
    const said = chunk.choices[0]?.delta ?? {};
    this.content += said.content ?? "";
    this.thinks = Boolean(said.reasoning_content);
    for (const step of chunk.entmtp.steps) this.steps.set(step.step, { ...step, tokens: [] });
    for (const token of chunk.entmtp.tokens) this.addToken(token);
    if (chunk.entmtp.speed) this.figures.replaceChildren(...figures(chunk.entmtp.speed));
    if (performance.now() - this.drawn > REDRAW) this.draw();
  }

  addToken(token) {
    const span = element("span", { class: `token by-${first(token.source)}`, tabindex: this.tokens.length ? "-1" : "0" }, token.text);
    span.classList.toggle("thought", this.thinks);
    if (!token.text) {
      span.classList.add("mark");
      span.dataset.mark = token.piece ?? "…"; // the end, or bytes of a character that another token begins
      span.setAttribute("aria-label", token.piece ?? "part of a character");
    }
    this.text.append(span);
    this.tokens.push(token);
    this.steps.get(token.step)?.tokens.push(token);
    this.points.append(drawing("circle", { class: `point by-${first(token.source)}`, r: 2.5 }));
  }

  draw() {
    const n = this.tokens.length;
    if (!n) return;
    this.drawn = performance.now();
    this.curve.hidden = false;
    const height = 64;
    const most = Math.max(1, ...this.tokens.map((t) => Math.max(t.entropy, t.running)));
    this.slot = Math.min(12, Math.max(4, this.wide.clientWidth / n));
    const y = (nats) => decimals(height - 4 - ((height - 8) * nats) / most, 1);
    const x = (i) => decimals((i + 0.5) * this.slot, 1);
    this.svg.setAttribute("width", n * this.slot);
    this.line.setAttribute("points", this.tokens.map((t, i) => `${x(i)},${y(t.running)}`).join(" "));
    this.tokens.forEach((token, i) => {
      this.points.children[i].setAttribute("cx", x(i));
      this.points.children[i].setAttribute("cy", y(token.entropy));
    });
    this.top.textContent = `${decimals(most, 1)} nats`;
    this.svg.setAttribute("aria-label",
      `Running entropy over ${n} tokens, now ${decimals(this.tokens[n - 1].running)} nats; a dot is the entropy of a token`);
  }

  /** Draw the tree of a token's step. */
  show(i) {
    const token = this.tokens[i];
    if (!token) return;
    document.querySelectorAll(".shown").forEach((before) => before.classList.remove("shown"));
    shown = () => this.show(i);
    this.text.children[i].classList.add("shown");
    this.points.children[i].classList.add("shown");
    const step = this.steps.get(token.step);
    byId("step-title").textContent = step ? `Step ${step.step}` : "Before the first step";
    byId("tree").replaceChildren(...(step ? [tree(step, token)] : []));
    byId("caption").textContent = caption(token, step);
  }

  move(event) {
    const now = this.index(event.target);
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: this.tokens.length - 1 }[event.key] ??
      { ArrowDown: this.beside(now, 1), ArrowUp: this.beside(now, -1) }[event.key];
    const target = this.text.children[to];
    if (!target) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    target.tabIndex = 0;
    target.focus();
  }

  /** The token below or above another one. */
  beside(now, way) {
    const spans = [...this.text.children];
    const from = spans[now].getBoundingClientRect();
    const line = (box) => (box.bottom - from.bottom) * way;
    const far = spans.map((s) => s.getBoundingClientRect()).map((box) => (line(box) > 5 ? line(box) * 100 + Math.abs(box.left - from.left) : Infinity));
    const best = Math.min(...far);
    return best === Infinity ? now : far.indexOf(best);
  }

  end() {
    this.draw();
    if (!this.tokens.length) this.figures.append("No token was drawn.");
  }
}

/** The speed in a few figures, and below them what they are compared with. */
function figures(speed) {
  const parts = [`${decimals(speed.tokens_per_second, 1)} tokens/s`];
  if (speed.against_plain !== null) parts.push(`${decimals(speed.against_plain)}× plain decoding`);
  if (speed.passes) {
    parts.push(`${decimals((speed.passes + speed.accepted) / speed.passes)} tokens a pass`, `${speed.accepted} of ${speed.drafted} guesses right`);
  }
  let plain = "not known yet: no pass over one token was timed";
  if (!speed.alone) plain = "not told: other answers shared its passes";
  else if (speed.plain_pass_us !== null) {
    plain = `a pass over one token takes ${decimals(speed.plain_pass_us / 1000)} ms, ${PLAIN[speed.plain_pass_from]}`;
  }
  return [element("p", {}, parts.join(" · ")), element("p", { class: "plain" }, `Plain decoding: ${plain}.`)];
}

// -- the tree of a step --

function caption(token, step) {
  const by = token.source.length ? `guessed by ${and(token.source.map((s) => WHO[s]))}` : "drawn by the model, nobody had guessed it";
  const what = `“${label(token.text || (token.piece ?? ""))}”: ${by}. The model gave it ${decimals(100 * token.p, 0)} %; ` +
    `entropy ${decimals(token.entropy)} nats, running ${decimals(token.running)}.`;
  if (!step) return `${what} It comes from the pass over the question, before anything was drafted.`;
  if (step.parents.length === 1) return `${what} Nothing was drafted in this step: plain decoding.`;
  const right = step.tokens.filter((t) => t.node !== null).length;
  return `${what} Its step checked ${step.parents.length - 1} guesses in one pass; ${right} of them went into the text.`;
}

function tree(step, token) {
  const taken = new Set([0, ...step.tokens.map((t) => t.node)]);
  const nodes = step.texts.map((text, i) => ({
    text, parent: step.parents[i], who: first(step.sources[i]), taken: taken.has(i), here: i > 0 && i === token.node,
  }));
  const left = step.tokens.find((t) => t.node === null); // the token that left the tree
  if (left) {
    const parent = Math.max(0, ...step.tokens.map((t) => t.node ?? 0)); // parents come first, so the last one taken
    nodes.push({ text: left.text || (left.piece ?? ""), parent, who: "none", taken: true, here: token === left, drawn: true });
  }

  const below = nodes.map(() => []);
  const depth = [];
  nodes.forEach((node, i) => {
    depth[i] = i ? depth[node.parent] + 1 : 0;
    if (i) below[node.parent].push(i);
  });
  const down = byId("step").clientHeight > byId("step").clientWidth; // the way the tree grows
  nodes.forEach((node) => {
    node.label = label(node.text);
    node.width = 8 * [...node.label].length + 16;
  });
  const widest = depth.reduce((all, d, i) => Object.assign(all, { [d]: Math.max(all[d] ?? 0, nodes[i].width) }), []);
  const along = (d) => (down ? 44 * d : widest.slice(0, d).reduce((sum, w) => sum + w + 28, 0)) + 2;
  const place = (i, from) => { // beside the first of its children, of which one that was taken comes first
    const node = nodes[i];
    [node.x, node.y] = down ? [from, along(depth[i])] : [along(depth[i]), from];
    below[i].sort((a, b) => nodes[b].taken - nodes[a].taken);
    return Math.max(below[i].reduce((to, child) => place(child, to), from), from + (down ? node.width + 8 : 30));
  };
  const end = place(0, 2);

  const size = down ? [end, along(Math.max(...depth)) + 28] : [along(widest.length), end];
  const svg = drawing("svg", { role: "img", width: size[0], height: size[1], "aria-label": spoken(nodes) });
  for (const node of nodes.slice(1)) {
    const from = nodes[node.parent];
    const [x0, y0, x1, y1] = down ? [from.x + 16, from.y + 24, node.x + 16, node.y] : [from.x + from.width, from.y + 12, node.x, node.y + 12];
    const bend = down ? `${x0},${y0 + 10} ${x1},${y1 - 10}` : `${x0 + 14},${y0} ${x1 - 14},${y1}`;
    svg.append(drawing("path", { class: `edge by-${node.who}${node.taken ? " taken" : ""}`, d: `M${x0},${y0} C${bend} ${x1},${y1}` }));
  }
  nodes.forEach((node, i) => {
    const marks = ["taken", "here", "drawn"].filter((mark) => node[mark]).join(" ");
    svg.append(drawing("g", { class: `node by-${node.who} ${marks}`, transform: `translate(${node.x} ${node.y})` },
      drawing("title", {}, i ? `${JSON.stringify(node.text)}, ${WHO[node.who]}` : `${JSON.stringify(node.text)}, the token before`),
      drawing("rect", { width: node.width, height: 24, rx: 6 }),
      drawing("text", { x: 8, y: 16.5 }, node.label)));
  });
  return svg;
}

function spoken(nodes) {
  const said = (wanted) => nodes.slice(1).filter(wanted).map((n) => n.text.trim() || label(n.text)).join(", ");
  return `Tree of ${nodes.length} tokens after ${nodes[0].text}. Taken: ${said((n) => n.taken) || "none"}. Dropped: ${said((n) => !n.taken) || "none"}.`;
}

// -- the conversation --

const keep = () => sessionStorage.setItem("entmtp-talk", JSON.stringify(messages));

function headers() {
  const key = sessionStorage.getItem("entmtp-key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function put(node) {
  byId("empty").hidden = true;
  talk.append(node);
  talk.scrollTop = talk.scrollHeight;
}

function say(role, content) {
  if (role === "assistant") { // of before the page was loaded: who guessed it is not known any more
    put(element("article", { class: "answer tokens", "aria-label": "Answer" }, content));
  } else {
    put(element("p", { class: "question" }, content));
  }
}

function wantKey() {
  byId("key-label").hidden = false;
  openSettings(true);
  byId("key").focus();
}

async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) wantKey();
  return body.error?.message ?? body.detail ?? `status ${response.status}`;
}

/** Chunks of a stream of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let { value, done } = await reader.read(); !done; { value, done } = await reader.read()) {
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

async function answer() {
  last?.again.setAttribute("hidden", "");
  const made = (last = new Answer());
  writing = new AbortController();
  busy(true);
  put(made.node);
  let problem = "";
  try {
    const body = {
      model: byId("model").value || undefined, messages, stream: true, entmtp: true,
      temperature: byId("temperature").valueAsNumber, max_tokens: byId("max-tokens").valueAsNumber,
    };
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: writing.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const low = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
      made.add(chunk);
      if (low) talk.scrollTop = talk.scrollHeight;
    }
  } catch (error) {
    problem = error.name === "AbortError" ? "Stopped." : error.message;
    made.node.append(element("p", { class: error.name === "AbortError" ? "note" : "error", role: "alert" }, problem));
  }
  made.end();
  if (made.content) messages.push({ role: "assistant", content: made.content });
  keep();
  writing = null;
  busy(false);
  made.again.hidden = false;
  byId("said").textContent = `${made.content} ${problem}`;
  talk.scrollTop = talk.scrollHeight;
}

function busy(is) {
  byId("stop").hidden = !is;
  byId("send").hidden = byId("new").disabled = is;
  talk.setAttribute("aria-busy", is);
  if (is) byId("said").textContent = "The model is writing.";
}

function ask() {
  const content = question.value.trim();
  if (!content || writing || !byId("settings").reportValidity()) return;
  question.value = "";
  grow();
  messages.push({ role: "user", content });
  say("user", content);
  answer();
}

function regenerate() {
  if (writing) return;
  if (messages.at(-1)?.role === "assistant") messages.pop();
  last.node.remove();
  question.focus();
  answer();
}

function begin() {
  messages = [];
  last = shown = null;
  keep();
  talk.replaceChildren(byId("empty"));
  byId("empty").hidden = false;
  byId("tree").replaceChildren();
  byId("step-title").textContent = "The step";
  byId("caption").textContent = "Point at a token of an answer, or move to it with Tab and the arrow keys.";
  question.focus();
}

// -- what can be set --

function openSettings(open) {
  byId("settings").hidden = !open;
  byId("settings-toggle").setAttribute("aria-expanded", open);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => localStorage.getItem("entmtp-theme") ?? (dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(theme()));
byId("theme").addEventListener("click", () => {
  localStorage.setItem("entmtp-theme", theme() === "dark" ? "light" : "dark");
  setTheme(theme());
});
setTheme(theme());

for (const id of ["temperature", "max-tokens"]) {
  byId(id).value = localStorage.getItem(`entmtp-${id}`) ?? byId(id).value;
  byId(id).addEventListener("change", () => localStorage.setItem(`entmtp-${id}`, byId(id).value));
}
byId("key").addEventListener("change", () => {
  sessionStorage.setItem("entmtp-key", byId("key").value);
  listModels();
});
byId("settings").addEventListener("submit", (event) => event.preventDefault());
byId("settings-toggle").addEventListener("click", () => openSettings(byId("settings").hidden));
byId("new").addEventListener("click", begin);
byId("stop").addEventListener("click", () => writing?.abort());
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
question.addEventListener("input", grow);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (writing) writing.abort();
  else openSettings(false);
});
addEventListener("resize", () => {
  last?.draw();
  shown?.();
});

async function listModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) {
    byId("said").textContent = await refusal(response);
    return;
  }
  const { data } = await response.json();
  byId("model").replaceChildren(...data.map((model) => element("option", {}, model.id)));
}

for (const [who, name] of Object.entries(WHO)) byId("legend").append(element("li", { class: `by-${who}` }, name));
for (const message of messages) say(message.role, message.content);
listModels();
