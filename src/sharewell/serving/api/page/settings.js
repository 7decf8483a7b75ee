// What an answer is asked with: model, system prompt, temperature, max tokens. Kept for this tab.

import { read, write } from "./api.js";

const KEPT = "sharewell.settings";
const at = (id) => document.getElementById(id);

export class Settings {
  constructor() {
    this.form = at("settings");
    this.kept = parse(read(KEPT)) ?? {};
    at("system").value = this.kept.system ?? "";
    at("temperature").value = this.kept.temperature ?? "0.7";
    at("temperature-slide").value = at("temperature").value;
    at("max-tokens").value = this.kept.maxTokens ?? "";
    at("temperature-slide").addEventListener("input", (event) => (at("temperature").value = event.target.value));
    at("temperature").addEventListener("input", (event) => (at("temperature-slide").value = event.target.value));
    this.form.addEventListener("input", () => this.keep());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    at("model").addEventListener("change", () => this.keep());
    at("settings-toggle").addEventListener("click", () => this.open(this.form.hidden));
  }

  open(shown) {
    this.form.hidden = !shown;
    at("settings-toggle").setAttribute("aria-expanded", String(shown));
  }

  keep() {
    this.kept = {
      model: at("model").value,
      system: at("system").value,
      temperature: at("temperature").value,
      maxTokens: at("max-tokens").value,
    };
    write(KEPT, JSON.stringify(this.kept));
  }

  /** Offer the models of GET /v1/models that generate; embedding models have no dtype there. */
  offer(models) {
    const select = at("model");
    const chosen = select.disabled ? this.kept.model : select.value;
    const names = models.filter((m) => m.dtype).map((m) => m.id);
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    select.disabled = !names.length;
    select.title = names.length ? "" : "The server offers no model that generates text";
    if (names.includes(chosen)) select.value = chosen;
  }

  /** The request's fields, or null after showing which field is wrong. */
  request() {
    const wrong = [at("temperature"), at("max-tokens")].find((field) => !field.checkValidity());
    if (wrong) {
      this.open(true);
      wrong.reportValidity();
      return null;
    }
    const fields = { model: at("model").value };
    if (at("temperature").value !== "") fields.temperature = at("temperature").valueAsNumber;
    if (at("max-tokens").value !== "") fields.max_tokens = at("max-tokens").valueAsNumber;
    return fields;
  }

  get system() {
    return at("system").value.trim();
  }
}

function parse(text) {
  try {
    return text && JSON.parse(text);
  } catch {
    return null;
  }
}
