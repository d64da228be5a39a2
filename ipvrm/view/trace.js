// The data block is described in ipvrm/view/traces.py. Texts are set as text, never as HTML.
const models = data.models, letters = "AB", edges = [0.08, 0.25, 0.5, 1];
const narrow = matchMedia("(max-width: 760px)");
let index = -1, trace, cursor = 0, active = 0, inNats = false, asMean = false;
let spans = [], marked = [], chart = [], spoken = 0, waiting = 0, characterAt = () => 0;

// Three significant digits and a real minus; e-notation only below 0.001.
function digits(x) {
  if (x == null || !Number.isFinite(x)) return "unknown";
  const a = Math.abs(x);
  if (!a) return "0";
  return a < 0.0009995 ? a.toExponential(2).replace("-", "−") : a < 999.5 ? a.toPrecision(3) : String(+a.toPrecision(3));
}
const number = x => (x > 0 ? "+" : x < 0 ? "−" : "") + digits(x);
const limit = m => (m.flags ? `${m.flags === "all" ? "+" : "−"}∞ flags ${m.flags}` : number(m.threshold));
const visible = piece => piece.replace(/ /g, "␣").replace(/\r/g, "␍").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
const plural = (n, word) => n + " " + word + (n === 1 ? "" : "s");
const inWords = step => (step < 0 ? "none" : "step " + (step + 1));

// Full colour: each model's own scale, or one in nats (TD = beta * nats) for all.
const widest = Math.max(...models.map(m => m.scale / m.beta));
const scale = k => (inNats ? widest * models[k].beta : models[k].scale);
function colour(td, k) {
  const share = td == null ? 0 : Math.abs(td) / scale(k);
  const level = share > 0 ? edges.filter(edge => share >= edge).length : 0; // a scale of 0 gives NaN: no colour
  return level ? (td < 0 ? "n" : "p") + level : "";
}

function prepared(t) {
  const texts = t.texts.map(text => {
    const pieces = text.ids.map(id => data.vocabulary[id]), starts = [0], steps = [];
    let step = 0;
    for (let i = 0; i < pieces.length; i++) {
      while (step < text.ends.length && i > text.ends[step]) step++;
      const inside = step < text.ends.length;
      steps.push(inside ? step : -1);
      starts.push(starts[i] + (inside ? [...pieces[i]].length : 1)); // an end of turn is no text: one place on the axis
    }
    return { ...text, pieces, starts, steps };
  });
  const shown = t.models.map((m, k) => {
    const text = texts[models[k].tokens] || texts[0];
    let sum = 0;
    return { ...m, text, values: m.td.map(x => (sum += x || 0)) };
  });
  return { ...t, label: t.label ?? undefined, texts, shown, length: Math.max(1, ...texts.map(x => x.starts[x.pieces.length])) };
}
const value = (k, t) => trace.shown[k].values[t] / (asMean ? t + 1 : 1);
// The other model's token that ends at, or first behind, the same character.
function tokenOf(k) {
  const here = trace.shown[active].text, there = trace.shown[k].text;
  if (here === there) return cursor;
  const end = here.starts[cursor + 1];
  let low = 0, high = there.pieces.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (there.starts[middle + 1] < end) low = middle + 1; else high = middle; }
  return low;
}

