"use strict";
// Draws every <figure data-chart> from the JSON in the page: curves over one common axis (time or tokens) with one
// crosshair, so that a restart, a spike and a slow hour can be read off together.
const page = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["var(--one)", "var(--two)"];
let axis = "time";
let pointed = null; // position on the axis under the pointer

function element(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.append(node);
  return node;
}

function format(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e5) return new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(value);
  if (size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function linearTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= 0.75 * rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const m of [1, 2, 5]) {
      const tick = m * 10 ** power;
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  return ticks.length > 2 ? ticks : linearTicks(low, high, 4);
}

function nearest(xs, x) {
  let low = 0;
  let high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

function extent(arrays) {
  let low = Infinity;
  let high = -Infinity;
  for (const array of arrays)
    for (const value of array) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  return [low, high];
}

function draw(figure) {
  const chart = page.charts[figure.dataset.chart];
  const along = chart.axis || axis;
  const svg = figure.querySelector("svg");
  svg.replaceChildren();
  const width = svg.clientWidth;
  const height = svg.clientHeight;
  const left = 46;
  const right = width - 8;
  const top = 8;
  const bottom = height - 20;
  const group = along === chart.axis ? [chart] : page.charts.filter((c) => !c.axis);
  let [x0, x1] = extent(group.flatMap((c) => c.curves.map((curve) => curve[along])));
  if (x1 <= x0) [x0, x1] = [x0 - 0.5, x0 + 0.5];
  let [y0, y1] = extent(chart.curves.map((curve) => curve.values));
  const log = chart.log && y0 > 0 && y1 / y0 > 1.5;
  const pad = log ? (y1 / y0) ** 0.04 : (y1 - y0) * 0.06 || Math.abs(y1) * 0.1 || 1;
  const scale = log ? Math.log : (v) => v;
  [y0, y1] = log ? [y0 / pad, y1 * pad] : [chart.zero ? 0 : y0 - pad, y1 + pad];
  const x = (v) => left + ((v - x0) / (x1 - x0)) * (right - left);
  const y = (v) => bottom - ((scale(v) - scale(y0)) / (scale(y1) - scale(y0))) * (bottom - top);
  const labels = element("g", { class: "axis" }, svg);
  let above = Infinity;
  for (const tick of log ? logTicks(y0, y1) : linearTicks(y0, y1, height > 150 ? 4 : 3)) {
    element("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }, svg);
    if (above - y(tick) < 14) continue;
    above = y(tick);
    element("text", { x: left - 6, y: above + 4, "text-anchor": "end" }, labels).textContent = format(tick);
  }
  for (const tick of linearTicks(x0, x1, Math.max(1.5, (right - left) / 80))) {
    const anchor = x(tick) > right - 14 ? "end" : x(tick) < left + 14 ? "start" : "middle";
    element("text", { x: x(tick), y: height - 5, "text-anchor": anchor }, labels).textContent = format(tick);
  }
  if (!chart.axis)
    for (const restart of page.restarts) {
      const from = x(restart.from[along]);
      const to = x(restart.to[along]);
      element("rect", { class: "lost", x: from, y: top, width: Math.max(to - from, 0), height: bottom - top }, svg);
      element("line", { class: "restart", x1: to, x2: to, y1: top, y2: bottom }, svg);
    }
  chart.curves.forEach((curve, n) => {
    const points = curve.values.map((value, i) => `${x(curve[along][i]).toFixed(1)},${y(value).toFixed(1)}`);
    const broken = (i) => page.restarts.some((r) => curve.time[i - 1] <= r.from.time && r.from.time < curve.time[i]);
    const path = points.map((point, i) => (i === 0 || (!chart.axis && broken(i)) ? "M" : "L") + point).join("");
    element("path", { d: path, fill: "none", stroke: COLOURS[n], "stroke-width": 1.5 }, svg);
    if (points.length < 40)
      for (const point of points) {
        const [cx, cy] = point.split(",");
        element("circle", { cx, cy, r: 2.2, fill: COLOURS[n] }, svg);
      }
  });
  const at = pointed === null || figure.dataset.own !== String(pointed.own) ? null : pointed.value;
  if (at !== null) element("line", { class: "cross", x1: x(at), x2: x(at), y1: top, y2: bottom }, svg);
  const shown = chart.curves.map((curve, n) => {
    const i = at === null ? curve.values.length - 1 : nearest(curve[along], at);
    return `<span><i class="key" style="background:${COLOURS[n]}"></i>${curve.name ? curve.name + " " : ""}${format(curve.values[i])}</span>`;
  });
  figure.querySelector(".values").innerHTML = shown.join(" &nbsp;");
  svg.onpointermove = (event) => {
    const box = svg.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left - left) / (right - left)));
    pointed = { value: x0 + share * (x1 - x0), own: Boolean(chart.axis) };
    drawAll();
  };
  svg.onpointerleave = () => {
    pointed = null;
    drawAll();
  };
}

const figures = [...document.querySelectorAll("figure[data-chart]")];
for (const figure of figures) figure.dataset.own = String(Boolean(page.charts[figure.dataset.chart].axis));
let waiting = false;
function drawAll() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    figures.forEach(draw);
  });
}
for (const input of document.querySelectorAll("input[name=axis]"))
  input.onchange = () => {
    axis = input.value;
    pointed = null;
    drawAll();
  };
addEventListener("resize", drawAll);
figures.forEach(draw);
