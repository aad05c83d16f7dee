// The page: chat on one side, what happens inside of the model on the other.

import { events, request, useKey } from "./api.js";
import { Chat } from "./chat.js";
import { bytes } from "./format.js";
import { HeatMap } from "./heatmap.js";
import { Live } from "./live.js";

const AGAIN_S = 2;

const find = (id) => document.getElementById(id);
const chat = new Chat();
const live = new Live();
const map = new HeatMap();
let model = null;

function show(state) {
  if (model?.name !== state.model.name) {
    model = state.model;
    chat.serve(model);
    document.title = `${model.name} · mlx-flash`;
  }
  const kind = `${model.layers} layers of ${model.unit}s`;
  const size = `${bytes(model.bytes)} in a budget of ${bytes(state.memory.budget)}`;
  find("model").replaceChildren(strong(model.name), ` ${size}, ${kind}`);
  live.show(state);
  map.show(state);
}

function strong(text) {
  const made = document.createElement("b");
  made.textContent = text;
  return made;
}

function status(text, name) {
  const place = find("status");
  if (place.textContent !== text) place.textContent = text;
  place.className = name;
}

async function watch() {
  for (;;) {
    try {
      const answer = await request("/api/flash/stream");
      live.forget();
      map.forget();
      status("live", "good");
      find("key").hidden = true;
      for await (const data of events(answer)) show(JSON.parse(data));
      status("The server ended the connection.", "bad");
    } catch (error) {
      if (error.status === 401) find("key").hidden = false;
      status(error.message, "bad");
    }
    await new Promise((done) => setTimeout(done, AGAIN_S * 1000));
  }
}

function tab(name) {
  document.body.dataset.tab = name;
  for (const each of ["chat", "inside"]) {
    find(`tab-${each}`).setAttribute("aria-pressed", String(each === name));
  }
}

find("tab-chat").addEventListener("click", () => tab("chat"));
find("tab-inside").addEventListener("click", () => tab("inside"));
find("key").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(find("key-value").value);
  find("key").hidden = true;
});
watch();
