// The data block is described in ipvrm/view/runs.py. Texts are set as text, never as HTML.
const shownFirst = 8, shortTable = 12;
const hidden = new Set();
let x = "step";

function digits(v) {
  if (v == null) return "–";
  const a = Math.abs(v), sign = v < 0 ? "−" : "";
  if (!a) return "0";
  return sign + (a < 0.0009995 ? a.toExponential(2).replace("-", "−") : a < 999.5 ? a.toPrecision(3) : (+a.toPrecision(3)).toLocaleString("en"));
}
const paint = run => `var(--r${run % 8})`;
const dash = run => ["", "6 3", "2 3"][Math.floor(run / 8) % 3];

function tableOf(head, rows) {
  const words = head.map((_, i) => rows.every(row => !/^[−-]?(\d|$)/.test(row[i]))), place = i => ({ className: words[i] ? "left" : "" });
  return h("div", { className: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ...head.map((c, i) => h("th", place(i), c)))),
    h("tbody", {}, ...rows.map(row => h("tr", {}, ...row.map((c, i) => h("td", place(i), String(c))))))));
}

// Round numbers between low and high, at most about `count` and two fifths of it or more.
function ticks(low, high, count, least = 0) {
  const raw = Math.max((high - low) / count || 1, least), power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find(m => m * power >= raw), found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return found;
}