// --------------------------------------------------------------------- the page
function open(i) {
  index = (i + data.traces.length) % data.traces.length;
  trace = prepared(data.traces[index]);
  $("pick").selectedIndex = index;
  history.replaceState(null, "", "#" + (index + 1));
  $("problem").textContent = trace.problem;
  $("problem").classList.remove("open");
  sentence(); legend(); rows(); draw();
  if (!$("table").hidden) table();
  const flagged = trace.shown.map(m => m.first_error).find(step => step >= 0);
  const step = trace.label >= 0 ? trace.label : flagged;
  scrollTo(0, 0);
  move(lowest(step), true);
}
function lowest(step) {
  const { td, text } = trace.shown[active];
  let best = -1;
  for (let t = 0; t < td.length; t++)
    if ((step == null || text.steps[t] === step) && (best < 0 || (td[t] || 0) < (td[best] || 0))) best = t;
  return best < 0 ? text.ends[step] || 0 : best; // of a step without tokens: where it would stand
}
function sentence() {
  const { label, shown } = trace, total = shown[0].scores.length;
  const title = label == null ? [h("span", {}, "No label · " + plural(total, "step"))]
    : label < 0 ? [`Labelled: all ${plural(total, "step")} right`]
    : ["Labelled first error: ", h("em", {}, "step " + (label + 1)), " of " + total];
  const verdicts = shown.map((m, k) => {
    const p = m.first_error, off = p - label;
    const judged = label == null ? "" : p === label ? " ✓ agrees" : label < 0 ? " ✗ false alarm" : p < 0 ? " ✗ missed"
      : ` ✗ ${plural(Math.abs(off), "step")} ${off < 0 ? "early" : "late"}`;
    return h("span", {}, letters[k] + " ", h("b", {}, models[k].name), " flags ",
      h("b", {}, inWords(p)), judged);
  });
  $("sentence").replaceChildren(h("h1", {}, ...title), ...verdicts);
}
function legend() {
  const ramp = h("span", { className: "ramp", ariaHidden: "true" });
  for (const name of ["n4", "n3", "n2", "n1", "", "p1", "p2", "p3", "p4"]) ramp.append(h("i", { className: name }));
  const which = models.map((m, k) => [m, k]).filter(([, k]) => !narrow.matches || k === active);
  const full = which.map(([m, k]) => `${letters[k]} ${digits(scale(k))} (${digits(scale(k) / m.beta)} nats)`);
  const flat = models.filter(m => !m.scale).map(m => m.name + " changes nowhere: no colour");
  const unknown = trace.shown.reduce((n, m) => n + m.td.filter(x => x == null).length, 0);
  const at = which.map(([m, k]) => `${letters[k]} ${limit(m)}`);
  $("legend").replaceChildren(
    h("span", {}, "TD − ", ramp, (narrow.matches ? " + full from " : " + full colour from ") + full.join(" · "),
      h("span", { className: "wide" }, inNats ? " — one scale for all" : " — the 98th percentile of each")),
    h("span", {}, h("i", { className: "cell" }), " step below the threshold (logit " + at.join(", ") + ")"),
    ...[...flat, ...(unknown ? [plural(unknown, "value") + " unknown, drawn neutral"] : [])].map(x => h("span", {}, x)));
}
function rows() {
  const count = trace.shown[0].scores.length, made = [];
  spans = trace.shown.map(() => []); marked = [];
  const head = h("div", { className: "row head" }, h("span", {}, "score (logit)"));
  for (let k = 0; k < models.length; k++) head.append(h("span", {}, letters[k] + " " + models[k].name));
  made.push(head);
  for (let step = 0; step <= count; step++) {
    const last = step === count, number_ = last ? -1 : step;
    if (last && !trace.texts.some(text => text.steps.includes(-1))) break;
    const gutter = h("div", { className: "gutter" }, h("b", {}, last ? "outside steps" : "Step " + (step + 1)));
    if (!last) {
      gutter.append(h("span", {}, trace.shown.map((m, k) => letters[k] + " " + number(m.scores[step])).join(" · ")));
      if (step === trace.label) gutter.append(h("em", {}, "◆ labelled error"));
      trace.shown.forEach((m, k) => { if (m.first_error === step) gutter.append(h("span", { className: "flag" }, "⚑ flagged by " + letters[k])); });
    }
    const row = h("div", { className: "row" + (step === trace.label ? " labelled" : "") }, gutter);
    row.dataset.step = number_;
    trace.shown.forEach((m, k) => row.append(cells(m, k, number_)));
    made.push(row);
  }
  $("steps").className = models.length > 1 ? "two" : "";
  $("steps").replaceChildren(...made);
  one();
}
function cells(m, k, step) {
  const box = h("div", { className: "text" });
  box.dataset.model = k;
  for (let t = 0; t < m.td.length; t++) {
    if (m.text.steps[t] !== step) continue;
    const piece = m.text.pieces[t], lead = piece.match(/^ */)[0], span = h("span");
    if (lead !== piece) {
      if (lead) box.append(lead);
      piece.slice(lead.length).split(/(\r?\n|\t)/).forEach(part => {
        if (part === "\t" || part.endsWith("\n")) span.append(h("small", {}, visible(part)));
        span.append(part);
      });
    }
    dress(span, piece, colour(m.td[t], k));
    span.token = t;
    spans[k][t] = span;
    box.append(span);
  }
  if (!box.childNodes.length) box.append(h("span", { className: "note" }, "no token of its own"));
  return box;
}
// A lone blank is a sign where it is coloured.
function dress(span, piece, paint) {
  span.className = paint;
  if (/^ +$/.test(piece)) span.replaceChildren(paint ? h("small", {}, visible(piece)) : piece);
}
// Below 761 px one model at a time.
function one() {
  for (const box of document.querySelectorAll(".text, #read .of")) box.classList.toggle("off", +box.dataset.model !== active);
  $("model").textContent = "model " + letters[active];
  $("model").hidden = models.length < 2;
}

