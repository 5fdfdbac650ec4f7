// The trace viewer. Everything that comes from a run enters the page as a text
// node or an attribute's value, never as markup.
"use strict";

const embedded = document.getElementById("data");
const stored = embedded ? JSON.parse(embedded.textContent) : null;
const PAGE = 200;
const POLL = 4000; // Milliseconds between looks at a running run.
const FIRST = [
  "eval/success", "train/success", "eval/tokens", "train/tokens",
  "train/turns", "train/intervention_rate", "train/resample_rate",
  "train/format_valid", "learn/entropy", "learn/grad_norm",
];
const COLOURS = ["#2f6fd0", "#d9731a", "#2c9460", "#a04fc4", "#c23b4e", "#7a7a2e"];

const state = {
  runs: [], run: 0, rows: [], total: 0, chosen: null, other: null,
  added: new Set(), seen: 0,
};
const $ = (id) => document.getElementById(id);

/** An element with properties, attributes and children. */
function make(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) {
    if (key in node && key !== "list") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) {
    node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

const yes = { yes: true, no: false };

/** What `runs.select` does, for a page that carries its data itself. */
function select(rows, wanted) {
  const [low, high] = (wanted.update || "").split("-");
  return rows.filter((row) =>
    ["kind", "category", "task_id"].every((k) => !wanted[k] || row[k] === wanted[k])
    && ["success", "aborted", "resampled", "intervened", "cut_off"].every(
      (k) => !wanted[k] || Boolean(row[k]) === yes[wanted[k]])
    && (!low || (row.update >= Number(low) && row.update <= Number(high || low))));
}

/** Asks the server, or the data inside this page. */
async function ask(path, query = {}) {
  if (!stored) {
    const answer = await fetch(`${path}?${new URLSearchParams(query)}`);
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  }
  const run = stored[Number(query.run || 0)];
  if (path === "/api/runs") return stored.map((r) => r.summary);
  if (path === "/api/metrics") return run.metrics;
  if (path === "/api/episode") return run.episodes[query.id];
  if (path === "/api/same") {
    return stored.flatMap((r, number) => r.rows
      .filter((row) => row.task_id === query.task_id)
      .map((row) => ({ run: number, ...row })));
  }
  const found = select(run.rows, query).reverse();
  const offset = Number(query.offset || 0);
  return { total: found.length, rows: found.slice(offset, offset + PAGE) };
}

function number(value, digits = 3) {
  return value === null || value === undefined ? "–" : Number(value).toFixed(digits);
}

function wanted() {
  const found = {};
  for (const [key, value] of new FormData($("filters"))) {
    if (value.trim()) found[key] = value.trim();
  }
  return found;
}

function fill(node, names, any) {
  const before = node.value;
  node.replaceChildren(...(any ? [make("option", { value: "" }, "any")] : []),
    ...names.map((name) => make("option", { value: name }, name)));
  if (names.includes(before)) node.value = before;
}

// ------------------------------------------------------------------- list --

async function list(append = false) {
  const query = { run: state.run, ...wanted() };
  if (append) query.offset = state.rows.length;
  let found;
  try {
    found = await ask("/api/episodes", query);
  } catch (error) {
    $("count").textContent = error.message;
    return;
  }
  state.rows = append ? [...state.rows, ...found.rows] : found.rows;
  state.total = found.total;
  $("count").textContent =
    `${found.total} of ${state.runs[state.run].episodes} episodes`;
  $("more").hidden = state.rows.length >= state.total;
  const items = found.rows.map(item);
  if (append) $("list").append(...items);
  else $("list").replaceChildren(...items);
  mark();
}

function item(row) {
  const outcome = row.aborted ? "aborted" : row.success ? "solved" : "failed";
  const facts = [`${row.kind} ${row.update}`, `return ${number(row.return, 2)}`,
    `${row.turns} turns`, `${row.tokens} tokens`];
  for (const [key, word] of [["resampled", "resampled"],
    ["intervened", "intervened"], ["cut_off", "cut off"]]) {
    if (row[key]) facts.push(`${row[key]}× ${word}`);
  }
  const button = make("button", { type: "button" },
    make("span", { className: "task" },
      make("span", { className: row.success ? "good" : "bad" }, outcome),
      ` ${row.category} · ${row.task_id}`),
    make("span", { className: "facts" }, facts.join(" · ")));
  button.dataset.id = row.id;
  button.addEventListener("click", () => choose(row.id));
  return make("li", {}, button);
}

function mark() {
  for (const button of $("list").querySelectorAll("button")) {
    const current = state.chosen && button.dataset.id === state.chosen;
    button.setAttribute("aria-current", current ? "true" : "false");
  }
}

async function step(by) {
  const at = state.rows.findIndex((row) => row.id === state.chosen);
  let next = at < 0 ? 0 : at + by;
  if (next >= state.rows.length && state.rows.length < state.total) await list(true);
  next = Math.min(Math.max(next, 0), state.rows.length - 1);
  if (state.rows[next]) {
    await choose(state.rows[next].id);
    const button = [...$("list").querySelectorAll("button")][next];
    button?.scrollIntoView({ block: "nearest" });
  }
}

// ---------------------------------------------------------------- episode --

async function choose(id) {
  state.chosen = id;
  state.other = null;
  mark();
  await show();
}

async function show() {
  const parts = [[state.run, state.chosen]];
  if (state.other) parts.push(state.other);
  const columns = [];
  for (const [run, id] of parts) {
    try {
      const found = await ask("/api/episode", { run, id });
      columns.push(await column(run, found));
    } catch (error) {
      columns.push(make("p", { className: "bad" }, error.message));
    }
  }
  const hash = new URLSearchParams({ run: state.run, id: state.chosen });
  if (state.other) hash.set("with", state.other.join(":"));
  history.replaceState(null, "", `#${hash}`);
  $("shown").replaceChildren(...columns);
  $("shown").scrollTop = 0;
  tint();
}

async function column(run, found) {
  const episode = found.episode;
  const node = make("article", {});
  node.append(make("h2", {}, `${episode.category} · ${episode.task_id}`));
  const outcome = episode.aborted ? "aborted" : episode.success ? "solved" : "failed";
  const facts = make("p", { className: "facts-line" });
  const penalty = episode.turns.reduce((sum, t) => sum + t.penalty, 0);
  for (const [name, value] of [
    ["run", state.runs[run].label], ["", `${found.kind} ${found.update}`],
    ["group", `${episode.group}.${episode.member}`],
    ["return", number(episode.return)], ["penalties", number(penalty)],
    ["tokens", found.tokens],
  ]) facts.append(make("span", {}, name ? `${name} ` : "", make("b", {}, String(value))));
  facts.append(make("span", { className: episode.success ? "good" : "bad" }, outcome));
  node.append(facts, await comparison(run, found), phis(episode));
  episode.turns.forEach((turn, k) => node.append(turnNode(turn, k)));
  return node;
}

async function comparison(run, found) {
  const same = (await ask("/api/same", { task_id: found.task_id }))
    .filter((row) => row.run !== run || row.id !== found.id);
  const choice = make("select", { className: "compare" },
    make("option", { value: "" }, `compare with one of ${same.length}`),
    ...same.map((row) => make("option", { value: `${row.run}:${row.id}` },
      `${state.runs[row.run].label} · ${row.kind} ${row.update} · `
      + `${row.success ? "solved" : "failed"} · ${number(row.return, 2)}`)));
  choice.disabled = !same.length;
  choice.addEventListener("change", () => {
    if (!choice.value) return;
    const cut = choice.value.indexOf(":");
    state.other = [Number(choice.value.slice(0, cut)), choice.value.slice(cut + 1)];
    show();
  });
  return make("label", { className: "soft" }, choice);
}

/** The turn scores of an episode as bars. */
function phis(episode) {
  const known = episode.turns.map((turn) => turn.phi);
  const width = 26 * Math.max(known.length, 1) + 34;
  const node = draw("svg", {
    class: "phi", viewBox: `0 0 ${width} 46`, role: "img",
    style: `max-width:${width}px`,
  });
  node.append(draw("title", {}, "Phi of every turn"));
  const label = draw("text", { x: 0, y: 30 });
  label.append("Φ");
  node.append(label);
  const most = Math.max(1e-6, ...known.map((x) => x ?? 0));
  known.forEach((value, k) => {
    const high = value === null ? 0 : (24 * value) / most;
    const x = 18 + 26 * k;
    node.append(draw("rect", {
      class: "bar", x, y: 32 - high, width: 18, height: Math.max(high, 0.5),
    }));
    const text = draw("text", { x: x + 9, y: 43, "text-anchor": "middle" });
    text.append(number(value, 2));
    node.append(text);
  });
  return node;
}

function turnNode(turn, k) {
  const facts = [["Φ", number(turn.phi)], ["|ΔΦ|", number(turn.phi_change)],
    ["reward", number(turn.reward)], ["penalty", number(turn.penalty)],
    ["advantage", number(turn.advantage)]];
  for (const [name, value] of Object.entries(turn.info || {})) {
    facts.push([name, number(value)]);
  }
  const head = make("h3", {}, `turn ${k + 1}`,
    ...facts.map(([name, value]) => make("span", {}, `${name} ${value}`)));
  if (!turn.format_valid) head.append(make("span", { className: "bad" }, "badly formed"));
  else if (!turn.action_valid) head.append(make("span", { className: "bad" }, "not possible"));
  const attempts = make("div", { className: "attempts" });
  [...turn.discarded, turn].forEach((attempt, i) => {
    const kept = attempt === turn;
    const word = turn.discarded.length
      ? `attempt ${i + 1}, ${kept ? "kept" : "discarded"} · ` : "";
    const fired = attempt.fired_at >= 0 ? ` · intervened at ${attempt.fired_at}` : "";
    attempts.append(make("div", { className: kept ? "attempt" : "attempt discarded" },
      make("p", {}, `${word}Φ ${number(attempt.phi)} · ${attempt.tokens.length} `
        + `tokens, ${attempt.thinking_tokens} of them thought · `
        + `ended by ${attempt.finish}${fired}`),
      said(attempt)));
  });
  const prompt = make("details", {}, make("summary", {}, "the whole prompt"),
    make("pre", {}, turn.prompt));
  const body = make("div", {}, make("p", { className: "saw" }, turn.observation),
    attempts, make("p", { className: "act" }, "→ ",
      make("b", {}, turn.action || "no action")), prompt);
  return make("section", { className: "turn" }, head, body);
}

/** A response, token by token. */
function said(attempt) {
  const node = make("p", { className: "said" });
  const whole = attempt.pieces.join("");
  if (!attempt.pieces.length) {
    node.append(attempt.text);
    return node;
  }
  // What the response was begun with was not sampled.
  if (attempt.text.endsWith(whole)) {
    node.append(attempt.text.slice(0, attempt.text.length - whole.length));
  }
  const forced = new Set(attempt.forced);
  attempt.pieces.forEach((piece, i) => {
    const token = make("span", { className: "tok" }, piece);
    const facts = [];
    for (const [name, key] of [["M", "uncertainty"], ["H", "entropy"],
      ["C", "confidence"], ["logprob", "logprobs"]]) {
      const value = attempt[key]?.[i];
      if (value !== undefined && value !== null) {
        if (key !== "logprobs") token.dataset[key] = value;
        facts.push(`${name} ${number(value)}`);
      }
    }
    if (forced.has(i)) {
      token.classList.add("forced");
      facts.push("forced");
    }
    token.title = `token ${i} · id ${attempt.tokens[i]} · ${facts.join(" · ")}`;
    node.append(token);
  });
  return node;
}

/** Colours every sampled token by the chosen measure. */
function tint() {
  const measure = document.querySelector("input[name=tint]:checked").value;
  const tokens = [...$("shown").querySelectorAll(".tok:not(.forced)")];
  const values = tokens.map((t) => Number(t.dataset[measure]))
    .filter((x) => Number.isFinite(x));
  let [low, high] = [0, 1];
  if (measure !== "uncertainty") {
    low = Math.min(...values);
    high = Math.max(...values);
  }
  for (const token of tokens) {
    const value = Number(token.dataset[measure]);
    const share = Math.min(Math.max((value - low) / (high - low || 1), 0), 1);
    const known = measure !== "none" && Number.isFinite(value);
    token.style.backgroundColor =
      known ? `rgba(var(--tint), ${(0.75 * share).toFixed(3)})` : "";
  }
}

// ----------------------------------------------------------------- curves --

async function curves() {
  const all = [];
  for (let run = 0; run < state.runs.length; run++) {
    all.push(await ask("/api/metrics", { run }));
  }
  const names = [...new Set(all.flat().flatMap((line) =>
    Object.keys(line).filter((name) => Number.isFinite(line[name]))))]
    .filter((name) => !["step", "time", "elapsed"].includes(name)).sort();
  fill($("metric"), ["", ...names], false);
  const chosen = [...FIRST, ...state.added].filter((name) => names.includes(name));
  $("charts").replaceChildren(...chosen.map((name) => chart(name, all)));
  if (!chosen.length) $("charts").append(make("p", {}, "no metrics here"));
}

function chart(name, all) {
  const lines = all.map((run) => run.filter((line) => Number.isFinite(line[name]))
    .map((line) => [line.step, line[name]]));
  const points = lines.flat();
  const [left, top, width, height] = [44, 8, 280, 120];
  const range = (at) => {
    const values = points.map((p) => p[at]);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  };
  const [[x0, x1], [y0, y1]] = [range(0), range(1)];
  const x = (value) => left + (width * (value - x0)) / (x1 - x0);
  const y = (value) => top + height - (height * (value - y0)) / (y1 - y0);
  const node = draw("svg", { viewBox: "0 0 330 152", role: "img" });
  node.append(draw("title", {}, name));
  for (const value of [y0, (y0 + y1) / 2, y1]) {
    node.append(draw("line", {
      class: "grid", x1: left, x2: left + width, y1: y(value), y2: y(value),
    }));
    const label = draw("text", { x: left - 4, y: y(value) + 3, "text-anchor": "end" });
    label.append(String(Number(value.toPrecision(3))));
    node.append(label);
  }
  for (const value of [x0, x1]) {
    const label = draw("text", { x: x(value), y: 146, "text-anchor": "middle" });
    label.append(String(Math.round(value)));
    node.append(label);
  }
  lines.forEach((line, run) => {
    const colour = COLOURS[run % COLOURS.length];
    node.append(draw("polyline", {
      fill: "none", stroke: colour, "stroke-width": 1.8,
      points: line.map(([a, b]) => `${x(a)},${y(b)}`).join(" "),
    }));
    for (const [a, b] of line) {
      const dot = draw("circle", { cx: x(a), cy: y(b), r: 2.2, fill: colour });
      dot.append(draw("title", {}, `${state.runs[run].label}, update ${a}: ${b}`));
      node.append(dot);
    }
  });
  const legend = make("p", { className: "soft" });
  if (state.runs.length > 1) {
    state.runs.forEach((run, i) => {
      const swatch = make("span", {}, "■ ");
      swatch.style.color = COLOURS[i % COLOURS.length];
      legend.append(swatch, `${run.label}  `);
    });
  }
  return make("div", { className: "chart" }, make("h3", {}, name), node, legend);
}

// -------------------------------------------------------------- the whole --

function tab(name) {
  for (const which of ["episodes", "curves"]) {
    $(which).hidden = which !== name;
    $(`tab-${which}`).setAttribute("aria-pressed", String(which === name));
  }
  if (name === "curves") curves();
}

async function refresh(first = false) {
  state.runs = await ask("/api/runs");
  const options = state.runs.map((run, i) => make("option", { value: i }, run.label));
  if (first) $("run").replaceChildren(...options);
  const run = state.runs[state.run];
  fill($("filters").elements.kind, run.kinds, true);
  fill($("filters").elements.category, run.categories, true);
  const seen = state.runs.map((r) => `${r.episodes}/${r.steps}`).join();
  if (seen === state.seen) return;
  state.seen = seen;
  if (first || state.rows.length <= PAGE) await list();
  if (!$("curves").hidden) await curves();
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input:not([type=radio]):not([type=checkbox]), select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const tints = { 1: "uncertainty", 2: "entropy", 3: "confidence", 0: "none" };
  if (event.key === "j" || event.key === "ArrowDown") step(1);
  else if (event.key === "k" || event.key === "ArrowUp") step(-1);
  else if (event.key in tints) {
    document.querySelector(`input[value=${tints[event.key]}]`).checked = true;
    tint();
  } else if (event.key === "c") document.querySelector(".compare")?.focus();
  else if (event.key === "x" && state.other) { state.other = null; show(); }
  else if (event.key === "/") $("filters").elements.kind.focus();
  else if (event.key === "g") tab($("curves").hidden ? "curves" : "episodes");
  else return;
  event.preventDefault();
}

function theme() {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

async function start() {
  for (const node of document.querySelectorAll(".yes-no")) fill(node, ["yes", "no"], true);
  const hash = new URLSearchParams(location.hash.slice(1));
  state.run = Number(hash.get("run") || 0);
  await refresh(true);
  if (!state.runs[state.run]) state.run = 0;
  $("run").value = state.run;
  if (hash.get("id")) {
    state.chosen = hash.get("id");
    const other = hash.get("with");
    if (other) {
      const cut = other.indexOf(":");
      state.other = [Number(other.slice(0, cut)), other.slice(cut + 1)];
    }
    mark();
    await show();
  } else if (!state.total && state.runs[state.run].steps) tab("curves");
  $("run").addEventListener("change", async () => {
    state.run = Number($("run").value);
    state.chosen = state.other = state.seen = null;
    $("filters").reset();
    await refresh();
  });
  $("filters").addEventListener("change", () => list());
  $("filters").addEventListener("submit", (e) => { e.preventDefault(); list(); });
  $("filters").addEventListener("reset", () => setTimeout(list));
  $("more").addEventListener("click", () => list(true));
  $("tint").addEventListener("change", tint);
  $("theme").addEventListener("click", theme);
  $("tab-episodes").addEventListener("click", () => tab("episodes"));
  $("tab-curves").addEventListener("click", () => tab("curves"));
  $("metric").addEventListener("change", () => {
    if ($("metric").value) state.added.add($("metric").value);
    curves();
  });
  $("shown").addEventListener("mouseover", (event) => {
    $("token").textContent = event.target.closest(".tok")?.title || "";
  });
  document.addEventListener("keydown", keys);
  if (!stored) setInterval(() => $("follow").checked && refresh().catch(() => {}), POLL);
  document.body.dataset.ready = "yes";
}

start().catch((error) => { $("count").textContent = error.message; });
