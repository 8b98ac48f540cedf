// The page put together: controls to state, state to what is drawn.

function drawSummary() {
  $("summary").textContent = results.map((result) => {
    const ranked = result.rank.filter((r) => r > 0).length;
    const chosen = result.rank.filter((_, i) => isChosen(result, i)).length;
    return `${results.length > 1 ? `${result.letter}: ` : ""}${chosen} of ${ranked} chosen`;
  }).join(" · ");
}

// What depends on the percentage, and what on the measure too.
function drawChoice() {
  drawMaps();
  drawSummary();
  drawTable();
  if (window.Plotly) drawPair();
}
function redraw() {
  drawChoice();
  if (window.Plotly) drawSpread();
}

function setPercent(text) {
  const percent = Number(text);
  // A selection of nothing, or of more than all, is none that a scan would write.
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

// What is drawn by now, for scripts to wait for and for measuring.
function tell(what) {
  document.documentElement.dataset.ready = what;
  performance.mark(what);
  requestAnimationFrame(() => setTimeout(() => performance.mark(`${what} painted`)));
}

function start() {
  const title = `Spectrum scores: ${results.map((result) => shown(result.name)).join(" and ")}`;
  $("title").textContent = document.title = title;
  const names = new Set(results.flatMap((result) => [...result.measures.keys()]));
  $("measure").replaceChildren(...[...names].map((name) => element("option", name, { value: name })));
  $("notes").replaceChildren(...results.flatMap((result) => result.notes.map((note) => element("li", `${results.length > 1 ? `${result.letter}: ` : ""}${shown(note)}`))));
  $("facts").replaceChildren(...results.map((result) => {
    const list = element("dl", undefined, { className: "facts" });
    definitions(list, [...result.facts.map((pair) => pair.map(shown)), ["page by", `spectrum_stream ${data.version}`]]);
    return list;
  }));
  $("percent").value = $("slider").value = state.percent;
  $("bar").style.backgroundImage = `linear-gradient(to right, ${data.colors.join(", ")})`;
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("measure").addEventListener("change", () => { state.measure = $("measure").value; redraw(); });
  $("scale").addEventListener("change", () => { state.scale = $("scale").value; drawMaps(); });
  $("percent").addEventListener("input", () => setPercent($("percent").value));
  $("slider").addEventListener("input", () => { $("percent").value = $("slider").value; setPercent($("slider").value); });
  $("close-experts").addEventListener("click", () => { state.opened = null; $("experts").hidden = true; drawMaps(); $("map").focus(); });
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
// Plotly is the script after this one; the map does not wait for it.
document.addEventListener("DOMContentLoaded", () => {
  drawSpread();
  drawPair();
  tell("all");
});
