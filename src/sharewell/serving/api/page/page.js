// Puts the page together: what the poller hears goes to the panels, the header and the banner.

import { ServerError, apiKey, getJson } from "./api.js";
import { Chat } from "./chat.js";
import { count, plural, rate } from "./format.js";
import { Panels } from "./panels.js";
import { Poller } from "./poller.js";

const at = (id) => document.getElementById(id);
const panels = new Panels();
const chat = new Chat({ onKey: wantKey });
const poller = new Poller({ onStats: heard, onAway: away, onKey: wantKey });
let modelsOf = null; // the server start whose models are shown
let countdown = null;

function state(name, text) {
  at("dot").dataset.state = name;
  if (at("pulse-text").textContent !== text) at("pulse-text").textContent = text;
}

function heard(stats) {
  clearInterval(countdown);
  at("away").hidden = true;
  at("key-form").hidden = !stats.auth_required || Boolean(apiKey.value);
  panels.show(stats);
  const { engine, info } = stats;
  const running = engine.running + engine.waiting;
  state(running ? "busy" : "idle", running ? `${rate(stats.rates.generated_tokens_per_s)} tokens/s` : "idle");
  at("identity").textContent =
    `${info.model.split("/").pop()} · ${info.dtype} on ${info.device}` +
    `${info.runner ? ` · ${info.runner}` : ""} · ${plural(info.threads, "thread")}` +
    ` · context ${count(info.context_length)} · v${stats.version}`;
  // Another process, or another start of it, may serve other models.
  const started = Math.round((Date.now() / 1000 - stats.uptime_s) / 5);
  const key = `${apiKey.value} ${info.revision} ${engine.adapters}`;
  if (!modelsOf || modelsOf.key !== key || Math.abs(modelsOf.started - started) > 1) {
    modelsOf = { key, started };
    loadModels();
  }
}

async function loadModels() {
  try {
    chat.offer((await getJson("v1/models")).data);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    modelsOf = null; // the next poll tries again
  }
}

function away(error, waitMs) {
  panels.stale();
  state("away", "away");
  clearInterval(countdown);
  const until = performance.now() + waitMs;
  at("away-text").textContent = `${error.message} The figures are old; the page keeps trying and comes back by itself.`;
  at("away").hidden = false;
  const tick = () => {
    const seconds = Math.max(0, Math.round((until - performance.now()) / 1000));
    at("away-retry").textContent = seconds > 0 ? `Try now (${seconds} s)` : "Trying";
  };
  tick();
  countdown = setInterval(tick, 1000);
}

function wantKey(error) {
  clearInterval(countdown);
  at("away").hidden = true;
  panels.stale();
  state("away", "API key needed");
  at("key-form").hidden = false;
  at("key-note").textContent = `${error.message} It stays in this tab and is forgotten when the tab closes.`;
  at("key-form").dataset.wrong = Boolean(apiKey.value);
}

at("away-retry").addEventListener("click", () => poller.now());
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set(at("api-key").value);
  poller.now();
});
at("pulse").addEventListener("click", () => {
  const open = document.body.classList.toggle("show-engine");
  at("pulse").setAttribute("aria-expanded", String(open));
});
poller.now();
