"use strict";
// Numbers and words: pure functions. Files share one scope, and each uses only those before it.

// A stranger's text, inert for the eye: what could reverse a line or hide is shown as its escape.
const shown = (text) => text.replace(/[\p{C}\p{Z}]/gu, (c) => {
  if (c === " ") return c;
  const code = c.codePointAt(0).toString(16);
  return code.length <= 2 ? `\\x${code.padStart(2, "0")}` : code.length <= 4 ? `\\u${code.padStart(4, "0")}` : `\\U${code.padStart(8, "0")}`;
});

const shortened = (text, limit) => (text.length <= limit ? text : `${text.slice(0, limit / 2 - 1)}…${text.slice(1 - limit / 2)}`);

// Plotly takes `<b>` in a label for markup and `$` for the beginning of mathematics, whoever wrote it.
const unmarked = (text, limit = 36) =>
  shortened(shown(text), limit).replace(/[&<>$]/g, (c) => `&#${c.charCodeAt(0)};`);

function numeral(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isNaN(value) || value === -Infinity) return "NaN";
  if (value === Infinity) return "∞";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const rounded = Number(value.toPrecision(4)), size = Math.abs(rounded);
  return size < 1e-4 || size >= 1e6 ? rounded.toExponential().replace("e+", "e") : String(rounded);
}

// Where a logarithmic axis has its numbers: at 1, 2 and 5 of every decade, or at as many powers of ten as there is room for.
function logTicks(low, high, decadesDivided) {
  const first = Math.floor(Math.log10(low)) - 1, last = Math.ceil(Math.log10(high)) + 1, decades = last - first - 2;
  const step = Math.max(1, Math.ceil(decades / 8)), ticks = [];
  for (let power = first; power <= last; power += step) {
    for (const digit of decades <= decadesDivided ? [1, 2, 5] : [1]) ticks.push(Number(`${digit}e${power}`));
  }
  return ticks.filter((tick) => tick > 0 && tick < Infinity);
}

function median(values) {
  const sorted = Float64Array.from(values).sort();
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

// Spectrum's rule: every group by score, equal ones in the file's order. Experts that are pooled have one rank together.
function rankings(groups, scores, isRanked, pools) {
  const members = new Map();
  for (let i = 0; i < groups.length; i++) {
    if (!isRanked[i]) continue;
    if (!members.has(groups[i])) members.set(groups[i], []);
    members.get(groups[i]).push(i);
  }
  const rank = new Int32Array(groups.length), size = new Int32Array(groups.length);
  for (const own of members.values()) {
    own.sort((a, b) => (scores[a] < scores[b] ? 1 : scores[a] > scores[b] ? -1 : 0));
    const units = new Map();
    const unit = (i) => (pools[i] < 0 ? `single ${i}` : pools[i]);
    for (const i of own) if (!units.has(unit(i))) units.set(unit(i), units.size + 1);
    for (const i of own) { rank[i] = units.get(unit(i)); size[i] = units.size; }
  }
  return { rank, size };
}

const countChosen = (size, percent) => Math.floor((size * percent) / 100);

// Marchenko-Pastur for singular values: those of a noise matrix of shape n x m are scale * x, beta = min / max, and
//   f(x) = sqrt((x^2 - (1 - sqrt beta)^2) ((1 + sqrt beta)^2 - x^2)) / (pi beta x)
function marchenkoPastur(beta, points = 400) {
  const low = 1 - Math.sqrt(beta), high = 1 + Math.sqrt(beta), x = [], f = [];
  for (let i = 0; i <= points; i++) {
    // Closer together at the edges, where the density rises as a root.
    const at = low + ((high - low) * (1 - Math.cos((Math.PI * i) / points))) / 2;
    x.push(at);
    const inside = Math.max(0, (at * at - low * low) * (high * high - at * at));
    // At beta 1 the lower edge is 0, where the density is finite: 2 / pi.
    f.push(at > 0 ? Math.sqrt(inside) / (Math.PI * beta * at) : 2 / Math.PI);
  }
  let area = 0;
  const cumulative = [0];
  for (let i = 1; i <= points; i++) cumulative.push((area += ((f[i] + f[i - 1]) / 2) * (x[i] - x[i - 1])));
  const half = cumulative.findIndex((value) => value >= area / 2);
  return { x, f, median: x[half], edge: high };
}

// The share of values below each edge, of values of which only equally spaced quantiles are known, descending.
function histogram(descending, low, high, bins) {
  const ascending = Array.from(descending).reverse(), last = ascending.length - 1;
  let at = 0;
  const below = (x) => {
    if (x >= ascending[last]) return 1;
    while (at < last && ascending[at + 1] <= x) at++;
    if (x <= ascending[0]) return 0;
    return (at + (x - ascending[at]) / (ascending[at + 1] - ascending[at])) / last;
  };
  const width = (high - low) / bins, x = [], f = [];
  let before = below(low);
  for (let i = 1; i <= bins; i++) {
    const now = below(low + i * width);
    x.push(low + (i - 0.5) * width);
    f.push((now - before) / width);
    before = now;
  }
  return { x, f, width, beyond: 1 - before };
}

const words = {
  empty_noise: "degenerate: nothing is at or below τ",
  zero_noise: "degenerate: only zeros are at or below τ",
  zero: "degenerate: a zero matrix",
  infinite: "degenerate: infinite in the file",
  not_a_number: "no number in the file",
  not_finite: "no score: the weights hold NaN or Inf",
  out_of_range: "no score: out of range",
  no_convergence: "no score: no convergence",
};
const meaning = (flag) => words[flag] || flag;
const isMissing = (flag) => (words[flag] || "").startsWith("no ");
