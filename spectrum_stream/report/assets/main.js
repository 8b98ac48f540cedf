// Connect the controls to the state, and the state to the drawings.

function drawSummary() {
  $("summary").textContent = results.map((result) => {
    const ranked = result.rank.filter((r) => r > 0).length;
    const chosen = result.rank.filter((_, i) => isChosen(result, i)).length;
    return prefixed(result, `${chosen} of ${ranked} chosen`);
  }).join(" · ");
}

// Redraw everything that depends on the percentage.
function drawChoice() {
  drawMaps();
  drawSummary();
  drawTable();
  if (window.Plotly) drawPair();
}
// Redraw everything that depends on the metric.
function redraw() {
  drawChoice();
  if (window.Plotly) drawSpread();
}

function setPercent(text) {
  const percent = Number(text);
  // Ignore a percentage that is still being typed.
  if (text === "" || !(percent >= 0 && percent <= 100)) return;
  state.percent = percent;
  $("slider").value = percent;
  if (document.activeElement !== $("percent")) $("percent").value = percent;
  if (state.picked) drawFacts(state.picked);
  drawChoice();
}

function setTheme(isDark) {
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  $("theme").setAttribute("aria-pressed", String(isDark));
  $("theme").textContent = isDark ? "Light" : "Dark";
  if (!window.Plotly) return;
  drawSpread();
  drawPair();
  if (!$("spectrum").hidden) drawMatrix(state.picked);
}

// Mark the drawn parts for tests and benchmarks.
function tell(what) {
  document.documentElement.dataset.ready = what;
  performance.mark(what);
  requestAnimationFrame(() => setTimeout(() => performance.mark(`${what} painted`)));
}

function start() {
  const title = `Spectrum scores: ${results.map((result) => shown(result.name)).join(" and ")}`;
  $("title").textContent = document.title = title;
  const names = new Set(results.flatMap((result) => [...result.metrics.keys()]));
  $("metric").replaceChildren(...[...names].map((name) => element("option", name, { value: name })));
  const notes = results.flatMap((result) => result.notes.map((note) => prefixed(result, shown(note))));
  $("notes").replaceChildren(...notes.map((note) => element("li", note)));
  $("facts").replaceChildren(...results.map((result) => {
    const list = element("dl", undefined, { className: "facts" });
    definitions(list, [...result.facts.map((pair) => pair.map(shown)), ["page by", `spectrum_stream ${data.version}`]]);
    return list;
  }));
  $("percent").value = $("slider").value = state.percent;
  $("bar").style.backgroundImage = `linear-gradient(to right, ${data.colors.join(", ")})`;
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("metric").addEventListener("change", () => { state.metric = $("metric").value; redraw(); });
  $("scale").addEventListener("change", () => { state.scale = $("scale").value; drawMaps(); });
  $("percent").addEventListener("input", () => setPercent($("percent").value));
  $("slider").addEventListener("input", () => {
    $("percent").value = $("slider").value;
    setPercent($("slider").value);
  });
  $("close-experts").addEventListener("click", () => {
    state.opened = null;
    $("experts").hidden = true;
    drawMaps();
    $("map").focus();
  });
  $("search").addEventListener("input", () => { listing.limit = ROWS_MORE; drawTable(); });
  $("more").addEventListener("click", () => { listing.limit += ROWS_MORE; drawTable(); });
  $("csv").addEventListener("click", downloadCsv);
  window.addEventListener("scroll", placeTip, { capture: true, passive: true });
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  $("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
  prefersDark.addEventListener("change", (event) => setTheme(event.matches));
  setTheme(prefersDark.matches);
  listItems();
  redraw();
  tell("map");
}

start();
// Plotly is the script after this one. The map does not wait for it.
document.addEventListener("DOMContentLoaded", () => {
  drawSpread();
  drawPair();
  tell("all");
});