// ------------------------------------------------------------------- the curves
function draw() {
  const svg = $("chart"), width = svg.clientWidth || 800, left = narrow.matches ? 58 : 66, right = width - 6;
  const which = narrow.matches ? [active] : trace.shown.map((_, k) => k);
  const tall = which.length > 1 ? 82 : narrow.matches ? 92 : 130, top = 18, height = top + tall * which.length;
  const x = character => left + (right - left) * character / trace.length;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  svg.replaceChildren();
  chart = [];
  which.forEach((k, place) => {
    const m = trace.shown[k], text = m.text, y0 = top + place * tall + 2, y1 = y0 + tall - 16;
    const values = m.values.map((_, t) => value(k, t));
    const low = Math.min(0, ...values), high = Math.max(0, ...values), y = v => y0 + 3 + (y1 - y0 - 6) * (high - v) / (high - low || 1);
    const edge = step => x(text.starts[step < 0 ? 0 : text.ends[step] + 1]);
    if (trace.label >= 0)
      svg.append(s("rect", { x: edge(trace.label - 1), y: y0, width: Math.max(2, edge(trace.label) - edge(trace.label - 1)), height: y1 - y0 + 9, fill: "var(--label-band)" }));
    text.ends.forEach((_, step) => {
      const a = edge(step - 1), b = edge(step), labelled = step === trace.label, { flags, threshold } = models[k], score = m.scores[step];
      const below = step === m.first_error || (score != null && (flags ? flags === "all" : score < threshold)); // an infinite score is null
      svg.append(s("line", { x1: b, x2: b, y1: y0, y2: y1 + 9, stroke: "var(--line)" }));
      svg.append(s("rect", { x: a + 0.5, y: y1 + 2, width: Math.max(0.5, b - a - 1), height: 7, fill: below ? "var(--n4)" : "var(--line)" }));
      if (!place && (b - a > 14 || labelled))
        svg.append(s("text", { x: (a + b) / 2, y: 13, "text-anchor": "middle", class: labelled ? "label" : "" }, (labelled ? "◆" : "") + (step + 1)));
    });
    svg.append(s("line", { x1: left, x2: right, y1: y(0), y2: y(0), stroke: "var(--second)" }));
    svg.append(s("path", { d: "M" + x(0) + " " + y(0) + values.map((v, t) => "L" + x(text.starts[t + 1]).toFixed(1) + " " + y(v).toFixed(1)).join(""), fill: "none", stroke: "var(--curve)", "stroke-width": 1.8, "stroke-linejoin": "round" }));
    svg.append(s("text", { x: left - 5, y: y0 + 11, "text-anchor": "end" }, number(high)), s("text", { x: left - 5, y: y1 + 3, "text-anchor": "end" }, number(low)));
    svg.append(s("text", { x: 0, y: (y0 + y1) / 2 + 5, class: "name" }, letters[k] + (asMean ? " V/t" : " V")));
    if (m.first_error >= 0) {
      const at = edge(m.first_error - 1), behind = at > width - 90;
      svg.append(s("line", { x1: at, x2: at, y1: y0, y2: y1 + 9, stroke: "var(--flag)", "stroke-width": 2, "stroke-dasharray": "4 3" }));
      const near = values.filter((_, t) => Math.abs(x(text.starts[t + 1]) - at - (behind ? -42 : 42)) < 48).map(y); // the curve beside the words
      const over = y1 - Math.max(...near) < 18 && Math.min(...near) - y0 > 18;
      svg.append(s("text", { x: at + (behind ? -6 : 6), y: over ? y0 + 13 : y1 - 4, "text-anchor": behind ? "end" : "start", class: "flag" }, `⚑ ${letters[k]} flags ${m.first_error + 1}`));
    }
    const line = s("line", { y1: y0, y2: y1 + 9, stroke: "var(--ink)" }), dot = s("circle", { r: 4, fill: "var(--ink)" });
    svg.append(line, dot);
    chart.push({ k, line, dot, x: t => x(text.starts[t + 1]), y: t => y(values[t]) });
  });
  characterAt = px => trace.length * (px - left) / (right - left);
}

