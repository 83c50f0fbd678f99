"use strict";
const data = /*DATA*/null;

const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const mean = v => v.reduce((a, b) => a + b, 0) / v.length;
const spread = v => v.length < 2 ? 0 : Math.sqrt(v.reduce((a, b) => a + (b - mean(v)) ** 2, 0) / (v.length - 1));
const shown = (m, v) => (data.metrics[m].factor * v).toFixed(data.metrics[m].digits);
const unit = m => data.metrics[m].unit === "%" ? " %" : data.metrics[m].unit ? " " + data.metrics[m].unit : "";
const colour = family => family === "none" ? "var(--ink)" : data.colours[family];
const nameOf = p => p.strength ? `${p.family}, ${p.strength}` : p.family;

function make(tag, attributes = {}, text) {
  const e = document.createElementNS(SVG, tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  if (text !== undefined) e.textContent = text;
  return e;
}
function html(tag, text, className) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (className) e.className = className;
  return e;
}

const families = Object.keys(data.colours).filter(f => data.points.some(p => p.family === f));
const state = { objective: Object.keys(data.objectives)[0], family: families.includes(data.slider) ? data.slider : families[0], at: 0, metric: "loss" };
const of = family => data.points.filter(p => p.objective === state.objective && p.family === family);
const target = () => data.objectives[state.objective].target;
const chosen = () => of(state.family)[state.at];

function chips(id, group, entries, pick) {
  for (const [value, label, dot] of entries) {
    const chip = html("label", undefined, "chip"), input = html("input"), face = html("span");
    Object.assign(input, { type: "radio", name: group, value, checked: state[group] === value });
    input.addEventListener("change", () => pick(value));
    if (dot) { const i = html("i"); i.style.background = dot; face.append(i); }
    face.append(label);
    chip.append(input, face);
    $(id).append(chip);
  }
}
function select(family, at) {
  state.family = family;
  state.at = at;
  document.querySelector(`input[name=family][value="${CSS.escape(family)}"]`).checked = true;
  draw();
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(s => s * power).find(s => s >= raw);
  const result = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9; v += step) result.push(v);
  return result;
}
function extent(values) {
  const low = Math.min(...values), high = Math.max(...values), pad = (high - low || Math.abs(high) || 1) * 0.07;
  return [low - pad, high + pad];
}

// Points that no other beats in both; only where the metric has a better side.
function frontier(points, m) {
  const sign = data.metrics[m].better === "low" ? 1 : -1;
  if (data.metrics[m].better === "base") return [];
  const at = points.map(p => [mean(p.values[target()]), sign * mean(p.values[m])]);
  return points.filter((_, i) => !at.some(q => q[0] >= at[i][0] && q[1] <= at[i][1] && (q[0] > at[i][0] || q[1] < at[i][1])))
    .sort((a, b) => mean(a.values[target()]) - mean(b.values[target()]));
}

