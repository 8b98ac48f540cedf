// The state of the page: its data, and the choices of the reader.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const { rows, columns, groups } = data;
const state = { metric: "score", scale: "row", percent: data.top_percent, opened: null, picked: null };

const SCORE = "score", RANK = "rank";
const results = data.results.map((raw, number) => {
  const numbers = (values) => values.map((v) => (v === null ? null : Number(v)));
  const snr = numbers(raw.snr);
  const { rank, size } = rankings(raw.group, snr, raw.is_ranked, raw.pool);
  const metrics = new Map([[SCORE, snr], [RANK, Array.from(rank, (r) => r || null)]]);
  for (const [name, values] of Object.entries(raw.metrics)) metrics.set(name, numbers(values));
  const cells = cellsOf(raw), lines = new Map();
  for (const [key, cell] of cells) {
    const row = Math.floor(key / columns.length);
    if (!lines.has(row)) lines.set(row, []);
    lines.get(row).push(cell);
  }
  const tau = numbers(raw.tau), largest = numbers(raw.largest), letter = "AB"[number];
  return { ...raw, number, snr, tau, largest, rank, size, metrics, letter, cells, lines };
});

// A cell has one matrix, or experts as parts. Fused experts have both.
function cellsOf(raw) {
  const cells = new Map();
  for (let i = 0; i < raw.module.length; i++) {
    const key = raw.row[i] * columns.length + raw.column[i];
    let cell = cells.get(key);
    if (!cell) cells.set(key, (cell = { own: -1, parts: [] }));
    if (raw.index[i] === "" && cell.own < 0) cell.own = i;
    else cell.parts.push(i);
  }
  return cells;
}

// The words for every flag come with the data, so that they are stated only once.
const meaning = (flag) => data.flags[flag] || flag;
const isMissing = (flag) => data.missing.includes(flag);

const prefixed = (result, text) => (results.length > 1 ? `${result.letter}: ${text}` : text);
const isPhone = () => document.documentElement.clientWidth < 600;
const flagOf = (result, i) => result.flags[result.flag[i]];
const isChosen = (result, i) => result.rank[i] > 0 && result.rank[i] <= countChosen(result.size[i], state.percent);

// If one of several fused experts has no score, they have none together and are not in the result.
const isIncomplete = (result, cell) => cell.own < 0 && !cell.parts.some((i) => result.is_ranked[i]);

function valueOf(result, cell, metric = state.metric) {
  const values = result.metrics.get(metric);
  if (!values || isIncomplete(result, cell)) return null;
  if (cell.own >= 0) return values[cell.own];
  const known = cell.parts.map((i) => values[i]).filter((v) => v !== null && !Number.isNaN(v));
  return known.length ? median(known) : null;
}

// The flag of a cell is the flag of its matrix, or the one flag that all its parts have.
function cellFlag(result, cell) {
  if (cell.own >= 0) return flagOf(result, cell.own);
  const flags = new Set(cell.parts.map((i) => flagOf(result, i)));
  if (isIncomplete(result, cell)) return [...flags].find(isMissing) || "";
  return flags.size === 1 ? [...flags][0] : "";
}

// 1 if all of a cell is chosen, 0 if nothing is, and the share of its parts in between.
function chosenShare(result, cell) {
  if (cell.own >= 0) return isChosen(result, cell.own) ? 1 : 0;
  return cell.parts.filter((i) => isChosen(result, i)).length / cell.parts.length;
}

// Map values to 0..1, on a logarithmic scale if they spread over more than a factor of twenty.
function scaleOf(values, metric = state.metric) {
  const finite = values.filter(Number.isFinite);
  if (!finite.length) return null;
  const low = finite.reduce((a, b) => Math.min(a, b)), high = finite.reduce((a, b) => Math.max(a, b));
  const isLog = metric !== RANK && low > 0 && high / low > 20;
  const [from, to] = isLog ? [Math.log(low), Math.log(high)] : [low, high];
  const at = (v) => {
    if (to === from) return 0.5;
    // The difference of two large numbers is infinite, and that of their halves is not.
    const share = ((isLog ? Math.log(Math.max(v, low)) : v) / 2 - from / 2) / (to / 2 - from / 2 || 1);
    return Math.min(1, Math.max(0, share));
  };
  // The first rank is the best.
  return { low, high, isLog, at: metric === RANK ? (v) => 1 - at(v) : at };
}

// A degenerate score would stretch the scale of the others.
function scaleOfCells(pairs) {
  const known = (some) => some.map(([result, cell]) => valueOf(result, cell)).filter((v) => v !== null);
  return scaleOf(known(pairs.filter(([result, cell]) => !cellFlag(result, cell)))) || scaleOf(known(pairs));
}

const stops = data.colors.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
function colorAt(share) {
  const at = Math.min(stops.length - 1.000001, Math.max(0, share * (stops.length - 1))), i = Math.floor(at);
  return stops[i].map((from, k) => Math.round(from + (stops[i + 1][k] - from) * (at - i)));
}
const isLight = ([r, g, b]) => 0.299 * r + 0.587 * g + 0.114 * b > 128;

function element(tag, text, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  return made;
}

function definitions(target, pairs) {
  target.replaceChildren(...pairs.map(([label, text]) => {
    const pair = element("div");
    pair.append(element("dt", label), element("dd", text));
    return pair;
  }));
}

const layerName = (column) => (columns[column] === "" ? "no layer" : `layer ${shown(columns[column])}`);

const rankText = (result, i, where = "") =>
  `rank ${result.rank[i]} of ${result.size[i]}${where}, ${isChosen(result, i) ? "chosen" : "not chosen"}`;

function describe(result, i) {
  const lines = [shown(result.module[i]), `score ${numeral(result.snr[i])}`];
  if (result.rank[i]) lines.push(rankText(result, i, " in its group"));
  if (result.n[i] !== null) lines.push(`${result.n[i]} × ${result.m[i]}, ${numeral(result.above[i])} above τ`);
  if (flagOf(result, i)) lines.push(meaning(flagOf(result, i)));
  if (state.metric !== SCORE && state.metric !== RANK) {
    lines.push(`${state.metric} ${numeral(result.metrics.get(state.metric)?.[i])}`);
  }
  return lines;
}

function describeCell(result, cell, row, column) {
  if (cell.own >= 0 && !cell.parts.length) return describe(result, cell.own);
  const lines = cell.own >= 0 ? describe(result, cell.own) : [`${shown(rows[row])}, ${layerName(column)}`];
  const flagged = cell.parts.filter((i) => flagOf(result, i)).length;
  if (isIncomplete(result, cell)) lines.push(`${cell.parts.length} fused experts without a score`);
  else if (cell.own < 0) {
    lines.push(`median ${state.metric} ${numeral(valueOf(result, cell))}`);
    lines.push(`${cell.parts.filter((i) => isChosen(result, i)).length} of ${cell.parts.length} chosen`);
  } else lines.push(`${cell.parts.length} fused experts; the score is their median`);
  if (flagged) lines.push(`${flagged} with a degenerate or missing score`);
  return lines;
}
