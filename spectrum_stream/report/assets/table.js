// The table of all matrices: searched as you type, sorted by any column, downloaded as CSV.

const ROWS_MORE = 200;
const listing = { items: [], found: [], column: null, isDown: false, limit: ROWS_MORE };

// One item per module of either result.
function listItems() {
  const byModule = new Map();
  results.forEach((result, number) => result.module.forEach((module, i) => {
    let item = byModule.get(module);
    if (!item) byModule.set(module, (item = { module, at: results.map(() => -1) }));
    item.at[number] = i;
  }));
  listing.items = [...byModule.values()];
  for (const item of listing.items) {
    const [result, i] = firstOf(item);
    item.group = groups[result.group[i]];
    item.column = result.column[i];
    const marks = item.at.map((at, number) => (at < 0 ? "" : flagOf(results[number], at)));
    item.mark = [...new Set(marks.filter(Boolean))].join(" ");
    item.haystack = `${item.module}\n${item.group}\n${item.mark}`.toLowerCase();
  }
}
const firstOf = (item) => {
  const number = item.at.findIndex((i) => i >= 0);
  return [results[number], item.at[number]];
};

// {name, of(item), isNumber}: the columns to show, to sort by and to write to CSV.
function listColumns(forFile) {
  const of = (number, get) => (item) => (item.at[number] < 0 ? null : get(results[number], item.at[number]));
  const made = [
    { name: "module", of: (item) => item.module },
    { name: "group", of: (item) => item.group },
    { name: "layer", of: (item) => columns[item.column], order: (item) => item.column },
  ];
  results.forEach((result, number) => {
    const suffix = results.length > 1 ? ` ${result.letter}` : "";
    made.push({ name: `score${suffix}`, isNumber: true, of: of(number, (r, i) => r.snr[i]) });
    made.push({ name: `rank${suffix}`, isNumber: true, of: of(number, (r, i) => r.rank[i] || null) });
    made.push({ name: `chosen${suffix}`, of: of(number, (r, i) => (isChosen(r, i) ? "yes" : "")) });
    for (const name of result.metrics.keys()) {
      if (name === SCORE || name === RANK || !(forFile || name === state.metric)) continue;
      made.push({ name: `${name}${suffix}`, isNumber: true, of: of(number, (r, i) => r.metrics.get(name)[i]) });
    }
  });
  const ratio = ({ at }) => {
    if (at.includes(-1) || !results[0].snr[at[0]]) return null;
    const ratio = results[1].snr[at[1]] / results[0].snr[at[0]];
    return Number.isNaN(ratio) ? null : ratio;
  };
  if (results.length > 1) made.push({ name: "B / A", isNumber: true, of: ratio });
  made.push({ name: "mark", of: (item) => item.mark });
  const [n, m] = ["n", "m"].map((side) => (item) => { const [result, i] = firstOf(item); return result[side][i]; });
  made.push({ name: "rows", isNumber: true, of: n }, { name: "columns", isNumber: true, of: m });
  return made;
}

function drawTable() {
  const all = listColumns(false), sought = $("search").value.toLowerCase();
  listing.found = sought ? listing.items.filter((item) => item.haystack.includes(sought)) : listing.items.slice();
  const sorter = all.find((column) => column.name === listing.column);
  if (sorter) {
    const key = sorter.order || sorter.of, sign = listing.isDown ? -1 : 1;
    const keyed = listing.found.map((item) => [key(item), item]);
    // Items without a value come last in both directions.
    keyed.sort(([a], [b]) => (a === null ? (b === null ? 0 : 1) : b === null ? -1 : a < b ? -sign : a > b ? sign : 0));
    listing.found = keyed.map(([, item]) => item);
  }
  $("found").textContent = `${listing.found.length} of ${listing.items.length} matrices`;
  const head = $("table").tHead, body = $("table").tBodies[0], focused = document.activeElement?.dataset?.column;
  head.replaceChildren(element("tr"));
  for (const column of all) {
    const isSorter = column.name === listing.column;
    const th = element("th", undefined, { scope: "col", className: column.isNumber ? "number" : "" });
    const arrow = isSorter ? (listing.isDown ? " ▾" : " ▴") : "";
    const button = element("button", column.name + arrow, { type: "button" });
    button.dataset.column = column.name;
    th.setAttribute("aria-sort", isSorter ? (listing.isDown ? "descending" : "ascending") : "none");
    button.addEventListener("click", () => {
      // Sort numbers from the largest first.
      listing.isDown = isSorter ? !listing.isDown : Boolean(column.isNumber);
      listing.column = column.name;
      drawTable();
    });
    th.append(button);
    head.rows[0].append(th);
    if (column.name === focused) button.focus();
  }
  body.replaceChildren(...listing.found.slice(0, listing.limit).map((item) => tableRow(item, all)));
  $("more").hidden = listing.found.length <= listing.limit;
}

function tableRow(item, all) {
  const tr = element("tr", undefined, { className: item.mark ? "degenerate" : "" });
  for (const column of all) {
    const value = column.of(item);
    const marks = column.name === "mark" && item.mark.split(" ").filter(Boolean).map(meaning).join("; ");
    const text = column.isNumber ? numeral(value) : marks || shown(String(value ?? ""));
    const isName = column.name === "module" || column.name === "group";
    const td = element("td", undefined, { className: column.isNumber ? "number" : isName ? "name" : "" });
    if (column.name === "module") {
      const button = element("button", text, { type: "button" });
      button.addEventListener("click", () => openMatrix(...firstOf(item)));
      td.append(button);
    } else td.textContent = text;
    tr.append(td);
  }
  return tr;
}

// A spreadsheet runs a text that begins like this as a formula, also with full-width signs. If it splits fields at
// semicolons, tabs or other separators, a text in the middle of a line can begin a field as well. It may ignore quotes,
// spaces and invisible characters in front of the sign.
const SIGN = "[\"'\\p{C}\\p{Z}]*[=+\\-@＝＋－＠﹦﹢﹣﹫]";
const STARTS = [new RegExp(`[;|\\t\\r\\n](?=${SIGN})`, "gu"), new RegExp(`^(?=${SIGN}|[;|\\t\\r\\n])`, "u")];
const inertField = (text) => STARTS.reduce((inert, start) => inert.replace(start, "$&'"), text);
const quoted = (text) => `"${inertField(text).replaceAll('"', '""')}"`;

function csvText() {
  const all = listColumns(true);
  const lines = [all.map((column) => quoted(column.name)).join(",")];
  for (const item of listing.found) {
    lines.push(all.map((column) => {
      const value = column.of(item);
      return value === null ? "" : Number.isFinite(value) ? String(value) : quoted(String(value));
    }).join(","));
  }
  return `${lines.join("\r\n")}\r\n`;
}

function downloadCsv() {
  const address = URL.createObjectURL(new Blob(["\ufeff", csvText()], { type: "text/csv" }));
  element("a", undefined, { href: address, download: "spectrum_scores.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