function drawFrontier() {
  const m = state.metric, t = target(), narrow = matchMedia("(max-width: 820px)").matches;
  const W = narrow ? 460 : 760, H = narrow ? 430 : 430, left = narrow ? 58 : 60, right = 16, top = 14, bottom = 50;
  const svg = $("frontier"), points = data.points.filter(p => p.objective === state.objective), now = chosen();
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  svg.replaceChildren();
  const means = points.map(p => mean(p.values[m])).sort((a, b) => a - b);
  // A cure that is many times worse than the rest is drawn at the edge: it would press all others into one line.
  const most = means[Math.floor(0.8 * (means.length - 1))], cap = data.metrics[m].better === "low" ? most + 1.5 * (most - means[0]) : Infinity;
  const seen = v => Math.min(v, cap);
  const fx = data.metrics[t].factor, fy = data.metrics[m].factor, base = data.base.values;
  const [x0, x1] = extent([...points.flatMap(p => p.values[t]), base[t]].map(v => v * fx));
  const [y0, y1] = extent([...points.flatMap(p => p.values[m]), base[m]].map(v => seen(v) * fy));
  const x = v => left + (v * fx - x0) / (x1 - x0) * (W - left - right);
  const y = v => H - bottom - (seen(v) * fy - y0) / (y1 - y0) * (H - top - bottom);
  for (const v of ticks(y0, y1, 7)) {
    svg.append(make("line", { x1: left, x2: W - right, y1: y(v / fy), y2: y(v / fy), class: "rule" }));
    svg.append(make("text", { x: left - 8, y: y(v / fy) + 4, "text-anchor": "end" }, +v.toFixed(3)));
  }
  for (const v of ticks(x0, x1, narrow ? 4 : 7)) svg.append(make("text", { x: x(v / fx), y: H - bottom + 18, "text-anchor": "middle" }, +v.toFixed(2)));
  svg.append(make("line", { x1: left, x2: W - right, y1: H - bottom, y2: H - bottom, class: "axis" }));
  svg.append(make("text", { x: W - right, y: H - 8, "text-anchor": "end" }, `${data.metrics[t].label},${unit(t)} (better to the right) →`));
  svg.append(make("line", { x1: left, x2: W - right, y1: y(base[m]), y2: y(base[m]), stroke: "var(--soft)", "stroke-dasharray": "4 4" }));
  const best = frontier(points, m);
  if (best.length > 1) svg.append(make("polyline", { points: best.map(p => `${x(mean(p.values[t]))},${y(mean(p.values[m]))}`).join(" "), fill: "none", stroke: "var(--line)", "stroke-width": 7, "stroke-linejoin": "round", "stroke-linecap": "round" }));
  const path = of(state.family);
  svg.append(make("polyline", { points: path.map(p => `${x(mean(p.values[t]))},${y(mean(p.values[m]))}`).join(" "), fill: "none", stroke: colour(state.family), "stroke-width": 1.5, opacity: 0.7 }));
  const mark = (p, loud) => {
    const cx = x(mean(p.values[t])), cy = y(mean(p.values[m])), g = make("g", { class: "point" });
    if (loud) {
      const dx = spread(p.values[t]), dy = spread(p.values[m]), a = mean(p.values[t]), b = mean(p.values[m]);
      g.append(make("line", { x1: x(a - dx), x2: x(a + dx), y1: cy, y2: cy, stroke: colour(p.family), "stroke-width": 2 }));
      g.append(make("line", { x1: cx, x2: cx, y1: y(b - dy), y2: y(b + dy), stroke: colour(p.family), "stroke-width": 2 }));
      p.values[m].forEach((v, i) => g.append(make("circle", { cx: x(p.values[t][i]), cy: y(v), r: 2.5, fill: colour(p.family) })));
    }
    g.append(make("circle", { cx, cy, r: 14, fill: "transparent" }));
    g.append(make("circle", { cx, cy, r: loud ? 9 : 5, fill: colour(p.family), opacity: loud || p.family === state.family ? 1 : 0.55, stroke: "var(--paper)", "stroke-width": loud ? 3 : 1 }));
    g.append(make("title", {}, `${nameOf(p)}: ${shown(t, mean(p.values[t]))}${unit(t)} ${data.metrics[t].label}, ${data.metrics[m].label} ${shown(m, mean(p.values[m]))}${unit(m)}`));
    g.addEventListener("click", () => select(p.family, of(p.family).indexOf(p)));
    svg.append(g);
  };
  points.filter(p => p !== now).forEach(p => mark(p, false));
  const star = make("path", { d: "M0-9 2.6-2.9 9-2.6 4 1.6 5.6 8 0 4.4-5.6 8-4 1.6-9-2.6-2.6-2.9Z", transform: `translate(${x(base[t])} ${y(base[m])})`, fill: "var(--ink)" });
  star.append(make("title", {}, "base model"));
  svg.append(star);
  const label = (text, px, py, anchor, className) => svg.append(make("text", { x: px, y: py, "text-anchor": anchor, class: className, stroke: "var(--paper)", "stroke-width": 4, "paint-order": "stroke" }, text));
  const side = px => px > W * 0.62 ? "end" : "start", offset = px => px > W * 0.62 ? -13 : 13;
  const bx = x(base[t]), by = y(base[m]);
  label("base model", bx + offset(bx), by + (by > H / 2 ? 20 : -12), side(bx), "");
  mark(now, true);
  const nx = x(mean(now.values[t])), ny = y(mean(now.values[m]));
  const off = mean(now.values[m]) > cap ? ` (${shown(m, mean(now.values[m]))} ↑)` : "";
  label(nameOf(now) + off, nx + offset(nx), ny + (ny < 40 ? 22 : -14), side(nx), "strong");
  svg.setAttribute("aria-label", `${data.metrics[m].label} against ${data.metrics[t].label}, ${points.length} measured points. ${$("verdict").textContent}`);
}

