// Asks the server once a second how it is. Rests while nobody looks, backs off while the server is away, and
// comes back by itself.

import { ServerError, getJson } from "./api.js";

const EVERY_MS = 1000;
const LONGEST_MS = 15000;

export class Poller {
  /**
   * `onStats(stats)` for every answer, `onAway(error, waitMs)` for every failure, `onKey(error)` when the server
   * wants another API key (polling then rests until `now()`).
   */
  constructor({ onStats, onAway, onKey }) {
    Object.assign(this, { onStats, onAway, onKey });
    this.failures = 0;
    this.timer = null;
    this.asking = false;
    this.again = false;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.rest() : this.now()));
  }

  rest() {
    clearTimeout(this.timer);
    this.timer = null;
  }

  /** Ask at once, and go on from there. */
  now() {
    this.rest();
    if (this.asking) this.again = true; // what is under way may carry the old key
    else this.ask();
  }

  async ask() {
    this.asking = true;
    let waitMs = EVERY_MS;
    try {
      const stats = await getJson("stats");
      this.failures = 0;
      this.onStats(stats);
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      if (error.kind === "key") {
        waitMs = null;
        this.onKey(error);
      } else {
        // A little chance keeps many pages from coming back in the same instant.
        waitMs = Math.min(LONGEST_MS, EVERY_MS * 2 ** this.failures++) * (0.9 + 0.2 * Math.random());
        this.onAway(error, waitMs);
      }
    } finally {
      this.asking = false;
      if (this.again) waitMs = 0;
      this.again = false;
      if (waitMs !== null && !document.hidden) this.timer = setTimeout(() => this.ask(), waitMs);
    }
  }
}