// ------------------------------------------------------------------- the cursor
function move(t, scroll) {
  cursor = Math.max(0, Math.min(trace.shown[active].td.length - 1, t));
  for (const span of marked) span.classList.remove("here");
  marked = trace.shown.map((_, k) => spans[k][tokenOf(k)]).filter(Boolean);
  for (const span of marked) span.classList.add("here");
  for (const c of chart) {
    const at = tokenOf(c.k), px = c.x(at);
    c.line.setAttribute("x1", px); c.line.setAttribute("x2", px);
    c.dot.setAttribute("cx", px); c.dot.setAttribute("cy", c.y(at));
  }
  read();
  if (scroll && spans[active][cursor]) {
    const box = spans[active][cursor].getBoundingClientRect(), top = $("dock").getBoundingClientRect().bottom + 34;
    const bottom = $("read").getBoundingClientRect().top - 34;
    if (box.top < top) scrollBy(0, box.top - top);
    else if (box.bottom > bottom) scrollBy(0, Math.min(box.bottom - bottom, box.top - top));
  }
  clearTimeout(waiting);
  waiting = setTimeout(say, Math.max(0, 250 - (Date.now() - spoken)));
}
function say() {
  spoken = Date.now();
  const m = trace.shown[active];
  $("live").textContent = `${visible(m.text.pieces[cursor])}, TD ${number(m.td[cursor])}, V ${number(m.values[cursor])}`;
}
function read() {
  const { text } = trace.shown[active], step = text.steps[cursor], count = text.ends.length;
  const where = h("div", { className: "where" }, h("code", {}, visible(text.pieces[cursor])),
    h("span", {}, `token ${cursor + 1} / ${text.pieces.length}`), h("span", {}, step < 0 ? "outside steps" : `step ${step + 1} of ${count}`),
    h("span", {}, "policy p " + digits(text.prob[cursor])));
  const parts = trace.shown.map((m, k) => {
    const t = tokenOf(k), box = h("div", { className: "of" }, h("b", {}, letters[k]), " TD ", h("b", {}, number(m.td[t])), "  V ",
      h("b", {}, number(m.values[t])), "  V/t " + number(m.values[t] / (t + 1)));
    box.dataset.model = k;
    box.append(candidates(k));
    return box;
  });
  $("read").firstChild.replaceChildren(where, ...parts);
  $("read").firstChild.style.setProperty("--models", models.length);
  one();
}
function candidates(k) {
  const { text } = trace.shown[0], t = tokenOf(0), note = words => h("div", { className: "note" }, words);
  if (!trace.candidates) return note("no candidates in this file");
  if (trace.shown[k].text !== text) return note("the candidates are of A's vocabulary");
  if (!trace.candidates[t]) return note(trace.dropped.includes(t) ? "left out (--max_size)" : `no second candidate with p ≥ ${data.min_prob}`);
  const [ids, prob, ...td] = trace.candidates[t], body = h("table", {});
  ids.forEach((id, j) => body.append(h("tr", {}, h("td", {}, id === text.ids[t] ? "▸" : ""),
    h("td", { className: "left" }, h("code", {}, visible(data.vocabulary[id]))), h("td", {}, "p " + digits(prob[j])),
    h("td", {}, "TD"), h("td", {}, h("span", { className: "chip " + colour(td[k][j], k) }, number(td[k][j]))))));
  return body;
}

// -------------------------------------------------------------------- the table
function table() {
  const shown = trace.shown.filter(m => m.text === trace.shown[active].text), { text } = shown[0], sigma = v => digits(1 / (1 + Math.exp(-v)));
  const head = h("tr", {}, ...["token", "", "step", "p"].map(x => h("th", {}, x))), body = h("tbody", {});
  for (const m of shown) for (const x of ["TD", "V", "V/t", "σ(V/t)"]) head.append(h("th", {}, letters[trace.shown.indexOf(m)] + " " + x));
  text.pieces.forEach((piece, t) => {
    const cells = [t + 1, visible(piece), text.steps[t] < 0 ? "–" : text.steps[t] + 1, digits(text.prob[t])];
    for (const m of shown) cells.push(number(m.td[t]), number(m.values[t]), number(m.values[t] / (t + 1)), sigma(m.values[t] / (t + 1)));
    body.append(h("tr", {}, ...cells.map((cell, i) => h("td", { className: i === 1 ? "left" : "" }, String(cell)))));
  });
  $("table").replaceChildren(h("table", {}, h("thead", {}, head), body));
}
function tabular() {
  const on = $("table").hidden;
  $("table").hidden = !on; $("steps").hidden = on;
  $("tabular").ariaPressed = String(on);
  if (on) table(); else $("table").replaceChildren();
}