// A metric pays when it is worse than the base model's by more than the seeds' spread.
function judge(m, values) {
  const d = mean(values) - data.base.values[m], s = spread(values), better = data.metrics[m].better;
  const half = 0.5 * 10 ** -data.metrics[m].digits / data.metrics[m].factor;
  if (Math.abs(d) <= Math.max(s, half)) return "keeps";
  if (better === "base") return "pays";
  return (d > 0) === (better === "high") ? "gains" : "pays";
}

function drawMetrics() {
  const body = $("metrics").tBodies[0], now = chosen(), none = of("none")[0];
  body.replaceChildren();
  for (const m of Object.keys(data.metrics)) {
    const row = html("tr"), b = data.base.values[m], all = data.points.filter(p => p.objective === state.objective).flatMap(p => p.values[m]);
    const [low, high] = extent([...all, b]), x = v => 4 + (v - low) / (high - low) * 152;
    const head = html("th", data.metrics[m].label + (data.metrics[m].unit ? `, ${data.metrics[m].unit}` : ""));
    head.scope = "row";
    row.append(head, html("td", shown(m, b)), html("td", none ? shown(m, mean(none.values[m])) : ""), html("td", `${shown(m, mean(now.values[m]))} ± ${shown(m, spread(now.values[m]))}`));
    const track = html("td", undefined, "track"), svg = make("svg", { viewBox: "0 0 160 22", "aria-hidden": "true" }), v = now.values[m];
    svg.append(make("line", { x1: 4, x2: 156, y1: 11, y2: 11, class: "axis", "stroke-width": 2 }));
    svg.append(make("line", { x1: x(b), x2: x(b), y1: 2, y2: 20, stroke: "var(--ink)", "stroke-width": 2 }));
    if (none) { const c = x(mean(none.values[m])); svg.append(make("path", { d: `M${c - 4} 7l8 8m0-8l-8 8`, stroke: "var(--soft)", "stroke-width": 1.8 })); }
    svg.append(make("line", { x1: x(mean(v) - spread(v)), x2: x(mean(v) + spread(v)), y1: 11, y2: 11, stroke: colour(now.family), "stroke-width": 2.5 }));
    svg.append(make("circle", { cx: x(mean(v)), cy: 11, r: 5.5, fill: colour(now.family) }));
    track.append(svg);
    const verdict = judge(m, v), d = mean(v) - b;
    row.append(track, html("td", `${verdict === "keeps" ? "within spread" : verdict} ${d >= 0 ? "+" : "−"}${shown(m, Math.abs(d))}`, verdict));
    body.append(row);
  }
}

function drawReliability() {
  const svg = $("reliability"), now = chosen(), S = 240, o = 34, at = v => o + v * (S - o - 6), up = v => S - o - v * (S - o - 6);
  svg.setAttribute("viewBox", `0 0 ${S} ${S}`);
  svg.replaceChildren();
  const w = (S - o - 6) / now.bins.length;
  now.bins.forEach((b, i) => {
    if (!b.count) return;
    const bar = make("rect", { x: at(0) + i * w + 1, y: up(b.accuracy), width: w - 2, height: up(0) - up(b.accuracy), fill: colour(now.family), opacity: 0.8 });
    bar.append(make("title", {}, `confidence ${(100 * b.confidence).toFixed(0)} %: right ${(100 * b.accuracy).toFixed(0)} % of ${b.count} bytes`));
    svg.append(bar);
  });
  svg.append(make("line", { x1: at(0), y1: up(0), x2: at(1), y2: up(1), stroke: "var(--soft)", "stroke-dasharray": "4 4" }));
  svg.append(make("polyline", { points: data.base.bins.filter(b => b.count).map(b => `${at(b.confidence)},${up(b.accuracy)}`).join(" "), fill: "none", stroke: "var(--ink)", "stroke-width": 1.5 }));
  svg.append(make("line", { x1: at(0), x2: at(1), y1: up(0), y2: up(0), class: "axis" }));
  for (const t of [0, 0.5, 1]) {
    svg.append(make("text", { x: at(t), y: S - o + 15, "text-anchor": t === 1 ? "end" : "middle" }, 100 * t));
    svg.append(make("text", { x: o - 6, y: up(t) + 4, "text-anchor": "end" }, 100 * t));
  }
  svg.append(make("text", { x: S - 6, y: S - 3, "text-anchor": "end" }, "confidence, % (line: base model)"));
  svg.append(make("text", { x: o + 4, y: 12 }, "right, %"));
  svg.setAttribute("aria-label", `Reliability diagram of ${nameOf(now)}: calibration error ${shown("ece", mean(now.values.ece))} %, base model ${shown("ece", data.base.values.ece)} %.`);
}

