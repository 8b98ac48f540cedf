// The map: a grid of real table cells, which can be focused, read aloud and outlined, unlike a drawing.

const ROWS_AT_ONCE = 64, COLUMNS_AT_ONCE = 128;
const maps = [];

// spec: result, title, rowLabels, columnLabels, cellAt(row, column), describe(cell, row, column),
// pick(cell, row, column) and expand(row), which may be null. Row and column numbers are those of the whole map.
function heatMap(spec) {
  const home = element("div");
  const map = { spec, home, firstRow: 0, firstColumn: 0, cursor: null, cells: [] };
  home.append(element("h3", spec.title));
  map.pager = element("div", undefined, { className: "pager" });
  map.scroll = element("div", undefined, { className: "scroll" });
  home.append(map.pager, map.scroll);
  build(map);
  return map;
}

function build(map) {
  const { spec } = map;
  const table = element("table", undefined, { className: "heat" });
  table.setAttribute("role", "grid");
  table.setAttribute("aria-label", spec.title);
  const lastRow = Math.min(spec.rowLabels.length, map.firstRow + ROWS_AT_ONCE);
  const lastColumn = Math.min(spec.columnLabels.length, map.firstColumn + COLUMNS_AT_ONCE);
  const width = cellWidth(lastColumn - map.firstColumn);
  table.style.setProperty("--cell", `${width}px`);
  table.classList.toggle("narrow", width < 16);
  const head = table.createTHead().insertRow();
  head.append(element("th", ""));
  for (let c = map.firstColumn; c < lastColumn; c++) {
    const label = shown(spec.columnLabels[c]) || "–";
    const isSpared = width < 16 && !/[05]$/.test(label);
    head.append(element("th", isSpared ? "" : label.length > 3 ? "…" : label, { scope: "col", title: label }));
  }
  map.cells = [];
  const body = table.createTBody();
  for (let r = map.firstRow; r < lastRow; r++) {
    const line = body.insertRow(), label = shown(spec.rowLabels[r]);
    const name = element("th", undefined, { scope: "row", title: label });
    if (spec.expand?.(r)) {
      const button = element("button", "open", { type: "button" });
      button.setAttribute("aria-label", `open ${label}`);
      button.addEventListener("click", spec.expand(r));
      name.append(button);
    }
    // The label is shortened in the middle, since groups differ at the end.
    name.append(shortened(label, isPhone() ? (name.firstChild ? 14 : 22) : results.length > 1 ? 26 : 60));
    line.append(name);
    for (let c = map.firstColumn; c < lastColumn; c++) {
      const td = line.insertCell(), cell = spec.cellAt(r, c);
      td.setAttribute("role", "gridcell");
      if (!cell) { td.className = "none"; continue; }
      td.tabIndex = -1;
      map.cells.push({ td, cell, r, c });
      Object.assign(td, { heat: map.cells.at(-1) });
    }
  }
  map.scroll.replaceChildren(table);
  buildPager(map, lastRow, lastColumn);
  if (map.cells.length) moveCursor(map, map.cells[0], false);
  table.addEventListener("pointerover", (event) => {
    const at = heatOf(event);
    at ? showTip(map, at) : hideTip();
  });
  table.addEventListener("pointerleave", hideTip);
  table.addEventListener("focusin", (event) => {
    const at = heatOf(event);
    if (!at) return;
    moveCursor(map, at, false);
    showTip(map, at);
  });
  table.addEventListener("focusout", hideTip);
  table.addEventListener("click", (event) => {
    const at = heatOf(event);
    if (!at) return;
    moveCursor(map, at, false);
    hideTip();
    spec.pick(at.cell, at.r, at.c);
  });
  table.addEventListener("keydown", (event) => onKey(map, event));
  paint(map);
}

// Cells are as wide as the window allows, and narrower if two maps then fit side by side.
function cellWidth(count) {
  const room = Math.min(document.documentElement.clientWidth, 1500) / results.length - (results.length > 1 ? 230 : 330);
  const fitting = Math.floor(room / Math.max(count, 1)) - 1;
  return fitting < 11 ? 19 : Math.min(28, results.length > 1 ? fitting : Math.max(19, fitting));
}