// --------------------------------------------------------------------- the keys
function step(by) {
  const { text } = trace.shown[active], at = t => (text.steps[t] < 0 ? text.ends.length : text.steps[t]), here = at(cursor);
  for (let t = cursor; t >= 0 && t < text.pieces.length; t += by)
    if (at(t) !== here) { while (t > 0 && at(t - 1) === at(t)) t--; return move(t, true); }
}
// The drops in order of size, begun again behind the last: the one after the token at the cursor.
function drop() {
  const { td } = trace.shown[active], sorted = td.map((x, t) => [x || 0, t]).filter(([x]) => x < 0).sort((a, b) => a[0] - b[0]);
  const place = sorted.findIndex(([, t]) => t === cursor);
  if (sorted.length) move(sorted[(place + 1) % sorted.length][1], true);
}
function repaint() {
  trace.shown.forEach((m, k) => m.td.forEach((td, t) => { if (spans[k][t]) dress(spans[k][t], m.text.pieces[t], colour(td, k)); }));
  legend(); draw(); move(cursor);
}
const actions = {
  ArrowLeft: () => move(cursor - 1, true), ArrowRight: () => move(cursor + 1, true), ArrowUp: () => step(-1), ArrowDown: () => step(1),
  "[": () => open(index - 1), "]": () => open(index + 1), d: drop,
  e: () => { if (trace.label >= 0) move(lowest(trace.label), true); },
  f: () => { const p = trace.shown[active].first_error; if (p >= 0) move(lowest(p), true); },
  m: () => { const other = (active + 1) % models.length, t = tokenOf(other); active = other; one(); legend(); draw(); move(t, true); },
  u: () => { inNats = !inNats; $("units").ariaPressed = String(inNats); repaint(); },
  v: () => { asMean = !asMean; $("mean").ariaPressed = String(asMean); draw(); move(cursor); },
  t: tabular, p: () => $("problem").classList.toggle("open"), "?": () => $("keys").showModal(),
};
addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "SELECT" || $("keys").open || !actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
});
for (const [id, key] of Object.entries({ previous: "[", next: "]", model: "m", units: "u", mean: "v", tabular: "t", help: "?", problem: "p" }))
  $(id).addEventListener("click", () => actions[key]());
$("pick").addEventListener("change", event => open(event.target.selectedIndex));
function pointed(event) {
  const span = event.target.closest ? event.target.closest(".text span") : null;
  if (!span || span.token === undefined || (event.type === "pointermove" && event.pointerType !== "mouse")) return;
  const k = +span.parentNode.dataset.model;
  if (event.type === "pointermove" && k === active && span.token === cursor) return;
  active = k;
  move(span.token);
}
$("steps").addEventListener("pointermove", pointed);
$("steps").addEventListener("click", pointed);
$("chart").addEventListener("pointerdown", along);
$("chart").addEventListener("pointermove", event => { if (event.pointerType === "mouse" || event.buttons) along(event); });
function along(event) {
  const { starts, pieces } = trace.shown[active].text, character = characterAt(event.clientX - $("chart").getBoundingClientRect().left);
  let t = 0;
  while (t < pieces.length - 1 && starts[t + 1] < character) t++;
  if (t !== cursor || event.type === "pointerdown") move(t, event.type === "pointerdown");
}
let drawn = innerWidth;
addEventListener("resize", () => { if (innerWidth !== drawn) { drawn = innerWidth; one(); draw(); move(cursor); } });
addEventListener("hashchange", () => { const i = +location.hash.slice(1) - 1; if (i !== index && data.traces[i]) open(i); });
data.traces.forEach((t, i) => $("pick").append(h("option", {},
  `${i + 1}/${data.traces.length} ${t.id} · ${t.label == null ? "no label" : t.label < 0 ? "all right" : "error at " + (t.label + 1)}${t.picked_for ? " · " + t.picked_for : ""}`)));
$("about").textContent = [...models.map((m, k) => `${letters[k]} ${m.name}: ${m.objective}, beta ${m.beta}, rule ${m.rule}, threshold ${limit(m)} from ${m.threshold_from}`),
  ...(data.dropped_candidates ? ["candidates of " + plural(data.dropped_candidates, "token") + " left out (--max_size)"] : []),
  `ipvrm ${data.ipvrm}, ${data.date}`].join(" · ");
const asked = +location.hash.slice(1) - 1;
open(data.traces[asked] ? asked : 0);
