// Numbers as people read them. Everything takes null or undefined for "not known yet".

const NONE = "–";
const known = (x) => typeof x === "number" && Number.isFinite(x);
const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

/** 28230 -> "28,230". */
export const count = (x) => (known(x) ? grouped.format(x) : NONE);

/** A rate: one digit after the point below ten. */
export const rate = (x) => (known(x) ? (x > 0 && x < 9.95 ? x.toFixed(1) : grouped.format(x)) : NONE);

/** 0.4712 -> "47.1 %"; exact zero and one without digits. */
export function percent(x) {
  if (!known(x)) return NONE;
  return x === 0 || x === 1 ? `${100 * x} %` : `${Math.min(99.9, 100 * x).toFixed(1)} %`;
}

/** A duration in seconds: "8.4 ms", "340 ms", "1.24 s", "30 s", "3 min 20 s", "2 h 5 min", "3 d 4 h". */
export function duration(s) {
  if (!known(s)) return NONE;
  if (Number.isInteger(s) && s < 60) return `${s} s`;
  if (s < 0.00995) return `${(s * 1000).toFixed(1)} ms`;
  if (s < 0.9995) return `${Math.round(s * 1000)} ms`;
  if (s < 9.995) return `${s.toFixed(2)} s`;
  if (s < 59.95) return `${s.toFixed(1)} s`;
  const whole = Math.round(s);
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, size]) => whole >= size);
  return units
    .slice(first, first + 2)
    .map(([name, size], i) => [Math.floor((i ? whole % units[first][1] : whole) / size), name])
    .filter(([n], i) => n > 0 || i === 0)
    .map(([n, name]) => `${n} ${name}`)
    .join(" ");
}

/** "1 token", "2 tokens". */
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