const heatOf = (event) => event.target.closest?.("td")?.heat;

function buildPager(map, lastRow, lastColumn) {
  const { rowLabels, columnLabels } = map.spec;
  map.pager.replaceChildren();
  const turn = (what, first, last, total, step, key) => {
    if (total <= step) return;
    const go = (by) => () => { map[key] = Math.max(0, Math.min(first + by, total - 1)); build(map); };
    const back = element("button", `earlier ${what}`, { type: "button", disabled: first === 0 });
    const forth = element("button", `later ${what}`, { type: "button", disabled: last >= total });
    back.addEventListener("click", go(-step));
    forth.addEventListener("click", go(step));
    map.pager.append(back, element("span", `${what} ${first + 1} to ${last} of ${total}`), forth);
  };
  turn("rows", map.firstRow, lastRow, rowLabels.length, ROWS_AT_ONCE, "firstRow");
  turn("layers", map.firstColumn, lastColumn, columnLabels.length, COLUMNS_AT_ONCE, "firstColumn");
}

function moveCursor(map, at, hasToFocus) {
  if (map.cursor) map.cursor.td.tabIndex = -1;
  map.cursor = at;
  at.td.tabIndex = 0;
  if (hasToFocus) at.td.focus();
}

function onKey(map, event) {
  const at = heatOf(event);
  if (!at) return;
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  let next = null;
  if (event.key in steps) {
    const [dr, dc] = steps[event.key];
    // Skip gaps: move to the next matrix in that direction.
    for (const other of map.cells) {
      const isInLine = dr ? other.c === at.c : other.r === at.r;
      const ahead = isInLine ? (other.r - at.r) * dr + (other.c - at.c) * dc : 0;
      if (ahead > 0 && (!next || ahead < next.ahead)) next = { ...other, ahead, heat: other };
    }
    next = next?.heat;
  } else if (event.key === "Home") next = map.cells.find((other) => other.r === at.r);
  else if (event.key === "End") next = map.cells.findLast((other) => other.r === at.r);
  else if (event.key === "Enter" || event.key === " ") map.spec.pick(at.cell, at.r, at.c);
  else if (event.key === "Escape") { hideTip(); return; }
  else return;
  event.preventDefault();
  if (next) moveCursor(map, next, true);
}

function paint(map) {
  const { result } = map.spec;
  const scales = new Map();
  const scaleAt = (r) => (state.scale === "all" ? map.spec.scaleAll() : map.spec.scaleRow(r));
  for (const { td, cell, r, c } of map.cells) {
    const key = state.scale === "all" ? 0 : r;
    if (!scales.has(key)) scales.set(key, scaleAt(r));
    const scale = scales.get(key), value = valueOf(result, cell), flag = cellFlag(result, cell);
    const hasColor = scale && value !== null && !Number.isNaN(value);
    const color = hasColor ? colorAt(scale.at(value)) : null;
    td.style.backgroundColor = color ? `rgb(${color.join(" ")})` : "";
    td.style.color = color ? (isLight(color) ? "#000" : "#fff") : "";
    const share = chosenShare(result, cell);
    const choice = share === 1 ? "chosen" : share > 0 ? "partly" : "";
    td.className = [color ? "" : "missing", choice, isPicked(result, cell) ? "picked" : ""].join(" ").trim();
    td.textContent = !flag ? "" : isMissing(flag) ? "×" : "!";
    td.setAttribute("aria-label", map.spec.describe(cell, r, c).join(", "));
  }
}

const isPicked = (result, cell) =>
  state.picked?.result === result &&
  (cell.own === state.picked.i || (cell.own < 0 && cell.parts.includes(state.picked.i)));

let tipped = null;
function showTip(map, { td, cell, r, c }) {
  $("tip").textContent = map.spec.describe(cell, r, c).join("\n");
  $("tip").hidden = false;
  tipped = td;
  placeTip();
}

