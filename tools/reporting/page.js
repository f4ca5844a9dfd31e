// What the page does beyond being read: filters, sorting, shortening, values under the pointer. Everything it works on
// stands in the page; without this file nothing is hidden.
"use strict";
document.documentElement.classList.add("js");

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("[data-browse=samples]").forEach(browseSamples);
  document.querySelectorAll("[data-browse=answers]").forEach(browseAnswers);
  document.querySelectorAll(".charts").forEach(readCharts);
  window.addEventListener("hashchange", openTarget);
  window.addEventListener("beforeprint", openAll);
  window.addEventListener("afterprint", closeAgain);
  openTarget();
});

// Filters: each returns whether an item stays.

function browseSamples(box) {
  const rows = [...box.querySelectorAll("tbody tr")];
  listen(box, rows, (row, values) =>
    (!values.quarter || row.dataset.quarter === values.quarter) &&
    (!values.category || row.dataset.category === values.category) &&
    (!values.zero || "zero" in row.dataset));
  box.querySelectorAll("th[data-key]").forEach((head) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sortRows(box, rows, head));
  });
  shorten([...box.querySelectorAll(".texts")]);
}

function browseAnswers(box) {
  const items = [...box.querySelectorAll(".question")];
  const list = box.querySelector(".questions");
  const scores = new Map(items.map((item) => [item, item.dataset.scores.split(" ").map(Number)]));
  let order = "";
  listen(box, items, (item, values) => !values.set || item.dataset.set === values.set, (values) => {
    const rows = new Set([...box.querySelectorAll("[data-filter=row]:checked")].map((tick) => tick.value));
    box.querySelectorAll("[data-row]").forEach((card) => { card.hidden = rows.size > 0 && !rows.has(card.dataset.row); });
    const wanted = `${values.order} ${values.against}`;
    if (wanted === order) return;
    order = wanted;
    const value = (item) => scores.get(item)[+values.order.slice(1)] -
      (values.against ? scores.get(item)[+values.against] : 0);
    const sign = values.order[0] === "-" ? 1 : -1;
    list.append(...(values.order ? sorted(items, value, sign) : items));
  });
  shorten([...box.querySelectorAll(".question > .prompt, .card")]);
}

function listen(box, items, keeps, also = () => {}) {
  const shown = box.querySelector(".shown");
  const words = new Map(items.map((item) => [item, plain([...item.querySelectorAll("p")].map((p) => p.textContent).join(" "))]));
  const form = box.querySelector(".controls");
  const update = () => {
    const values = {};
    form.querySelectorAll("[data-filter]").forEach((field) => {
      values[field.dataset.filter] = field.type === "checkbox" ? field.checked : field.value;
    });
    const asked = plain(values.search || "").split(" ").filter(Boolean);
    let count = 0;
    for (const item of items) {
      item.hidden = !(keeps(item, values) && asked.every((word) => words.get(item).includes(word)));
      count += !item.hidden;
    }
    also(values);
    shown.value = count === items.length ? `${count} shown` : `${count} of ${items.length} shown`;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update(); // a browser may have kept what was typed before the page was loaded again
}

function plain(text) {
  return text.normalize("NFKC").toLowerCase().replace(/\s+/g, " ").trim();
}

// Sorting.

function sortRows(box, rows, head) {
  const down = head.getAttribute("aria-sort") === "ascending";
  box.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => {
    const text = row.querySelector(`td[data-key="${head.dataset.key}"]`).dataset.v;
    return text === "" || Number.isNaN(+text) ? text : +text;
  };
  box.querySelector("tbody").append(...sorted(rows, value, down ? -1 : 1));
}

// What has no value comes last, whichever the direction; equal values keep the order of the page.
function sorted(items, value, sign) {
  const missing = (v) => v === "" || Number.isNaN(v);
  return items
    .map((item, i) => ({ item, i, v: value(item) }))
    .sort((a, b) => missing(a.v) - missing(b.v) || (missing(a.v) ? 0 : sign * compare(a.v, b.v)) || a.i - b.i)
    .map((entry) => entry.item);
}

function compare(a, b) {
  return typeof a === "string" || typeof b === "string" ? String(a).localeCompare(String(b)) : a - b;
}

// Long texts: shortened to a few lines where they are longer, with a button that shows them whole.

function shorten(parts) {
  parts.forEach((part) => part.classList.add("short"));
  const longer = parts.filter((part) => [part, ...part.querySelectorAll("p")].some((p) => p.scrollHeight > p.clientHeight + 2));
  parts.forEach((part) => part.classList.remove("short"));
  longer.forEach(addButton);
}

function addButton(part) {
  const button = document.createElement("button");
  const set = (short) => {
    part.classList.toggle("short", short);
    button.textContent = short ? "show all of it" : "show less";
    button.setAttribute("aria-expanded", String(!short));
  };
  button.type = "button";
  button.className = "more";
  button.addEventListener("click", () => set(!part.classList.contains("short")));
  part.append(button);
  set(true);
}

// Values under the pointer: read back from the lines themselves.

function readCharts(group) {
  const charts = [...group.querySelectorAll("svg[data-x]")].map(openChart);
  if (!charts.length) return;
  const linked = "linked" in group.dataset;
  for (const chart of charts) {
    const move = (event) => {
      const box = chart.svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * chart.width;
      const share = Math.min(1, Math.max(0, (at - chart.x[2]) / (chart.x[3] - chart.x[2])));
      const step = Math.round(chart.x[0] + share * (chart.x[1] - chart.x[0]));
      (linked ? charts : [chart]).forEach((other) => readAt(other, step));
    };
    const leave = () => charts.forEach(clear);
    chart.svg.addEventListener("pointermove", move);
    chart.svg.addEventListener("pointerdown", move);
    chart.svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && leave());
  }
}

