// Small graphics: a figure with its line over time, and a bar of parts with its legend.

import { digits } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 120;
const HEIGHT = 28;

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

// A figure: `show(value, note, [[seconds before now, value], …], seconds shown)`.
export function tile(title, unit) {
  const whole = element("div", "tile");
  const value = element("span", "value", "–");
  const note = element("dd", "note");
  const most = element("span", "most");
  const line = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  line.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  line.setAttribute("preserveAspectRatio", "none");
  line.setAttribute("aria-hidden", "true");
  line.append(path);
  const figure = element("dd", "figure");
  figure.append(value, " ", element("span", "unit", unit));
  const graph = element("dd", "graph");
  graph.append(line, most);
  whole.append(element("dt", "", title), figure, note, graph);

  function show(now, said, past, span) {
    value.textContent = now == null ? "–" : digits(now);
    note.textContent = said;
    const top = Math.max(...past.map(([, y]) => y ?? 0));
    most.textContent = top > 0 ? digits(top, 2) : "";
    path.setAttribute("d", top > 0 ? curve(past, span, top) : "");
  }
  return { whole, show };
}

function curve(past, span, top) {
  let drawn = "";
  let pen = "M";
  for (const [at, y] of past) {
    if (y == null) {
      pen = "M";
      continue;
    }
    const across = WIDTH * (1 + at / span);
    const up = HEIGHT - 1 - (HEIGHT - 3) * (y / top);
    drawn += `${pen}${across.toFixed(1)} ${up.toFixed(1)}`;
    pen = "L";
  }
  return drawn;
}

// A bar of parts: [name, value, colour class] each, with a legend that has the figures.
export function bar(place, { title, value, whole, parts, say, marks = [], note = "", alarm = false }) {
  const drawn = element("div", "bar");
  drawn.setAttribute("role", "img");
  drawn.setAttribute("aria-label", `${title}: ${parts.map(([name, v]) => `${name} ${say(v)}`).join(", ")}`);
  for (const [name, v, colour] of parts) {
    const piece = element("span", `part ${colour}`);
    piece.style.width = `${(100 * v) / whole}%`;
    piece.title = `${name}: ${say(v)}`;
    drawn.append(piece);
  }
  const legend = element("ul", "legend");
  for (const [name, v, colour] of parts) {
    const entry = element("li");
    entry.append(element("span", `swatch ${colour}`), element("span", "", name), element("b", "", say(v)));
    legend.append(entry);
  }
  for (const [kind, name, v] of marks) {
    const mark = element("span", `mark ${kind}`);
    mark.style.left = `${Math.min((100 * v) / whole, 100)}%`;
    drawn.append(mark);
    const entry = element("li");
    entry.append(element("span", `swatch mark-${kind}`), element("span", "", name), element("b", "", say(v)));
    legend.append(entry);
  }
  const head = element("p", "bar-title");
  head.append(element("span", "", title), element("b", "", value));
  const rest = note ? [element("p", alarm ? "note alarm" : "note", note)] : [];
  place.replaceChildren(head, drawn, legend, ...rest);
}