function placeTip() {
  if (!tipped) return;
  const tip = $("tip"), box = tipped.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const above = box.bottom + 8 + own.height > window.innerHeight && box.top > own.height + 8;
  tip.style.left = `${Math.max(4, Math.min(box.left, window.innerWidth - own.width - 4))}px`;
  tip.style.top = `${above ? box.top - own.height - 8 : box.bottom + 8}px`;
}
function hideTip() { $("tip").hidden = true; tipped = null; }

// Both results share one color scale.
function rowPairs(row) {
  return results.flatMap((result) => (result.lines.get(row) || []).map((cell) => [result, cell]));
}
const allPairs = () => results.flatMap((result) => [...result.cells.values()].map((cell) => [result, cell]));

function mainMap(result) {
  const cellAt = (r, c) => result.cells.get(r * columns.length + c);
  const folded = new Set();
  for (const [key, cell] of result.cells) if (cell.parts.length) folded.add(Math.floor(key / columns.length));
  return heatMap({
    result,
    title: prefixed(result, shown(result.name)),
    rowLabels: rows,
    columnLabels: columns,
    cellAt,
    scaleRow: (r) => scaleOfCells(rowPairs(r)),
    scaleAll: () => scaleOfCells(allPairs()),
    describe: (cell, r, c) => describeCell(result, cell, r, c),
    expand: (r) => (folded.has(r) ? () => openRow(r) : null),
    pick: (cell, r) => (cell.parts.length ? openRow(r) : openMatrix(result, cell.own)),
  });
}

const byNumber = new Intl.Collator("en", { numeric: true }).compare;

// The map of one opened row: its experts down, its layers across.
function expertMap(result, row) {
  const found = new Map(), indices = new Set(), layers = new Set();
  for (const [key, cell] of result.cells) {
    if (Math.floor(key / columns.length) !== row) continue;
    for (const i of cell.parts) {
      indices.add(result.index[i]);
      layers.add(result.column[i]);
      found.set(`${result.column[i]} ${result.index[i]}`, { own: i, parts: [] });
    }
  }
  const down = [...indices].sort(byNumber), across = [...layers].sort((a, b) => a - b);
  const cells = [...found.values()].map((cell) => [result, cell]);
  return heatMap({
    result,
    title: results.length > 1 ? `${result.letter}: ${shown(result.name)}` : `${down.length} by ${across.length} layers`,
    rowLabels: down,
    columnLabels: across.map((c) => columns[c]),
    cellAt: (r, c) => found.get(`${across[c]} ${down[r]}`),
    // A row here is one expert, but its group is ranked over all layers, so all rows share one scale.
    scaleRow: () => scaleOfCells(cells),
    scaleAll: () => scaleOfCells(cells),
    describe: (cell) => describe(result, cell.own),
    pick: (cell) => openMatrix(result, cell.own),
  });
}

function openRow(row) {
  state.opened = row;
  $("experts").hidden = false;
  $("experts-title").textContent = `${shown(rows[row])}: each expert`;
  drawMaps();
  $("experts").focus({ preventScroll: true });
  $("experts").scrollIntoView({ block: "nearest" });
}

function drawMaps() {
  if (!maps.length) {
    maps.push(...results.map(mainMap));
    $("maps").replaceChildren(...maps.map((map) => map.home));
  } else maps.slice(0, results.length).forEach(paint);
  if (maps.row !== state.opened) {
    maps.length = results.length;
    if (state.opened !== null) maps.push(...results.map((result) => expertMap(result, state.opened)));
    maps.row = state.opened;
    $("expert-maps").replaceChildren(...maps.slice(results.length).map((map) => map.home));
  } else maps.slice(results.length).forEach(paint);
  const scale = state.scale === "all" ? scaleOfCells(allPairs()) : null;
  const ends = scale ? [numeral(scale.low), numeral(scale.high)] : ["lowest of its row", "highest of its row"];
  if (state.metric === RANK) ends.splice(0, 2, "last", "first");
  [$("low").textContent, $("high").textContent] = ends;
  $("legend-note").textContent = `${scale?.isLog ? "logarithmic; " : ""}degenerate scores do not count for the scale`;
}