function openChart(svg) {
  const numbers = (text) => text.split(" ").map(Number);
  const lines = [...svg.querySelectorAll("path.line")].map((path) => ({
    steps: path.dataset.shape === "steps",
    points: (path.getAttribute("d") || "").split(/[ML]/).filter(Boolean).map(numbers),
  })).filter((line) => line.points.length);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  const output = svg.parentElement.querySelector(".read");
  return { svg, lines, cursor, output, x: numbers(svg.dataset.x), y: numbers(svg.dataset.y), width: svg.viewBox.baseVal.width };
}

function readAt(chart, step) {
  const place = chart.x[2] + ((step - chart.x[0]) / (chart.x[1] - chart.x[0])) * (chart.x[3] - chart.x[2]);
  const near = chart.lines.map((line) => (line.steps ? onStep : nearest)(line.points, place));
  if (!near.length) return;
  const at = near.map(([x]) => x).sort((a, b) => Math.abs(a - place) - Math.abs(b - place))[0];
  const value = ([, y]) => chart.y[0] + ((y - chart.y[2]) / (chart.y[3] - chart.y[2])) * (chart.y[1] - chart.y[0]);
  const where = Math.round(chart.x[0] + ((at - chart.x[2]) / (chart.x[3] - chart.x[2])) * (chart.x[1] - chart.x[0]));
  const words = near.map((point) => format(value(point)));
  chart.output.value = `${where.toLocaleString("en")}: ${words.join(" · ")}`;
  chart.cursor.setAttribute("d", `M${at} ${chart.y[2]}V${chart.y[3]}`);
}

function nearest(points, place) {
  let best = points[0];
  for (const point of points) if (Math.abs(point[0] - place) <= Math.abs(best[0] - place)) best = point;
  return best;
}

// A value that stays until it changes: that of the last point before, here.
function onStep(points, place) {
  const last = points[points.length - 1][0];
  const here = Math.min(last, Math.max(points[0][0], place));
  return [here, points.filter(([x]) => x <= here + 0.02).pop()[1]];
}

function format(value) {
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size > 0 && size < 0.001) return value.toExponential(1).replace("e-0", "e-");
  return String(+value.toPrecision(3));
}

function clear(chart) {
  chart.output.value = "";
  chart.cursor.removeAttribute("d");
}

// Parts that are folded.

function openTarget() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  const folded = target && target.closest("details");
  if (folded) folded.open = true;
}

function openAll() {
  document.querySelectorAll("details:not([open])").forEach((part) => {
    part.open = true;
    part.dataset.forPrint = "";
  });
}

function closeAgain() {
  document.querySelectorAll("[data-for-print]").forEach((part) => {
    part.open = false;
    delete part.dataset.forPrint;
  });
}
