"use strict";
// Numbers and texts: pure functions. All files share one scope, and each uses only the files before it.

// Make untrusted text safe to show: escape characters that are invisible or could reverse a line.
const shown = (text) => text.replace(/[\p{C}\p{Z}]/gu, (c) => {
  if (c === " ") return c;
  const code = c.codePointAt(0).toString(16);
  if (code.length <= 2) return `\\x${code.padStart(2, "0")}`;
  return code.length <= 4 ? `\\u${code.padStart(4, "0")}` : `\\U${code.padStart(8, "0")}`;
});

const shortened = (text, limit) =>
  text.length <= limit ? text : `${text.slice(0, limit / 2 - 1)}…${text.slice(1 - limit / 2)}`;

// Plotly reads `<b>` in a label as markup and `$` as the start of a formula.
const unmarked = (text, limit = 36) =>
  shortened(shown(text), limit).replace(/[&<>$]/g, (c) => `&#${c.charCodeAt(0)};`);

function numeral(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isNaN(value) || value === -Infinity) return "NaN";
  if (value === Infinity) return "∞";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const rounded = Number(value.toPrecision(4)), size = Math.abs(rounded);
  // The largest numbers are infinite when they are rounded up.
  if (size === Infinity) return value.toExponential(3).replace("e+", "e");
  return size < 1e-4 || size >= 1e6 ? rounded.toExponential().replace("e+", "e") : String(rounded);
}

// The ticks of a logarithmic axis: 1, 2 and 5 of every decade, or powers of ten if these are too many.
function logTicks(low, high, decadesDivided) {
  const first = Math.floor(Math.log10(low)) - 1, last = Math.ceil(Math.log10(high)) + 1;
  const decades = last - first - 2;
  const step = Math.max(1, Math.ceil(decades / 8)), ticks = [];
  for (let power = first; power <= last; power += step) {
    for (const digit of decades <= decadesDivided ? [1, 2, 5] : [1]) ticks.push(Number(`${digit}e${power}`));
  }
  return ticks.filter((tick) => tick > 0 && tick < Infinity);
}

// Whether a plot can show a number: Plotly adds squares and powers of them. No scan gives others.
const isDrawable = (value) => value === 0 || (Math.abs(value) > 1e-100 && Math.abs(value) < 1e100);

function median(values) {
  const sorted = Float64Array.from(values).sort();
  const half = sorted.length >> 1;
  const [low, high] = [sorted[sorted.length - 1 - half], sorted[half]];
  if (low === high || low === -Infinity) return low;
  // The sum of two large numbers is infinite, and the halves of two tiny ones are zero.
  return Number.isFinite(low + high) ? (low + high) / 2 : low / 2 + high / 2;
}

// Spectrum's rule: rank each group by score, equal scores in the file's order. Pooled experts share one rank.
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

// The Marchenko-Pastur law for the singular values scale * x of an n x m noise matrix, with beta = min / max:
//   f(x) = sqrt((x^2 - (1 - sqrt beta)^2) ((1 + sqrt beta)^2 - x^2)) / (pi beta x)
function marchenkoPastur(beta, points = 400) {
  const low = 1 - Math.sqrt(beta), high = 1 + Math.sqrt(beta), x = [], f = [];
  for (let i = 0; i <= points; i++) {
    // Points are closer together at the edges, where the density rises as a root.
    const at = low + ((high - low) * (1 - Math.cos((Math.PI * i) / points))) / 2;
    x.push(at);
    const inside = Math.max(0, (at * at - low * low) * (high * high - at * at));
    // At beta 1 the lower edge is 0, and the density there is 2 / pi.
    f.push(at > 0 ? Math.sqrt(inside) / (Math.PI * beta * at) : 2 / Math.PI);
  }
  let area = 0;
  const cumulative = [0];
  for (let i = 1; i <= points; i++) cumulative.push((area += ((f[i] + f[i - 1]) / 2) * (x[i] - x[i - 1])));
  const half = cumulative.findIndex((value) => value >= area / 2);
  return { x, f, median: x[half], edge: high };
}

// A histogram of values that are known only by equally spaced quantiles, descending.
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
