// The plots, drawn by Plotly. Its labels can read untrusted text as markup, so every label goes through `unmarked`.

const inked = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function draw(id, traces, layout) {
  const ink = inked("--ink"), line = inked("--line");
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, exponentformat: "power" };
  // Plotly's own numbers on a logarithmic axis have two sizes and overlap.
  const finished = ({ span, ...own }) => {
    const ticks = own.type === "log" ? logTicks(...span, isPhone() ? 2 : 4) : null;
    return { ...axis, ...(ticks && { tickvals: ticks, ticktext: ticks.map(numeral) }), ...own };
  };
  const legend = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } };
  Plotly.react($(id), traces, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, size: 12, family: "system-ui, sans-serif" },
    margin: { l: 56, r: 12, t: 34, b: 44 }, legend, hoverlabel: { bgcolor: inked("--sheet"), font: { color: ink } },
    ...layout, xaxis: finished(layout.xaxis), yaxis: finished(layout.yaxis),
  }, { displayModeBar: false, responsive: true });
}

const spectraTexts = [];
// Decode the spectrum of one matrix, from the largest singular value to the smallest.
function singularValues(result, i) {
  const text = (spectraTexts[result.number] ??= JSON.parse($(`spectra-${result.number}`).textContent));
  const bytes = Uint8Array.from(atob(text.slice(i * result.stride, (i + 1) * result.stride)), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Array.from({ length: result.points[i] }, (_, k) => {
    const steps = view.getUint16(2 * k, true);
    return steps === 65535 ? 0 : result.largest[i] * 2 ** (-steps / 2048);
  });
}

function drawFacts({ result, i }) {
  const facts = [["group", shown(groups[result.group[i]]) || "(no name)"], ["score", numeral(result.snr[i])]];
  if (results.length > 1) facts.unshift(["result", `${result.letter}: ${shown(result.name)}`]);
  if (result.rank[i]) facts.push(["rank", rankText(result, i).replace("rank ", "")]);
  if (result.n[i] !== null) {
    const count = Math.min(result.n[i], result.m[i]);
    facts.push(["shape", `${result.n[i]} × ${result.m[i]}`]);
    facts.push(["τ", `${numeral(result.tau[i])}; ${numeral(result.above[i])} of ${count} above`]);
  }
  for (const [name, values] of result.metrics) {
    if (name !== SCORE && name !== RANK) facts.push([name, numeral(values[i])]);
  }
  if (flagOf(result, i)) facts.push(["mark", meaning(flagOf(result, i))]);
  definitions($("detail-facts"), facts);
}

function openMatrix(result, i) {
  state.picked = { result, i };
  $("detail").hidden = false;
  $("detail-title").textContent = shown(result.module[i]);
  drawFacts(state.picked);
  const hasSpectrum = result.points[i] > 1 && result.largest[i] > 0 && isDrawable(result.largest[i]);
  $("spectrum").hidden = $("density").hidden = !hasSpectrum;
  if (hasSpectrum) drawMatrix(state.picked);
  else if (result.points[i] === 1) $("detail-note").textContent = "One singular value: nothing to draw.";
  else if (result.largest[i] > 0) $("detail-note").textContent = "The singular values are out of the range of a plot.";
  else if (result.points[i]) $("detail-note").textContent = "All singular values are zero.";
  else $("detail-note").textContent = "Only a scan record (.sqlite next to the result) has singular values.";
  drawMaps();
  $("detail").scrollIntoView({ block: "nearest" });
}

function drawMatrix({ result, i }) {
  const values = singularValues(result, i), n = result.n[i], m = result.m[i];
  const tau = isDrawable(result.tau[i]) ? result.tau[i] : 0;
  const count = Math.min(n, m), last = values.length - 1, beta = count / Math.max(n, m);
  const accent = inked("--accent"), second = inked("--second"), threshold = inked("--threshold");
  const positions = values.map((_, k) => 1 + (k * (count - 1)) / last);
  const tauLine = (line, label) => tau > 0 && {
    shapes: [{ type: "line", line: { color: threshold, width: 2, dash: "dot" }, ...line }],
    annotations: [{ showarrow: false, font: { color: threshold }, ...label }],
  };
  const spectrum = {
    x: positions, y: values, mode: "lines+markers", marker: { size: 3 }, line: { color: accent },
    hovertemplate: "no. %{x:.0f}: %{y:.4g}<extra></extra>",
  };
  draw("spectrum", [spectrum], {
    xaxis: { title: { text: "number, from the largest" } },
    yaxis: { type: "log", span: [values.findLast((v) => v > 0), values[0]], title: { text: "singular value" } },
    ...tauLine(
      { xref: "paper", x0: 0, x1: 1, y0: tau, y1: tau },
      { text: `τ = ${numeral(tau)}`, xref: "paper", x: 1, xanchor: "right", y: Math.log10(tau), yanchor: "bottom" },
    ),
  });
  const noise = marchenkoPastur(beta), middle = median(values), fitted = middle / noise.median, own = tau / noise.edge;
  const right = Math.min(values[0], 1.25 * Math.max(noise.edge * fitted, tau)) || values[0];
  const seen = histogram(values, 0, right, 48);
  const curve = (scale, name, color, dash) => ({
    x: noise.x.map((x) => x * scale), y: noise.f.map((f) => f / scale), mode: "lines", name,
    line: { color, dash, width: 2 }, hoverinfo: "skip",
  });
  const traces = [{
    type: "bar", x: seen.x, y: seen.f, width: seen.width, name: "singular values",
    marker: { color: accent, opacity: 0.45 }, hovertemplate: "%{x:.4g}: %{y:.3g}<extra></extra>",
  }];
  if (fitted > 0) traces.push(curve(fitted, "noise of the same median", second, "solid"));
  if (own > 0) traces.push(curve(own, "noise that ends at τ", threshold, "dash"));
  // The curve of a narrow law is far taller than the histogram, and would flatten it.
  const top = 1.15 * Math.max(...seen.f, ...(fitted > 0 ? noise.f.map((f) => f / fitted) : []));
  draw("density", traces, {
    bargap: 0,
    xaxis: { title: { text: "singular value" }, range: [0, right * 1.02] },
    yaxis: { title: { text: "density" }, range: [0, top] },
    ...tauLine(
      { yref: "paper", y0: 0, y1: 1, x0: tau, x1: tau },
      { text: " τ", yref: "paper", y: 1, yanchor: "top", x: tau, xanchor: "left" },
    ),
  });
  const kept = values.length < count ? `, drawn from ${values.length} quantiles` : "";
  const outside = numeral(Math.round(seen.beyond * count));
  const beyond = seen.beyond > 0 ? ` ${outside} of them lie beyond the right edge of the density.` : "";
  $("detail-note").textContent = `${count} singular values${kept}.${beyond} Noise: the Marchenko–Pastur law for this shape.`;
}

const BOXES_AT_ONCE = 60;
function drawSpread() {
  // Ranks spread the same way in every group, so their box plot would be useless.
  const metric = state.metric === RANK ? SCORE : state.metric;
  let undrawn = 0;
  const groupsOf = results.map((result) => {
    const byRow = new Map();
    const values = result.metrics.get(metric) || [];
    result.row.forEach((row, i) => {
      if (values[i] === null || !isDrawable(values[i])) {
        undrawn += values[i] !== null;
        return;
      }
      if (!byRow.has(row)) byRow.set(row, []);
      byRow.get(row).push(values[i]);
    });
    return byRow;
  });
  const wanted = rows.map((_, row) => row).filter((row) => groupsOf.some((byRow) => (byRow.get(row) || []).length > 1));
  const used = wanted.slice(0, BOXES_AT_ONCE);
  const all = used.flatMap((row) => groupsOf.flatMap((byRow) => byRow.get(row) || []));
  const scale = scaleOf(all, metric);
  $("boxes").hidden = !used.length;
  $("boxes-note").textContent = [
    wanted.length > used.length ? `The first ${used.length} of ${wanted.length} groups.` : "",
    "The box is the middle half, the line in it the median.",
    scale?.isLog ? "Logarithmic." : "",
    undrawn ? `${undrawn} ${undrawn === 1 ? "value is" : "values are"} out of range and not drawn.` : "",
  ].join(" ");
  if (!used.length) return;
  const traces = results.map((result, number) => {
    const x = [], y = [];
    used.forEach((row, place) => (groupsOf[number].get(row) || []).forEach((v) => { x.push(v); y.push(place); }));
    return {
      type: "box", orientation: "h", x, y, name: results.length > 1 ? result.letter : "",
      marker: { size: 3, color: inked(number ? "--second" : "--accent") },
      line: { width: 1.5 }, boxpoints: all.length > 3000 ? false : "outliers", hoverinfo: "x",
    };
  });
  draw("boxes", traces, {
    margin: { l: 56, r: 12, t: results.length > 1 ? 34 : 6, b: 44 },
    height: 90 + used.length * (results.length > 1 ? 38 : 26), boxmode: "group", showlegend: results.length > 1,
    xaxis: {
      type: scale.isLog ? "log" : "linear", span: [scale.low, scale.high], title: { text: metric }, side: "bottom",
    },
    yaxis: {
      tickvals: used.map((_, place) => place), ticktext: used.map((row) => unmarked(rows[row], isPhone() ? 18 : 44)),
      autorange: "reversed", zeroline: false,
    },
  });
}

// The scatter plot: a point for every cell of the map that both results have.
function drawPair() {
  $("pair").hidden = results.length < 2;
  if (results.length < 2) return;
  const [a, b] = results, x = [], y = [], names = [];
  for (const [key, cell] of a.cells) {
    const other = b.cells.get(key);
    const values = other ? [valueOf(a, cell), valueOf(b, other)] : [];
    if (!other || !values.every((v) => v !== null && isDrawable(v))) continue;
    x.push(values[0]);
    y.push(values[1]);
    const place = `${rows[Math.floor(key / columns.length)]}, ${layerName(key % columns.length)}`;
    names.push(unmarked(cell.own >= 0 ? a.module[cell.own] : place, 70));
  }
  const chosen = results.map((result) => new Set(result.module.filter((_, i) => isChosen(result, i))));
  const both = [...chosen[0]].filter((module) => chosen[1].has(module)).length;
  // The overlap is defined as in the command `compare`.
  const larger = Math.max(chosen[0].size, chosen[1].size);
  const share = larger ? ` (${Math.round((100 * both) / larger)} percent of the larger selection)` : "";
  const counts = `${chosen[0].size} chosen in A, ${chosen[1].size} in B, ${both} in both`;
  $("overlap").textContent = `At ${state.percent} percent: ${counts}${share}.`;
  const scale = scaleOf([...x, ...y]);
  $("scatter").hidden = !scale;
  if (!scale) return;
  const axis = { type: scale.isLog ? "log" : "linear", span: [scale.low, scale.high] };
  draw("scatter", [
    {
      x: [scale.low, scale.high], y: [scale.low, scale.high], mode: "lines",
      line: { color: inked("--faint"), dash: "dot" }, hoverinfo: "skip",
    },
    {
      x, y, customdata: names, mode: "markers", marker: { size: 5, color: inked("--accent"), opacity: 0.6 },
      hovertemplate: "%{customdata}<br>A %{x:.4g}, B %{y:.4g}<extra></extra>",
    },
  ], {
    height: 460, showlegend: false,
    xaxis: { ...axis, title: { text: `${state.metric}, A` } }, yaxis: { ...axis, title: { text: `${state.metric}, B` } },
  });
}
