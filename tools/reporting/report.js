// What the page does beyond being read: filters, sorting, shortening, values under the pointer. Everything it works on
// stands in the page; without this file nothing is hidden.
"use strict";
document.documentElement.classList.add("js");

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".browse").forEach(browse);
  document.querySelectorAll(".charts").forEach(readCharts);
});

// The fields of a form show the items that fit all of them, in the order that is asked for.
function browse(box) {
  const form = box.querySelector("form");
  const list = box.querySelector(".items");
  const items = [...list.children];
  const words = new Map(items.map((item) => [item, plain([...item.querySelectorAll("p")].map((p) => p.textContent).join(" "))]));
  let sorted = "";
  const update = () => {
    const fields = [...form.querySelectorAll("[data-field]")].map((field) => [field.dataset.field, field.value]);
    const { search, order, against = "", ...filters } = Object.fromEntries(fields);
    const asked = plain(search).split(" ");
    const fits = Object.entries(filters).filter(([, value]) => value);
    for (const item of items) {
      item.hidden = !(fits.every(([name, value]) => item.getAttribute(`data-${name}`) === value) &&
        asked.every((word) => words.get(item).includes(word)));
    }
    form.querySelectorAll("[data-shows]").forEach((tick) => {
      box.querySelectorAll(`[data-row="${tick.dataset.shows}"]`).forEach((card) => { card.hidden = !tick.checked; });
    });
    if (sorted !== `${order} ${against}`) list.append(...inOrder(items, order, against));
    sorted = `${order} ${against}`;
    const shown = items.filter((item) => !item.hidden).length;
    form.querySelector(".shown").value = shown === items.length ? `${shown} shown` : `${shown} of ${items.length} shown`;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update(); // a browser may have kept what was typed before the page was loaded again
  shorten([...box.querySelectorAll(".prompt, .card")]);
}

function plain(text) {
  return text.normalize("NFKC").toLowerCase().replace(/\s+/g, " ").trim();
}

// Up (+name) or down (-name), by the difference where there is another; equal values keep the order of the page, and
// what has no value comes last.
function inOrder(items, order, against) {
  if (!order) return items;
  const read = (item, name) => {
    const text = item.getAttribute(`data-${name}`) || "";
    return text === "" || Number.isNaN(+text) ? text : +text;
  };
  const value = (item) => (against ? read(item, order.slice(1)) - read(item, against) : read(item, order.slice(1)));
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  const sign = order[0] === "-" ? -1 : 1;
  const found = items.map((item) => [item, value(item)]);
  const missing = ([, v]) => v === "" || Number.isNaN(v);
  return found.sort((a, b) => missing(a) - missing(b) || sign * compare(a[1], b[1]) || 0).map(([item]) => item);
}

// Long texts are shortened to a few lines, with a button that shows them whole.
function shorten(parts) {
  parts.forEach((part) => part.classList.add("short"));
  const long = parts.filter((part) => [...part.querySelectorAll("p")].some((p) => p.scrollHeight > p.clientHeight + 2));
  parts.forEach((part) => part.classList.toggle("short", long.includes(part)));
  for (const part of long) {
    const button = document.createElement("button");
    const say = (short) => {
      button.textContent = short ? "show all of it" : "show less";
      button.setAttribute("aria-expanded", String(!short));
    };
    button.type = "button";
    button.className = "more";
    button.addEventListener("click", () => say(part.classList.toggle("short")));
    part.append(button);
    say(true);
  }
}

// Values under the pointer: those of the nearest step, in all panels of a group that share their steps.
function readCharts(group) {
  const charts = [...group.children].map(openChart).filter((chart) => chart.lines.length);
  for (const chart of charts) {
    const together = "linked" in group.dataset ? charts : [chart];
    const [left, , width] = chart.plot;
    const move = (event) => {
      const box = chart.svg.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width - left) / width;
      together.forEach((other) => readAt(other, chart.x[0] + Math.min(1, Math.max(0, share)) * (chart.x[1] - chart.x[0])));
    };
    chart.svg.addEventListener("pointermove", move);
    chart.svg.addEventListener("pointerdown", move);
    chart.svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && charts.forEach(clear));
  }
}

function openChart(figure) {
  const svg = figure.querySelector("svg");
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  return { svg, cursor, output: figure.querySelector(".read"), ...JSON.parse(figure.dataset.lines) };
}

function readAt(chart, step) {
  const near = chart.lines.map((line) => (line.steps ? lastBefore : nearest)(line.points, Math.round(step)));
  const at = near.map(([x]) => x).reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a));
  const size = chart.svg.viewBox.baseVal;
  const [left, bottom, width, height] = chart.plot;
  const place = size.width * (left + (width * (at - chart.x[0])) / (chart.x[1] - chart.x[0]));
  chart.output.value = `${Math.round(at).toLocaleString("en")}: ${near.map(([, y]) => format(y)).join(" · ")}`;
  chart.cursor.setAttribute("d", `M${place} ${size.height * (1 - bottom - height)}V${size.height * (1 - bottom)}`);
}

function nearest(points, step) {
  return points.reduce((best, point) => (Math.abs(point[0] - step) <= Math.abs(best[0] - step) ? point : best));
}

// A value that stays until it changes.
function lastBefore(points, step) {
  const value = (points.filter(([x]) => x <= step).pop() || points[0])[1];
  return [Math.min(points[points.length - 1][0], Math.max(points[0][0], step)), value];
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
