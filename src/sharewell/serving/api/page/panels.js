// The live panels: one GET /stats answer at a time becomes figures, bars and a line.

import { Sparkline } from "./chart.js";
import { count, duration, percent, plural, rate } from "./format.js";

const HISTORY_S = [30, 120]; // at first, and at most
const RECENT_S = 60;
const COMPETING_CORES = 0.5; // below this the operating system's own work would raise the warning
const COMPETING_POLLS = 3;

const at = (id) => document.getElementById(id);
const put = (id, text) => {
  const node = at(id);
  if (node.textContent !== text) node.textContent = text; // unchanged text must not be announced again
};

function fill(bar, parts, total) {
  for (const [name, value] of Object.entries(parts)) {
    bar.querySelector(`[data-part=${name}]`).style.width = total ? `${(100 * value) / total}%` : "0";
  }
}

export class Panels {
  constructor() {
    this.chart = new Sparkline(at("rate-chart"), {
      leastS: HISTORY_S[0],
      mostS: HISTORY_S[1],
      describe: (value, ageS) => `${rate(value)} tokens/s${ageS < 1 ? "" : `, ${duration(Math.round(ageS))} ago`}`,
      summarize: (last, peak) =>
        `Tokens per second, recently: now ${rate(last ?? 0)}, most ${rate(peak)}`,
    });
    this.recent = []; // [time in s, cached, computed]
    this.competing = 0;
  }

  /** Show one answer of GET /stats. */
  show(stats) {
    const { engine, info, rates, latency, saved } = stats;
    const now = performance.now() / 1000;
    at("engine").dataset.stale = "false";

    put("rate", rate(rates.generated_tokens_per_s));
    put("rate-note", `generated, ${rate(rates.prompt_tokens_per_s)} of prompts`);
    this.chart.push(now, rates.generated_tokens_per_s);
    put("rate-since", `${duration(Math.round(this.chart.spanS))} ago`);
    put("rate-peak", this.chart.peak > 0 ? `most ${rate(this.chart.peak)}` : "");

    put("running", `${count(engine.running)} of ${count(info.max_seqs)}`);
    put("waiting", count(engine.waiting));
    at("waiting").dataset.busy = engine.waiting > 0;
    put("ttft50", duration(latency.ttft_p50_s));
    put("ttft95", duration(latency.ttft_p95_s));
    put("itl50", duration(latency.itl_p50_s));

    this.blocks(engine, info);
    this.sharing(now, engine, saved);
    this.answers(stats.cache);

    put("uptime", duration(Math.floor(stats.uptime_s)));
    put("restarts", count(engine.restarts));
    at("restarts").dataset.busy = engine.restarts > 0;
    put("preemptions", count(engine.preemptions));
    put("forward", engine.step_s > 0 ? `${percent(engine.forward_s / engine.step_s)} of its steps` : "–");
    at("adapters-row").hidden = !engine.adapters.length;
    put("adapters", engine.adapters.join(", "));
    this.compete(engine.competing_cpu);
  }

  blocks(engine, info) {
    const total = engine.blocks_total;
    const parts = {
      shared: engine.blocks_shared,
      used: Math.max(0, engine.blocks_used - engine.blocks_shared),
      cached: engine.blocks_cached,
    };
    // The engine counts a cached block as free, because it may be taken; here each block counts once.
    const empty = Math.max(0, total - engine.blocks_used - engine.blocks_cached);
    put("kv-note", `${plural(total, "block")} of ${plural(info.block_size, "token")}`);
    fill(at("kv-bar"), parts, total);
    for (const [name, value] of Object.entries({ ...parts, free: empty })) put(`kv-${name}`, count(value));
    at("kv-bar").setAttribute(
      "aria-label",
      `Blocks of the KV cache: ${count(parts.shared)} shared, ${count(parts.used)} used by one request,` +
        ` ${count(parts.cached)} cached, ${count(empty)} free`,
    );
  }

  sharing(now, engine, saved) {
    const cached = engine.cached_prompt_tokens;
    const computed = engine.computed_prompt_tokens;
    if (this.recent.length && cached + computed < this.recent.at(-1)[1] + this.recent.at(-1)[2]) this.recent = [];
    this.recent.push([now, cached, computed]);
    while (this.recent.length > 2 && now - this.recent[1][0] >= RECENT_S) this.recent.shift();
    const [, cachedThen, computedThen] = this.recent[0];
    const hit = (c, m) => (c + m > 0 ? c / (c + m) : null);
    put("saved-tokens", count(saved.tokens));
    put("saved-seconds", duration(saved.seconds));
    put("hit-rate", percent(hit(cached, computed)));
    at("relayed-row").hidden = !engine.relayed_tokens;
    put("relayed", count(engine.relayed_tokens));
    at("relay-kl-row").hidden = !engine.relay_samples;
    put("relay-kl", `${(engine.relay_kl_sum / Math.max(1, engine.relay_samples)).toPrecision(2)} nats${engine.relay_fallen_back ? ", held off" : ""}`);
    put("hit-recent", percent(hit(cached - cachedThen, computed - computedThen)));
    fill(at("hit-bar"), { shared: cached }, cached + computed);
    at("hit-bar").setAttribute("aria-label", `${count(cached)} of ${count(cached + computed)} prompt tokens were shared`);
  }

  answers(cache) {
    at("answers").hidden = !cache || cache.mode === "off";
    if (at("answers").hidden) return;
    const hits = cache.exact_hits + cache.semantic_hits;
    put("answers-mode", cache.mode === "semantic" ? "also in other words" : "equal requests");
    put("answers-hits", count(hits));
    put("answers-semantic", count(cache.semantic_hits));
    put("answers-rate", percent(hits + cache.misses > 0 ? hits / (hits + cache.misses) : null));
    put("answers-seconds", duration(cache.saved_s));
    put("answers-entries", count(cache.entries));
  }

  compete(cores) {
    this.competing = cores >= COMPETING_CORES ? this.competing + 1 : 0;
    const warn = this.competing >= COMPETING_POLLS;
    // Rounded coarsely, so that a screen reader is not told every second.
    const amount = cores < 1.25 ? "about one core" : `about ${Math.round(cores)} cores`;
    if (warn) put("competing", `Other processes use ${amount} of this machine. Answers come slower until they end.`);
    at("competing").hidden = !warn;
  }

  /** The figures are old from now on. */
  stale() {
    at("engine").dataset.stale = "true";
    if (this.chart.points.length) this.chart.push(performance.now() / 1000, null);
    this.recent = [];
  }
}