function drawCost() {
  const now = chosen(), none = of("none")[0], list = $("cost");
  const entry = (k, v) => list.append(html("dt", k), html("dd", v));
  list.replaceChildren();
  if (now.step_ms === null) entry("training", "none: weights of finished runs");
  else {
    entry("a step", `${now.step_ms.toFixed(0)} ms` + (none && none.step_ms ? ` (${(now.step_ms / none.step_ms).toFixed(1)} × no cure)` : ""));
    entry("capability backward passes", now.backwards);
    entry("extra memory", `${(now.extra_bytes / 1e6).toFixed(1)} MB`);
  }
}

function draw() {
  const path = of(state.family);
  state.at = Math.min(state.at, path.length - 1);
  const now = chosen(), range = $("strength");
  for (const o of $("metric").options) o.disabled = o.hidden = o.value === target();
  if (state.metric === target()) state.metric = $("metric").value = "loss";
  range.max = path.length - 1;
  range.value = state.at;
  range.disabled = path.length < 2;
  range.setAttribute("aria-valuetext", now.strength || "no strength to choose");
  $("strength-is").textContent = now.strength || "–";
  $("weakest").textContent = path.length > 1 ? path[0].strength : "";
  $("strongest").textContent = path.length > 1 ? path[path.length - 1].strength : "";
  const paying = Object.keys(data.metrics).filter(m => judge(m, now.values[m]) === "pays").map(m => data.metrics[m].label);
  const verdict = $("verdict"), t = target();
  verdict.replaceChildren(html("b", nameOf(now)), `: ${shown(t, mean(now.values[t]))}${unit(t)} ${data.metrics[t].label}, ${shown("loss", mean(now.values.loss))} nats a byte on Python (base ${shown("loss", data.base.values.loss)}). ` + (paying.length ? `Pays in ${paying.join(", ")}.` : "Nothing pays."));
  drawFrontier();
  drawMetrics();
  drawReliability();
  drawCost();
}

function drawOnce() {
  chips("objectives", "objective", Object.entries(data.objectives).map(([k, o]) => [k, o.title]), v => { state.objective = v; draw(); });
  chips("families", "family", families.map(f => [f, f, colour(f)]), v => { state.family = v; state.at = 0; draw(); });
  for (const [m, metric] of Object.entries(data.metrics)) $("metric").append(new Option(metric.label, m, m === state.metric, m === state.metric));
  $("strength").addEventListener("input", e => { state.at = +e.target.value; draw(); });
  $("metric").addEventListener("change", e => { state.metric = e.target.value; draw(); });
  $("controls").addEventListener("submit", e => e.preventDefault());
  matchMedia("(max-width: 820px)").addEventListener("change", draw);
  data.found.forEach(s => $("found").append(html("li", s)));
  $("made").textContent = "Made by " + Object.entries(data.made).map(([k, v]) => `${k} ${v}`).join(" · ");
  const head = html("tr");
  for (const t of ["taught by", "cure", ...Object.values(data.metrics).map(m => m.label), "ms a step", "capability passes", "extra MB"]) { const th = html("th", t); th.scope = "col"; head.append(th); }
  $("all").tHead.append(head);
  for (const p of data.points) {
    const row = html("tr");
    row.append(html("td", data.objectives[p.objective].title), html("td", nameOf(p)));
    for (const m of Object.keys(data.metrics)) row.append(html("td", `${shown(m, mean(p.values[m]))} ± ${shown(m, spread(p.values[m]))}`));
    row.append(html("td", p.step_ms === null ? "" : p.step_ms.toFixed(0)), html("td", p.backwards === null ? "" : p.backwards), html("td", p.extra_bytes === null ? "" : (p.extra_bytes / 1e6).toFixed(1)));
    $("all").tBodies[0].append(row);
  }
}

drawOnce();
draw();
