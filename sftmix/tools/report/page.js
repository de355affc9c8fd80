"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 600px)");

function theme(layout) {
  const ink = dark.matches ? "#e4e8ee" : "#1d2430", grid = dark.matches ? "#2f3843" : "#e3e7ec";
  const themed = { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
  themed.font = { color: ink, size: narrow.matches ? 11 : 12 };
  themed.margin = { l: narrow.matches ? 48 : 62, r: 14, t: 8, b: 44, ...layout.margin };
  themed.legend = { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, ...layout.legend };
  themed.hoverlabel = { align: "left", bgcolor: dark.matches ? "#262d37" : "#ffffff", font: { color: ink } };
  themed.shapes = (layout.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: ink } }));
  for (const axis of Object.keys(layout).filter((key) => /^[xy]axis/.test(key)))
    themed[axis] = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, ...layout[axis] };
  delete themed.height; // the place has it, as the style --height, so that a page does not jump when it is drawn
  return themed;
}

// A picture is drawn when it comes near the window, so that a long page opens at once.
const waiting = new Map([...document.querySelectorAll("script[data-plot]")].map((holder) => [holder.dataset.plot, holder]));
const drawn = [];
const options = { responsive: true, displayModeBar: false };
const nearby = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen)
    if (isIntersecting) setTimeout(draw, 0, target.id); // each in a task of its own: the first is seen while others are drawn
}, { rootMargin: "300px" });

function draw(id) {
  if (!waiting.has(id)) return;
  const place = document.getElementById(id), { data, layout } = JSON.parse(waiting.get(id).textContent);
  waiting.delete(id);
  nearby.unobserve(place);
  Plotly.newPlot(place, data, theme(layout), options);
  drawn.push({ place, data, layout });
}

for (const id of waiting.keys()) nearby.observe(document.getElementById(id));
addEventListener("beforeprint", () => [...waiting.keys()].forEach(draw));
for (const change of [dark, narrow])
  change.addEventListener("change", () => {
    for (const { place, data, layout } of drawn) Plotly.react(place, data, theme(layout), options);
  });

for (const button of document.querySelectorAll("button.save"))
  button.addEventListener("click", () => Plotly.downloadImage(button.value, { format: "svg", filename: button.value }));

const table = document.getElementById("example-table");
if (table) {
  const body = table.tBodies[0], rows = [...body.rows], found = document.getElementById("found");
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const search = document.getElementById("search");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row, k) => { row.hidden = !words.every((word) => texts[k].includes(word)); });
    found.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} shown`;
  };
  search.addEventListener("input", filter);
  filter();
  table.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {
    const head = button.parentElement, up = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    // Confidence "-12,346" is shown, and its data-value -12345.678 is sorted by; "-Infinity" is a Number as well.
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = "number" in button.dataset ? (a, b) => Number(key(a)) - Number(key(b)) : (a, b) => key(a).localeCompare(key(b));
    body.append(...[...rows].sort((a, b) => (up ? 1 : -1) * compare(a, b)));
  }));
}
