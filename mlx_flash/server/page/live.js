// Figures of the model: what each picture of the server's state says, and its past.

import { bytes, count, digits, percent, seconds } from "./format.js";
import { bar, tile } from "./graphics.js";

const PAST_S = 60;
const RATE_S = 2; // a rate is that of so many seconds

const find = (id) => document.getElementById(id);

export class Live {
  constructor() {
    this.past = []; // {at, counters, tokens, begun}
    this.tiles = {
      speed: tile("Speed", "tokens/s"),
      hits: tile("Hits", "%"),
      flash: tile("Flash", "GB/s"),
      waits: tile("Waits for MLX", "per token"),
    };
    find("figures").append(...Object.values(this.tiles).map((made) => made.whole));
  }

  // What was seen of a server that was started anew since then counts no more.
  forget() {
    this.past = [];
  }

  show(state) {
    this.remember(state);
    this.figures(state);
    budget(state);
    machine(state);
    time(state.answer);
    find("phase").textContent = phase(state);
  }

  remember(state) {
    const { answer } = state;
    const now = {
      at: state.at_s, ...state.counters, tokens: answer?.tokens ?? 0, begun: answer?.begun_s,
    };
    this.past.push(now);
    while (this.past[0].at < now.at - PAST_S) this.past.shift();
    const before = this.past.findLast((x) => x.at <= now.at - RATE_S) ?? this.past[0];
    const same = before.begun === now.begun;
    const tokens = same ? now.tokens - before.tokens : now.tokens;
    const span = now.at - Math.max(before.at, same ? 0 : now.begun ?? 0);
    const asked = now.hits + now.misses - before.hits - before.misses;
    const busy = now.read_s - before.read_s;
    now.rates = {
      speed: span > 0 ? tokens / span : 0,
      hits: asked > 0 ? (100 * (now.hits - before.hits)) / asked : null,
      flash: busy > 0 ? (now.bytes_read - before.bytes_read) / 1e9 / busy : 0,
      // Those of a prompt are of no token.
      waits: same && before.tokens && tokens > 0 ? (now.waits - before.waits) / tokens : null,
    };
  }

  figures(state) {
    const answer = state.answer ?? {};
    const { rates } = this.past.at(-1);
    const said = {
      speed: answer.first_token_s == null ? "" : `first after ${seconds(answer.first_token_s)}`,
      hits: answer.hit_rate == null ? "" : `of ${state.model.unit}s needed`,
      flash: answer.bytes_per_token == null ? "" : `${bytes(answer.bytes_per_token)} per token`,
      waits: answer.waits_per_token == null ? "" : "to know what to read",
    };
    const values = {
      speed: answer.tokens_per_s,
      hits: answer.hit_rate == null ? null : 100 * answer.hit_rate,
      flash: answer.read_gb_per_s ?? (rates.flash || null),
      waits: answer.waits_per_token,
    };
    for (const [name, made] of Object.entries(this.tiles)) {
      const line = this.past.map((x) => [x.at - state.at_s, x.rates[name]]);
      made.show(values[name], said[name], line, PAST_S);
    }
  }
}

function phase({ answer, requests }) {
  const waiting = requests.waiting ? `, ${count(requests.waiting)} waiting` : "";
  if (requests.reading) {
    const [done, all] = requests.reading;
    return `reading the prompt, ${count(done)} of ${count(all)} tokens${waiting}`;
  }
  if (requests.running) return `${count(answer?.tokens ?? 0)} tokens so far${waiting}`;
  return answer ? `the last one, ${count(answer.tokens)} tokens` : "none yet";
}

function budget({ memory }) {
  const parts = [
    ["resident", memory.resident, "resident"],
    ["predictors", memory.predictors, "predictors"],
    ["slots for units", memory.slots, "held"],
    ["KV cache", memory.kv_cache, "kv"],
    ["workspace", memory.workspace, "workspace"],
    ["draft model", memory.draft, "draft"],
  ].filter(([, value]) => value > 0);
  bar(find("budget"), {
    title: "Budget", value: bytes(memory.budget), whole: Math.max(memory.budget, memory.peak),
    parts, say: bytes,
    marks: [["now", "held now", memory.held], ["peak", "peak", memory.peak]],
  });
}

function machine({ memory }) {
  const others = Math.max(memory.machine - memory.available - memory.process, 0);
  bar(find("machine"), {
    title: "Machine", value: bytes(memory.machine), whole: memory.machine, say: bytes,
    parts: [
      ["this process", Math.min(memory.process, memory.machine), "resident"],
      ["others", others, "workspace"],
      ["available", memory.available, "free"],
    ],
    note: memory.short ? "Memory pressure: short" : "Memory pressure: normal",
    alarm: memory.short,
  });
}

function time(answer) {
  const known = answer?.compute_s != null && answer.tokens > 1;
  const parts = known ? [
    ["waits for flash", answer.io_s, "flash"],
    ["bookkeeping", answer.cache_s, "kv"],
    ["computing", answer.compute_s, "resident"],
  ] : [];
  const whole = parts.reduce((sum, [, value]) => sum + value, 0);
  const tokens = known ? answer.tokens - 1 : 1;
  bar(find("time"), {
    title: "Time of a token", value: known ? seconds(whole / tokens) : "–", whole, parts,
    say: (value) => percent(value / whole),
  });
}