function chart(metric) {
  const svg = s("svg", { role: "img", "aria-label": metric.name }), values = h("span", {}), caption = h("figcaption", {}, h("b", {}, metric.name), values);
  const details = h("details", {}, h("summary", {}, "table")), figure = h("figure", {}, caption, svg, details);
  details.addEventListener("toggle", () => { while (details.children[1]) details.children[1].remove(); if (details.open) details.append(rowsOf(metric)); });
  const draw = () => {
    const lines = metric.lines.filter(line => !hidden.has(line.run) && line[x].some(v => v != null));
    const width = svg.clientWidth || 400, height = 170, left = 52, right = width - 10, top = 8, bottom = height - 22;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`); svg.setAttribute("height", height); svg.replaceChildren();
    const xs = lines.flatMap(line => line[x].filter(v => v != null)), ys = lines.flatMap(line => line.value.filter(v => v != null));
    if (!ys.length) { svg.append(s("text", { x: left, y: 60 }, "no values")); return () => {}; }
    let low = Math.min(...ys), high = Math.max(...ys);
    if (low === high) { low -= Math.abs(low) * 0.1 || 1; high += Math.abs(high) * 0.1 || 1; }
    const x0 = Math.min(...xs), x1 = Math.max(...xs), px = v => left + (right - left) * (x1 > x0 ? (v - x0) / (x1 - x0) : 0.5), py = v => bottom - (bottom - top) * (v - low) / (high - low);
    for (const v of ticks(low, high, 5)) svg.append(s("line", { x1: left, x2: right, y1: py(v), y2: py(v), stroke: "var(--line)" }), s("text", { x: left - 6, y: py(v) + 4, "text-anchor": "end" }, digits(v)));
    const marks = ticks(x0, x1, Math.max(2, Math.floor(width / 90)), x === "step" ? 1 : 0);
    for (const v of x1 > x0 ? marks : [x0]) svg.append(s("text", { x: px(v), y: height - 6, "text-anchor": v > x1 - (x1 - x0) * 0.02 ? "end" : "middle" }, v.toLocaleString("en") + (x === "seconds" ? " s" : "")));
    for (const group of data.groups) band(svg, group, lines, px, py);
    for (const line of lines) {
      let path = "", pen = "M", alone = true;
      line.value.forEach((v, i) => {
        if (v == null || line[x][i] == null) { pen = "M"; return; }
        path += pen + px(line[x][i]).toFixed(1) + " " + py(v).toFixed(1);
        if (pen === "L") alone = false;
        pen = "L";
      });
      svg.append(s("path", { d: path, fill: "none", stroke: paint(line.run), "stroke-width": 1.8, "stroke-dasharray": dash(line.run), "stroke-linejoin": "round" }));
      if (alone || line.value.length < 9) line.value.forEach((v, i) => { if (v != null && line[x][i] != null) svg.append(s("circle", { cx: px(line[x][i]), cy: py(v), r: 2.5, fill: paint(line.run) })); });
    }
    const cursor = s("line", { y1: top, y2: bottom, stroke: "var(--ink)", visibility: "hidden" });
    svg.append(cursor);
    svg.at = clientX => {
      const wanted = x0 + (x1 - x0) * Math.min(1, Math.max(0, (clientX - svg.getBoundingClientRect().left - left) / (right - left)));
      show(wanted);
      cursor.setAttribute("x1", px(wanted)); cursor.setAttribute("x2", px(wanted)); cursor.setAttribute("visibility", "visible");
    };
    const show = wanted => values.replaceChildren(...lines.map(line => {
      let best = -1;
      line[x].forEach((v, i) => { if (v != null && (best < 0 || Math.abs(v - wanted) < Math.abs(line[x][best] - wanted))) best = i; });
      return h("span", {}, h("i", { className: "key", style: `height:3px;width:14px;vertical-align:4px;background:${paint(line.run)}` }), `${digits(line.value[best])} at ${line[x][best].toLocaleString("en")}  `);
    }));
    show(x1);
  };
  svg.addEventListener("pointermove", event => svg.at && svg.at(event.clientX));
  svg.addEventListener("pointerdown", event => svg.at && svg.at(event.clientX));
  figure.draw = draw;
  return figure;
}
// Lowest to highest over the seeds of a group, at the steps that all of them have.
function band(svg, group, lines, px, py) {
  const own = lines.filter(line => group.includes(line.run));
  if (own.length < 2 || x !== "step") return;
  const at = own.map(line => new Map(line.step.map((v, i) => [v, line.value[i]])));
  const steps = own[0].step.filter(v => at.every(map => map.get(v) != null)), edge = pick => steps.map(v => `${px(v).toFixed(1)} ${py(pick(...at.map(map => map.get(v)))).toFixed(1)}`);
  if (steps.length > 1) svg.append(s("path", { d: "M" + [...edge(Math.max), ...edge(Math.min).reverse()].join("L") + "Z", fill: paint(group[0]), opacity: 0.15 }));
}
function rowsOf(metric) {
  const at = metric.lines.map(line => new Map(line[x].map((v, i) => [v, line.value[i]])));
  const places = [...new Set(metric.lines.flatMap(line => line[x]).filter(v => v != null))].sort((a, b) => a - b);
  return tableOf([x, ...metric.lines.map(line => data.runs[line.run].name)], places.map(v => [v, ...at.map(map => (map.has(v) ? digits(map.get(v)) : ""))]));
}
function draw() { for (const figure of document.querySelectorAll("figure")) if (figure.checkVisibility()) figure.draw(); }

$("title").textContent = `${data.runs.length} run${data.runs.length === 1 ? "" : "s"}`;
data.runs.forEach((run, i) => {
  const button = h("button", { ariaPressed: "true" }, h("i", { className: "key" }), run.name + (run.state === "finished" ? "" : ` (${run.state})`));
  button.firstChild.style.background = dash(i) ? `repeating-linear-gradient(90deg, ${paint(i)} 0 6px, transparent 6px 9px)` : paint(i);
  button.addEventListener("click", () => {
    if (!hidden.delete(i)) hidden.add(i);
    button.ariaPressed = String(!hidden.has(i));
    draw();
  });
  $("runs").append(button);
});
for (const table of data.tables) { // the curves stand behind what is short and read first
  const parts = [h("h2", {}, table.title), tableOf(table.head, table.rows), h("p", { className: "note" }, table.note)];
  if (table.rows.length <= shortTable) $("above").append(...parts);
  else $("below").append(parts[0], h("details", { open: table.name !== "settings" }, h("summary", {}, `${table.rows.length} rows`), ...parts.slice(1)));
}
const bands = data.groups.map(group => `band: lowest to highest of ${group.length} seeds (${group.map(i => data.runs[i].name).join(", ")})`).join(" · ");
const sentence = () => { $("bands").textContent = bands && x !== "step" ? "no band over time: seeds reach a step at different times" : bands; };
$("curves").hidden = $("x").hidden = !data.metrics.length;
data.metrics.forEach((metric, i) => $(i < shownFirst ? "charts" : "others").append(chart(metric)));
const rest = data.metrics.length - shownFirst;
$("more").hidden = rest <= 0;
$("more").firstElementChild.textContent = `${rest} more metrics`;
$("more").addEventListener("toggle", draw);
$("x").disabled = !data.metrics.some(metric => metric.lines.some(line => line.seconds.some(v => v != null)));
$("x").addEventListener("click", () => { x = x === "step" ? "seconds" : "step"; $("x").ariaPressed = String(x === "seconds"); sentence(); draw(); });
sentence();
let drawn = innerWidth;
addEventListener("resize", () => { if (innerWidth !== drawn) { drawn = innerWidth; draw(); } });
draw();
