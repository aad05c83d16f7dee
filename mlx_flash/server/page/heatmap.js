// The heat map: a row for each layer, a column for each unit or group of units.
// Colour says where a unit is (memory or flash), its depth how often it was asked for.

import { count, digits, percent } from "./format.js";

const LEFT = 30;
const RIGHT = 74;
const ABOVE = 6;
const BELOW = 18;
const LATELY = 40; // pictures

const find = (id) => document.getElementById(id);

function decode(text, Type) {
  return new Type(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(name).trim();
  const rgb = (name) => read(name).match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16));
  return {
    held: [rgb("--held-low"), rgb("--held-high")],
    flash: [rgb("--flash-low"), rgb("--flash-high")],
    ink: read("--ink"), quiet: read("--quiet"), line: read("--line"), bar: read("--held"),
    font: getComputedStyle(document.body).fontFamily,
  };
}

function css(rgb) {
  return `rgb(${rgb.map(Math.round).join(" ")})`;
}

function mix(a, b, share) {
  return a.map((value, i) => value + (b[i] - value) * share);
}

export class HeatMap {
  constructor() {
    this.canvas = find("map");
    this.rows = [];
    this.past = [];
    this.cell = null;
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
    find("since").addEventListener("change", () => this.draw());
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.canvas.parentElement);
  }

  forget() {
    this.past = [];
    this.cell = null;
  }

  show(state) {
    this.unit = state.model.unit;
    this.rows = state.layers.map((layer) => ({
      ...layer, asked: decode(layer.asked, Uint32Array), held: decode(layer.held, Uint8Array),
    }));
    this.past.push(this.rows.map((row) => row.asked));
    if (this.past.length > LATELY) this.past.shift();
    this.draw();
    if (!this.rows.length) return;
    this.table();
    this.name();
    if (document.activeElement !== this.canvas) this.describe();
  }

  // How often the units of each column were asked for, each unit's mean.
  asked(index) {
    const row = this.rows[index];
    const before = find("since").value === "lately" ? this.past[0][index] : null;
    const wide = row.units / row.asked.length;
    return Float32Array.from(row.asked, (value, i) => (value - (before?.[i] ?? 0)) / wide);
  }

  draw() {
    const box = this.canvas.parentElement.clientWidth;
    if (!this.rows.length || !box) return;
    const height = Math.min(Math.max(Math.floor(240 / this.rows.length), 5), 26);
    const shape = { width: box - LEFT - RIGHT, height };
    const scale = devicePixelRatio || 1;
    const tall = ABOVE + height * this.rows.length + BELOW;
    this.canvas.width = Math.round(box * scale);
    this.canvas.height = Math.round(tall * scale);
    this.canvas.style.height = `${tall}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.translate(0, ABOVE);
    const ink = colours();
    const counts = this.rows.map((_, i) => this.asked(i));
    const most = Math.max(...counts.map((values) => Math.max(...values)));
    const least = Math.min(...counts.map((values) => Math.min(...values)));
    const depth = (value) => {
      if (most === least) return most ? 0.5 : 0; // all alike: blocks, for example
      return Math.log1p((99 * value) / most) / Math.log(100);
    };
    this.rows.forEach((row, i) => this.row(pen, ink, shape, row, counts[i], depth, i));
    this.labels(pen, ink, shape);
    if (this.cell) this.outline(pen, ink, shape);
    ramp(find("ramp-held"), ink.held);
    ramp(find("ramp-flash"), ink.flash);
  }

  row(pen, ink, { width, height }, row, counts, depthOf, index) {
    const top = index * height;
    const gap = height > 8 ? 1 : 0.5;
    const step = width / counts.length;
    const between = step > 5 ? 1 : 0;
    for (let i = 0; i < counts.length; i++) {
      const depth = row.whole ? 0.5 : depthOf(counts[i]);
      const left = LEFT + i * step;
      const wide = between ? step - between : step + 0.5;
      const high = height - gap;
      const filled = (high * row.held[i]) / 255;
      pen.fillStyle = css(mix(...ink.flash, depth));
      pen.fillRect(left, top, wide, high);
      pen.fillStyle = css(mix(...ink.held, depth));
      pen.fillRect(left, top + high - filled, wide, filled);
    }
    const share = row.held_units / row.units;
    const left = LEFT + width + 10;
    const room = RIGHT - 46;
    pen.fillStyle = ink.line;
    pen.fillRect(left, top, room, height - gap);
    pen.fillStyle = ink.bar;
    pen.fillRect(left, top, room * share, height - gap);
  }

  labels(pen, ink, { width, height }) {
    pen.font = `11px ${ink.font}`;
    pen.fillStyle = ink.quiet;
    pen.textBaseline = "middle";
    const every = Math.max(1, Math.ceil(this.rows.length / 16), Math.ceil(12 / height));
    pen.textAlign = "right";
    this.rows.forEach((row, i) => {
      if (i % every) return;
      const middle = i * height + height / 2;
      pen.fillText(String(i), LEFT - 8, middle);
      pen.fillText(percent(row.held_units / row.units), LEFT + width + RIGHT, middle);
    });
    const below = this.rows.length * height + 10;
    const units = Math.max(...this.rows.map((row) => row.units));
    pen.textAlign = "left";
    pen.fillText(`${this.unit} 0`, LEFT, below);
    pen.textAlign = "right";
    pen.fillText(count(units - 1), LEFT + width, below);
    pen.fillText("held", LEFT + width + RIGHT, below);
  }

  outline(pen, ink, { width, height }) {
    const [row, column] = this.cell;
    const step = width / this.rows[row].asked.length;
    pen.strokeStyle = ink.ink;
    pen.lineWidth = 1.5;
    pen.strokeRect(LEFT + column * step - 1, row * height - 0.5, Math.max(step, 2) + 1, height);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const width = box.width - LEFT - RIGHT;
    const height = (box.height - ABOVE - BELOW) / this.rows.length;
    const row = Math.floor((event.clientY - box.top - ABOVE) / height);
    const share = (event.clientX - box.left - LEFT) / width;
    if (!this.rows[row] || share < 0 || share >= 1) return;
    this.cell = [row, Math.floor(share * this.rows[row].asked.length)];
    this.draw();
    this.describe();
  }

  move(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const step = steps[event.key];
    if (!step || !this.rows.length) return;
    event.preventDefault();
    const [row, column] = this.cell ?? [0, -step[1]];
    const there = Math.min(Math.max(row + step[0], 0), this.rows.length - 1);
    const most = this.rows[there].asked.length - 1;
    this.cell = [there, Math.min(Math.max(column + step[1], 0), most)];
    this.draw();
    this.describe();
  }

  name() {
    const held = this.rows.reduce((sum, row) => sum + row.held_units, 0);
    const units = this.rows.reduce((sum, row) => sum + row.units, 0);
    this.canvas.setAttribute("aria-label",
      `Heat map of ${this.rows.length} layers with ${count(units)} ${this.unit}s, ` +
      `${percent(held / units)} of them in memory. The table below has the figures.`);
  }

  describe() {
    if (!this.cell) {
      const row = this.rows[0];
      const many = Math.round(row.units / row.asked.length);
      const what = many > 1 ? `${many} ${this.unit}s, blue as far as they are in memory` : `one ${this.unit}`;
      find("map-cell").textContent = `A cell is ${what}. Point at one for its figures, or use the arrow keys.`;
      return;
    }
    const [index, column] = this.cell;
    const row = this.rows[index];
    const columns = row.asked.length;
    const from = Math.floor((column * row.units) / columns);
    const to = Math.floor(((column + 1) * row.units) / columns) - 1;
    const who = from === to ? `${this.unit} ${count(from)}` : `${this.unit}s ${count(from)} to ${count(to)}`;
    const where = from === to
      ? (row.held[column] ? "in memory" : "on flash")
      : `${percent(row.held[column] / 255)} in memory`;
    const times = row.whole
      ? "the layer is held whole and asks for nothing"
      : `asked for ${digits(this.asked(index)[column])} times${from === to ? "" : " each"}`;
    find("map-cell").textContent = `Layer ${index}, ${who}: ${where}, ${times}.`;
  }

  table() {
    const place = find("layers");
    if (!place.closest("details").open) return;
    const lines = this.rows.map((row, i) => {
      const total = row.asked.reduce((sum, value) => sum + value, 0);
      const cells = [
        i, count(row.held_units), count(row.units), percent(row.held_units / row.units),
        row.whole ? "held whole" : digits(total / row.units),
      ];
      const line = document.createElement("tr");
      cells.forEach((said, j) => {
        const cell = document.createElement(j ? "td" : "th");
        if (!j) cell.scope = "row";
        cell.textContent = said;
        line.append(cell);
      });
      return line;
    });
    place.tBodies[0].replaceChildren(...lines);
  }
}

function ramp(canvas, ends) {
  const pen = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    pen.fillStyle = css(mix(...ends, x / canvas.width));
    pen.fillRect(x, 0, 1, canvas.height);
  }
}
